"""The optimiser, its learning-rate schedule, parameter groups, and filters of the gradient."""

import dataclasses
import math
import re

from megatransformer_jax.config.option import (
    ConfigError,
    check_options,
    option,
    require_defaults,
    rule,
    section,
)

# ------------------------------------------------------------------------------
# Options of single optimisers and of the gradient filter.


@dataclasses.dataclass(frozen=True)
class SgdConfig:
    """Stochastic gradient descent."""

    momentum: float = option(
        0.9, "Decay of the sum of gradients. 0: no momentum.", minimum=0, below=1
    )
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
        1.0, "Largest root mean square of a parameter's update. None: no limit.", above=0
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
    momentum_from: float | None = option(
        None,
        "Momentum at step 0, from which it grows linearly over momentum_warmup_steps; the average "
        "is then not corrected for its start at zero (Parcae: 0.85). Default (None): `momentum` "
        "throughout.",
        minimum=0,
        below=1,
    )
    momentum_warmup_steps: int = option(
        0, "Steps from momentum_from to momentum (Parcae: 300).", minimum=0
    )
    nesterov: bool = option(True, "Looks ahead by one step of the momentum.")
    newton_schulz_steps: int = option(5, "Number of orthogonalisation iterations.", minimum=1)
    polynomial: str = option(
        "quintic",
        "What an orthogonalisation iteration does to singular values. quintic: always the same "
        "polynomial, which brings them near 1. polar_express: the best one for each of up to 5 "
        "iterations (arXiv 2505.16932).",
        choices=("quintic", "polar_express"),
    )
    row_decay: float | None = option(
        None,
        "Divides the rows of the longer side of the orthogonal matrix by the root of their mean "
        "square, averaged with this decay, and keeps the matrix's norm (after NorMuon, arXiv "
        "2510.05491; Parcae: 0.95). Default (None): off.",
        minimum=0,
        below=1,
    )
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

    @property
    def is_plain(self) -> bool:
        """Whether all options that optax's Muon lacks are off."""
        return (
            self.momentum_from is None and self.polynomial == "quintic" and self.row_decay is None
        )

    @rule("momentum_from", "momentum_warmup_steps")
    def _ramp_has_both_ends(self) -> None:
        """momentum_from and momentum_warmup_steps above 0 need each other."""
        if (self.momentum_from is None) != (self.momentum_warmup_steps == 0):
            raise ConfigError(
                "momentum_warmup_steps",
                f"{self.momentum_warmup_steps} does not go with momentum_from="
                f"{self.momentum_from}; give both, such as momentum_from=0.85 and "
                "momentum_warmup_steps=300, or neither.",
            )

    @rule("newton_schulz_steps", "polynomial")
    def _polynomials_are_known(self) -> None:
        """At most 5 with polynomial='polar_express', which has as many polynomials."""
        if self.polynomial == "polar_express" and self.newton_schulz_steps > 5:
            raise ConfigError(
                "newton_schulz_steps",
                f"{self.newton_schulz_steps} is more than the 5 iterations of "
                "polynomial='polar_express'; use at most 5, or polynomial='quintic'.",
            )


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
        True,
        "ma only: starts only after `window` gradients. False: averages the gradients seen so far.",
    )

    def __post_init__(self) -> None:
        check_options(self)

    @rule("alpha", "lamb", "window", "warmup")
    def _options_go_with_their_filter(self) -> None:
        """Keep the default with a filter that does not use it."""
        unread = {
            "none": ("alpha", "lamb", "window", "warmup"),
            "ema": ("window", "warmup"),
            "ma": ("alpha",),
        }
        require_defaults(
            self, unread[self.filter], f"with filter={self.filter!r}", "choose another filter"
        )


# ------------------------------------------------------------------------------
# The optimiser and its schedule.

SCHEDULE_FREE = ("schedule_free_adamw", "schedule_free_sgd")
OPTIMIZERS = ("adamw", "adafactor", "lion", "muon", "sgd", *SCHEDULE_FREE)

