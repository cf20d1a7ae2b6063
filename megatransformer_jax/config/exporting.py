"""Options of a program that leaves this package, the same on the command line and in Python."""

import dataclasses

from megatransformer_jax.config.generation import GENERATION_OPTIONS
from megatransformer_jax.config.option import (
    MAX_COUNT,
    MAX_SEED,
    ConfigError,
    check_options,
    option,
    require_defaults,
    rule,
)
from megatransformer_jax.config.sampling import (
    cache_exited_reads_option,
    cache_sharing_option,
    cache_slots_option,
)

FORMATS = ("stablehlo", "onnx")
# What a program has if the model says nothing smaller.
DEFAULT_CAPACITY = 1024
GATE_READOUTS = GENERATION_OPTIONS["gate_readout"].check.choices
CRITERIA = GENERATION_OPTIONS["exit_criterion"].check.choices
_OF_THE_CORE = (
    "criterion",
    "gate_readout",
    "cache_slots",
    "cache_sharing",
    "cache_exited_reads",
    "seed",
)


@dataclasses.dataclass(frozen=True)
class ProgramConfig:
    """What the exported program can do. Its shapes are fixed; depth and thresholds are inputs."""

    format: str = option(
        "stablehlo",
        "stablehlo: a program for any runtime of XLA, parameters in a file next to it. onnx: for "
        "onnxruntime, parameters among its initialisers.",
        choices=FORMATS,
    )
    batch: int = option(
        1, "Rows that are read and continued at once.", minimum=1, maximum=MAX_COUNT
    )
    capacity: int | None = option(
        None,
        "Cache capacity in tokens, prompt and padding included; rounded up to a multiple of 64. "
        f"Default (None): max_length of the model, at most {DEFAULT_CAPACITY}.",
        minimum=2,
        maximum=MAX_COUNT,
    )
    chunk: int = option(64, "Prompt tokens per pass.", minimum=1, maximum=MAX_COUNT)
    criterion: tuple[str, ...] = option(
        ("latent_diff",),
        "Exit criteria among which the program's caller chooses. With several of them, those that "
        "read logits cost time only where they are chosen.",
        choices=CRITERIA,
    )
    gate_readout: str = option(
        "last",
        "What the output is read from once all iterations are made, as of generate; needs "
        "criterion=fixed. With threshold the caller gives gate_threshold.",
        choices=GATE_READOUTS,
    )
    cache_slots: int | None = cache_slots_option()
    cache_sharing: str = cache_sharing_option()
    cache_exited_reads: str = cache_exited_reads_option()
    seed: int = option(
        0,
        "Seed of the rows' keys in program.json, from which first states are drawn if the model "
        "draws them.",
        minimum=0,
        maximum=MAX_SEED,
    )
    check: bool = option(
        False, "Runs what was written next to this package's own decoding, and prints a table."
    )

    def __post_init__(self) -> None:
        check_options(self)

    @rule("criterion")
    def _criteria_differ(self) -> None:
        """At least one, none twice."""
        if not self.criterion or len(set(self.criterion)) < len(self.criterion):
            problem = "names one twice" if self.criterion else "is empty"
            raise ConfigError("criterion", f"{problem}; name each once: {', '.join(CRITERIA)}.")

    @rule("gate_readout")
    def _readouts_make_all_iterations(self) -> None:
        """Keep the default unless criterion is 'fixed' alone."""
        if self.gate_readout != "last" and self.criterion != ("fixed",):
            raise ConfigError(
                "gate_readout",
                f"{self.gate_readout!r} reads a pass that makes all iterations, and criterion="
                f"{','.join(self.criterion)} may end it early; give criterion=fixed.",
            )

    def check_model_without_core(self) -> None:
        """Checks that nothing is asked of a core.

        Raises:
          ConfigError: if an option is not at its default.
        """
        require_defaults(self, _OF_THE_CORE, "as the model has no recurrent core", "leave it out")
