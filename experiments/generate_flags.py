"""The command line of `experiments.generate`: short names for the options of generation."""

import contextlib
import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import flags

from experiments import launch
from experiments.flags import define_flag
from experiments.model_options import (
    param_dtype_option,
    precision_option,
    step_option,
    weights_option,
)
from megatransformer_jax.config.build import construct, merge
from megatransformer_jax.config.generation import GenerationConfig, flag_name
from megatransformer_jax.config.option import (
    ConfigError,
    Option,
    UserError,
    check_options,
    option,
    options_of,
    rule,
)
from megatransformer_jax.config.sampling import check_encodable

# The options of generation by their short names.
GENERATION_OPTIONS: Mapping[str, Option] = {
    flag_name(option.path): option for option in options_of(GenerationConfig)
}
_PROMPT_SOURCES = ("prompt", "prompts_file", "prompt_ids", "interactive")
# May be given several times, and hold commas.
_REPEATED = ("prompt", "image", "audio")


@dataclasses.dataclass(frozen=True)
class CommandOptions:
    """What is continued, with which model, and where the result goes."""

    workdir: str | None = option(
        None, "Folder of a run of ours, or of a Huginn checkpoint (config.json, *.safetensors)."
    )
    step: str = step_option()
    precision: str | None = precision_option()
    param_dtype: str = param_dtype_option()
    weights: str = weights_option()
    prompt: tuple[str, ...] = option((), "Text to continue; may be given several times.")
    prompts_file: str | None = option(
        None,
        'One prompt per line (.txt), or JSON lines with {"prompt": "..."} (.jsonl). Blank lines '
        "are left out.",
    )
    prompt_ids: tuple[int, ...] = option(
        (),
        "Token ids to continue, taken as they are, so with the model's start token if it is to "
        "have one; for models without a tokenizer too.",
        minimum=0,
    )
    interactive: bool = option(
        False, "Reads lines and streams their continuations; /help lists commands for settings."
    )
    json: str | None = option(
        None,
        "Also writes every text with its ids, iterations and score to this file, as JSON lines.",
    )
    show_depth: bool = option(
        False,
        "Colours each token by the iterations it took; where there are no colours, the number "
        "stands behind it as in token[3].",
    )

    image: tuple[str, ...] = option(
        (),
        "Image file; may be given several times. They stand where the prompt has "
        "<|IMAGE|><|/IMAGE|>, or before it.",
    )
    audio: tuple[str, ...] = option(
        (),
        "Sound file (WAV, FLAC), as --image; its place is <|VOICE|><|/VOICE|> or "
        "<|AUDIO|><|/AUDIO|>.",
    )
    convert: bool = option(
        False, "Resizes images and resamples sound of another format than the model's."
    )
    draw: bool = option(False, "An image is drawn right after each prompt; needs output.")
    speak: bool = option(False, "Speech is made right after each prompt; needs output.")
    output: str | None = option(
        None,
        "Folder for what is made: PNG and WAV files, contact_sheet.png and results.jsonl.",
    )
    vocoder: str | None = option(
        None,
        "Folder of a run with kind='vocoder', which makes waveforms. None: Griffin and Lim's "
        "method.",
    )

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def names_media(self) -> bool:
        """Whether an option asks for images or sound."""
        return bool(self.image or self.audio or self.draw or self.speak or self.output)

    @rule("workdir")
    def _model_is_named(self) -> None:
        """Must be given."""
        if not self.workdir:
            raise ConfigError("workdir", "is missing; give the folder of a run, as runs/recurrent.")

    @rule("step")
    def _step_is_known(self) -> None:
        """best, latest, or a whole number."""
        if self.step not in ("best", "latest") and not self.step.isdecimal():
            raise ConfigError(
                "step", f"{self.step!r} is no checkpoint; use best, latest or a number such as 600."
            )

    @rule("prompt", "prompts_file", "prompt_ids", "interactive")
    def _prompts_have_one_source(self) -> None:
        """Exactly one of prompt, prompts_file, prompt_ids and interactive; or image or audio."""
        given = [name for name in _PROMPT_SOURCES if getattr(self, name) not in (None, (), False)]
        if not given and not (self.image or self.audio):
            raise ConfigError(
                "prompt",
                'is missing; give --prompt="...", or --prompts_file, --prompt_ids or '
                "--interactive.",
            )
        if len(given) > 1:
            raise ConfigError(
                given[1], f"does not go together with --{given[0]}; give one of the two."
            )

    @rule("prompt")
    def _prompts_have_text(self) -> None:
        """No empty text, only UTF-8."""
        if "" in self.prompt:
            raise ConfigError(
                "prompt",
                "is empty; give some text. To start from nothing, give the id of the start token "
                "with --prompt_ids.",
            )
        check_encodable("prompt", self.prompt)

    @rule("json")
    def _json_needs_finished_texts(self) -> None:
        """Not with interactive."""
        if self.json is not None and self.interactive:
            raise ConfigError("json", "does not go together with --interactive; leave one out.")

    @rule("image", "audio")
    def _files_belong_to_one_prompt(self) -> None:
        """With at most one prompt, and no prompts_file."""
        for name in ("image", "audio"):
            if getattr(self, name) and (self.prompts_file is not None or len(self.prompt) > 1):
                raise ConfigError(name, "belongs to one prompt; give one --prompt, or none.")

    @rule("image", "audio", "draw", "speak", "output")
    def _media_need_prompts_of_text(self) -> None:
        """Not with prompt_ids, interactive, json and show_depth."""
        if self.names_media:
            for name in ("prompt_ids", "interactive", "json", "show_depth"):
                if getattr(self, name) not in (None, (), False):
                    raise ConfigError(
                        name, "is for text alone; leave it out (results go to --output)."
                    )

    @rule("draw", "speak")
    def _one_medium_comes_first(self) -> None:
        """Not both, and only with output."""
        if self.draw and self.speak:
            raise ConfigError("speak", "does not go together with --draw; leave one out.")
        if (self.draw or self.speak) and self.output is None:
            name = "draw" if self.draw else "speak"
            raise ConfigError(name, "needs a folder for the result; give --output=FOLDER.")

    @rule("convert", "vocoder")
    def _media_options_have_an_effect(self) -> None:
        """convert only with image or audio, vocoder only with output."""
        if self.convert and not (self.image or self.audio):
            raise ConfigError("convert", "would be ignored without --image or --audio.")
        if self.vocoder is not None and self.output is None:
            raise ConfigError("vocoder", "would be ignored without --output=FOLDER.")


