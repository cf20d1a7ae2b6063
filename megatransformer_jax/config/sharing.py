"""Layers of a stack that share their weights."""

import dataclasses

from megatransformer_jax.config.option import (
    ConfigError,
    check_options,
    option,
    require_defaults,
    rule,
)

SHARING_SCHEMES = ("none", "sequence", "cycle", "cycle_rev")
_UNIQUE = ("prelude_unique", "core_unique", "coda_unique")


@dataclasses.dataclass(frozen=True)
class SharingConfig:
    """Which layers of prelude, core and coda have the same weights (arXiv 2104.06022)."""

    scheme: str = option(
        "none",
        "Weights of 6 layers of which 3 are unique. sequence: 0 0 1 1 2 2. cycle: 0 1 2 0 1 2. "
        "cycle_rev: 0 1 2 2 1 0, so cycle with the last round reversed.",
        choices=SHARING_SCHEMES,
    )
    prelude_unique: int | None = option(
        None, "Different layers of the prelude. None: all of them.", minimum=1
    )
    core_unique: int | None = option(
        None, "Different layers of one core iteration. None: all of them.", minimum=1
    )
    coda_unique: int | None = option(
        None, "Different layers of the coda. None: all of them.", minimum=1
    )

    def __post_init__(self) -> None:
        check_options(self)

    @rule("scheme", *_UNIQUE)
    def _scheme_and_counts_go_together(self) -> None:
        """A scheme needs one of prelude_unique, core_unique and coda_unique, and they need it."""
        if self.scheme == "none":
            require_defaults(self, _UNIQUE, "with scheme='none'", "choose a scheme")
        elif all(getattr(self, name) is None for name in _UNIQUE):
            raise ConfigError(
                "scheme",
                f"{self.scheme!r} shares nothing as long as all layers are unique; set one of "
                f"{', '.join(_UNIQUE)}, or scheme='none'.",
            )
