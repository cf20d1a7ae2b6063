"""Diffusion: how it is trained, and how media are drawn with it."""

import dataclasses

from megatransformer_jax.config.option import (
    ConfigError,
    check_options,
    option,
    require_defaults,
    rule,
)


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """Noise schedule, what the network predicts, and the weight of each time in the loss."""

    schedule: str = option(
        "cosine",
        "Signal left at each time. linear: DDPM. cosine: Nichol and Dhariwal. sigmoid: Jabri.",
        choices=("linear", "cosine", "sigmoid"),
    )
    num_times: int | None = option(
        1000, "Times there are, evenly between clean and noise. None: all of them.", minimum=1
    )
    prediction: str = option(
        "v", "What the network predicts. epsilon: the noise. v: velocity.", choices=("epsilon", "v")
    )
    min_snr_gamma: float | None = option(
        5.0,
        "Weighs the error of the clean medium by min(SNR, gamma) (arXiv 2303.09556). None: the "
        "error of the prediction counts alike at all times.",
        above=0,
    )

    def __post_init__(self) -> None:
        check_options(self)


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """How media are drawn by diffusion."""

    sampler: str = option(
        "ddim",
        "ddim: few steps, noise as eta says. ddpm: ancestral.",
        choices=("ddim", "ddpm"),
    )
    num_steps: int = option(50, "Calls of the network.", minimum=1)
    eta: float = option(0.0, "Noise of DDIM: 0 none, 1 as much as DDPM.", minimum=0, maximum=1)
    guidance_scale: float = option(
        1.0,
        "Classifier-free guidance: 1 the conditional prediction, 0 the unconditional one, above 1 "
        "beyond the conditional. Other than 1 it takes twice the time.",
        minimum=0,
    )
    threshold: str = option(
        "clip",
        "What keeps predicted media in range. none: nothing. clip: to [-1, 1]. dynamic: by a "
        "quantile of each medium (Imagen).",
        choices=("none", "clip", "dynamic"),
    )
    threshold_quantile: float = option(
        0.995, "Quantile of absolute values for threshold=dynamic.", above=0, maximum=1
    )

    def __post_init__(self) -> None:
        check_options(self)

    @rule("eta")
    def _eta_needs_ddim(self) -> None:
        """At its default with sampler='ddpm'."""
        if self.sampler == "ddpm":
            require_defaults(self, ("eta",), "with sampler='ddpm'", "set sampler='ddim'")

    @rule("threshold_quantile")
    def _quantile_needs_dynamic(self) -> None:
        """At its default unless threshold='dynamic'."""
        if self.threshold != "dynamic":
            require_defaults(
                self,
                ("threshold_quantile",),
                f"with threshold={self.threshold!r}",
                "set threshold='dynamic'",
            )


def check_steps(sampler: SamplerConfig, diffusion: DiffusionConfig) -> None:
    """Checks that there is a time for every step.

    Raises:
      ConfigError: at 'sampler.num_steps'.
    """
    times = diffusion.num_times
    if times is not None and sampler.num_steps > times:
        raise ConfigError(
            "sampler.num_steps",
            f"{sampler.num_steps} exceeds diffusion.num_times={times}; take at most one step per "
            "time.",
        )