_OWN_OPTIONS = {option.path: option for option in options_of(CommandOptions)}


@dataclasses.dataclass(frozen=True)
class Command:
    """A parsed command line.

    Attributes:
      options: the command's own options.
      given: values of the generation options that were named, by their short names.
      config: the generation they describe.
    """

    options: CommandOptions
    given: dict[str, Any]
    config: GenerationConfig


def parse(argv: Sequence[str]) -> Command:
    """What a command line asks for (argv[0] is the program).

    Raises:
      UserError: if something in it cannot be used; options are named as they are written.
    """
    flag_values = flags.FlagValues()
    for name, declared in {**_OWN_OPTIONS, **GENERATION_OPTIONS}.items():
        if name in _REPEATED:
            flags.DEFINE_multi_string(name, None, declared.meaning, flag_values=flag_values)
        else:
            define_flag(flag_values, name, declared)
    launch.read_flags(flag_values, argv, '--prompt="Once upon a time"', _unknown_flag)
    given: dict[str, Any] = {
        name: flag_values[name].value for name in flag_values if flag_values[name].present
    }
    given |= {name: tuple(given[name]) for name in _REPEATED if name in given}
    of_generation = {name: given[name] for name in given if name in GENERATION_OPTIONS}
    with named_as_written("--"):
        options = CommandOptions(**{name: given[name] for name in given if name in _OWN_OPTIONS})
        config = generation_from(of_generation)
        if options.interactive:
            check_can_stream(config)
    return Command(options, of_generation, config)


def generation_from(given: Mapping[str, Any]) -> GenerationConfig:
    """The generation that values by short names describe.

    Raises:
      ConfigError: if a value is out of range or values exclude each other.
    """
    nested: dict[str, Any] = {}
    for name, value in given.items():
        section, _, field = GENERATION_OPTIONS[name].path.rpartition(".")
        nested = merge(nested, {section: {field: value}} if section else {field: value})
    config: GenerationConfig = construct(GenerationConfig, nested)
    return config


def check_can_stream(config: GenerationConfig) -> None:
    """Checks that there is one text, whose tokens are final as they come.

    Raises:
      ConfigError: if there are several, or beam search.
    """
    if config.num_samples > 1:
        raise ConfigError(
            "num_samples",
            f"{config.num_samples} texts cannot be shown at once as they come; leave it at 1.",
        )
    if config.strategy == "beam":
        raise ConfigError(
            "strategy", "'beam' knows its text only at the end, so cannot stream; use another."
        )


@contextlib.contextmanager
def named_as_written(mark: str) -> Iterator[None]:
    """Errors about an option name it as the user writes it: short, and after `mark`."""
    try:
        yield
    except ConfigError as error:
        name = flag_name(error.path)
        if name not in GENERATION_OPTIONS and error.path not in _OWN_OPTIONS:
            raise
        raise UserError(f"{mark}{name}: {error.problem}") from None


def _unknown_flag(error: flags.UnrecognizedFlagError) -> UserError:
    return unknown_name(error.flagname, [*GENERATION_OPTIONS, *_OWN_OPTIONS], "--")


def unknown_name(name: str, known: Sequence[str], mark: str) -> UserError:
    """The error about a name that is no option, with the nearest one if there is any."""
    by_path = {option.path: short for short, option in GENERATION_OPTIONS.items()}
    nearest = [by_path[name]] if name in by_path else difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {mark}{nearest[0]}? " if nearest else ""
    return UserError(f"{mark}{name}: no such option; {hint}{mark}help lists all.")
