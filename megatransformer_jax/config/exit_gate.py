"""Learned depth: the exit gate as a part of the model, and how it is trained."""

import dataclasses

from megatransformer_jax.config.option import (
    ConfigError,
    check_options,
    option,
    require_defaults,
    rule,
)


@dataclasses.dataclass(frozen=True)
class ExitGateConfig:
    """A gate that says after every iteration how likely a token should stop there (PonderNet,
    arXiv 2107.05407)."""

    enabled: bool = option(
        False,
        "Adds the gate: sigmoid(w . norm(state) + b), one number per token and iteration. "
        "train.exit_gate trains it, the exit criterion learned_gate uses it.",
    )

    def __post_init__(self) -> None:
        check_options(self)


@dataclasses.dataclass(frozen=True)
class ExitGateTrainingConfig:
    """The gate's term of the loss: weight * (expected loss over iterations + kl_weight * KL of the
    exit distribution from the prior)."""

    weight: float = option(1.0, "Weight of the term beside the loss at the drawn depth.", above=0)
    kl_weight: float = option(
        0.05,
        "Weight, within the term, of the KL divergence in nats of the exit distribution from the "
        "prior. Keeps the gate from settling on one depth early.",
        minimum=0,
    )
    prior: str = option(
        "uniform",
        "uniform: all iterations alike, so the KL is minus the entropy but for a constant (Ouro, "
        "arXiv 2510.25741). geometric: with mean prior_mean (PonderNet).",
        choices=("uniform", "geometric"),
    )
    prior_mean: float | None = option(
        None, "Mean iterations of the geometric prior, before it is cut at max_steps.", above=1
    )
    max_steps: int | None = option(
        None,
        "Iterations that the term looks at; the last takes what probability is left. None: twice "
        "model.recurrence.mean_steps.",
        minimum=2,
    )
    detach: bool = option(
        False,
        "The term trains the gate alone and leaves the rest of the model to the other terms.",
    )

    def __post_init__(self) -> None:
        check_options(self)

    @rule("prior_mean")
    def _prior_mean_goes_with_geometric(self) -> None:
        """Given if and only if prior='geometric'."""
        if self.prior != "geometric":
            require_defaults(
                self, ("prior_mean",), f"with prior={self.prior!r}", "set prior='geometric'"
            )
        elif self.prior_mean is None:
            raise ConfigError(
                "prior_mean", "None says nothing with prior='geometric'; give a number above 1."
            )

    @rule("prior", "prior_mean")
    def _prior_needs_a_weight(self) -> None:
        """At their defaults with kl_weight=0."""
        if self.kl_weight == 0:
            require_defaults(self, ("prior", "prior_mean"), "with kl_weight=0", "raise kl_weight")
