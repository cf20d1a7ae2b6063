"""The training loop: steps, checkpoints, what the run shows of itself, diagnostics, devices."""

import dataclasses
from typing import Any

from megatransformer_jax.config.option import (
    MAX_SEED,
    ConfigError,
    check_options,
    option,
    require_defaults,
    rule,
    section,
)
from megatransformer_jax.config.recurrence import (
    ExitGateTrainingConfig,
    StabilityConfig,
    SupervisionConfig,
)
from megatransformer_jax.config.sampling import check_texts
from megatransformer_jax.storage import check_served, is_bucket_path


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """The loop, whatever is trained."""

    steps: int = option(600, "Optimiser steps.", minimum=1)
    seed: int = option(
        0,
        "Seed of initialisation, dropout, depth draws and samples.",
        minimum=0,
        maximum=MAX_SEED,
    )
    precision: str = option(
        "auto",
        "Type of activations. auto: bfloat16 on accelerators, float32 on CPU. Parameters, "
        "optimiser state, norms, softmax, logits and losses are always float32. There is no "
        "float16: it would need loss scaling, which bfloat16, with the range of float32, does not.",
        choices=("auto", "float32", "bfloat16"),
    )
    accumulation: int = option(
        1, "Micro-batches whose gradients make one step; divides data.batch_size.", minimum=1
    )
    memory_budget_gib: float | str | None = option(
        None,
        "Memory in GiB that the compiled step may use on each device. accumulation then becomes "
        "the smallest value that fits, and config.json records it. auto: nine tenths of what the "
        "device has, on CPU half of the machine's memory. Default (None): accumulation as given.",
        above=0,
        words=("auto",),
    )
    ema_decay: float | None = option(
        None,
        "Keeps an exponential average of the weights, which validation, samples, the summary and "
        "generation use: average += (1 - d) (weights - average) with d the smaller of this and (1 "
        "+ t) / (10 + t) after t updates. Default (None): no average.",
        above=0,
        below=1,
    )
    max_bad_steps: int = option(
        20, "Stops with an error after this many non-finite steps in a row.", minimum=1
    )

    def __post_init__(self) -> None:
        check_options(self)

    @rule("memory_budget_gib")
    def _budget_chooses_the_accumulation(self) -> None:
        """Not with an accumulation, which it chooses."""
        if self.memory_budget_gib is not None and self.accumulation != 1:
            raise ConfigError(
                "accumulation",
                f"{self.accumulation} would be overruled by memory_budget_gib="
                f"{self.memory_budget_gib}, which chooses it; leave out one of them.",
            )


@dataclasses.dataclass(frozen=True)
class TrainConfig(LoopConfig):
    """The loop, and terms of a transformer's loss."""

    z_loss: float = option(
        0.0,
        "Weight of the squared log-normaliser, which keeps logits small (PaLM uses 1e-4).",
        minimum=0,
    )
    exit_gate: ExitGateTrainingConfig = section(
        ExitGateTrainingConfig, "The exit gate's term of the loss."
    )
    supervision: SupervisionConfig = section(SupervisionConfig, "A loss at every iteration.")
    stability: StabilityConfig = section(StabilityConfig, "Stability of the iterations.")


# ------------------------------------------------------------------------------
# Which checkpoints of a run are saved and kept, and which is the best.

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
    "validation/which_accuracy": ("max", "which"),
    "validation/which_clip_accuracy": ("max", "which_clip"),
    "validation/fewshot_accuracy": ("max", "fewshot"),
    "validation/documents_accuracy": ("max", "documents"),
}
# Of texts that the model generates, see `GeneratedConfig`.
TEXT_SCORES = ("bleu", "chrf", "rouge1", "rouge2", "rouge_l", "exact_match")
GENERATED_METRICS = {f"validation/{name}": "max" for name in TEXT_SCORES}
BETTER_ENDS = (
    REASONING_METRICS | {name: end for name, (end, _) in MEDIA_METRICS.items()} | GENERATED_METRICS
)


# Checkpoint formats of other projects; `checkpoints/folders.py` has what they are.
FOREIGN_FORMATS = ("huginn", "gpt2", "llama", "qwen2", "qwen3", "olmo2", "ouro", "parcae")


