"""The command line of `experiments.evaluate`."""

import dataclasses
import difflib
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags

from experiments import launch
from experiments.flags import define_flag
from experiments.generate_flags import GENERATION_OPTIONS, generation_from
from experiments.model_options import (
    param_dtype_option,
    precision_option,
    step_option,
    weights_option,
)
from megatransformer_jax.config.generation import GenerationConfig, flag_name
from megatransformer_jax.config.option import (
    MAX_COUNT,
    MAX_SEED,
    ConfigError,
    Option,
    UserError,
    check_options,
    option,
    options_of,
    require_defaults,
    rule,
)

# Python does not let a field have the name 'from'.
_FLAG_NAMES = {"model": "from"}
# What only the making of media, and of sound from spectrograms, heeds.
MEDIA_OPTIONS = ("media_per_class", "guidance_scale", "sampler_steps")
SOUND_OPTIONS = ("resynthesized_clips", "vocoder")
# Evaluation has its own options for these, or scores one text per prompt.
_LEFT_OUT = (
    *("depth", "batch_size", "num_samples", "seed", "max_media", "vocoder"),
    *MEDIA_OPTIONS,
)
OF_GENERATION = {
    name: option for name, option in GENERATION_OPTIONS.items() if name not in _LEFT_OUT
}
# What the other commands call it, and what a user may mean by an option that is left out.
_OTHER_NAMES = {"workdir": "from", "depth": "depths", "prompts_file": "references"}
# Sources of files, by the ending of their names.
FILE_KINDS = {".txt": "text", ".jsonl": "jsonl", ".parquet": "parquet"}

_OF_DATA = ("data", "text_field", "num_batches", "sequence_length", *MEDIA_OPTIONS, *SOUND_OPTIONS)
_OF_MODEL = ("step", "weights", "depths", "batch_size", "precision", "param_dtype", "seed")


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """What is evaluated, on what, and where the result goes."""

    model: str | None = option(
        None, "Folder of a run of ours, or of a Huginn checkpoint (config.json, *.safetensors)."
    )
    step: str = step_option()
    weights: str = weights_option()
    depths: tuple[int, ...] = option(
        (),
        "Iterations of the core, one row of the table for each. Empty: evaluation.final_depths of "
        "the run; of a Huginn folder a quarter, half, all and twice of the mean in training.",
        minimum=1,
        maximum=MAX_COUNT,
    )
    data: tuple[str, ...] = option(
        (),
        "Files with text to score (.txt, .jsonl, .parquet). Empty: the validation split of the "
        "run.",
    )
    text_field: str = option("text", "Field with the text, of .jsonl and .parquet files.")
    num_batches: int | None = option(
        None, "Batches that are scored, at most. None: all.", minimum=1, maximum=MAX_COUNT
    )
    sequence_length: int | None = option(
        None,
        "Tokens per row of a batch. None: data.sequence_length of the run; of a Huginn folder "
        "1024, or less if the model reads less.",
        minimum=1,
        maximum=MAX_COUNT,
    )
    batch_size: int | None = option(
        None,
        "Rows that are scored, or prompts that are continued, at once. None: data.batch_size of "
        "the run; otherwise 8.",
        minimum=1,
        maximum=MAX_COUNT,
    )
    references: str | None = option(
        None,
        'JSON lines {"prompt": "...", "reference": "..."}, or a list of references: the model '
        "continues each prompt, and the texts are scored.",
    )
    predictions: str | None = option(
        None,
        'JSON lines {"text": "..."}, one per line of references: these texts are scored instead, '
        "without a model.",
    )
    media_per_class: int | None = option(
        None,
        "Of a model that draws or speaks digits: how many it makes of each, at each depth, for "
        "judges that know real ones. None: 20; 0: none.",
        minimum=0,
        maximum=MAX_COUNT,
    )
    guidance_scale: float | None = option(
        None, "Classifier-free guidance of what is made. None: as in the run's config.", minimum=0
    )
    sampler_steps: int | None = option(
        None,
        "Steps of the sampler for what is made. None: as in the run's config.",
        minimum=1,
        maximum=MAX_COUNT,
    )
    resynthesized_clips: int | None = option(
        None,
        "Of a model with sound: held-out clips that are made again from their spectrograms and "
        "compared with themselves (PESQ, STOI, SI-SDR). None: 8; 0: none.",
        minimum=0,
        maximum=MAX_COUNT,
    )
    vocoder: str | None = option(
        None,
        "Folder of a run with kind='vocoder' that makes them. None: Griffin and Lim's method.",
    )
    output: str | None = option(
        None,
        "Folder for tables and plots, made if absent. None: evaluation/ in the model's folder; "
        "with predictions nothing is written.",
    )
    precision: str | None = precision_option()
    param_dtype: str = param_dtype_option()
    seed: int | None = option(
        None,
        "Seed of the core's first states and of draws. None: what validation in training has; of a "
        "Huginn folder, and of generation, 0.",
        minimum=0,
        maximum=MAX_SEED,
    )

    def __post_init__(self) -> None:
        check_options(self)

    @rule("model")
    def _something_is_evaluated(self) -> None:
        """Given, unless there are predictions."""
        if self.model is None and self.predictions is None:
            raise ConfigError("model", "is missing; give the folder of a run, as runs/recurrent.")
        if self.model is not None and self.predictions is not None:
            raise ConfigError(
                "predictions", "are scored without a model; leave out --from or --predictions."
            )

    @rule("references")
    def _predictions_need_references(self) -> None:
        """Given with predictions."""
        if self.predictions is not None and self.references is None:
            raise ConfigError(
                "references", "is missing; predictions are compared with the texts of this file."
            )

    @rule(*_OF_DATA)
    def _data_is_scored_without_references(self) -> None:
        """Only without references."""
        if self.references is not None:
            require_defaults(self, _OF_DATA, "with references", "leave references out")

    @rule(*_OF_MODEL)
    def _predictions_have_no_model(self) -> None:
        """Only without predictions."""
        if self.predictions is not None:
            require_defaults(self, _OF_MODEL, "with predictions", "leave predictions out")

    @rule("depths")
    def _depths_differ(self) -> None:
        """Each once."""
        if len(set(self.depths)) != len(self.depths):
            raise ConfigError("depths", f"{self.depths} names one twice; give each once.")

    @rule("text_field")
    def _fields_need_files(self) -> None:
        """Only with data."""
        if not self.data:
            require_defaults(self, ("text_field",), "without data", "name files with --data")

    @rule("data")
    def _files_are_of_one_kind(self) -> None:
        """All .txt, all .jsonl or all .parquet."""
        kinds = {pathlib.PurePath(name).suffix for name in self.data}
        unknown = sorted(kinds - FILE_KINDS.keys())
        if unknown or len(kinds) > 1:
            problem = f"{unknown[0]!r} is not known" if unknown else f"has {' and '.join(kinds)}"
            raise ConfigError(
                "data", f"{problem}; all names must end in one of {', '.join(FILE_KINDS)}."
            )


