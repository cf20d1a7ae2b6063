"""Floating-point operations per token, from the config alone.

Matrix products only: one with an m x n matrix costs 2 m n per token. What acts channel by channel
(norms, activations, rotary positions, softmax) is left out, as is usual; at common widths it is a
few percent.
"""

import dataclasses
from collections.abc import Mapping

from megatransformer_jax.config.model import ModelConfig


@dataclasses.dataclass(frozen=True)
class ForwardFlops:
    """FLOPs per token of one forward pass: part -> matrix product -> FLOPs.

    Attributes:
      once: parts that run once.
      iteration: products of one iteration of the core; empty without a core.
    """

    once: Mapping[str, Mapping[str, float]]
    iteration: Mapping[str, float]

    @property
    def once_total(self) -> float:
        """All that runs once."""
        return sum((sum(products.values()) for products in self.once.values()), 0.0)

    @property
    def iteration_total(self) -> float:
        """One iteration of the core."""
        return sum(self.iteration.values(), 0.0)

    def total(self, depth: int) -> float:
        """A forward pass with `depth` iterations."""
        return self.once_total + depth * self.iteration_total


@dataclasses.dataclass(frozen=True)
class TrainFlops:
    """FLOPs per token of one training step.

    Attributes:
      model: what the mathematics needs: a backward pass costs two forward passes, and iterations
        without gradients have none. The number to use for utilisation.
      hardware: what is computed at most: model FLOPs, what remat computes again, and gradient
        iterations that are masked because the draw is below the backprop depth.
    """

    model: float
    hardware: float


def mean_keys(length: int, window: int | None) -> float:
    """Keys that a query of a causal row of `length` tokens sees, on average."""
    window = length if window is None else min(window, length)
    # The first `window` queries see 1, 2, ..., window keys, the others `window` each.
    return (window * (window + 1) / 2 + (length - window) * window) / length


def forward_flops(
    config: ModelConfig, length: int, *, visible_keys_only: bool = True
) -> ForwardFlops:
    """Counts a forward pass over rows of `length` tokens, one document each.

    Args:
      config: the model.
      length: tokens per row; only attention depends on it.
      visible_keys_only: attention counts the keys that causality and window let a query see. False
        counts all keys of the row, as a kernel that multiplies first and masks later computes.
    """
    keys = mean_keys(length, config.attention.window) if visible_keys_only else float(length)
    outer = _layer(config, config.width, keys)
    once = {"prelude": _times(config.prelude_layers, outer)}
    iteration: Mapping[str, float] = {}
    if config.is_recurrent:
        width, adapter = config.core_width, config.recurrence.adapter
        injection = {"adapter": 2.0 * width**2 if adapter in ("linear", "diagonal") else 0.0}
        iteration = _times(config.core_layers, _layer(config, width, keys))
        iteration |= {"adapter": 2.0 * width**2 if adapter == "linear" else 0.0}
        if width != config.width:
            injection["core_in"] = 2.0 * config.width * width
        once["injection"] = injection
        if width != config.width:
            once["core_out"] = {"core_out": 2.0 * width * config.width}
    once["coda"] = _times(config.coda_layers, outer)
    once["head"] = {"head": 2.0 * config.width * config.vocab_size}
    return ForwardFlops(once, iteration)


def train_flops(config: ModelConfig, forward: ForwardFlops, num_steps: int) -> TrainFlops:
    """Counts a training step whose draw is `num_steps`.

    The last `backprop_depth` iterations have gradients, the ones before run forward only.

    Args:
      config: the model that `forward` was counted for.
      forward: its forward pass.
      num_steps: iterations; of no meaning without a core.
    """
    backprop_depth = config.recurrence.backprop_depth
    with_gradient = min(num_steps, backprop_depth)
    without = num_steps - with_gradient
    model = 3 * forward.once_total + (without + 3 * with_gradient) * forward.iteration_total
    masked = (backprop_depth - with_gradient) * 3 * forward.iteration_total
    layers = [forward.once["prelude"], forward.once["coda"]]
    again = sum((_recomputed(config, products) for products in layers), 0.0)
    again += backprop_depth * _recomputed(config, forward.iteration)
    return TrainFlops(model=model, hardware=model + masked + again)


def _layer(config: ModelConfig, width: int, keys: float) -> dict[str, float]:
    attention, head_dim = config.attention, config.head_dim(width)
    heads_width = attention.num_heads * head_dim
    return {
        "qkv": 2.0 * width * (heads_width + 2 * attention.kv_heads * head_dim),
        "attention": 2 * 2.0 * heads_width * keys,  # Logits, and the mixture of values.
        "output": 2.0 * heads_width * width,
        **_feed_forward(config, width),
    }


def _feed_forward(config: ModelConfig, width: int) -> dict[str, float]:
    """Of PEER, `up` and `down` are the experts that a token gets."""
    if config.mlp.kind == "peer":
        peer = config.mlp.peer
        one_way = 2.0 * width * peer.num_heads * peer.top_k
        queries = peer.num_heads * peer.key_dim
        return {
            "query": 2.0 * width * queries,
            "keys": 2.0 * queries * peer.num_keys,
            "up": one_way,
            "down": one_way,
        }
    hidden_width, branches = config.mlp.hidden_width, 2 if config.mlp.kind == "gated" else 1
    return {"up": 2.0 * width * branches * hidden_width, "down": 2.0 * hidden_width * width}


def _times(count: int, products: Mapping[str, float]) -> dict[str, float]:
    return {name: count * flops for name, flops in products.items()}


def _recomputed(config: ModelConfig, products: Mapping[str, float]) -> float:
    """FLOPs that the backward pass computes a second time; PEER's at most."""
    # PEER gathers its experts again, and compares queries again if it does so in blocks.
    always, without_weights = 0.0, products.get("attention", 0.0)  # Attention has no weights.
    if config.mlp.kind == "peer" and products:
        always = products["keys"] + products["up"]
        without_weights += products["keys"] + products["up"] + products["down"]
    match config.remat:
        case "none":
            return always
        case "full":
            return always + sum(products.values(), 0.0)
        case "dots":  # Keeps products with weights that all tokens share.
            return always + without_weights
    raise ValueError(f"unknown remat {config.remat!r}; known: none, full, dots")