# Which optimisers read an option that not all of them read.
_READERS = {
    "beta1": ("adamw", "lion", "muon", *SCHEDULE_FREE),
    "beta2": ("adamw", "lion", "muon", "schedule_free_adamw"),
    "eps": ("adamw", "muon", "schedule_free_adamw"),
}
# Sections of one optimiser each, named as it is.
_SECTIONS = ("sgd", "adafactor", "muon")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimiser, learning-rate schedule and what is done to gradients before them."""

    name: str = option(
        "adamw",
        "Optimiser. muon: Muon for matrices, AdamW for the rest. schedule_free_*: no decay of the "
        "rate, an average of the weights is evaluated (arXiv 2405.15682).",
        choices=OPTIMIZERS,
    )
    learning_rate: float = option(3e-3, "Peak learning rate.", above=0)
    schedule: str = option(
        "warmup_cosine",
        "warmup_cosine: to final_fraction of the peak. wsd: warmup, stable, then a decay over the "
        "last decay_steps or decay_fraction (arXiv 2405.18392). constant: warmup, then stable.",
        choices=("warmup_cosine", "wsd", "constant"),
    )
    warmup_steps: int = option(50, "Steps of linear warmup.", minimum=0)
    decay_steps: int = option(0, "wsd only: steps of the final decay.", minimum=0)
    decay_fraction: float = option(
        0.0,
        "wsd only, in place of decay_steps: share of the run's steps that the final decay takes.",
        minimum=0,
        maximum=1,
    )
    decay_shape: str = option(
        "one_minus_sqrt",
        "wsd only: how the rate falls. one_minus_sqrt: fast at first. linear: evenly (Parcae).",
        choices=("one_minus_sqrt", "linear"),
    )
    final_fraction: float = option(
        0.1, "Last learning rate as a share of the peak.", minimum=0, maximum=1
    )
    beta1: float = option(
        0.9,
        "Decay of the first moment. schedule_free_*: share of the average in the point where "
        "gradients are taken.",
        minimum=0,
        below=1,
    )
    beta2: float = option(0.95, "Decay of the second moment.", minimum=0, below=1)
    eps: float = option(1e-8, "Added to the root of the second moment.", above=0)
    weight_decay: float = option(
        0.1,
        "Decoupled weight decay on matrices; vectors (norm scales, biases, the diagonal "
        "adapter's a_log, dt_bias and b_matrix), the read-out's c_matrix and embeddings have none.",
        minimum=0,
    )
    weight_decay_schedule: str = option(
        "constant",
        "constant: the same weight decay in all steps. linear: falls evenly from it to 0 at the "
        "run's end (Parcae).",
        choices=("constant", "linear"),
    )
    cautious_decay: bool = option(
        False,
        "Decays a weight only in steps whose update moves it towards 0 as well: where update and "
        "decay have one sign (arXiv 2510.12402; Parcae).",
    )
    clip_norm: float | None = option(
        1.0,
        "Largest global norm of the gradients; larger ones are scaled down. None: no limit.",
        above=0,
    )

    groups: tuple[str, ...] = option(
        (),
        "Rates by parameter: 'REGEX: learning_rate=FACTOR, weight_decay=VALUE', either or both. "
        "The expression is searched for in paths such as core/layers/layer_0/mlp/up; the first "
        "group that matches counts. The factor multiplies the schedule, the value replaces "
        "weight_decay.",
    )
    sgd: SgdConfig = section(SgdConfig, "Only for name='sgd'.")
    adafactor: AdafactorConfig = section(AdafactorConfig, "Only for name='adafactor'.")
    muon: MuonConfig = section(MuonConfig, "Only for name='muon'.")
    grokfast: GrokfastConfig = section(GrokfastConfig, "Filter of gradients, after clipping.")

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def is_schedule_free(self) -> bool:
        """Whether the optimiser averages the weights itself."""
        return self.name in SCHEDULE_FREE

    @rule("beta1", "beta2", "eps", "sgd", "adafactor", "muon")
    def _options_go_with_their_optimizer(self) -> None:
        """Keep the default unless `name` is one that reads it (beta1: adamw, lion, muon,
        schedule_free_*; beta2: the same but schedule_free_sgd; eps: adamw, muon,
        schedule_free_adamw)."""
        for option_name, readers in _READERS.items():
            if self.name not in readers:
                fix = f"choose name={' or '.join(map(repr, readers))}"
                require_defaults(self, (option_name,), f"with name={self.name!r}", fix)
        for name in _SECTIONS:
            if self.name != name:
                own = getattr(self, name)
                names = [field.name for field in dataclasses.fields(own)]
                try:
                    require_defaults(
                        own, names, f"with name={self.name!r}", f"choose name={name!r}"
                    )
                except ConfigError as error:
                    raise error.below(name) from None

    @rule("schedule")
    def _schedule_free_has_a_constant_rate(self) -> None:
        """'constant' with name='schedule_free_*'."""
        if self.is_schedule_free and self.schedule != "constant":
            raise ConfigError(
                "schedule",
                f"{self.schedule!r} does not go with name={self.name!r}, which averages instead of "
                "lowering the rate; set schedule='constant'.",
            )

    @rule("beta1")
    def _schedule_free_needs_beta1(self) -> None:
        """Above 0 with name='schedule_free_*'."""
        if self.is_schedule_free and self.beta1 == 0:
            raise ConfigError(
                "beta1", f"0 is not allowed with name={self.name!r}; use 0.9, or at least above 0."
            )

    @rule("groups")
    def _groups_can_be_read(self) -> None:
        """Each 'REGEX: NAME=VALUE, ...'. That each decides for some parameter is checked once the
        model is built."""
        parse_groups(self.groups)

    @rule("final_fraction")
    def _final_fraction_needs_a_decay(self) -> None:
        """Only with a schedule that decays."""
        if self.schedule == "constant":
            require_defaults(
                self, ("final_fraction",), "with schedule='constant'", "choose another schedule"
            )

    @rule("decay_steps", "decay_fraction", "decay_shape")
    def _decay_goes_with_wsd(self) -> None:
        """schedule='wsd' needs decay_steps of at least 1 or decay_fraction above 0, not both; other
        schedules need the default."""
        if self.schedule != "wsd":
            names = ("decay_steps", "decay_fraction", "decay_shape")
            with_it = f"with schedule={self.schedule!r}"
            require_defaults(self, names, with_it, "set schedule='wsd'")
        elif (self.decay_steps > 0) == (self.decay_fraction > 0):
            raise ConfigError(
                "decay_steps",
                f"{self.decay_steps} with decay_fraction={self.decay_fraction} does not say how "
                "long schedule='wsd' decays; give decay_steps >= 1 or decay_fraction above 0, and "
                "leave the other at 0.",
            )

    @rule("weight_decay_schedule", "cautious_decay")
    def _decay_options_need_a_decay(self) -> None:
        """Only with weight_decay above 0, or a group that sets one."""
        decays = [self.weight_decay, *(group.weight_decay for group in parse_groups(self.groups))]
        if not any(decays):
            names = ("weight_decay_schedule", "cautious_decay")
            require_defaults(self, names, "with weight_decay=0", "raise weight_decay")

    def num_decay_steps(self, total_steps: int) -> int:
        """Steps of the learning rate's final decay in a run of `total_steps`."""
        if self.decay_fraction:
            return max(1, round(self.decay_fraction * total_steps))
        return self.decay_steps


