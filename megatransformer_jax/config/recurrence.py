"""Depth recurrence: how the core is iterated, its exit gate, and what keeps the loop stable."""

import dataclasses

from megatransformer_jax.config.option import (
    ConfigError,
    check_options,
    option,
    require_defaults,
    rule,
)

# Options of parameters that iterations have for themselves. They start as the identity, so a model
# can start from one that lacks them.
LOOP_OPTIONS = (
    "loop_embedding",
    "loop_scale",
    "loop_lora_rank",
    "hyper_connections",
    "loop_iterations",
)


def is_loop_parameter(path: str) -> bool:
    """Whether a parameter's path, 'core/layers/layer_0/mlp/up_loop_a', is of such options."""
    return path.startswith("core/") and "loop_" in path.rpartition("/")[2]


@dataclasses.dataclass(frozen=True)
class RecurrenceConfig:
    """How the core is iterated: injection, initial state, and how deep training goes."""

    adapter: str = option(
        "linear",
        "Feeds the injected prelude output e into the state s. linear: W [s; e]. sum: s + e. "
        "gate: s * e. diagonal: exp(-dt A) s + dt B e, stable by design (arXiv 2604.12946). none: "
        "s alone, so that e enters as the first state only (state_init='none'; Universal "
        "Transformer, Ouro).",
        choices=("linear", "sum", "gate", "diagonal", "none"),
    )
    zero_order_hold: bool = option(
        False,
        "diagonal only: exact discretisation, (1 - exp(-dt A)) / A instead of dt on the input.",
    )
    core_width: int | None = option(
        None,
        "Width of the core if it differs from the model's. Default (None): the same.",
        minimum=1,
    )
    injection_norm: bool = option(False, "Normalises the prelude's output before injection.")
    iteration_norm: bool = option(False, "Normalises the core's output after every iteration.")
    output_norm: bool = option(
        True,
        "Normalises the core's last state before the coda, with the norm that stands before the "
        "head (Huginn). False suits models made from plain ones (fine_tuning.retrofit).",
    )
    head_norm: bool = option(
        True,
        "Normalises what the head reads. False: the head reads the coda's output as it is, for "
        "models whose iteration_norm has normalised it (Ouro).",
    )
    readout_matrix: bool = option(
        False,
        "Multiplies the core's last state by a learned matrix C before the coda (Parcae). It "
        "starts as the identity and has no weight decay.",
    )
    state_init: str = option(
        "like_init",
        "First state. like_init: normal cut at 3 std with the embedding's std and scale. normal: "
        "std 1. embed: std 1/sqrt(D). unit: normal with mean 0 and std 1 per position. zero. "
        "none: the injected embedding itself.",
        choices=("like_init", "normal", "embed", "unit", "zero", "none"),
    )
    mean_steps: int = option(8, "Mean number of iterations in training (r).", minimum=1)
    backprop_depth: int = option(
        4,
        "Number of last iterations that gradients flow through (k); the iterations "
        "before run without gradients. With gradient='implicit': terms of the sum.",
        minimum=1,
    )
    gradient: str = option(
        "truncated",
        "How gradients go back through the iterations. truncated: through the last "
        "backprop_depth of them, which are stored. implicit: as if the core had settled "
        "(s = f(s)), by v + J^T v + (J^T)^2 v + ... of backprop_depth terms, J being the Jacobian "
        "of the last iteration, the only one that is stored. Needs an adapter that injects, and "
        "iterations that do not differ.",
        choices=("truncated", "implicit"),
    )
    implicit_tolerance: float = option(
        0.0,
        "With gradient='implicit', a row of a training batch stops iterating, before its draw, "
        "once an iteration moves its state by no more than this share of the state's length; "
        "and its sum ends before a term that is no more than this share of the sum. 0: all "
        "iterations and terms. Evaluation and generation always go as deep as they are asked to.",
        minimum=0,
        below=1,
    )
    sampling: str = option(
        "lognormal_poisson",
        "Distribution of the number of iterations. lognormal_poisson: as Huginn, "
        "Poisson(rate) + 1 with a log-normal rate of mean mean_steps, so its mean is "
        "mean_steps + 1. fixed: mean_steps. The others have mean mean_steps. uniform: "
        "1 .. 2 * mean_steps - 1. poisson: Poisson(mean_steps - 1) + 1. truncated_poisson: "
        "Poisson(mean_steps) within 1 .. max_steps, whose mean is a little above for a small "
        "mean_steps, as 0 is left out. geometric. A draw above max_steps becomes max_steps "
        "(truncated_poisson: is not made), which lowers the mean if max_steps is near mean_steps.",
        choices=(
            "lognormal_poisson",
            "fixed",
            "uniform",
            "poisson",
            "truncated_poisson",
            "geometric",
        ),
    )
    sampling_sigma: float = option(0.5, "Spread of the log-normal rate.", above=0)
    max_steps: int = option(64, "Largest number of iterations that is drawn.", minimum=1)
    draw_per: str = option(
        "batch",
        "One draw for all, for each sequence, or for each token.",
        choices=("batch", "sequence", "token"),
    )
    ramp: str = option(
        "none",
        "Curriculum: the mean grows from ramp_from to mean_steps over ramp_steps. linear. "
        "one_minus_sqrt: 1 - sqrt(1 - t), slow at first. doubling: in stages of equally many "
        "steps, each with twice the mean of the one before.",
        choices=("none", "linear", "one_minus_sqrt", "doubling"),
    )
    ramp_steps: int = option(0, "Optimiser steps that the ramp takes.", minimum=0)
    ramp_from: int = option(1, "Mean number of iterations at step 0 of the ramp.", minimum=1)
    ramp_backprop: bool = option(
        False,
        "Lets the ramp raise backprop_depth too, in proportion to the mean and rounded up to a "
        "power of two, so that early steps take less time. The step is compiled for each depth. "
        "Terms of the loss that look at all iterations (train.exit_gate, train.supervision) keep "
        "backprop_depth.",
    )
    loop_embedding: bool = option(
        False,
        "Adds a learned vector per iteration to the core's input; it starts at zero.",
    )
    loop_scale: bool = option(
        False,
        "Multiplies what each attention and feed-forward layer of the core adds by a learned "
        "number per iteration; it starts at 1.",
    )
    loop_lora_rank: int = option(
        0,
        "Rank of a learned low-rank update per iteration of each matrix of the core's attention "
        "and feed-forward layers, not of PEER's (arXiv 2410.20672); it starts at zero. 0: none.",
        minimum=0,
    )
    hyper_connections: int = option(
        0,
        "Number of streams that the core's state consists of (hyper-connections between loops, "
        "arXiv 2409.19606, 2604.21106). Each iteration reads a learned mixture of them and adds "
        "its change to each by a learned weight; both are the iteration's own. It starts as the "
        "plain loop. 0: the state is one vector.",
        minimum=0,
    )
    loop_iterations: int | None = option(
        None,
        "Iterations with their own loop_embedding, loop_scale, loop_lora_rank and "
        "hyper_connections; later ones have the last one's. Default (None): mean_steps.",
        minimum=1,
    )
    unroll: int = option(
        1,
        "Gradient iterations unrolled per loop turn. Larger values compile longer and may run "
        "faster.",
        minimum=1,
    )

    kept_every: int = option(
        1,
        "With model.remat, the loop with gradients keeps the state before every n-th iteration "
        "alone. The states between are computed again from it, which costs one more forward pass "
        "of these iterations and keeps backprop_depth / n + n states instead of backprop_depth.",
        minimum=1,
    )

    def __post_init__(self) -> None:
        check_options(self)

    @rule("kept_every")
    def _groups_fill_the_loop(self) -> None:
        """Divides backprop_depth."""
        if self.backprop_depth % self.kept_every:
            raise ConfigError(
                "kept_every",
                f"{self.kept_every} does not divide backprop_depth={self.backprop_depth}; use a "
                "divisor of it.",
            )

    @property
    def kept_states(self) -> int:
        """States of the loop with gradients that are in memory at one time."""
        if self.gradient == "implicit":
            return 1
        if self.kept_every == 1:
            return self.backprop_depth
        return self.backprop_depth // self.kept_every + self.kept_every

    @rule("mean_steps", "backprop_depth")
    def _depths_fit_max_steps(self) -> None:
        """At most max_steps."""
        for name in ("mean_steps", "backprop_depth"):
            if getattr(self, name) > self.max_steps:
                raise ConfigError(
                    name,
                    f"{getattr(self, name)} exceeds max_steps={self.max_steps}; "
                    "lower it or raise max_steps.",
                )

    @property
    def has_loop_parameters(self) -> bool:
        """Whether iterations of the core differ in parameters."""
        low_rank, streams = self.loop_lora_rank > 0, self.hyper_connections > 0
        return self.loop_embedding or self.loop_scale or low_rank or streams

    @property
    def own_iterations(self) -> int:
        """`loop_iterations` after resolving None."""
        return self.mean_steps if self.loop_iterations is None else self.loop_iterations

    @rule("loop_iterations")
    def _own_iterations_have_parameters(self) -> None:
        """Only with loop_embedding, loop_scale, loop_lora_rank or hyper_connections."""
        if not self.has_loop_parameters:
            names = "loop_embedding, loop_scale, loop_lora_rank or hyper_connections"
            require_defaults(self, ("loop_iterations",), f"without {names}", "set one of them")

    @rule("hyper_connections")
    def _streams_are_several(self) -> None:
        """0, or at least 2."""
        if self.hyper_connections == 1:
            raise ConfigError(
                "hyper_connections",
                "1 stream is the plain loop with more parameters; use 0, or at least 2.",
            )

    @property
    def trains_state(self) -> bool:
        """Whether gradients reach the input through the first state, as there is no other way."""
        return self.adapter == "none"

    @rule("adapter", "backprop_depth")
    def _gradients_reach_the_input(self) -> None:
        """adapter='none' needs backprop_depth of at least mean_steps."""
        if self.adapter == "none" and self.backprop_depth < self.mean_steps:
            raise ConfigError(
                "backprop_depth",
                f"{self.backprop_depth} with adapter='none' lets no gradient reach the embedding "
                f"and the prelude at mean_steps={self.mean_steps}, as they enter before the first "
                f"iteration alone; raise it to {self.mean_steps}, or choose another adapter.",
            )

    @rule("adapter", "state_init")
    def _input_reaches_the_core(self) -> None:
        """adapter='none' needs state_init='none'; other first states do not depend on the input."""
        if self.adapter == "none" and self.state_init != "none":
            raise ConfigError(
                "state_init",
                f"{self.state_init!r} with adapter='none' leaves the input out of the core, as the "
                "first state does not depend on it and nothing is injected; set "
                "state_init='none', or choose another adapter.",
            )

    @rule("gradient")
    def _a_fixed_point_depends_on_the_input(self) -> None:
        """'implicit' needs another adapter than 'none', and neither loop parameters, kept_every nor
        unroll."""
        if self.gradient != "implicit":
            require_defaults(
                self,
                ("implicit_tolerance",),
                f"with gradient={self.gradient!r}",
                "set gradient='implicit'",
            )
            return
        if self.adapter == "none":
            raise ConfigError(
                "gradient",
                "'implicit' with adapter='none': nothing is injected, so where the state settles "
                "does not depend on the input; choose another adapter, or gradient='truncated'.",
            )
        reason, fix = "with gradient='implicit'", "set gradient='truncated'"
        # Iterations that differ have no fixed point in common; only one of them is stored.
        require_defaults(self, (*LOOP_OPTIONS, "kept_every", "unroll"), reason, fix)

    @rule("zero_order_hold")
    def _zero_order_hold_needs_diagonal(self) -> None:
        """True only with adapter='diagonal'."""
        if self.zero_order_hold and self.adapter != "diagonal":
            raise ConfigError(
                "zero_order_hold",
                f"True needs adapter='diagonal', not {self.adapter!r}; set it to False.",
            )

    @rule("sampling_sigma")
    def _sigma_needs_lognormal(self) -> None:
        """Only with sampling='lognormal_poisson'."""
        if self.sampling != "lognormal_poisson":
            require_defaults(
                self,
                ("sampling_sigma",),
                f"with sampling={self.sampling!r}",
                "set sampling='lognormal_poisson'",
            )

    @rule("max_steps")
    def _uniform_fits_max_steps(self) -> None:
        """At least 2 * mean_steps - 1 with sampling='uniform', its largest draw."""
        highest = 2 * self.mean_steps - 1
        if self.sampling == "uniform" and self.max_steps < highest:
            raise ConfigError(
                "max_steps",
                f"{self.max_steps} cuts sampling='uniform', which reaches 2 * mean_steps - 1 = "
                f"{highest}; raise it to at least {highest}, or lower mean_steps.",
            )

    @rule("ramp_steps", "ramp_from", "ramp_backprop")
    def _ramp_options_go_together(self) -> None:
        """With ramp='none' all keep their defaults; the other ramps need ramp_steps >= 1."""
        if self.ramp == "none":
            names = ("ramp_steps", "ramp_from", "ramp_backprop")
            require_defaults(self, names, "with ramp='none'", "choose a ramp")
        elif self.ramp_steps == 0:
            raise ConfigError(
                "ramp_steps", f"0 does not go with ramp={self.ramp!r}; give at least 1."
            )

    @rule("ramp_from")
    def _ramp_starts_below_the_mean(self) -> None:
        """At most mean_steps."""
        if self.ramp_from > self.mean_steps:
            raise ConfigError(
                "ramp_from", f"{self.ramp_from} exceeds mean_steps={self.mean_steps}; lower it."
            )

    @rule("ramp_backprop", "ramp_from", "backprop_depth")
    def _ramp_raises_backprop_depth(self) -> None:
        """ramp_backprop needs a ramp with more than one depth to backpropagate through."""
        if self.ramp_backprop and len(self.backprop_depths) == 1:
            raise ConfigError(
                "ramp_backprop",
                f"True changes nothing, as ramp_from={self.ramp_from} needs all of backprop_depth="
                f"{self.backprop_depth}; lower ramp_from, or set it to False.",
            )

    @property
    def backprop_depths(self) -> tuple[int, ...]:
        """The depths that training backpropagates through, ascending; one but for a ramp."""
        if not self.ramp_backprop:
            return (self.backprop_depth,)
        least = self.backprop_depth * self.ramp_from / self.mean_steps
        powers = (2**power for power in range(self.backprop_depth.bit_length()))
        return (*(n for n in powers if least <= n < self.backprop_depth), self.backprop_depth)

    @rule("unroll")
    def _unroll_fits_backprop_depth(self) -> None:
        """At most backprop_depth."""
        if self.unroll > self.backprop_depth:
            raise ConfigError(
                "unroll",
                f"{self.unroll} exceeds backprop_depth={self.backprop_depth}; lower it.",
            )


