"""How one token is generated: iterations of the core, the key/value cache, and the logits."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from megatransformer_jax.config.option import (
    MAX_COUNT,
    ConfigError,
    check_options,
    option,
    require_defaults,
    rule,
)

# models/exit_criteria.py has a function for each.
EXIT_CRITERIA = (
    "fixed",
    "latent_diff",
    "cosine",
    "entropy_diff",
    "kl",
    "minp_kl",
    "argmax_stability",
    "entropy",
    "top1",
    "margin",
    "learned_gate",
)


# `exit_threshold` of a model that was calibrated, see config/calibration.py.
AUTO = "auto"

# models/gate_readout.py has what they mean.
GATE_READOUTS = ("last", "threshold", "weighted")
GATE_THRESHOLD = 0.5


def check_readout(readout: str, threshold: float) -> None:
    """Checks that a threshold is read.

    Raises:
      ConfigError: if it is given, but for `gate_readout=threshold`.
    """
    if readout != "threshold" and threshold != GATE_THRESHOLD:
        raise ConfigError(
            "gate_threshold",
            f"{threshold} would be ignored with gate_readout={readout!r}; leave it out, or set "
            "gate_readout='threshold'.",
        )


@dataclasses.dataclass(frozen=True)
class DepthConfig:
    """How often the core is iterated for each token."""

    depth: int | None = option(
        None,
        "Iterations per token, at most. Default (None): the mean in training.",
        minimum=1,
        maximum=MAX_COUNT,
    )
    exit_criterion: str = option(
        "fixed",
        "Criterion that ends a token's iterations before depth. fixed: none. Some measure how much "
        "an iteration changed: latent_diff and cosine compare the core's state; "
        "entropy_diff, kl and minp_kl compare the distribution of the next token; "
        "argmax_stability counts consecutive iterations with the same likeliest token. Others ask "
        "how sure the model is: entropy of the next token, top1 (1 - its largest probability), "
        "margin (1 - what the largest is ahead of the second). "
        "learned_gate: the model's trained exit gate (model.exit_gate.enabled).",
        choices=EXIT_CRITERIA,
    )
    exit_threshold: float | str | None = option(
        None,
        "A token exits once its value is below this (argmax_stability: at least this). auto: what "
        "`megatransformer calibrate` has found for this model, criterion and depth. Default "
        "(None): the criterion's default, see models/exit_criteria.py.",
        above=0,
        words=(AUTO,),
    )
    min_depth: int = option(
        1, "Smallest number of iterations before a token may exit.", minimum=1, maximum=MAX_COUNT
    )
    gate_readout: str = option(
        "last",
        "What the output is read from once all iterations of depth are made. last: the last state. "
        "threshold: the state of the first iteration whose cumulative exit probability, by the "
        "model's exit gate, is at least gate_threshold. weighted: the states' mean over the exit "
        "distribution (both Ouro's, arXiv 2510.25741). Saves no time; exit_criterion=learned_gate "
        "does.",
        choices=GATE_READOUTS,
    )
    gate_threshold: float = option(
        GATE_THRESHOLD,
        "Cumulative exit probability of gate_readout=threshold; Ouro's early_exit_threshold.",
        above=0,
        maximum=1,
    )
    warm_start: bool = option(
        False, "A token's first state is the last state of the token before it (arXiv 2502.05171)."
    )

    def __post_init__(self) -> None:
        check_options(self)

    @rule("exit_threshold", "min_depth")
    def _exit_options_need_a_criterion(self) -> None:
        """Keep the default with exit_criterion='fixed'."""
        if self.exit_criterion == "fixed":
            require_defaults(
                self,
                ("exit_threshold", "min_depth"),
                "with exit_criterion='fixed'",
                f"choose one of {', '.join(EXIT_CRITERIA[1:])}",
            )

    @rule("gate_readout", "gate_threshold")
    def _readouts_make_all_iterations(self) -> None:
        """gate_readout other than last needs exit_criterion='fixed'; gate_threshold keeps its
        default unless gate_readout='threshold'."""
        check_readout(self.gate_readout, self.gate_threshold)
        if self.gate_readout != "last" and self.exit_criterion != "fixed":
            raise ConfigError(
                "gate_readout",
                f"{self.gate_readout!r} reads a pass that makes all iterations, and "
                f"exit_criterion={self.exit_criterion!r} ends them early; leave out either.",
            )

    @rule("exit_threshold")
    def _survival_is_a_probability(self) -> None:
        """Below 1 with exit_criterion='learned_gate', where it is a probability."""
        threshold = self.exit_threshold
        if threshold is None or isinstance(threshold, str):
            return
        if self.exit_criterion == "learned_gate" and threshold >= 1:
            raise ConfigError(
                "exit_threshold",
                f"{threshold} is not below 1, so that every token would leave at once; "
                "learned_gate compares it with the probability of not having exited.",
            )

    @property
    def threshold(self) -> float | None:
        """`exit_threshold` of a certain model, as a number. None: the criterion's default."""
        assert not isinstance(self.exit_threshold, str)  # `for_model` has put a number there.
        return self.exit_threshold

    def check_gate(self, has_exit_gate: bool) -> None:
        """Checks that a model has the gate that is asked.

        Raises:
          ConfigError: naming the option that needs one.
        """
        for name in ("exit_criterion", "gate_readout"):
            value = getattr(self, name)
            if value in ("learned_gate", "threshold", "weighted") and not has_exit_gate:
                raise ConfigError(
                    name,
                    f"{value!r} needs a model with an exit gate (model.exit_gate.enabled in "
                    "training), and this one has none; choose another.",
                )

    @rule("min_depth")
    def _least_depth_is_not_above_depth(self) -> None:
        """At most depth."""
        if self.depth is not None and self.min_depth > self.depth:
            raise ConfigError(
                "min_depth",
                f"{self.min_depth} exceeds depth={self.depth}; lower it or raise depth.",
            )


