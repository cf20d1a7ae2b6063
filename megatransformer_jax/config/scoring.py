"""Options of scoring a finished model, the same on the command line and in Python."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from megatransformer_jax.config.generation import GENERATION_OPTIONS
from megatransformer_jax.config.option import (
    MAX_COUNT,
    MAX_SEED,
    ConfigError,
    check_options,
    option,
    require_defaults,
    require_function_name,
    rule,
)
from megatransformer_jax.config.sampling import (
    EXIT_CRITERIA,
    GATE_READOUTS,
    GATE_THRESHOLD,
    check_readout,
)

# Sources of files, by the ending of their names.
FILE_KINDS = {".txt": "text", ".jsonl": "jsonl", ".parquet": "parquet"}
# What only the making of media, and of sound from spectrograms, heeds.
MEDIA_OPTIONS = ("media_per_class", "image_features", "guidance_scale", "sampler_steps")
SOUND_OPTIONS = ("resynthesized_clips", "vocoder")
# Scoring has its own options for these, or scores one text per prompt.
_LEFT_OUT = (
    "depth",
    "gate_readout",
    "gate_threshold",
    "batch_size",
    "num_samples",
    "seed",
    "max_media",
    *MEDIA_OPTIONS,
)
# How prompts of references are continued.
OF_GENERATION = {
    name: declared for name, declared in GENERATION_OPTIONS.items() if name not in _LEFT_OUT
}
# Options of which 0 asks for nothing.
_COUNTS = ("media_per_class", "resynthesized_clips")
_OF_DATA = (
    "files",
    "text_field",
    "num_batches",
    "sequence_length",
    "votes",
    *MEDIA_OPTIONS,
    *SOUND_OPTIONS,
)
# Options of a calibration that a score has too.
CALIBRATION_DATA = (
    "files",
    "text_field",
    "num_batches",
    "sequence_length",
    "batch_size",
    "seed",
)


def _text_field_option() -> Any:
    """Where records have their text."""
    return option("text", "Field with the text, of .jsonl and .parquet files.")


def _sequence_length_option() -> Any:
    """How long the rows are that a finished model reads."""
    return option(
        None,
        "Tokens per row of a batch. Default (None): data.sequence_length of the run; of other "
        "models 1024, or less if the model reads less.",
        minimum=1,
        maximum=MAX_COUNT,
    )


@dataclasses.dataclass(frozen=True)
class ScoringConfig:
    """On what a model is scored, and how."""

    depths: tuple[int, ...] = option(
        (),
        "Depths to score, one row of the table for each. Default (empty): evaluation.final_depths "
        "of the run; for other models a quarter, half, all and twice the trained mean.",
        minimum=1,
        maximum=MAX_COUNT,
    )
    files: tuple[str, ...] = option(
        (),
        "Files with text to score (.txt, .jsonl, .parquet). Default (empty): the validation split "
        "of the run.",
    )
    text_field: str = _text_field_option()
    num_batches: int | None = option(
        None,
        "Largest number of batches to score. Default (None): all.",
        minimum=1,
        maximum=MAX_COUNT,
    )
    sequence_length: int | None = _sequence_length_option()
    batch_size: int | None = option(
        None,
        "Rows that are scored, or prompts that are continued, at once. Default (None): "
        "data.batch_size of the run; otherwise 8.",
        minimum=1,
        maximum=MAX_COUNT,
    )
    gate_readout: str = option(
        "last",
        "What is scored at each depth: the last iteration's output, or that which the exit gate "
        "says, as in generation.",
        choices=GATE_READOUTS,
    )
    gate_threshold: float = option(
        GATE_THRESHOLD,
        "Cumulative exit probability of gate_readout=threshold.",
        above=0,
        maximum=1,
    )
    votes: int = option(
        1,
        "For problems: passes from as many random first states, whose answers vote at each "
        "position. Needs a first state that is drawn (model.recurrence.state_init).",
        minimum=1,
        maximum=MAX_COUNT,
    )
    references: str | None = option(
        None,
        'JSON lines {"prompt": "...", "reference": "..."}, or a list of references: the model '
        "continues each prompt, and the texts are scored.",
    )
    media_per_class: int | None = option(
        None,
        "For a model that draws or speaks digits: how many of each it makes at each depth, for "
        "judges trained on real ones. Other images have no classes: with image_features it draws "
        "ten times as many of them in all. Default (None): 20. 0: none.",
        minimum=0,
        maximum=MAX_COUNT,
    )
    image_features: str | None = option(
        None,
        "A function 'package.module:name' from images [N, height, width, C] in [-1, 1] to features "
        "[N, K], or to a pair of features and class probabilities [N, classes], for FID and "
        "Inception score. Default (None): a small network trained on the run's real digits.",
    )
    guidance_scale: float | None = option(
        None,
        "Classifier-free guidance of what is made. Default (None): as in the run's config.",
        minimum=0,
    )
    sampler_steps: int | None = option(
        None,
        "Steps of the sampler for what is made. Default (None): as in the run's config.",
        minimum=1,
        maximum=MAX_COUNT,
    )
    resynthesized_clips: int | None = option(
        None,
        "For a model with sound: held-out clips to resynthesise from their spectrograms and "
        "compare with the originals (PESQ, STOI, SI-SDR). Default (None): 8. 0: none.",
        minimum=0,
        maximum=MAX_COUNT,
    )
    vocoder: str | None = option(
        None,
        "Folder of a run with kind='vocoder' for the resynthesis. Default (None): Griffin and "
        "Lim's method.",
    )
    seed: int | None = option(
        None,
        "Seed of the core's first states and of random draws. Default (None): the seed of "
        "validation in training; for other models, and for generation, 0.",
        minimum=0,
        maximum=MAX_SEED,
    )

    def __post_init__(self) -> None:
        check_options(self)

    @rule(*_OF_DATA)
    def _data_is_scored_without_references(self) -> None:
        """Only without references."""
        if self.references is not None:
            require_defaults(self, _OF_DATA, "with references", "leave references out")

    @rule("gate_threshold")
    def _threshold_is_read(self) -> None:
        """Keeps its default unless gate_readout='threshold'."""
        check_readout(self.gate_readout, self.gate_threshold)

    @rule("depths")
    def _depths_differ(self) -> None:
        """Each depth once."""
        if len(set(self.depths)) != len(self.depths):
            raise ConfigError("depths", f"{self.depths} names one twice; give each once.")

    @rule("text_field")
    def _fields_need_files(self) -> None:
        """Only with files."""
        if not self.files:
            require_defaults(self, ("text_field",), "without files", "name files")

    @rule("image_features")
    def _features_have_module_and_name(self) -> None:
        """Written 'package.module:name'."""
        require_function_name(self, "image_features")

    @rule("files")
    def _files_are_of_one_kind(self) -> None:
        """All .txt, all .jsonl or all .parquet."""
        kinds = {pathlib.PurePath(name).suffix for name in self.files}
        unknown = sorted(kinds - FILE_KINDS.keys())
        if unknown or len(kinds) > 1:
            problem = f"{unknown[0]!r} is not known" if unknown else f"has {' and '.join(kinds)}"
            raise ConfigError(
                "files", f"{problem}; all names must end in one of {', '.join(FILE_KINDS)}."
            )

    def reject_media(
        self, why: str, names: Sequence[str] = (*MEDIA_OPTIONS, *SOUND_OPTIONS)
    ) -> None:
        """Checks that options of media which would be ignored are not given, other than as 0.

        Raises:
          ConfigError: naming the option, and `why`.
        """
        for name in names:
            value = getattr(self, name)
            if value is not None and (name not in _COUNTS or value != 0):
                raise ConfigError(name, f"{value!r} would be ignored, as {why}; leave it out.")


@dataclasses.dataclass(frozen=True)
class CalibrationConfig:
    """How well exits must do, which criteria are tried, and on what."""

    accuracy: float = option(
        0.99,
        "Share of the full depth's accuracy that a threshold must keep. Accuracy is that of exact "
        "answers to problems; on text it is how often the likeliest token is the one of the full "
        "depth.",
        above=0,
        maximum=1,
    )
    depth: int | None = option(
        None,
        "Full depth: most iterations of a token. Default (None): the mean in training.",
        minimum=2,
        maximum=MAX_COUNT,
    )
    criteria: tuple[str, ...] = option(
        (),
        "Exit criteria to calibrate. Default (empty): all that the model has.",
        choices=EXIT_CRITERIA[1:],
    )
    files: tuple[str, ...] = option(
        (),
        "Files with text to calibrate on (.txt, .jsonl, .parquet). Default (empty): the validation "
        "split of the run.",
    )
    text_field: str = _text_field_option()
    num_batches: int | None = option(
        None,
        "Largest number of batches. Default (None): all.",
        minimum=1,
        maximum=MAX_COUNT,
    )
    sequence_length: int | None = _sequence_length_option()
    batch_size: int | None = option(
        None,
        "Rows at once. Default (None): data.batch_size of the run; otherwise 8.",
        minimum=1,
        maximum=MAX_COUNT,
    )
    seed: int | None = option(
        None,
        "Seed of the core's first states. Default (None): the seed of validation in training; for "
        "other models 0.",
        minimum=0,
        maximum=MAX_SEED,
    )

    def __post_init__(self) -> None:
        check_options(self)

    @rule("criteria")
    def _criteria_differ(self) -> None:
        """Each criterion once."""
        if len(set(self.criteria)) != len(self.criteria):
            raise ConfigError("criteria", f"{self.criteria} names one twice; give each once.")

    @rule("files", "text_field")
    def _data_can_be_scored(self) -> None:
        """All .txt, all .jsonl or all .parquet; text_field only with files."""
        _ = self.scoring

    @property
    def scoring(self) -> ScoringConfig:
        """The same data for a score."""
        return ScoringConfig(**{name: getattr(self, name) for name in CALIBRATION_DATA})


def check_generation(given: Mapping[str, Any], *, has_prompts: bool) -> None:
    """Checks that options of generation have an effect.

    Args:
      given: those that were named.
      has_prompts: whether texts are generated at all.

    Raises:
      ConfigError: otherwise.
    """
    if given and not has_prompts:
        raise ConfigError(
            next(iter(given)),
            "would be ignored, as no text is generated; give a model and references.",
        )
