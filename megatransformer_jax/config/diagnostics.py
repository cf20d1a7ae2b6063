"""Looks into the model during training, as a frozen dataclass."""

import dataclasses

from megatransformer_jax.config.option import (
    ConfigError,
    check_options,
    option,
    require_defaults,
    rule,
)

RECURRENT_KINDS = ("recurrence", "spectral_radius", "depth_draws")
DIAGNOSTIC_KINDS = (
    "gradient_norms",
    "activations",
    "attention_maps",
    "token_correlation",
    *RECURRENT_KINDS,
)


@dataclasses.dataclass(frozen=True)
class DiagnosticsConfig:
    """Figures of a few validation rows, in TensorBoard and as PNGs in the workdir."""

    every_steps: int = option(
        0, "Steps between diagnostics, which the last step gets too; 0: never.", minimum=0
    )
    kinds: tuple[str, ...] = option(
        (),
        "gradient_norms: by layer, with the norms of the weights. activations: histograms. "
        "attention_maps: of the first row. token_correlation: mean cosine between tokens. "
        "recurrence: residual, contraction and size of the state by iteration. spectral_radius: "
        "of the core's Jacobian. depth_draws: iterations drawn since the last time. Empty: all "
        "that the model has.",
        choices=DIAGNOSTIC_KINDS,
    )
    num_rows: int = option(
        2, "The first so many rows of the first validation batch are looked at.", minimum=1
    )
    num_steps: int | None = option(
        None, "Iterations that are shown. None: twice the trained mean.", minimum=1
    )

    def __post_init__(self) -> None:
        check_options(self)

    @rule("kinds", "num_rows", "num_steps")
    def _what_is_shown_goes_with_steps(self) -> None:
        """At their defaults with every_steps=0 (`experiments.diagnose` has flags of its own)."""
        if self.every_steps == 0:
            require_defaults(
                self,
                ("kinds", "num_rows", "num_steps"),
                "with every_steps=0",
                "set every_steps above 0",
            )

    @rule("kinds")
    def _kinds_are_different(self) -> None:
        """Each at most once."""
        if len(set(self.kinds)) != len(self.kinds):
            raise ConfigError("kinds", f"{self.kinds!r} repeats a kind; name each once.")
