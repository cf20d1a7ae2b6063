"""The training loop, as a frozen dataclass."""

import dataclasses

from megatransformer_jax.config.exit_gate import ExitGateTrainingConfig
from megatransformer_jax.config.option import (
    MAX_SEED,
    ConfigError,
    check_options,
    option,
    rule,
    section,
)
from megatransformer_jax.config.stability import StabilityConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop."""

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
        "optimiser state, norms, softmax, logits and losses are float32 always.",
        choices=("auto", "float32", "bfloat16"),
    )
    accumulation: int = option(
        1, "Micro-batches whose gradients make one step; divides data.batch_size.", minimum=1
    )
    memory_budget_gib: float | None = option(
        None,
        "GiB that the compiled step may take on each device. accumulation is then the smallest "
        "with which it fits, and config.json names it. None: accumulation as given.",
        above=0,
    )
    z_loss: float = option(
        0.0, "Weight of the squared log-normaliser, keeps logits small (PaLM uses 1e-4).", minimum=0
    )
    ema_decay: float | None = option(
        None,
        "Keeps an exponential average of the weights, which validation, samples, the summary and "
        "experiments.generate use: average += (1 - d) (weights - average) with d the smaller of "
        "this and (1 + t) / (10 + t) after t updates. None: no average.",
        above=0,
        below=1,
    )
    max_bad_steps: int = option(
        20, "Stops with an error after this many non-finite steps in a row.", minimum=1
    )
    exit_gate: ExitGateTrainingConfig = section(
        ExitGateTrainingConfig, "The exit gate's term of the loss."
    )
    stability: StabilityConfig = section(StabilityConfig, "Stability of the iterations.")

    def __post_init__(self) -> None:
        check_options(self)

    @rule("memory_budget_gib")
    def _budget_chooses_the_accumulation(self) -> None:
        """Not with an accumulation, which it chooses."""
        if self.memory_budget_gib is not None and self.accumulation != 1:
            raise ConfigError(
                "accumulation",
                f"{self.accumulation} would be overruled by memory_budget_gib="
                f"{self.memory_budget_gib:g}, which chooses it; leave out one of them.",
            )
