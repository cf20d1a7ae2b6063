"""The optimiser, its learning-rate schedule and what is done to gradients before it."""

import dataclasses

from megatransformer_jax.config.option import (
    ConfigError,
    check_options,
    option,
    require_defaults,
    rule,
)

OPTIMIZERS = ("adamw",)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimiser, learning-rate schedule and what is done to gradients before them."""

    name: str = option("adamw", "Optimiser.", choices=OPTIMIZERS)
    learning_rate: float = option(3e-3, "Peak learning rate.", above=0)
    schedule: str = option(
        "warmup_cosine",
        "warmup_cosine: to final_fraction of the peak. wsd: warmup, stable, then 1 - sqrt decay "
        "over the last decay_steps (arXiv 2405.18392). constant: warmup, then stable.",
        choices=("warmup_cosine", "wsd", "constant"),
    )
    warmup_steps: int = option(50, "Steps of linear warmup.", minimum=0)
    decay_steps: int = option(0, "wsd only: steps of the final decay.", minimum=0)
    final_fraction: float = option(
        0.1, "Last learning rate as a share of the peak.", minimum=0, maximum=1
    )
    beta1: float = option(0.9, "Decay of the first moment.", minimum=0, below=1)
    beta2: float = option(0.95, "Decay of the second moment.", minimum=0, below=1)
    eps: float = option(1e-8, "Added to the root of the second moment.", above=0)
    weight_decay: float = option(
        0.1,
        "Decoupled weight decay on matrices; vectors (norm scales, biases, the diagonal "
        "adapter's a_log, dt_bias and b_matrix) and embeddings have none.",
        minimum=0,
    )
    clip_norm: float | None = option(
        1.0, "Global gradient norm is cut to this. None: never.", above=0
    )

    def __post_init__(self) -> None:
        check_options(self)

    @rule("final_fraction")
    def _final_fraction_needs_a_decay(self) -> None:
        """Only with a schedule that decays."""
        if self.schedule == "constant":
            require_defaults(
                self, ("final_fraction",), "with schedule='constant'", "choose another schedule"
            )

    @rule("decay_steps")
    def _decay_steps_go_with_wsd(self) -> None:
        """At least 1 with schedule='wsd', otherwise 0."""
        if (self.schedule == "wsd") != (self.decay_steps > 0):
            raise ConfigError(
                "decay_steps",
                f"{self.decay_steps} does not go with schedule={self.schedule!r}; "
                "wsd needs decay_steps >= 1, the others 0.",
            )