@dataclasses.dataclass(frozen=True)
class SavingConfig:
    """What is kept and how often. A save has parameters, optimiser, step, data iterator, config."""

    every_steps: int = option(100, "Steps between saves; the last step is always saved.", minimum=1)
    every_minutes: float | None = option(
        None,
        "Also saves when this many minutes have passed since the last save. Process 0 looks at "
        "its clock every logging.every_steps steps. Default (None): by steps alone.",
        above=0,
    )
    keep_last: int = option(2, "Newest checkpoints kept.", minimum=1)
    keep_best: int = option(1, "Best checkpoints kept, by best_metric; 0: none.", minimum=0)
    keep_every_steps: int | None = option(
        None,
        "Checkpoints at multiples of this step are never deleted. Default (None): no such rule.",
        minimum=1,
    )

    def __post_init__(self) -> None:
        check_options(self)

    @rule("keep_every_steps")
    def _kept_steps_are_saved_steps(self) -> None:
        """A multiple of every_steps."""
        if self.keep_every_steps is not None and self.keep_every_steps % self.every_steps:
            raise ConfigError(
                "keep_every_steps",
                f"{self.keep_every_steps} is not a multiple of every_steps={self.every_steps}, so "
                "there would be nothing to keep; use a multiple.",
            )

    @property
    def ranking(self) -> tuple[str, bool]:
        """The validation metric that ranks checkpoints, and whether a high value is better."""
        return "validation/loss", False


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(SavingConfig):
    """What is kept and how often. A save has parameters, optimiser, step, data iterator, config."""

    best_metric: str = option(
        "validation/loss",
        "Validation metric that ranks checkpoints. validation/exact_accuracy exists for reasoning "
        "tasks only; metrics of images, sound, captions and transcriptions need the data.media "
        "task that they measure, and those of generated text need evaluation.generated.metrics.",
        choices=tuple(BETTER_ENDS),
    )
    best_mode: str = option(
        "auto",
        "Whether a high or a low best_metric is better. auto: max for accuracies, min for the "
        "others.",
        choices=("auto", "min", "max"),
    )

    @property
    def ranking(self) -> tuple[str, bool]:
        """See `SavingConfig`; with best_mode='auto' resolved."""
        mode = BETTER_ENDS[self.best_metric] if self.best_mode == "auto" else self.best_mode
        return self.best_metric, mode == "max"


# ------------------------------------------------------------------------------
# What a run shows of itself: validation, samples, logs.


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """Validation during training and at its end."""

    every_steps: int = option(100, "Steps between validations.", minimum=1)
    num_batches: int = option(8, "Validation batches per depth.", minimum=1)

    def __post_init__(self) -> None:
        check_options(self)


@dataclasses.dataclass(frozen=True)
class GeneratedConfig:
    """Scores of texts that the model generates greedily in validation, as validation/METRIC."""

    metrics: tuple[str, ...] = option(
        (),
        "What the texts are scored by. bleu, chrf, rouge1, rouge2, rouge_l: as `megatransformer "
        "evaluate --references` does (extra 'eval'). exact_match: share of texts that equal a "
        "reference. Default (empty): nothing is generated.",
        choices=TEXT_SCORES,
    )
    references: str | None = option(
        None,
        'Of text: file of JSON lines {"prompt": "...", "reference": "..."}; a reference may also '
        "be a list of right texts. Reasoning problems have their own answers.",
    )
    num_texts: int = option(
        64, "Number of prompts: the first of the file, or of the held-out problems.", minimum=1
    )
    max_new_tokens: int = option(
        48, "Tokens generated after a prompt. An answer to a problem has its own length.", minimum=1
    )
    stop: tuple[str, ...] = option(
        (), "Stop texts: a text ends before the first of them, such as '\\n'."
    )

    def __post_init__(self) -> None:
        check_options(self)

    @rule("metrics")
    def _metrics_are_different(self) -> None:
        """Each at most once."""
        if len(set(self.metrics)) != len(self.metrics):
            raise ConfigError("metrics", f"{self.metrics!r} repeats a metric; name each once.")

    @rule("references", "num_texts", "max_new_tokens", "stop")
    def _texts_are_generated_for_metrics(self) -> None:
        """Keep the default without metrics."""
        if not self.metrics:
            require_defaults(
                self,
                ("references", "num_texts", "max_new_tokens", "stop"),
                "without metrics",
                "name metrics",
            )

    @rule("stop")
    def _stops_have_text(self) -> None:
        """None is empty, and all can be written in UTF-8."""
        check_texts("stop", self.stop)


