"""Continues prompts with a trained model: `megatransformer generate`."""

import sys
from typing import TYPE_CHECKING

from megatransformer_jax.cli.flags import Command, Parsed
from megatransformer_jax.cli.generate_options import GenerateOptions, check_can_stream, read_prompts
from megatransformer_jax.cli.launch import drop_output
from megatransformer_jax.cli.model_options import OLD_MODEL_NAMES, load_chosen_model
from megatransformer_jax.config.generation import GENERATION_OPTIONS
from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.storage import local_path

if TYPE_CHECKING:
    from megatransformer_jax.runs.load import LoadedModel

# As a shell reports a program that a closed pipe has ended.
BROKEN_PIPE = 141


def generate(parsed: Parsed) -> None:
    """Continues the prompts of a command line; the texts go to stdout.

    Raises:
      UserError: if something cannot be used. What can be known before JAX is imported is.
    """
    options: GenerateOptions = parsed.options
    options.check_model_is_named()
    if options.interactive:
        check_can_stream(parsed.generation)
    if options.json is not None:
        check_json_path(options.json)
    prompts = read_prompts(options)
    # It imports JAX, which takes long.
    from megatransformer_jax.cli.screen import continue_texts  # noqa: PLC0415

    loaded = load_chosen_model(options)
    _check_fits(options, loaded)
    try:
        continue_texts(loaded, parsed, prompts)
    except BrokenPipeError:
        drop_output()
        sys.exit(BROKEN_PIPE)


def check_json_path(name: str) -> None:
    """Checks before the work that its result can be written.

    Raises:
      UserError: if the folder is not there.
    """
    path = local_path("json", name)
    if path.is_dir() or not path.parent.is_dir():
        problem = "is a folder" if path.is_dir() else f"folder {path.parent} does not exist"
        raise UserError(f"--json={name}: {problem}; name a file in a folder that is there.")


def _check_fits(options: GenerateOptions, loaded: "LoadedModel") -> None:
    """Checks what the command asks for against the model."""
    if loaded.tokenizer is None and not options.prompt_ids:
        raise UserError(
            f"{loaded.description} has no tokenizer, so it takes no text; give token ids with "
            "--prompt_ids."
        )
    size = loaded.config.vocab_size if loaded.tokenizer is None else loaded.tokenizer.vocab_size
    if max(options.prompt_ids, default=0) >= size:
        raise ConfigError(
            "prompt_ids", f"{max(options.prompt_ids)} is not a token; ids are below {size}."
        )
    if options.show_depth and loaded.trained_depth is None:
        raise ConfigError("show_depth", "this model has no recurrent core, so nothing to show.")


COMMAND = Command(
    name="generate",
    doc="""Continues prompts with a trained model, at any depth and by any decoding strategy.

The texts go to stdout, a line about speed to stderr.""",
    options=GenerateOptions,
    run=generate,
    examples=(
        '--model=runs/recurrent --prompt="The old house"',
        '--model=runs/recurrent --prompt="The old house" \\\n'
        "      --temperature=0.7 --top_p=0.9 --num_samples=3 --stop=\"['.', '\\n']\"",
        '--model=runs/recurrent --prompt="The old house" \\\n'
        "      --depth=32 --exit_criterion=kl --show_depth",
        "--model=runs/recurrent --interactive --strategy=greedy",
        '--model=my/llama --chat --system="Be short." --interactive',
        "--model=my/huginn --prompts_file=my/prompts.jsonl \\\n"
        "      --strategy=beam --num_beams=4 --json=completions.jsonl",
        '--model=runs/image --prompt="a handwritten three" --draw \\\n'
        "      --num_samples=4 --guidance_scale=2 --output=drawn",
        "--model=runs/image --image=my/three.png --strategy=greedy",
        "--model=runs/image --image=my/three.png --interactive --max_new_tokens=8",
    ),
    generation=GENERATION_OPTIONS,
    # May be given several times, and hold commas.
    repeated=("prompt", "image", "audio"),
    old_names=OLD_MODEL_NAMES,
)
