"""Options of programs that are compiled ahead of time for TPUs and GPUs that need not be here."""

import dataclasses

from megatransformer_jax.config.generation import GENERATION_OPTIONS
from megatransformer_jax.config.option import (
    MAX_COUNT,
    ConfigError,
    check_options,
    option,
    require_defaults,
    rule,
)

PHASES = ("train", "prefill", "decode", "serve")
CRITERIA = GENERATION_OPTIONS["exit_criterion"].check.choices
# What a phase other than training has if nothing is said.
DEFAULT_PROMPT, DEFAULT_NEW_TOKENS, DEFAULT_CAPACITY = 512, 512, 2048

# Which options mean something in which phases.
_OF_PHASES = {
    "rows": ("prefill", "decode", "serve"),
    "prompt_tokens": ("prefill", "decode"),
    "new_tokens": ("prefill", "decode"),
    "depth": ("prefill", "decode", "serve"),
    "exit_criterion": ("prefill", "decode"),
    "cache_slots": ("prefill", "decode", "serve"),
    "capacity": ("serve",),
}


@dataclasses.dataclass(frozen=True)
class CompileConfig:
    """Which programs are compiled for which TPUs or GPUs. Nothing runs."""

    topology: str | None = option(
        None,
        "The slice, by the name of an accelerator (v4-128, v5p-64, v5e-256, v6e-8) or as its box "
        "of chips (v4:4x4x4, v5e:16x16). The number counts cores with v4 and v5p, two per chip, "
        "and chips with v5e and v6e. Or a machine with GPUs: h100-8 has eight; kinds are l4, "
        "a100-40gb, a100-80gb, h100, h200 and b200. Must be given.",
    )
    slices: int = option(
        1,
        "Number of such slices or machines, joined by the data centre's network.",
        minimum=1,
        maximum=MAX_COUNT,
    )
    phase: str = option(
        "train",
        "train: the train step. prefill: reading the prompts of a generation, in one pass. decode: "
        "its loop over new tokens. serve: the programs of a server's batch. All but train run on "
        "one chip unless the mesh says otherwise.",
        choices=PHASES,
    )
    rows: int | None = option(
        None,
        "Texts at once, of phases other than train (whose rows are data.batch_size). Default "
        "(None): 1, and 8 with phase='serve'.",
        minimum=1,
        maximum=MAX_COUNT,
    )
    prompt_tokens: int = option(
        DEFAULT_PROMPT, "Tokens of a prompt in a generation.", minimum=1, maximum=MAX_COUNT
    )
    new_tokens: int = option(
        DEFAULT_NEW_TOKENS,
        "New tokens of a text in a generation, for which the cache has room.",
        minimum=1,
        maximum=MAX_COUNT,
    )
    depth: int | None = option(
        None,
        "Iterations of the core per token, outside of training. Default (None): the trained mean.",
        minimum=1,
        maximum=MAX_COUNT,
    )
    exit_criterion: str = option(
        "fixed", "Criterion that ends a token's iterations early.", choices=CRITERIA
    )
    cache_slots: int | None = option(
        None,
        "Slots of each core layer in the cache. Default (None): as generate and serve have it.",
        minimum=1,
        maximum=MAX_COUNT,
    )
    capacity: int | None = option(
        None,
        "Tokens of a row that is served, prompt included. Default (None): max_length of the model, "
        f"at most {DEFAULT_CAPACITY}.",
        minimum=2,
        maximum=MAX_COUNT,
    )
    headroom: bool = option(
        False,
        "Also compiles more rows, to say how many fit: twice as many, then by halving.",
    )

    def __post_init__(self) -> None:
        check_options(self)

    @rule("topology")
    def _slices_are_named(self) -> None:
        """Must be given."""
        if not self.topology:
            raise ConfigError(
                "topology",
                "is missing; name a slice or a machine, as topology=v4-128 or topology=h100-8.",
            )

    @rule(*_OF_PHASES)
    def _options_belong_to_phases(self) -> None:
        """Keep the default in phases that do not have it."""
        for name, phases in _OF_PHASES.items():
            if self.phase not in phases:
                fix = f"set phase to {' or '.join(phases)}"
                require_defaults(self, (name,), f"with phase={self.phase!r}", fix)

    @property
    def num_rows(self) -> int:
        """Texts at once, outside of training."""
        return self.rows or (8 if self.phase == "serve" else 1)
