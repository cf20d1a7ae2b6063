"""How the weights of a finished model are rounded to 8 or 4 bits."""

import dataclasses

from megatransformer_jax.config.fine_tuning import check_patterns
from megatransformer_jax.config.option import (
    MAX_COUNT,
    MAX_SEED,
    ConfigError,
    check_options,
    option,
    require_defaults,
    rule,
)

# Matrices that layers know how to read when they are quantised.
QUANTIZABLE = (
    r"^(prelude|core/layers|coda)/layer_\d+/attention/(qkv|output)$",
    r"^(prelude|core/layers|coda)/layer_\d+/mlp/(up|down)$",
    r"^core/adapter/(state_kernel|embedding_kernel|b_matrix)$",
    r"^embedding/(embedding|head)$",
)
# The injection, the embedding and the head stay as they are.
DEFAULT_INCLUDE = (r"/attention/(qkv|output)$", r"/mlp/(up|down)$")
BITS = {"int8": 8, "int4": 4}
# Inputs that share a scale in int4, where the user names no other number.
INT4_GROUP = 64
_OF_CALIBRATION = ("calibration_batches", "calibration_files")


@dataclasses.dataclass(frozen=True)
class QuantizationConfig:
    """To how many bits, by which method, and which matrices."""

    weights: str = option("int8", "Type of the weights.", choices=tuple(BITS))
    group: int | None = option(
        None,
        "Inputs of a matrix that share a scale, an even number. 0: all inputs of an output channel "
        "do. Default (None): 0 for int8, 64 for int4.",
        minimum=0,
        maximum=MAX_COUNT,
    )
    activations: str = option(
        "float",
        "int8: the inputs of these matrices are rounded too, each token by its largest entry, and "
        "products are of whole numbers. float: they are not rounded.",
        choices=("float", "int8"),
    )
    method: str = option(
        "rtn",
        "rtn rounds each number to the nearest. gptq rounds input by input and corrects the "
        "others for the error (arXiv 2210.17323). awq scales inputs by their size before rounding "
        "(arXiv 2306.00978). gptq and awq need calibration data.",
        choices=("rtn", "gptq", "awq"),
    )
    include: tuple[str, ...] = option(
        DEFAULT_INCLUDE,
        "Regular expressions, searched for in parameter paths such as core/layers/layer_0/mlp/up. "
        "Matching matrices of attention, MLP, injection (core/adapter/), embedding and head "
        "(embedding/) are quantised; vectors and other matrices never are.",
    )
    calibration_batches: int = option(
        8, "gptq and awq: batches of calibration data.", minimum=1, maximum=MAX_COUNT
    )
    calibration_files: tuple[str, ...] = option(
        (),
        "gptq and awq: files with text to calibrate on (.txt, .jsonl, .parquet). Default (empty): "
        "the training data of the model's run.",
    )
    seed: int = option(
        0,
        "gptq and awq: seed of depths and first states in calibration.",
        minimum=0,
        maximum=MAX_SEED,
    )

    def __post_init__(self) -> None:
        check_options(self)

    @rule("group")
    def _pairs_share_a_scale(self) -> None:
        """0, or an even number."""
        if self.group is not None and self.group % 2:
            raise ConfigError(
                "group", f"{self.group} is odd; use an even number, such as 64, or 0."
            )

    @rule("include")
    def _include_has_patterns(self) -> None:
        """At least one regular expression."""
        if not self.include:
            raise ConfigError("include", "is empty; name a matrix, or leave it out.")
        check_patterns("include", self.include)

    @rule(*_OF_CALIBRATION)
    def _rounding_needs_no_data(self) -> None:
        """Only with method='gptq' or 'awq'."""
        if self.method == "rtn":
            names = (*_OF_CALIBRATION, "seed")
            require_defaults(self, names, "with method='rtn'", "choose gptq or awq")

    @property
    def bits(self) -> int:
        """Bits of a number."""
        return BITS[self.weights]

    def group_of(self, inputs: int) -> int:
        """Inputs that share a scale in a matrix of so many; an even number."""
        group = (0 if self.weights == "int8" else INT4_GROUP) if self.group is None else self.group
        whole = inputs + inputs % 2
        return min(group, whole) if group else whole
