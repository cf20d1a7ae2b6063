"""Stability of the iterations beyond the trained depth, as a frozen dataclass."""

import dataclasses

from megatransformer_jax.config.option import check_options, option, require_defaults, rule


@dataclasses.dataclass(frozen=True)
class StabilityConfig:
    """Terms of the loss that keep the core's iterations from moving apart."""

    jacobian_weight: float = option(
        0.0,
        "Weight of the mean squared singular value of the Jacobian of one more iteration by the "
        "last state, estimated with one random vector (after STARS, arXiv 2605.26733). 0: off, at "
        "no cost.",
        minimum=0,
    )
    jacobian_warmup_steps: int = option(
        0, "Optimiser steps over which jacobian_weight grows from 0.", minimum=0
    )

    def __post_init__(self) -> None:
        check_options(self)

    @rule("jacobian_warmup_steps")
    def _warmup_needs_a_weight(self) -> None:
        """Only with jacobian_weight above 0."""
        if self.jacobian_weight == 0:
            require_defaults(
                self,
                ("jacobian_warmup_steps",),
                "with jacobian_weight=0",
                "raise jacobian_weight",
            )
