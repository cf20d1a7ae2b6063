"""Speed and memory of decoding with quantised weights, against float32 in the same run.

    python -m benchmarks.quantization
    python -m benchmarks.quantization --width=512 --rows=1,8 --rounds=5

Random weights: prelude 1, core 2, coda 1, a gated feed-forward of 2.75 times the width, greedy, the
real decode loop with its cache. Every round runs all variants one after the other; the speed-up is
the median over rounds of float32's time over the variant's. Temporaries are what XLA reports of the
compiled decode loop: a float copy of quantised matrices would be as large as the column says.
"""

import argparse
import copy
from typing import Any

import jax

from benchmarks.generation_phases import GenerationPhases
from benchmarks.timing import Phase, alternate, by_round, call_first, environment, quartiles, spread
from megatransformer_jax.config.layers import AttentionConfig
from megatransformer_jax.config.model import MlpConfig, ModelConfig
from megatransformer_jax.config.quantization import QuantizationConfig
from megatransformer_jax.config.recurrence import RecurrenceConfig
from megatransformer_jax.models.quantization import quantize_weights
from megatransformer_jax.nn.quantized import is_quantized_matrix

# None: the float32 model itself.
VARIANTS = {
    "float32": None,
    "int8": QuantizationConfig(),
    "int8 x int8": QuantizationConfig(activations="int8"),
    "int4, groups of 64": QuantizationConfig(weights="int4"),
    "int4 x int8, groups of 64": QuantizationConfig(weights="int4", activations="int8"),
}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def sizes(text: str) -> tuple[int, ...]:
        return tuple(int(size) for size in text.split(","))

    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rows", type=sizes, default=(8, 1), help="numbers of rows")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=16, help="new tokens")
    parser.add_argument("--depth", type=int, default=8, help="iterations of the core")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds")
    arguments = parser.parse_args()
    arguments.precision = "float32"
    arguments.capacities = (arguments.prompt + arguments.new + 1,)
    return arguments


def build_config(arguments: argparse.Namespace) -> ModelConfig:
    """The model."""
    width = arguments.width
    return ModelConfig(
        vocab_size=4096,
        width=width,
        max_length=arguments.capacities[0],
        attention=AttentionConfig(num_heads=max(width // 64, 1)),
        mlp=MlpConfig(hidden_width=width * 11 // 4),
        recurrence=RecurrenceConfig(
            mean_steps=arguments.depth,
            backprop_depth=min(4, arguments.depth),
            max_steps=arguments.depth,
            sampling="fixed",
            state_init="zero",
        ),
    )


def quantized_bytes(params: Any) -> tuple[int, int]:
    """Bytes of the quantised matrices, and of the same in float32."""
    leaves = jax.tree.leaves(params, is_leaf=is_quantized_matrix)
    found = [leaf for leaf in leaves if is_quantized_matrix(leaf)]
    return sum(leaf.nbytes for leaf in found), sum(4 * leaf.size for leaf in found)


def main() -> None:
    """Measures what the command line says."""
    arguments = parse_arguments()
    floats = GenerationPhases(arguments, build_config(arguments))
    models = {}
    for name, config in VARIANTS.items():
        models[name] = copy.copy(floats)
        if config is not None:
            models[name].params = quantize_weights(floats.model, floats.params, config)
    told = environment()
    print(f"{told['device']}; {told['versions']}")
    print(f"width {arguments.width}, depth {arguments.depth}, {arguments.new} new tokens")
    for rows in arguments.rows:
        capacity = arguments.capacities[0]
        phases: dict[str, Phase] = {}
        for name, model in models.items():
            phases[name] = model.decode(rows, capacity)
            call_first(phases[name])
        alternate(list(phases.values()), arguments.rounds)
        print(f"\n| {rows} rows | time | speed-up | temporaries, MiB | float copy, MiB |")
        print("|---|---:|---:|---:|---:|")
        for name, phase in phases.items():
            low, median, high = quartiles(by_round(phases["float32"].seconds, phase.seconds))
            temporaries = models[name].decode_temporaries(rows, capacity) / 2**20
            copied = quantized_bytes(models[name].params)[1] / 2**20
            print(
                f"| {name} | {spread(phase.seconds)} | {median:.2f} ({low:.2f} to {high:.2f}) | "
                f"{temporaries:.1f} | {copied:.1f} |"
            )
    print("\n| weights | bytes of the quantised matrices | of float32 |\n|---|---:|---:|")
    for name, model in models.items():
        if VARIANTS[name] is not None:
            ours, theirs = quantized_bytes(model.params)
            print(f"| {name} | {ours:,} | {ours / theirs:.4f} |")


if __name__ == "__main__":
    main()