@dataclasses.dataclass(frozen=True)
class EvaluationConfig(ValidationConfig):
    """Validation during training and at its end."""

    final_depths: tuple[int, ...] = option(
        (1, 2, 4, 8, 16, 32), "Depths of the table and the plot at the end.", minimum=1
    )
    generated: GeneratedConfig = section(GeneratedConfig, "Scores of generated texts.")

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
class ShowingConfig:
    """Samples during training."""

    every_steps: int = option(200, "Steps between samples; 0: never.", minimum=0)

    def __post_init__(self) -> None:
        check_options(self)


@dataclasses.dataclass(frozen=True)
class SampleConfig(ShowingConfig):
    """Text, images and sound made during training."""

    prompts: tuple[str, ...] = option(("The ", "If the "), "Prompts that the samples continue.")
    max_new_tokens: int = option(48, "Tokens per sample.", minimum=1)
    temperature: float = option(0.7, "0: greedy.", minimum=0)
    depth: int | None = option(
        None, "Iterations per token. Default (None): the trained mean.", minimum=1
    )
    num_media: int = option(
        8,
        "With data.source='media': number of held-out prompts to draw and to speak, and of images "
        "and clips to describe; at most the rows of a batch.",
        minimum=1,
    )

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
        ("tensorboard",),
        "Where metrics are written in addition to the log.",
        choices=("tensorboard", "wandb"),
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

    mirror: str | None = option(
        None,
        "Folder of a bucket, such as s3://BUCKET/PATH, that gets copies of what the run writes "
        "into its workdir, except for checkpoints. Default (None): no copies.",
    )

    def __post_init__(self) -> None:
        check_options(self)

    @rule("mirror")
    def _mirror_is_a_bucket(self) -> None:
        """At gs:// (extra 'gcs') or s3:// (extra 's3')."""
        if self.mirror is None:
            return
        check_served("mirror", self.mirror)
        if not is_bucket_path(self.mirror):
            raise ConfigError(
                "mirror",
                f"{self.mirror!r} is a folder of this machine; name one of a bucket, such as "
                "s3://BUCKET/PATH.",
            )

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


# ------------------------------------------------------------------------------
# Figures that show the inside of the model during training.

RECURRENT_KINDS = ("recurrence", "spectral_radius", "depth_draws")
DIAGNOSTIC_KINDS = (
    "gradient_norms",
    "activations",
    "attention_maps",
    "token_correlation",
    *RECURRENT_KINDS,
)


@dataclasses.dataclass(frozen=True)
class DiagnosticsConfig:
    """Figures of a few validation rows, in TensorBoard and as PNGs in the workdir."""

    every_steps: int = option(
        0, "Steps between diagnostics, which the last step gets too; 0: never.", minimum=0
    )
    kinds: tuple[str, ...] = option(
        (),
        "gradient_norms: by layer, with the norms of the weights. activations: histograms. "
        "attention_maps: of the first row. token_correlation: mean cosine between tokens. "
        "recurrence: residual, contraction and size of the state by iteration. spectral_radius: "
        "of the core's Jacobian. depth_draws: iterations drawn since the last time. Default "
        "(empty): all that the model has.",
        choices=DIAGNOSTIC_KINDS,
    )
    num_rows: int = option(2, "Number of rows of the first validation batch to look at.", minimum=1)
    num_steps: int | None = option(
        None, "Number of iterations to plot. Default (None): twice the trained mean.", minimum=1
    )

    def __post_init__(self) -> None:
        check_options(self)

    @rule("kinds", "num_rows", "num_steps")
    def _what_is_shown_goes_with_steps(self) -> None:
        """Keep the default with every_steps=0 (`megatransformer diagnose` has its own options)."""
        if self.every_steps == 0:
            require_defaults(
                self,
                ("kinds", "num_rows", "num_steps"),
                "with every_steps=0",
                "set every_steps above 0",
            )

    @rule("kinds")
    def _kinds_are_different(self) -> None:
        """Each at most once."""
        if len(set(self.kinds)) != len(self.kinds):
            raise ConfigError("kinds", f"{self.kinds!r} repeats a kind; name each once.")


