"""How media are drawn: diffusion, flow matching, and the networks that they train."""

import dataclasses
from typing import Any

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
        1000,
        "Number of times, evenly spaced between clean and noise. None: time is continuous.",
        minimum=1,
    )
    prediction: str = option(
        "v", "What the network predicts. epsilon: the noise. v: velocity.", choices=("epsilon", "v")
    )
    min_snr_gamma: float | None = option(
        5.0,
        "Weighs the error of the clean medium by min(SNR, gamma) (arXiv 2303.09556). None: the "
        "error of the prediction has the same weight at all times.",
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
    num_steps: int = option(50, "Number of network evaluations.", minimum=1)
    eta: float = option(0.0, "Noise of DDIM: 0 none, 1 as much as DDPM.", minimum=0, maximum=1)
    guidance_scale: float = option(
        1.0,
        "Classifier-free guidance. 1: the conditional prediction. 0: the unconditional one. Above "
        "1: further away from the unconditional one. Any value but 1 takes twice the time.",
        minimum=0,
    )
    threshold: str = option(
        "clip",
        "How predicted media are kept in range. none: not at all. clip: clipped to [-1, 1]. "
        "dynamic: scaled by a quantile of each medium (Imagen).",
        choices=("none", "clip", "dynamic"),
    )
    threshold_quantile: float = option(
        0.995, "Quantile of absolute values for threshold=dynamic.", above=0, maximum=1
    )

    def __post_init__(self) -> None:
        check_options(self)

    @rule("eta")
    def _eta_needs_ddim(self) -> None:
        """Keep the default with sampler='ddpm'."""
        if self.sampler == "ddpm":
            require_defaults(self, ("eta",), "with sampler='ddpm'", "set sampler='ddim'")

    @rule("threshold_quantile")
    def _quantile_needs_dynamic(self) -> None:
        """Keep the default unless threshold='dynamic'."""
        if self.threshold != "dynamic":
            require_defaults(
                self,
                ("threshold_quantile",),
                f"with threshold={self.threshold!r}",
                "set threshold='dynamic'",
            )


def coda_queries_option() -> Any:
    """What a decoder of images or sound reads of the positions before its medium."""
    return option(
        None,
        "Learned vectors that gather these positions by attention; the decoder reads the vectors, "
        "so its cost does not grow with context_length. Default (None): the decoder reads every "
        "position.",
        minimum=1,
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


# ------------------------------------------------------------------------------
# Flow matching: how it is trained, and how media are drawn with it.


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
        """Keep the default with time_draw='uniform'."""
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
        "Classifier-free guidance. 1: the conditional velocity. 0: the unconditional one. Above 1: "
        "further away from the unconditional one. Any value but 1 takes twice the time.",
        minimum=0,
    )

    def __post_init__(self) -> None:
        check_options(self)


# ------------------------------------------------------------------------------
# The UNet that draws images by diffusion.


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Residual convolutions at several resolutions, each half of the one before, with skips."""

    base_width: int = option(48, "Channels at full resolution.", minimum=1)
    width_multipliers: tuple[int, ...] = option(
        (1, 2), "Channels of each resolution over base_width; one item per resolution.", minimum=1
    )
    blocks_per_level: int = option(
        1, "Residual blocks of each resolution on the way down; one more on the way up.", minimum=1
    )
    attention_levels: tuple[int, ...] = option(
        (0, 1),
        "Resolutions with self-attention and cross-attention, 0 the full one. The middle always "
        "has both.",
        minimum=0,
    )
    head_width: int = option(16, "Channels of an attention head.", minimum=1)
    norm_groups: int = option(8, "Groups of the group norms.", minimum=1)

    def __post_init__(self) -> None:
        check_options(self)

    @rule("base_width", "head_width", "norm_groups")
    def _heads_and_groups_divide_the_width(self) -> None:
        """head_width and norm_groups divide base_width."""
        for name in ("head_width", "norm_groups"):
            if self.base_width % getattr(self, name):
                raise ConfigError(
                    "base_width",
                    f"{self.base_width} is not divisible by {name}={getattr(self, name)}; change "
                    "either.",
                )

    @rule("width_multipliers", "attention_levels")
    def _levels_exist(self) -> None:
        """At least one width; each attention level once, below the number of widths."""
        if not self.width_multipliers:
            raise ConfigError("width_multipliers", "() has no resolution; give at least one item.")
        levels = self.attention_levels
        if len(set(levels)) < len(levels) or any(
            level >= len(self.width_multipliers) for level in levels
        ):
            raise ConfigError(
                "attention_levels",
                f"{levels} must name each level once and be below {len(self.width_multipliers)}, "
                "the number of width_multipliers.",
            )

    @property
    def shrinkage(self) -> int:
        """Sides of an image over those of the lowest resolution."""
        return 2 ** (len(self.width_multipliers) - 1)


# ------------------------------------------------------------------------------
# The diffusion transformer that draws images by flow matching.


@dataclasses.dataclass(frozen=True)
class DitConfig:
    """A transformer over patches whose norms are scaled and shifted by the time and the condition
    (arXiv 2212.09748)."""

    width: int = option(64, "Width of a patch's vector; a multiple of 4.", minimum=4)
    num_layers: int = option(4, "Layers.", minimum=1)
    num_heads: int = option(4, "Heads of self-attention and cross-attention.", minimum=1)
    hidden_width: int = option(256, "Width inside the feed-forward layer.", minimum=1)
    patch_size: int = option(2, "Pixels, or latent places, along each side of a patch.", minimum=1)

    def __post_init__(self) -> None:
        check_options(self)

    @rule("width", "num_heads")
    def _width_suits_positions_and_heads(self) -> None:
        """width is a multiple of num_heads, and of 4 for the sinusoids of both coordinates."""
        for name, divisor in (("4", 4), (f"num_heads={self.num_heads}", self.num_heads)):
            if self.width % divisor:
                raise ConfigError(
                    "width", f"{self.width} is not divisible by {name}; choose a multiple."
                )
