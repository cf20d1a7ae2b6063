"""The command line of generate: short names, conflicts, errors that name what was written."""

import shlex
from typing import Any

import pytest

from experiments import generate_flags
from experiments.generate_flags import (
    GENERATION_OPTIONS,
    CommandOptions,
    generation_from,
    named_as_written,
)
from experiments.generate_help import help_text
from megatransformer_jax.config.generation import GenerationConfig
from megatransformer_jax.config.option import ConfigError, UserError, options_of


def parse(*words: str) -> generate_flags.Command:
    return generate_flags.parse(["generate", *words])


def parse_text(*words: str) -> GenerationConfig:
    return parse("--workdir=runs/a", "--prompt=a", *words).config


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
        config: Any = generation_from({name: option.default})
        assert config == GenerationConfig()


def test_a_prompt_may_be_repeated_and_hold_commas() -> None:
    options = parse("--workdir=runs/a", "--prompt=Yes, it", "--prompt", "No").options
    assert options.prompt == ("Yes, it", "No")
    assert parse("--workdir=runs/a", "--prompt_ids=1,2,3").options.prompt_ids == (1, 2, 3)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--tempreature=1"], r"--tempreature: no such option; did you mean --temperature\?"),
        (["--slots=1"], r"--slots: no such option; did you mean --cache_slots\?"),
        (["--sampling.top_k=1"], r"--sampling\.top_k: no such option; did you mean --top_k\?"),
        (["--zzz=1"], r"--zzz: no such option; --help lists all\."),
        (["--depth=deep"], r"depth=deep: 'deep' is not a whole number"),
        (["--top_p=1.5"], r"^--top_p: 1\.5 is not allowed; it must be above 0 and at most 1"),
        (["--exit_criterion=entropy"], r"^--exit_criterion: 'entropy' .* one of 'fixed', 'latent"),
        (["--strategy=nucleus"], r"^--strategy: 'nucleus' .* one of 'greedy', 'sample'"),
        (["--temperature=0"], r"^--temperature: 0 draws nothing; .* strategy='greedy'"),
        (["--strategy=greedy", "--temperature=0.5"], r"^--temperature: 0\.5 would be ignored"),
        (["--num_beams=2"], r"^--num_beams: 2 would be ignored with strategy='sample'"),
        (["--exit_threshold=0.1"], r"^--exit_threshold: .* with exit_criterion='fixed'"),
        (["--depth=4", "--cache_slots=5"], r"^--cache_slots: 5 exceeds depth=4"),
        (["--prompts_file=a.txt"], r"^--prompts_file: does not go together with --prompt"),
        (["--interactive"], r"^--interactive: does not go together with --prompt"),
        (["--prompt="], r"^--prompt: is empty; give some text.*--prompt_ids"),
        (["--step=newest"], r"^--step: 'newest' is no checkpoint; use best, latest or a number"),
        (["--workdir="], r"^--workdir: is missing"),
        (["--draw"], r"^--draw: needs a folder for the result; give --output=FOLDER"),
        (["--draw", "--speak", "--output=a"], r"^--speak: does not go together with --draw"),
        (["--image=a", "--prompt=b"], r"^--image: belongs to one prompt"),
        (["--audio=a", "--json=b"], r"^--json: is for text alone"),
        (["--output=a", "--show_depth"], r"^--show_depth: is for text alone"),
        (["--convert"], r"^--convert: would be ignored without --image or --audio"),
        (["--vocoder=a"], r"^--vocoder: would be ignored without --output"),
        (["--precision=float16"], r"^--precision: .* one of 'auto', 'float32', 'bfloat16'"),
        (["--prompt=\udcff"], r"^--prompt: .* is no text; write it in UTF-8"),
        (["stray"], r"'stray' is no option; options look like --prompt="),
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
        (["--prompt_ids=-1"], r"^--prompt_ids: \(-1,\) is not allowed; each item must be at least"),
        (["--interactive", "--json=a"], r"^--json: does not go together with --interactive"),
        (["--interactive", "--num_samples=2"], r"^--num_samples: 2 texts cannot be shown"),
        (["--interactive", "--strategy=beam"], r"^--strategy: 'beam' .* cannot stream"),
    ],
)
def test_prompts_have_one_source_that_fits(words: list[str], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        parse("--workdir=runs/a", *words)


def test_a_workdir_is_needed() -> None:
    with pytest.raises(UserError, match=r"^--workdir: is missing"):
        parse("--prompt=a")


def test_files_may_be_repeated_and_need_no_prompt() -> None:
    options = parse("--workdir=runs/a", "--image=a,b.png", "--image=c.png").options
    assert options.image == ("a,b.png", "c.png")
    assert parse("--workdir=runs/a", "--audio=a.wav").options.prompt == ()


def test_errors_about_other_options_keep_their_path() -> None:
    with pytest.raises(ConfigError, match=r"^model\.width: bad"), named_as_written("--"):
        raise ConfigError("model.width", "bad")


def test_help_has_every_option_with_meaning_and_default() -> None:
    text = help_text("What it does.")
    flat = " ".join(text.split())
    own = {option.path: option for option in options_of(CommandOptions)}
    for name, option in {**own, **GENERATION_OPTIONS}.items():
        assert f"\n  --{name} (" in text
        assert " ".join(option.meaning.split()) in flat
        assert f"default: {option.default!r}" in text
    assert text.startswith("What it does.\n")
    assert "python -m experiments.generate --workdir=" in text
    assert max(map(len, text.splitlines())) <= 100


def test_examples_of_help_are_accepted() -> None:
    text = help_text("")
    examples = text[: text.index("Values are written")].replace("\\\n", " ").splitlines()
    commands = [line.partition("experiments.generate ")[2] for line in examples]
    commands = [command for command in commands if command]
    assert len(commands) == 7

    for command in commands:
        parse(*shlex.split(command))