# ------------------------------------------------------------------------------
# Devices and processes of a run.


@dataclasses.dataclass(frozen=True)
class DataMeshConfig:
    """Devices per mesh axis; their product must be the number of devices of all processes."""

    data: int = option(
        -1, "Batch axis. -1: all devices that the other axes leave over.", minimum=-1
    )
    fsdp: int = option(1, "Batch axis over which parameters are sharded as well.", minimum=1)

    def __post_init__(self) -> None:
        check_options(self)

    @rule("data")
    def _data_axis_is_not_empty(self) -> None:
        """Not 0. The product of all axes is the number of devices (checked when they are known)."""
        if self.data == 0:
            raise ConfigError("data", "0 is not allowed; use -1 (what is left) or at least 1.")

    @property
    def inner(self) -> dict[str, int]:
        """Devices of the axes within one copy of the model."""
        return {"fsdp": self.fsdp, "tensor": 1, "sequence": 1}


@dataclasses.dataclass(frozen=True)
class MeshConfig(DataMeshConfig):
    """Devices per mesh axis; their product must be the number of devices of all processes."""

    tensor: int = option(1, "Heads, feed-forward and vocabulary axis.", minimum=1)
    sequence: int = option(1, "Sequence axis.", minimum=1)

    @property
    def inner(self) -> dict[str, int]:
        """See `DataMeshConfig`."""
        return {"fsdp": self.fsdp, "tensor": self.tensor, "sequence": self.sequence}


def data_ways_option() -> Any:
    """The axis `data` of a finished model's mesh."""
    return option(
        1, "Devices that the texts are divided among; each has a copy of the weights.", minimum=1
    )


def tensor_ways_option() -> Any:
    """The axis `tensor` of a finished model's mesh."""
    return option(
        1,
        "Devices that share every text: each has a part of the heads, of the feed-forward layers "
        "and of the vocabulary.",
        minimum=1,
    )


@dataclasses.dataclass(frozen=True)
class ModelMeshConfig:
    """Devices that a finished model is laid over; the first data x tensor of them."""

    data: int = data_ways_option()
    tensor: int = tensor_ways_option()

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def num_devices(self) -> int:
        """How many that takes."""
        return self.data * self.tensor


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """Start of `jax.distributed`. On TPU pods set enabled alone; the rest is found by JAX."""

    enabled: bool = option(False, "Joins several processes into one run.")
    coordinator: str | None = option(None, "host:port of process 0.")
    num_processes: int | None = option(None, "Number of processes.", minimum=1)
    process_id: int | None = option(None, "Index of this process, from 0.", minimum=0)
    heartbeat_seconds: int = option(
        100,
        "A process that has not been heard of for so long is lost, and the others end with exit "
        "code 3.",
        minimum=1,
    )
    initialization_seconds: int = option(
        300, "How long the processes wait for each other at the start.", minimum=1
    )

    def __post_init__(self) -> None:
        check_options(self)

    @rule("coordinator", "num_processes", "process_id")
    def _process_options_go_together(self) -> None:
        """All three or none, and only with enabled=True."""
        given = [self.coordinator, self.num_processes, self.process_id]
        if not self.enabled and any(value is not None for value in given):
            raise ConfigError("enabled", "False, yet process options are given; set enabled=True.")
        if len({value is None for value in given}) > 1:
            raise ConfigError(
                "coordinator",
                f"coordinator={self.coordinator!r}, num_processes={self.num_processes!r}, "
                f"process_id={self.process_id!r}: give all three, or none.",
            )

    @rule("heartbeat_seconds", "initialization_seconds")
    def _one_process_waits_for_no_other(self) -> None:
        """Keep the default with enabled=False."""
        if not self.enabled:
            require_defaults(
                self,
                ("heartbeat_seconds", "initialization_seconds"),
                "with enabled=False",
                "set enabled=True",
            )

    @rule("process_id")
    def _process_is_one_of_them(self) -> None:
        """Below num_processes."""
        if self.num_processes is None or self.process_id is None:
            return
        if self.process_id >= self.num_processes:
            raise ConfigError(
                "process_id",
                f"{self.process_id} is not below num_processes={self.num_processes}; "
                "processes count from 0.",
            )