# ------------------------------------------------------------------------------
# The exit gate, and the term that trains it.


@dataclasses.dataclass(frozen=True)
class ExitGateConfig:
    """A gate that says after every iteration how likely a token should stop there (PonderNet,
    arXiv 2107.05407)."""

    enabled: bool = option(
        False,
        "Adds the gate: sigmoid(w . norm(state) + b), one number per token and iteration. "
        "train.exit_gate trains it, the exit criterion learned_gate uses it.",
    )
    norm: bool = option(
        True,
        "Normalises what the gate reads. False: it reads the core's state as it is, for models "
        "whose recurrence.iteration_norm has normalised it (Ouro).",
    )

    def __post_init__(self) -> None:
        check_options(self)

    @rule("norm")
    def _norm_needs_a_gate(self) -> None:
        """False only with enabled=True."""
        if not self.enabled:
            require_defaults(self, ("norm",), "with enabled=False", "set enabled=True")


@dataclasses.dataclass(frozen=True)
class ExitGateTrainingConfig:
    """The gate's term of the loss: weight * (expected loss over iterations + kl_weight * KL of the
    exit distribution from the prior), or what target='gain' says."""

    target: str = option(
        "expected_loss",
        "What the gate learns from. expected_loss: the loss under its exit distribution. gain: in "
        "each iteration from the second on, to go on with probability sigmoid(gain_slope (gain - "
        "gain_threshold)), where gain is how much the iteration lowered the token's loss, at least "
        "0; by cross-entropy (Ouro's second stage, arXiv 2510.25741).",
        choices=("expected_loss", "gain"),
    )
    gain_slope: float = option(50.0, "Per nat; how sharply target='gain' decides.", above=0)
    gain_threshold: float = option(
        0.005, "Gain in nats at which target='gain' is undecided.", minimum=0
    )
    weight: float = option(
        1.0, "Weight of the term relative to the loss at the drawn depth.", above=0
    )
    kl_weight: float = option(
        0.05,
        "Weight, within the term, of the KL divergence in nats of the exit distribution from the "
        "prior. Keeps the gate from settling on one depth early.",
        minimum=0,
    )
    prior: str = option(
        "uniform",
        "uniform: all iterations alike, so the KL is the negative entropy plus a constant (Ouro, "
        "arXiv 2510.25741). geometric: with mean prior_mean (PonderNet).",
        choices=("uniform", "geometric"),
    )
    prior_mean: float | None = option(
        None,
        "Mean of the geometric prior in iterations, before it is truncated at max_steps.",
        above=1,
    )
    max_steps: int | None = option(
        None,
        "Iterations that the term covers; the last one takes the remaining probability. Default "
        "(None): twice model.recurrence.mean_steps.",
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
        _check_prior_mean(self)

    @rule("kl_weight", "prior")
    def _gain_has_no_prior(self) -> None:
        """Keep the default with target='gain'."""
        if self.target == "gain":
            names = ("kl_weight", "prior", "prior_mean")
            require_defaults(self, names, "with target='gain'", "set target='expected_loss'")

    @rule("gain_slope", "gain_threshold")
    def _gain_is_the_target(self) -> None:
        """Only with target='gain'."""
        if self.target != "gain":
            names = ("gain_slope", "gain_threshold")
            require_defaults(self, names, f"with target={self.target!r}", "set target='gain'")

    @rule("detach")
    def _gain_trains_the_gate_alone(self) -> None:
        """True with target='gain', whose losses are constants."""
        if self.target == "gain" and not self.detach:
            raise ConfigError(
                "detach",
                "False with target='gain' would move states towards what the gate guessed, as the "
                "target's losses are constants; set it to True.",
            )

    @rule("prior", "prior_mean")
    def _prior_needs_a_weight(self) -> None:
        """Keep the default with kl_weight=0."""
        if self.kl_weight == 0:
            require_defaults(self, ("prior", "prior_mean"), "with kl_weight=0", "raise kl_weight")


def _check_prior_mean(options: "ExitGateTrainingConfig | SupervisionConfig") -> None:
    if options.prior != "geometric":
        require_defaults(
            options, ("prior_mean",), f"with prior={options.prior!r}", "set prior='geometric'"
        )
    elif options.prior_mean is None:
        raise ConfigError(
            "prior_mean", "None says nothing with prior='geometric'; give a number above 1."
        )


# ------------------------------------------------------------------------------
# A loss at every iteration.


@dataclasses.dataclass(frozen=True)
class SupervisionConfig:
    """The text's loss at every iteration, weighted by a fixed prior over iterations; it takes the
    place of the loss at the drawn depth, or part of it."""

    prior: str = option(
        "none",
        "Weights of the iterations. none: only the drawn depth has a loss. uniform: all alike. "
        "geometric: with mean prior_mean, the last one takes what is left (arXiv 2607.20519).",
        choices=("none", "uniform", "geometric"),
    )
    prior_mean: float | None = option(
        None,
        "Mean of the geometric prior in iterations, before it is truncated at max_steps.",
        above=1,
    )
    mix: float = option(
        1.0,
        "Part of the text's loss that is the mean over iterations; the rest is the loss at the "
        "drawn depth, from another pass. 1: no depth is drawn, and there is one pass.",
        above=0,
        maximum=1,
    )
    max_steps: int | None = option(
        None,
        "Iterations that have a loss. Default (None): model.recurrence.mean_steps.",
        minimum=2,
    )

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def is_alone(self) -> bool:
        """Whether no pass goes to a drawn depth."""
        return self.prior != "none" and self.mix == 1

    @rule("mix", "max_steps")
    def _options_need_a_prior(self) -> None:
        """Keep the default with prior='none'."""
        if self.prior == "none":
            require_defaults(self, ("mix", "max_steps"), "with prior='none'", "choose a prior")

    @rule("prior_mean")
    def _prior_mean_goes_with_geometric(self) -> None:
        """Given if and only if prior='geometric'."""
        _check_prior_mean(self)

    @rule("max_steps")
    def _one_pass_has_one_depth(self) -> None:
        """None with mix=1, where model.recurrence.mean_steps is the number of iterations."""
        if self.is_alone:
            require_defaults(
                self, ("max_steps",), "with mix=1", "set model.recurrence.mean_steps instead"
            )


# ------------------------------------------------------------------------------
# Terms that keep iterations beyond the trained depth from leaving what was reached.


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
    fixed_point_weight: float = option(
        0.0,
        "Weight of |h_T - h_{T-1}|^2 / |h_T|^2 per token that counts: how far the last iteration "
        "still moved the state h (arXiv 2608.18222). Tokens that made one iteration alone add "
        "nothing. 0: off, at no cost.",
        minimum=0,
    )
    fixed_point_warmup_steps: int = option(
        0, "Optimiser steps over which fixed_point_weight grows from 0.", minimum=0
    )

    def __post_init__(self) -> None:
        check_options(self)

    @rule("jacobian_warmup_steps", "fixed_point_warmup_steps")
    def _warmups_need_a_weight(self) -> None:
        """Only with jacobian_weight and fixed_point_weight above 0."""
        for term in ("jacobian", "fixed_point"):
            weight = f"{term}_weight"
            if getattr(self, weight) == 0:
                names = (f"{term}_warmup_steps",)
                require_defaults(self, names, f"with {weight}=0", f"raise {weight}")
