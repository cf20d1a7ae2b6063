"""Flow matching: how it is trained, and how media are drawn with it."""

import dataclasses

from megatransformer_jax.config.option import check_options, option, require_defaults, rule


@dataclasses.dataclass(frozen=True)
class FlowConfig:
    """Which times of the flow are learned, and how often."""

    time_draw: str = option(
        "logit_normal",
        "uniform: all times alike. logit_normal: the sigmoid of a normal, most in the middle "
        "(arXiv 2403.03206).",
        choices=("uniform", "logit_normal"),
    )
    time_mean: float = option(0.0, "Mean of the normal; above 0: more noise.")
    time_std: float = option(1.0, "Standard deviation of the normal.", above=0)

    def __post_init__(self) -> None:
        check_options(self)

    @rule("time_mean", "time_std")
    def _normal_needs_logit_normal(self) -> None:
        """At their defaults with time_draw='uniform'."""
        if self.time_draw == "uniform":
            require_defaults(
                self,
                ("time_mean", "time_std"),
                "with time_draw='uniform'",
                "set time_draw='logit_normal'",
            )


@dataclasses.dataclass(frozen=True)
class FlowSamplerConfig:
    """How media are drawn by flow matching."""

    sampler: str = option(
        "heun",
        "euler: one call of the network per step. heun: two, of second order.",
        choices=("euler", "heun"),
    )
    num_steps: int = option(25, "Steps from noise to the medium.", minimum=1)
    guidance_scale: float = option(
        1.0,
        "Classifier-free guidance: 1 the conditional velocity, 0 the unconditional one, above 1 "
        "beyond the conditional. Other than 1 it takes twice the time.",
        minimum=0,
    )

    def __post_init__(self) -> None:
        check_options(self)
