"""What single optimisers and the gradient filter have of their own."""

import dataclasses

from megatransformer_jax.config.option import check_options, option, require_defaults, rule


@dataclasses.dataclass(frozen=True)
class SgdConfig:
    """Stochastic gradient descent."""

    momentum: float = option(0.9, "Decay of the sum of gradients. 0: none.", minimum=0, below=1)
    nesterov: bool = option(False, "Looks ahead by one step of the momentum.")

    def __post_init__(self) -> None:
        check_options(self)

    @rule("nesterov")
    def _nesterov_needs_momentum(self) -> None:
        """Only with momentum above 0."""
        if self.momentum == 0:
            require_defaults(self, ("nesterov",), "with momentum=0", "set momentum")


@dataclasses.dataclass(frozen=True)
class AdafactorConfig:
    """Adafactor (arXiv 1804.04235): the second moment of a matrix as a row and a column."""

    decay_power: float = option(
        0.8, "The second moment decays by 1 - t^-decay_power at step t.", above=0, maximum=1
    )
    min_factored_size: int = option(
        128, "Only arrays whose second largest axis is this long are factored.", minimum=1
    )
    clip_rms: float | None = option(
        1.0, "Root mean square of a parameter's update is cut to this. None: never.", above=0
    )
    scale_by_parameter: bool = option(
        True, "Multiplies the rate by the parameter's root mean square (at least 1e-3)."
    )

    def __post_init__(self) -> None:
        check_options(self)


@dataclasses.dataclass(frozen=True)
class MuonConfig:
    """Muon: momentum of matrices made orthogonal. Everything else gets AdamW."""

    momentum: float = option(0.95, "Decay of the matrices' momentum.", minimum=0, below=1)
    nesterov: bool = option(True, "Looks ahead by one step of the momentum.")
    newton_schulz_steps: int = option(5, "Iterations that make it orthogonal.", minimum=1)
    consistent_rms: float | None = option(
        0.2,
        "Root mean square of a matrix's update before the learning rate; 0.2 is about AdamW's, so "
        "that one rate serves both (arXiv 2502.16982). None: sqrt(max(1, outputs / inputs)) times "
        "the orthogonal matrix.",
        above=0,
    )
    adamw_learning_rate: float = option(
        1.0, "Factor on the schedule for what AdamW moves.", above=0
    )

    def __post_init__(self) -> None:
        check_options(self)


@dataclasses.dataclass(frozen=True)
class GrokfastConfig:
    """Grokfast (arXiv 2405.20233): adds the slow part of the gradients to them."""

    filter: str = option(
        "none",
        "ema: adds lamb times their exponential average. ma: adds lamb times the mean of the last "
        "`window` gradients, which are all kept.",
        choices=("none", "ema", "ma"),
    )
    alpha: float = option(0.98, "ema only: decay of the average.", minimum=0, below=1)
    lamb: float = option(2.0, "How much of the slow part is added.", above=0)
    window: int = option(100, "ma only: gradients in the mean.", minimum=1)
    warmup: bool = option(
        True, "ma only: adds nothing before there are `window`. False: the mean of those there are."
    )

    def __post_init__(self) -> None:
        check_options(self)

    @rule("alpha", "lamb", "window", "warmup")
    def _options_go_with_their_filter(self) -> None:
        """At their defaults with a filter that does not read them."""
        unread = {
            "none": ("alpha", "lamb", "window", "warmup"),
            "ema": ("window", "warmup"),
            "ma": ("alpha",),
        }
        require_defaults(
            self, unread[self.filter], f"with filter={self.filter!r}", "choose another filter"
        )
