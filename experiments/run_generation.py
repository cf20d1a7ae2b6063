"""One command of `experiments.generate`: loads the model, then continues prompts or talks."""

import pathlib

from rich.console import Console

from experiments.continuations import check_json_path, continue_prompts
from experiments.depth_colors import Screen
from experiments.generate_flags import Command, named_as_written
from experiments.interactive import Session
from experiments.load_model import LoadedModel
from experiments.model_choice import load_chosen_model
from experiments.prompts import Prompts
from experiments.run_media_generation import generate_with_media, wants_media
from experiments.stopwatch import Stopwatch
from megatransformer_jax.config.generation import GenerationConfig, for_model
from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.generation.generator import Generator


def run(command: Command, prompts: Prompts) -> None:
    """Does what the command asks for.

    Args:
      command: the parsed command line.
      prompts: what is continued; not read in an interactive session.

    Raises:
      UserError: if an option does not fit the model, or a file or folder cannot be used.
    """
    options = command.options
    if options.json is not None:
        check_json_path(options.json)
    with named_as_written("--"):
        folder = pathlib.Path(options.workdir or "").expanduser()
        loaded = load_chosen_model(folder, options)
        _check_fits(command, loaded)
        if wants_media(command, prompts):
            generate_with_media(loaded, command, prompts)
            return
        screen = Screen(Console(), depth=None)

        def make_generator(config: GenerationConfig) -> Generator:
            has_exit_gate = loaded.model.config.exit_gate.enabled
            config = for_model(config, loaded.trained_depth, has_exit_gate=has_exit_gate)
            generator = loaded.generator(config)
            if options.show_depth:
                screen.depth = config.depth.depth
            return generator

        with Stopwatch() as stopwatch:
            if options.interactive:
                Session(make_generator, command.given, screen, stopwatch).run()
            else:
                generator = make_generator(command.config)
                continue_prompts(generator, loaded.tokenizer, prompts, command, screen, stopwatch)


def _check_fits(command: Command, loaded: LoadedModel) -> None:
    """Checks what the command asks for against the model."""
    options = command.options
    if loaded.tokenizer is None and not options.prompt_ids:
        raise UserError(
            f"{loaded.description} has no tokenizer, so it takes no text; give token ids with "
            "--prompt_ids."
        )
    size = loaded.config.vocab_size if loaded.tokenizer is None else loaded.tokenizer.vocab_size
    if max(options.prompt_ids, default=0) >= size:
        raise ConfigError(
            "prompt_ids", f"{max(options.prompt_ids)} is no token; ids are below {size}."
        )
    if options.show_depth and loaded.trained_depth is None:
        raise ConfigError("show_depth", "this model has no recurrent core, so nothing to show.")
