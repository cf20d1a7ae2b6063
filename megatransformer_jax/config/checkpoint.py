"""Which checkpoints of a run are saved and kept, and which is the best, as a frozen dataclass."""

import dataclasses

from megatransformer_jax.config.option import ConfigError, check_options, option, rule

# What validation returns, and which end of it is better. Of reasoning tasks more is known.
TEXT_METRICS = {
    "validation/loss": "min",
    "validation/perplexity": "min",
    "validation/accuracy": "max",
}
REASONING_METRICS = {**TEXT_METRICS, "validation/exact_accuracy": "max"}
# By the task of data.media whose rows they come from.
MEDIA_METRICS = {
    "validation/image_loss": ("min", "draw"),
    "validation/audio_loss": ("min", "speak"),
    "validation/caption_accuracy": ("max", "caption"),
    "validation/transcription_accuracy": ("max", "transcribe"),
}
BETTER_ENDS = REASONING_METRICS | {name: end for name, (end, _) in MEDIA_METRICS.items()}


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """What is kept and how often. A save has parameters, optimiser, step, data iterator, config."""

    every_steps: int = option(100, "Steps between saves; the last step is always saved.", minimum=1)
    keep_last: int = option(2, "Newest checkpoints kept.", minimum=1)
    keep_best: int = option(1, "Best checkpoints kept, by best_metric; 0: none.", minimum=0)
    keep_every_steps: int | None = option(
        None, "Checkpoints at multiples of this are never deleted. None: no such rule.", minimum=1
    )
    best_metric: str = option(
        "validation/loss",
        "What makes a checkpoint a good one: a number that validation returns. "
        "validation/exact_accuracy: of reasoning tasks only. Those of images, sound, captions and "
        "transcriptions: of data.media with the task that makes them.",
        choices=tuple(BETTER_ENDS),
    )
    best_mode: str = option(
        "auto",
        "Which end of best_metric is better. auto: max for accuracies, min for the others.",
        choices=("auto", "min", "max"),
    )

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def is_higher_better(self) -> bool:
        """Which end of best_metric is better, with best_mode='auto' resolved."""
        mode = BETTER_ENDS[self.best_metric] if self.best_mode == "auto" else self.best_mode
        return mode == "max"

    @rule("keep_every_steps")
    def _kept_steps_are_saved_steps(self) -> None:
        """A multiple of every_steps."""
        if self.keep_every_steps is not None and self.keep_every_steps % self.every_steps:
            raise ConfigError(
                "keep_every_steps",
                f"{self.keep_every_steps} is no multiple of every_steps={self.every_steps}, so "
                "there would be nothing to keep; use a multiple.",
            )
