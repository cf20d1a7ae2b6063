"""Where a run's parameters come from, and which of them it trains."""

import dataclasses
import re

from megatransformer_jax.config.option import (
    ConfigError,
    check_options,
    option,
    require_defaults,
    rule,
    section,
)

# Where the parameters of a model's exit gate are.
EXIT_GATE = "exit_gate/"
ATTENTION_AND_MLP = (r"attention/(qkv|output)$", r"mlp/(up|down)$")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank updates next to frozen weights (arXiv 2106.09685): W + alpha / rank * a b."""

    rank: int = option(0, "Rank of the updates. 0: no LoRA.", minimum=0)
    alpha: float = option(16.0, "The updates are multiplied by alpha / rank.", above=0)
    targets: tuple[str, ...] = option(
        ATTENTION_AND_MLP,
        "Regular expressions, searched for in parameter paths such as core/layers/layer_0/mlp/up. "
        "Matching matrices get updates.",
    )

    def __post_init__(self) -> None:
        check_options(self)

    @rule("alpha", "targets")
    def _lora_options_need_a_rank(self) -> None:
        """Keep the default when rank=0."""
        if self.rank == 0:
            require_defaults(self, ("alpha", "targets"), "with rank=0", "set rank to 1 or more")

    @rule("targets")
    def _targets_are_patterns(self) -> None:
        """At least one regular expression."""
        if not self.targets:
            raise ConfigError("targets", "is empty; name a matrix, or set rank=0.")
        check_patterns("targets", self.targets)


@dataclasses.dataclass(frozen=True)
class FineTuningConfig:
    """Start from another model, and training of a part of the parameters."""

    init_from: str | None = option(
        None,
        "Source of the parameters if the workdir has no checkpoint yet: the workdir of a run, or "
        "a checkpoint of another project, which may be its name on the Hugging Face hub. The "
        "optimiser starts from scratch. Default (None): random initialisation.",
    )
    init_step: str = option(
        "latest", "Which checkpoint of init_from: latest, best, or the number of a step."
    )
    freeze: tuple[str, ...] = option(
        (),
        "Regular expressions, searched for in parameter paths such as core/layers/layer_0/mlp/up. "
        "Matching parameters are not trained.",
    )
    train_only: tuple[str, ...] = option(
        (), "Regular expressions for the parameters to train; all others stay as they are."
    )
    base_precision: str = option(
        "float32",
        "How the frozen parameters under LoRA are stored. int8: matrices with a float32 scale per "
        "output channel (extra 'qlora').",
        choices=("float32", "int8"),
    )
    retrofit: bool = option(
        False,
        "init_from is a plain model (core_layers=0): its first layers become the prelude, its "
        "last the coda, and those before the coda the core (arXiv 2511.07384).",
    )
    core_start: int | None = option(
        None,
        "retrofit only: index of the layer of init_from that becomes the first of the core. "
        "Default (None): chosen so that the core ends where the coda begins.",
        minimum=0,
    )
    lora: LoraConfig = section(LoraConfig, "Low-rank updates.")

    def __post_init__(self) -> None:
        check_options(self)

    @rule("init_step")
    def _init_step_names_a_checkpoint(self) -> None:
        """latest, best or a number; only with init_from."""
        if self.init_step not in ("latest", "best") and not self.init_step.isdecimal():
            raise ConfigError(
                "init_step", f"{self.init_step!r}: give latest, best, or the number of a step."
            )
        if self.init_from is None:
            require_defaults(self, ("init_step",), "with init_from=None", "set init_from")

    @rule("init_from")
    def _init_from_is_named(self) -> None:
        """Not empty."""
        if self.init_from == "":
            raise ConfigError("init_from", "'' is not a folder; name one, or give None.")

    @rule("freeze", "train_only")
    def _parts_are_chosen_once(self) -> None:
        """Regular expressions; not both, and neither with LoRA, which chooses by its targets."""
        for name in ("freeze", "train_only"):
            patterns = getattr(self, name)
            check_patterns(name, patterns)
            if patterns and self.lora.rank:
                raise ConfigError(
                    name,
                    f"{patterns!r} does not go with lora.rank={self.lora.rank}, which freezes "
                    f"everything but its updates and the exit gate; leave {name} empty, or set "
                    "lora.rank=0.",
                )
        if self.freeze and self.train_only:
            raise ConfigError(
                "train_only",
                f"{self.train_only!r} and freeze={self.freeze!r}: give one of them; "
                "everything else is frozen, or trained.",
            )

    @rule("base_precision")
    def _int8_needs_lora(self) -> None:
        """int8 only with lora.rank >= 1: what is trained must be float32."""
        if self.base_precision == "int8" and self.lora.rank == 0:
            raise ConfigError(
                "base_precision", "'int8' needs lora.rank of at least 1; set it, or use float32."
            )

    @rule("retrofit", "core_start")
    def _retrofit_needs_a_source(self) -> None:
        """retrofit needs init_from, and core_start needs retrofit."""
        if self.retrofit and self.init_from is None:
            raise ConfigError("retrofit", "True needs init_from: the plain model to start from.")
        if not self.retrofit:
            require_defaults(self, ("core_start",), "with retrofit=False", "set retrofit=True")

    @rule("lora.rank", "init_from")
    def _lora_needs_a_source(self) -> None:
        """init_from is given with lora.rank >= 1."""
        if self.lora.rank and self.init_from is None:
            raise ConfigError(
                "init_from",
                f"None with lora.rank={self.lora.rank} would freeze weights as they are drawn, "
                "before any training; name the model to start from, or set lora.rank=0.",
            )

    def trains(self, path: str) -> bool:
        """Whether the parameter at a path is trained, itself or by an update of LoRA.

        LoRA trains the exit gate itself: it is vectors alone, which have no updates, and a fresh
        one would stay at its start.
        """

        def matches(patterns: tuple[str, ...]) -> bool:
            return any(re.search(pattern, path) for pattern in patterns)

        if self.lora.rank:
            return path.startswith(EXIT_GATE) or matches(self.lora.targets)
        return matches(self.train_only) if self.train_only else not matches(self.freeze)


def check_patterns(name: str, patterns: tuple[str, ...]) -> None:
    """Checks that every item is a regular expression.

    Raises:
      ConfigError: for option `name`, with what is wrong.
    """
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(
                name, f"{pattern!r} is not a regular expression ({error}); correct it."
            ) from error


# Nothing is frozen and nothing added: the parameters of a run are those of its model.
TRAIN_ALL = FineTuningConfig()
