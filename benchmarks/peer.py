"""PEER's memory and time per token, compared with a dense layer of as many active parameters.

    python -m benchmarks.peer
    python -m benchmarks.peer --experts=65536 --batch=1 --length=1

A forward pass of one layer: a million experts of width 256 by default, 8 heads of 16 experts each.
The dense layer has as many hidden neurons as a token has experts.
"""

import argparse
import functools
import resource
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from benchmarks.timing import Phase, alternate, by_round, call_first, environment, quartiles, spread
from megatransformer_jax.config.layers import PeerConfig
from megatransformer_jax.config.model import MlpConfig
from megatransformer_jax.models.cost.memory import tree_bytes
from megatransformer_jax.nn.mlp import Mlp
from megatransformer_jax.nn.parameters import WeightInit
from megatransformer_jax.nn.peer import Peer
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy

_MIB = 2**20
_INITS = WeightInit(0.04, 0.01, 0.04)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", type=int, default=1024**2, help="a square")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=16, help="experts per head")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4, help="rows")
    parser.add_argument("--length", type=int, default=256, help="tokens per row")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    return parser.parse_args()


def compile_layer(layer: nn.Module, x: jax.Array) -> tuple[Any, Any]:
    """Parameters, and the compiled forward pass with running statistics."""
    params = jax.jit(lambda key: nn.meta.unbox(layer.init(key, x, True)))(jax.random.key(0))
    run = jax.jit(lambda params, x: layer.apply(params, x, True))
    return params, run.lower(params, x).compile()


def main() -> None:
    """Measures and prints."""
    given = parse_arguments()
    active = given.heads * given.top_k
    peer = PeerConfig(num_experts=given.experts, num_heads=given.heads, top_k=given.top_k)
    layers: dict[str, nn.Module] = {
        "PEER": Peer(MlpConfig(kind="peer", peer=peer), _INITS, DTypePolicy(), Sharder()),
        "dense": Mlp(MlpConfig(kind="mlp", hidden_width=active), _INITS, DTypePolicy()),
    }
    x = jax.random.normal(jax.random.key(1), (given.batch, given.length, given.width))
    tokens = given.batch * given.length
    for name, value in environment().items():
        print(f"{name}: {value}")
    print(
        f"{given.experts} experts of width {given.width}, {given.heads} heads x {given.top_k}: "
        f"{active} active neurons; {given.batch} x {given.length} tokens, float32"
    )
    phases = []
    for name, layer in layers.items():
        params, compiled = compile_layer(layer, x)
        memory = compiled.memory_analysis()
        print(
            f"{name}: parameters {tree_bytes(params) / _MIB:.1f} MiB, temporary memory "
            f"{memory.temp_size_in_bytes / _MIB:.1f} MiB"
        )
        phases.append(Phase(name, lambda: x, functools.partial(compiled, params)))
    print(
        f"gathered for all tokens at once: {2 * tokens * active * given.width * 4 / _MIB:.1f} MiB"
    )
    for phase in phases:
        assert jnp.all(jnp.isfinite(call_first(phase)))
    alternate(phases, given.rounds)
    for phase in phases:
        print(
            f"{phase.name}: {spread(phase.seconds)} per pass, "
            f"{1e6 * phase.median_s / tokens:.2f} us per token"
        )
    low, median, high = quartiles(by_round(phases[0].seconds, phases[1].seconds))
    print(f"PEER / dense: {median:.1f} ({low:.1f} to {high:.1f})")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory of the process, initialisation included: {peak:.0f} MiB")


if __name__ == "__main__":
    main()
