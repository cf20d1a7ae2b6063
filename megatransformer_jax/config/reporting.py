"""What a run shows of itself: validation, samples, logs, as frozen dataclasses."""

import dataclasses

from megatransformer_jax.config.option import ConfigError, check_options, option, rule


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Validation during training and at its end."""

    every_steps: int = option(100, "Steps between validations.", minimum=1)
    num_batches: int = option(8, "Validation batches per depth.", minimum=1)
    final_depths: tuple[int, ...] = option(
        (1, 2, 4, 8, 16, 32), "Depths of the table and the plot at the end.", minimum=1
    )

    def __post_init__(self) -> None:
        check_options(self)

    @rule("final_depths")
    def _depths_are_increasing(self) -> None:
        """At least one depth, in increasing order."""
        if not self.final_depths:
            raise ConfigError("final_depths", "is empty; give at least one depth.")
        if list(self.final_depths) != sorted(set(self.final_depths)):
            raise ConfigError(
                "final_depths",
                f"{self.final_depths!r} is not increasing; sort it, each depth once.",
            )


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Text, images and sound made during training."""

    every_steps: int = option(200, "Steps between samples; 0: never.", minimum=0)
    prompts: tuple[str, ...] = option(("The ", "If the "), "What the samples start with.")
    max_new_tokens: int = option(48, "Tokens per sample.", minimum=1)
    temperature: float = option(0.7, "0: greedy.", minimum=0)
    depth: int | None = option(None, "Iterations per token. None: the trained mean.", minimum=1)
    num_media: int = option(
        8,
        "With data.source='media': held-out prompts whose image is drawn, images that are "
        "captioned, and the same with sound; of each at most this many, or rows of a batch.",
        minimum=1,
    )

    def __post_init__(self) -> None:
        check_options(self)

    @rule("prompts")
    def _samples_need_prompts(self) -> None:
        """At least one unless every_steps=0."""
        if self.every_steps and not self.prompts:
            raise ConfigError(
                "prompts",
                f"is empty with every_steps={self.every_steps}; give a prompt or set "
                "every_steps=0.",
            )


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """What is shown and written."""

    every_steps: int = option(10, "Steps between log lines and metric points.", minimum=1)
    writers: tuple[str, ...] = option(
        ("tensorboard",), "Where metrics go besides the log.", choices=("tensorboard", "wandb")
    )
    wandb_project: str | None = option(None, "Project for the wandb writer (extra 'wandb').")
    level: str = option(
        "info", "Least severe message shown.", choices=("debug", "info", "warning", "error")
    )
    progress: str = option(
        "auto",
        "bar: a live bar. lines: one line per log point. auto: bar on a terminal.",
        choices=("auto", "bar", "lines"),
    )

    def __post_init__(self) -> None:
        check_options(self)

    @rule("writers")
    def _writers_are_different(self) -> None:
        """Each at most once."""
        if len(set(self.writers)) != len(self.writers):
            raise ConfigError("writers", f"{self.writers!r} repeats a writer; name each once.")

    @rule("wandb_project")
    def _wandb_project_goes_with_wandb(self) -> None:
        """Given if and only if writers has wandb."""
        if ("wandb" in self.writers) != (self.wandb_project is not None):
            raise ConfigError(
                "wandb_project",
                f"{self.wandb_project!r} does not go with writers={self.writers!r}; "
                "the wandb writer needs a project, the others none.",
            )