# ------------------------------------------------------------------------------
# Groups of parameters with their own learning rate or weight decay, written as text.

EXAMPLE = "'mlp/(up|down)$: learning_rate=0.5, weight_decay=0'"
_SETTINGS = ("learning_rate", "weight_decay")


@dataclasses.dataclass(frozen=True)
class ParameterGroup:
    """What holds for the parameters whose path has a match of `pattern`.

    Attributes:
      pattern: searched for in paths such as 'core/layers/layer_0/mlp/up'; ^ and $ anchor it.
      learning_rate: factor on the schedule, or None: 1.
      weight_decay: in place of what the parameter would have, or None: that.
    """

    pattern: re.Pattern[str]
    learning_rate: float | None
    weight_decay: float | None


def parse_groups(texts: tuple[str, ...]) -> tuple[ParameterGroup, ...]:
    """Reads `REGEX: learning_rate=FACTOR, weight_decay=VALUE`, one text per group.

    Raises:
      ConfigError: at 'groups', quoting the text that cannot be read and what is allowed.
    """
    return tuple(_parse_group(text) for text in texts)


def _parse_group(text: str) -> ParameterGroup:
    regex, colon, settings = text.rpartition(":")
    if not colon or not regex.strip() or not settings.strip():
        raise ConfigError("groups", f"{text!r} is not 'REGEX: NAME=VALUE, ...', as {EXAMPLE}.")
    try:
        pattern = re.compile(regex.strip())
    except re.error as error:
        raise ConfigError(
            "groups",
            f"{regex.strip()!r} in {text!r} is not a regular expression ({error}); fix it.",
        ) from error
    values: dict[str, float] = {}
    for setting in settings.split(","):
        name, _, value = (part.strip() for part in setting.partition("="))
        if name not in _SETTINGS:
            raise ConfigError(
                "groups", f"{name!r} in {text!r} is unknown; known: {', '.join(_SETTINGS)}."
            )
        if name in values:
            raise ConfigError("groups", f"{text!r} sets {name} twice; keep one of them.")
        values[name] = _number(value, name, text)
    return ParameterGroup(pattern, values.get("learning_rate"), values.get("weight_decay"))


def _number(value: str, name: str, text: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise ConfigError(
            "groups",
            f"{name}={value} in {text!r} is not allowed; it must be a number of at least 0.",
        )
    return number