SHARINGS = ("modulo", "anchor", "last")
EXITED_READS = ("latest", "skip")


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """The key/value cache of prelude, core and coda."""

    slots: int | None = option(
        None,
        "Slots of each core layer, shared by the iterations. Default (None): one slot per "
        "iteration.",
        minimum=1,
        maximum=MAX_COUNT,
    )
    sharing: str = option(
        "modulo",
        "Which slot an iteration uses if there are fewer than iterations. modulo: in turn. "
        "anchor: half of the slots belong to the first iterations, the others take turns on the "
        "rest. last: the first iterations have their own, the others share the last slot.",
        choices=SHARINGS,
    )
    exited_reads: str = option(
        "latest",
        "What later tokens read, at deeper iterations, of a token that exited early. latest: its "
        "last keys and values. skip: they do not see it.",
        choices=EXITED_READS,
    )
    capacity: int | None = option(
        None,
        "Cache capacity in tokens. Default (None): prompt and new tokens, rounded up.",
        minimum=2,
        maximum=MAX_COUNT,
    )
    prefill_chunk: int | None = option(
        None,
        "Prompt tokens per prefill pass, which limits memory. Default (None): the whole prompt.",
        minimum=1,
        maximum=MAX_COUNT,
    )

    def __post_init__(self) -> None:
        check_options(self)

    @rule("sharing")
    def _sharing_needs_slots(self) -> None:
        """Keep the default without slots."""
        if self.slots is None:
            require_defaults(self, ("sharing",), "as every iteration has its own slot", "set slots")

    @rule("sharing")
    def _anchor_needs_two_slots(self) -> None:
        """anchor needs at least 2 slots."""
        check_anchor(self.sharing, self.slots)


def check_anchor(sharing: str, slots: int | None, prefix: str = "") -> None:
    """Checks that there are slots to share; `prefix` is that of the options' names.

    Raises:
      ConfigError: if there is one slot for sharing='anchor'.
    """
    if sharing == "anchor" and slots == 1:
        raise ConfigError(
            f"{prefix}sharing",
            f"'anchor' needs a slot for the first iteration and one for others, not {prefix}slots="
            "1; use more slots or another sharing.",
        )


# ------------------------------------------------------------------------------
# The cache of programs that are compiled once for all depths: a server's, and exported ones.

SLOTS_OF_ANY_DEPTH = 32


def cache_slots_option() -> Any:
    """Slots of each core layer."""
    return option(
        None,
        "Slots of each core layer, shared by the iterations. Default (None): "
        f"{SLOTS_OF_ANY_DEPTH}, or the trained mean depth if that is more; deeper tokens share "
        "them.",
        minimum=1,
        maximum=MAX_COUNT,
    )