OWN_OPTIONS: dict[str, Option] = {
    _FLAG_NAMES.get(option.path, option.path): option for option in options_of(EvaluateOptions)
}


@dataclasses.dataclass(frozen=True)
class Command:
    """A parsed command line.

    Attributes:
      options: the command's own options.
      generation: how prompts are continued, with its depth and seed still open; greedily unless
        the command says otherwise.
    """

    options: EvaluateOptions
    generation: GenerationConfig


def parse(argv: Sequence[str]) -> Command:
    """What a command line asks for (argv[0] is the program).

    Raises:
      UserError: if something in it cannot be used; options are named as they are written.
    """
    flag_values = flags.FlagValues()
    for name, declared in {**OWN_OPTIONS, **OF_GENERATION}.items():
        define_flag(flag_values, name, declared)
    launch.read_flags(flag_values, argv, "--from=runs/recurrent", _unknown_flag)
    given: dict[str, Any] = {
        name: flag_values[name].value for name in flag_values if flag_values[name].present
    }
    of_generation = {name: given[name] for name in given if name in OF_GENERATION}
    try:
        own = {OWN_OPTIONS[name].path: given[name] for name in given if name in OWN_OPTIONS}
        options = EvaluateOptions(**own)
        if of_generation and (options.references is None or options.predictions is not None):
            raise ConfigError(
                next(iter(of_generation)),
                "would be ignored, as no text is generated; give --from and --references.",
            )
        generation = generation_from({"strategy": "greedy", **of_generation})
    except ConfigError as error:
        raise as_written(error) from None
    return Command(options, generation)


def as_written(error: ConfigError) -> UserError:
    """The same error with the option as it is written on the command line."""
    name = _FLAG_NAMES.get(error.path, flag_name(error.path))
    if name not in OWN_OPTIONS and name not in GENERATION_OPTIONS:
        return error
    return UserError(f"--{name}: {error.problem}")


def _unknown_flag(error: flags.UnrecognizedFlagError) -> UserError:
    name = error.flagname
    known = [*OWN_OPTIONS, *OF_GENERATION]
    nearest = [_OTHER_NAMES[name]] if name in _OTHER_NAMES else []
    nearest = nearest or difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean --{nearest[0]}? " if nearest else ""
    return UserError(f"--{name}: no such option; {hint}--help lists all.")
