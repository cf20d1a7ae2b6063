"""PEER: a feed-forward layer of very many experts of one neuron each."""

import dataclasses
import math

from megatransformer_jax.config.option import (
    ConfigError,
    check_options,
    option,
    require_defaults,
    rule,
)


@dataclasses.dataclass(frozen=True)
class PeerConfig:
    """Parameter-efficient expert retrieval (arXiv 2407.04153), for mlp.kind='peer'.

    A token's cost depends on num_heads and top_k and on the square root of num_experts alone.
    """

    num_experts: int = option(
        16_384, "Experts, each of one neuron; the square of a whole number.", minimum=1
    )
    num_heads: int = option(
        8, "Queries per token; each retrieves experts of its own from the same pool.", minimum=1
    )
    top_k: int = option(
        16, "Experts per query. A token's active neurons are num_heads * top_k.", minimum=1
    )
    key_dim: int = option(
        128, "Width of a query. Each of its halves is compared with half keys.", minimum=2
    )
    query_norm: str = option(
        "batch",
        "Normalisation of queries, with a learned scale and bias. batch: of each channel over all "
        "tokens of the batch, as in the paper; evaluation uses running statistics. layer: over "
        "the channels of a query.",
        choices=("batch", "layer", "none"),
    )
    query_momentum: float = option(
        0.9,
        "What the running statistics of query_norm='batch' keep of themselves in a training step.",
        minimum=0,
        below=1,
    )

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def num_keys(self) -> int:
        """Half keys in each of the two sets: the square root of `num_experts`."""
        return math.isqrt(self.num_experts)

    @rule("num_experts")
    def _experts_are_a_square(self) -> None:
        """The square of a whole number."""
        if self.num_keys**2 != self.num_experts:
            raise ConfigError(
                "num_experts",
                f"{self.num_experts} is not the square of a whole number, which product keys need; "
                f"use {self.num_keys**2} or {(self.num_keys + 1) ** 2}.",
            )

    @rule("top_k")
    def _top_k_fits_the_half_keys(self) -> None:
        """At most the square root of num_experts."""
        if self.top_k > self.num_keys:
            raise ConfigError(
                "top_k",
                f"{self.top_k} is more than the {self.num_keys} half keys of num_experts="
                f"{self.num_experts}; use at most {self.num_keys}, or more experts.",
            )

    @rule("key_dim")
    def _queries_have_halves(self) -> None:
        """Even."""
        if self.key_dim % 2:
            raise ConfigError(
                "key_dim", f"{self.key_dim} has no halves; use {self.key_dim + 1}, an even number."
            )

    @rule("query_momentum")
    def _momentum_needs_batch_norm(self) -> None:
        """Only with query_norm='batch'."""
        if self.query_norm != "batch":
            require_defaults(
                self,
                ("query_momentum",),
                f"with query_norm={self.query_norm!r}",
                "set query_norm='batch'",
            )