def cache_sharing_option() -> Any:
    """How iterations share them."""
    return option(
        "modulo", "Which slot an iteration beyond them uses, as of generate.", choices=SHARINGS
    )


def cache_exited_reads_option() -> Any:
    """What is read of tokens that exited."""
    return option(
        "latest",
        "What later tokens read, at deeper iterations, of a token that exited early, as of "
        "generate.",
        choices=EXITED_READS,
    )


def slots_of_any_depth(slots: int | None, trained_depth: int | None) -> int:
    """What `cache_slots_option` means."""
    return slots or max(SLOTS_OF_ANY_DEPTH, trained_depth or 1)


# ------------------------------------------------------------------------------
# What is done to the scores of the next token.


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """What is done to the scores of the next token before one is chosen."""

    temperature: float = option(
        1.0,
        "Divides the logits. Values below 1 favour likely tokens, values above 1 flatten the "
        "distribution. 0: the likeliest token, with strategy speculative or parallel.",
        minimum=0,
    )
    top_k: int | None = option(
        None, "Keeps only this many of the likeliest tokens.", minimum=1, maximum=MAX_COUNT
    )
    top_p: float | None = option(
        None,
        "Keeps the likeliest tokens whose probabilities first add up to this (arXiv 1904.09751).",
        above=0,
        maximum=1,
    )
    min_p: float | None = option(
        None,
        "Keeps tokens of at least this fraction of the likeliest one's probability "
        "(arXiv 2407.01082).",
        above=0,
        maximum=1,
    )
    typical_p: float | None = option(
        None,
        "Keeps the tokens whose information is nearest to the entropy, up to this probability "
        "(arXiv 2202.00666).",
        above=0,
        maximum=1,
    )
    repetition_penalty: float = option(
        1.0,
        "Divides positive logits of tokens that have occurred (the prompt included) and "
        "multiplies negative ones (arXiv 1909.05858). 1: no penalty.",
        above=0,
    )
    presence_penalty: float = option(
        0.0, "Subtracted from the logit of a token that has been generated before."
    )
    frequency_penalty: float = option(
        0.0, "Subtracted from the logit of a token once for each time it has been generated."
    )
    no_repeat_ngram: int | None = option(
        None,
        "No run of this many tokens occurs twice. Default (None): no limit.",
        minimum=1,
        maximum=MAX_COUNT,
    )
    banned_words: tuple[str, ...] = option((), "Texts that are never generated.")
    forced_words: tuple[str, ...] = option((), "Texts that each continuation contains.")

    def __post_init__(self) -> None:
        check_options(self)

    @rule("top_k", "top_p", "min_p", "typical_p")
    def _cuts_need_draws(self) -> None:
        """Not given with temperature=0."""
        if self.temperature == 0:
            require_defaults(
                self,
                ("top_k", "top_p", "min_p", "typical_p"),
                "with temperature=0, which takes the likeliest token",
                "raise temperature",
            )

    @rule("banned_words", "forced_words")
    def _words_have_text(self) -> None:
        """No empty text, only UTF-8."""
        for name in ("banned_words", "forced_words"):
            check_texts(name, getattr(self, name))

    @rule("forced_words")
    def _no_word_is_banned_and_forced(self) -> None:
        """Must not contain banned_words."""
        for forced in self.forced_words:
            for banned in self.banned_words:
                if banned in forced:
                    raise ConfigError(
                        "forced_words", f"{forced!r} contains the banned {banned!r}; drop one."
                    )


def check_texts(name: str, texts: Sequence[str]) -> None:
    """Checks that no text of an option is empty or cannot be encoded.

    Raises:
      ConfigError: if one is.
    """
    if "" in texts:
        raise ConfigError(
            name, f"{tuple(texts)!r} has an empty text, which occurs everywhere; remove it."
        )
    check_encodable(name, texts)


def check_encodable(name: str, texts: Sequence[str]) -> None:
    """Checks that texts can be written in UTF-8.

    Raises:
      ConfigError: if one has a lone surrogate; a command line has them for bytes that are not text.
    """
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ConfigError(
                name,
                f"{text!r} has {text[error.start]!r} at character {error.start}, which is not "
                "text; write it in UTF-8.",
            ) from error
