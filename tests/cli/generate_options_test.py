"""The command line of generate: short names, conflicts, errors that name what was written."""

import shlex
from typing import Any

import pytest

from megatransformer_jax.cli import flags
from megatransformer_jax.cli.flags import (
    help_page,
    named_as_written,
)
from megatransformer_jax.cli.generate import COMMAND
from megatransformer_jax.cli.generate_options import GenerateOptions, check_can_stream
from megatransformer_jax.config.generation import GENERATION_OPTIONS, GenerationConfig
from megatransformer_jax.config.option import ConfigError, UserError, options_of


def parse(*words: str) -> flags.Parsed:
    return flags.parse(COMMAND, words)


def parse_text(*words: str) -> GenerationConfig:
    return parse("--model=runs/a", "--prompt=a", *words).generation


def test_options_have_short_names_in_their_sections() -> None:
    config = parse_text(
        "--depth=16",
        "--exit_criterion=kl",
        "--exit_threshold=0.01",
        "--cache_slots=4",
        "--cache_sharing=last",
        "--top_p",
        "0.9",
        "--warm_start",
        "--seed=3",
        "--stop=['.', ', ', '\\n']",
    )
    assert (config.depth.depth, config.depth.exit_criterion) == (16, "kl")
    assert config.depth.exit_threshold == 0.01
    assert config.depth.warm_start
    assert (config.cache.slots, config.cache.sharing) == (4, "last")
    assert (config.sampling.top_p, config.seed) == (0.9, 3)
    assert config.stop == (".", ", ", "\n")
    beam = parse_text("--strategy=beam", "--num_beams=2", "--early_stopping").beam
    assert (beam.num_beams, beam.early_stopping) == (2, True)


def test_every_option_reaches_its_place() -> None:
    for name, option in GENERATION_OPTIONS.items():
        config: Any = GenerationConfig.of(**{name: option.default})
        assert config == GenerationConfig()


def test_a_prompt_may_be_repeated_and_hold_commas() -> None:
    options = parse("--model=runs/a", "--prompt=Yes, it", "--prompt", "No").options
    assert options.prompt == ("Yes, it", "No")
    assert parse("--model=runs/a", "--prompt_ids=1,2,3").options.prompt_ids == (1, 2, 3)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--tempreature=1"], r"--tempreature: no such option; did you mean --temperature\?"),
        (["--slots=1"], r"--slots: no such option; did you mean --cache_slots\?"),
        (["--sampling.top_k=1"], r"--sampling\.top_k: no such option; did you mean --top_k\?"),
        (["--zzz=1"], r"--zzz: no such option; --help lists all\."),
        (["--depth=deep"], r"depth=deep: 'deep' is not a whole number"),
        (["--top_p=1.5"], r"^--top_p: 1\.5 is not allowed; it must be above 0 and at most 1"),
        (["--exit_criterion=entropi"], r"^--exit_criterion: 'entropi' .* one of 'fixed', 'latent"),
        (["--strategy=nucleus"], r"^--strategy: 'nucleus' .* one of 'greedy', 'sample'"),
        (["--temperature=0"], r"^--temperature: 0 draws nothing; .* strategy='greedy'"),
        (["--strategy=greedy", "--temperature=0.5"], r"^--temperature: 0\.5 would be ignored"),
        (["--num_beams=2"], r"^--num_beams: 2 would be ignored with strategy='sample'"),
        (["--exit_threshold=0.1"], r"^--exit_threshold: .* with exit_criterion='fixed'"),
        (["--depth=4", "--cache_slots=5"], r"^--cache_slots: 5 exceeds depth=4"),
        (["--prompts_file=a.txt"], r"^--prompts_file: does not go together with --prompt"),
        (["--interactive"], r"^--interactive: does not go together with --prompt"),
        (["--prompt="], r"^--prompt: is empty; give some text.*--prompt_ids"),
        (["--step=newest"], r"^--step: 'newest' is not a checkpoint; use best, latest or a number"),
        (["--draw"], r"^--draw: needs a folder for the result; give --output=FOLDER"),
        (["--draw", "--speak", "--output=a"], r"^--speak: does not go together with --draw"),
        (["--image=a", "--prompt=b"], r"^--image: belongs to one prompt"),
        (["--audio=a", "--json=b"], r"^--json: is for text alone"),
        (["--output=a", "--json=b"], r"^--json: is for text alone"),
        (["--chat", "--draw", "--output=a"], r"^--chat: a chat is of text alone"),
        (["--system=a"], r"^--system: would be ignored without --chat"),
        (["--convert"], r"^--convert: would be ignored without --image or --audio"),
        (["--vocoder=a"], r"^--vocoder: would be ignored without --output"),
        (["--precision=float16"], r"^--precision: .* one of 'auto', 'float32', 'bfloat16'"),
        (["--prompt=\udcff"], r"^--prompt: .* is not text; write it in UTF-8"),
        (["stray"], r"'stray' is not an option; options look like --model=VALUE"),
        (["--depth"], "depth"),
    ],
)
def test_bad_input_is_named_as_it_was_written(words: list[str], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        parse_text(*words)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([], r"^--prompt: is missing; give --prompt=.*--interactive"),
        (["--prompt_ids=1", "--chat"], r"^--prompt_ids: a chat is of text alone"),
        (["--prompt_ids=-1"], r"^--prompt_ids: \(-1,\) is not allowed; each item must be at least"),
        (["--interactive", "--json=a"], r"^--json: does not go together with --interactive"),
    ],
)
def test_prompts_have_one_source_that_fits(words: list[str], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        parse("--model=runs/a", *words)


@pytest.mark.parametrize("words", [["--prompt=a"], ["--prompt=a", "--model="]])
def test_a_model_is_needed(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^model: is missing; give the folder of a run"):
        parse(*words).options.check_model_is_named()


def test_one_text_alone_can_be_streamed() -> None:
    check_can_stream(parse_text())
    for word, problem in (
        ("--num_samples=2", "num_samples: 2 texts cannot be shown"),
        ("--strategy=beam", "strategy: 'beam' .* cannot stream"),
    ):
        with pytest.raises(ConfigError, match=problem):
            check_can_stream(parse_text(word))


def test_files_may_be_repeated_and_need_no_prompt() -> None:
    options = parse("--model=runs/a", "--image=a,b.png", "--image=c.png").options
    assert options.image == ("a,b.png", "c.png")
    assert parse("--model=runs/a", "--audio=a.wav").options.prompt == ()


def test_errors_about_other_options_keep_their_path() -> None:
    with pytest.raises(ConfigError, match=r"^model\.width: bad"), named_as_written(COMMAND.known):
        raise ConfigError("model.width", "bad")


def test_help_has_every_option_with_meaning_and_default() -> None:
    text = help_page(COMMAND)
    flat = " ".join(text.split())
    own = {option.path: option for option in options_of(GenerateOptions)}
    for name, option in {**own, **GENERATION_OPTIONS}.items():
        assert f"\n  --{name} (" in text
        assert " ".join(option.meaning.split()) in flat
        assert f"Default: {option.default!r}" in text
    assert "\n  megatransformer generate --model=" in text
    assert max(map(len, text.splitlines())) <= 100


def test_examples_of_help_are_accepted() -> None:
    text = help_page(COMMAND)
    examples = text[: text.index("Values are written")].replace("\\\n", " ").splitlines()
    commands = [line.partition("  megatransformer generate ")[2] for line in examples]
    commands = [command for command in commands if command]
    assert len(commands) == 9

    for command in commands:
        parse(*shlex.split(command))
