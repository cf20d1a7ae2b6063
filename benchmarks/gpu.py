"""Checks attention by cuDNN on one GPU, and times training and generation against its bounds.

    python -m benchmarks.gpu --json=gpu.json
    python -m benchmarks.gpu --preset=recurrent_medium --batch=8
    python -m benchmarks.gpu --platform=cpu --preset=tiny --batch=2 --length=32 --prompt=8 --new=4

The second line is another model; the third rehearses on a CPU, where no fused kernel is checked and
the bounds are measured instead of looked up. Without a GPU the command ends with exit code 2.

Attention: value and gradient of cuDNN's kernel in bfloat16, called as models call it, are compared
with XLA's attention in float32. Its error must be at most twice that of XLA's attention in
bfloat16, else the exit code is 1.

Bounds, of the data sheet's dense bfloat16 FLOP/s and memory bandwidth (`GPUS`):
  train    FLOPs that the mathematics of the step needs / peak.
  prefill  the larger of FLOPs / peak and bytes / bandwidth; likewise decode.
The bytes are those of `benchmarks.generate`: weights in the compute type, keys and values.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.bounds import MATMUL_FLOPS, STREAM_BYTES, product_chain, stream
from benchmarks.generation_phases import GenerationPhases
from benchmarks.timing import Phase, alternate, call_first, environment, quartiles, spread, timed
from benchmarks.train_step import make_batch
from megatransformer_jax.config.build import build
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.config.run_kinds import require_transformer
from megatransformer_jax.models.cost.flops import forward_flops, train_flops
from megatransformer_jax.models.megatransformer import build_model
from megatransformer_jax.ops.attention import PLATFORM_KERNELS, Kernel, attention
from megatransformer_jax.ops.masks import AttentionMask
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.sharding.topology import GPU_KINDS
from megatransformer_jax.training.optimizers import build_optimizer
from megatransformer_jax.training.state import init_state
from megatransformer_jax.training.step import make_train_step
from megatransformer_jax.types import DTypePolicy


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What a device can do at most.

    Attributes:
      flops_per_s: of dense bfloat16 matrix products.
      bytes_per_s: of its memory.
      source: where the numbers are from.
    """

    flops_per_s: float
    bytes_per_s: float
    source: str


def _sheet(name: str, tflops: float, bytes_per_s: float) -> Bounds:
    return Bounds(tflops * 1e12, bytes_per_s, f"NVIDIA {name} data sheet, dense")


# By the name that CUDA gives the device: those that programs can be compiled for, and others. From
# Hopper on, and for L4 and L40S, data sheets headline FLOP/s with sparsity, twice the dense ones.
GPUS = {
    **{
        kind.title: Bounds(
            kind.bf16_flops, kind.memory_bandwidth, f"{kind.title} data sheet, dense"
        )
        for kind in GPU_KINDS.values()
    },
    "NVIDIA A10": _sheet("A10", 125, 600e9),
    "NVIDIA A100-PCIE-40GB": _sheet("A100", 312, 1.555e12),
    "NVIDIA A100 80GB PCIe": _sheet("A100", 312, 1.935e12),
    "NVIDIA L40S": _sheet("L40S", 362, 864e9),
    "NVIDIA H100 PCIe": _sheet("H100", 756, 2.0e12),
    "NVIDIA H100 NVL": _sheet("H100", 835.5, 3.9e12),
    "NVIDIA H200 NVL": _sheet("H200", 835.5, 4.8e12),
    "NVIDIA GH200 480GB": _sheet("GH200", 989.5, 4.0e12),
}
ALLOWED_ERROR = 2.0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--platform", default="gpu", choices=("gpu", "cpu"))
    parser.add_argument("--preset", default="recurrent_small", help="text model; see gin/")
    parser.add_argument("--batch", type=int, default=32, help="rows of training and attention")
    parser.add_argument("--length", type=int, default=1024, help="tokens per row of both")
    parser.add_argument("--remat", default="none", choices=("none", "full", "dots"))
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="new tokens")
    parser.add_argument("--rows", type=int, default=8, help="rows of generation")
    parser.add_argument("--rounds", type=int, default=11, help="timed rounds")
    parser.add_argument("--peak", type=float, help="FLOP/s of a GPU that is not in the table")
    parser.add_argument("--bandwidth", type=float, help="its bytes per second")
    parser.add_argument("--json", help="also write all numbers to this file")
    arguments = parser.parse_args()
    if (arguments.peak is None) != (arguments.bandwidth is None):
        parser.error("--peak and --bandwidth: give both or neither")
    for name in ("batch", "length", "prompt", "new", "rows", "rounds"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name}: {getattr(arguments, name)} is not allowed; at least 1")
    if arguments.json and not pathlib.Path(arguments.json).parent.is_dir():
        parser.error(f"--json: the folder of {arguments.json} does not exist; make it first")
    # Decoding appends one token more than it passes through the model.
    arguments.capacities = (arguments.prompt + arguments.new + 1,)
    return arguments


# ------------------------------------------------------------------------------
# The device.


def require_device(platform: str) -> str:
    """The name of the first device of the platform; exits if it has none."""
    found = jax.default_backend()
    if found != platform:
        print(
            f"--platform={platform}: JAX found {found!r} devices only. On a machine with an NVIDIA "
            "GPU install the extra `cuda` (docs/gpu.md); --platform=cpu with JAX_PLATFORMS=cpu "
            "rehearses on a CPU.",
            file=sys.stderr,
        )
        sys.exit(2)
    return str(jax.devices()[0].device_kind)


def device_bounds(arguments: argparse.Namespace, name: str) -> Bounds:
    """Of the table or the command line; measured on a CPU, which is in no table."""
    if arguments.peak is not None:
        return Bounds(arguments.peak, arguments.bandwidth, "command line")
    if arguments.platform == "cpu":
        phases = [product_chain(jnp.float32), stream()]
        for phase in phases:
            call_first(phase)
        alternate(phases, 3)
        products, reading = (phase.median_s for phase in phases)
        return Bounds(MATMUL_FLOPS / products, STREAM_BYTES / reading, "measured")
    if name not in GPUS:
        print(
            f"the GPU is {name!r}, which the table of bounds lacks; it has {', '.join(GPUS)}. "
            "Give --peak (dense bfloat16 FLOP/s) and --bandwidth (bytes/s) of its data sheet.",
            file=sys.stderr,
        )
        sys.exit(2)
    return GPUS[name]


# ------------------------------------------------------------------------------
# Attention: the fused kernel against XLA's.


def masks(batch: int, length: int) -> dict[str, AttentionMask]:
    """A training row, a window, packed documents with padding, and no causality."""
    places = np.arange(length)
    documents = np.where(places < length // 3, 1, np.where(places < length - 2, 2, 0))
    segments = jnp.broadcast_to(jnp.asarray(documents, jnp.int32), (batch, length))
    return {
        "causal": AttentionMask(),
        "window": AttentionMask(window=max(length // 4, 1)),
        "documents": AttentionMask(query_segment_ids=segments, key_segment_ids=segments),
        "acausal": AttentionMask(is_causal=False),
    }


def check_attention(config: RunConfig, platform: str, rounds: int) -> list[dict[str, Any]]:
    """Errors relative to float32, and times, of the fused kernel and of XLA's."""
    options, data = config.model.attention, config.data
    shape = (data.batch_size, data.sequence_length, options.num_heads)
    width = config.model.head_dim(config.model.core_width)
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (shape[2], options.kv_heads, options.kv_heads, shape[2])
    arrays = [
        jax.random.normal(key, (*shape[:2], count, width))
        for key, count in zip(keys, heads, strict=True)
    ]
    fused = PLATFORM_KERNELS[platform]
    rows = []
    for name, mask in masks(*shape[:2]).items():
        exact = _phase("float32", mask, Kernel(platform, "xla"), arrays, jnp.float32)
        xla = _phase("xla", mask, Kernel(platform, "xla"), arrays, jnp.bfloat16)
        kernel = _phase(fused, mask, Kernel(platform, fused), arrays, jnp.bfloat16)
        # On a CPU, where XLA's attention is the only one, both are the same.
        expected, *found = (call_first(phase) for phase in (exact, xla, kernel))
        errors = [_errors(results, expected) for results in found]
        del expected, found
        alternate([xla, kernel], rounds)
        rows.append(
            {
                "mask": name,
                "kernel": fused,
                "error": dict(zip(("xla", "kernel"), errors, strict=True)),
                "is_right": all(
                    error <= ALLOWED_ERROR * errors[0][part] for part, error in errors[1].items()
                ),
                "first_call_s": kernel.first_call_s,
                "xla_s": xla.seconds,
                "kernel_s": kernel.seconds,
            }
        )
    return rows


def _phase(
    name: str, mask: AttentionMask, kernel: Kernel, arrays: list[jax.Array], dtype: Any
) -> Phase:
    """Output, and gradients of queries, keys and values for a random cotangent."""
    given = [array.astype(dtype) for array in arrays]

    @jax.jit
    def run(query: jax.Array, key: jax.Array, value: jax.Array, cotangent: jax.Array) -> Any:
        # GPUs multiply float32 by TF32 unless they are told otherwise.
        with jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default"):
            output, backward = jax.vjp(
                lambda q, k, v: attention(q, k, v, mask, kernel), query, key, value
            )
            return output, *backward(cotangent)

    return Phase(name, lambda: given, lambda given: run(*given))


def _errors(results: Any, expected: Any) -> dict[str, float]:
    """Norm of the difference over the norm, of each result."""
    names = ("output", "query", "key", "value")
    return {
        name: float(jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b))
        for name, a, b in zip(names, results, expected, strict=True)
    }


# ------------------------------------------------------------------------------
# Training and generation against the bounds.


def make_config(arguments: argparse.Namespace) -> RunConfig:
    data = {"batch_size": arguments.batch, "sequence_length": arguments.length}
    model = {
        "vocab_size": 4096,
        "max_length": max(arguments.length, *arguments.capacities),
        "remat": arguments.remat,
        "recurrence": {"sampling": "fixed"},
    }
    return require_transformer(build({"preset": arguments.preset, "model": model, "data": data}))


def train_phase(config: RunConfig, policy: DTypePolicy) -> tuple[Phase, dict[str, Any]]:
    """The whole step, its state donated; and its FLOPs and temporary memory."""
    model = build_model(config.model, policy, Sharder(), jax.default_backend())
    optimizer = build_optimizer(config.optimizer, config.train.steps)
    states = [init_state(model, optimizer, jax.random.key(0))]
    batch = make_batch(config)
    step = jax.jit(make_train_step(model, optimizer, config), donate_argnums=0)
    compile_s, compiled = timed(lambda: step.lower(states[0], batch).compile())
    memory: Any = compiled.memory_analysis()

    def run(_: Any) -> Any:
        state, metrics = compiled(states.pop(), batch)
        states.append(state)
        return metrics

    def check(metrics: Any) -> None:
        if not np.isfinite(metrics["loss"]):
            raise RuntimeError(f"the train step gave the loss {metrics['loss']}")

    length, depth = config.data.sequence_length, config.model.recurrence.mean_steps
    tokens = config.data.batch_size * length
    flops = tokens * train_flops(config.model, forward_flops(config.model, length), depth).model
    work = {"tokens": tokens, "flops": flops, "num_bytes": 0.0}
    return Phase("train step", lambda: None, run, check), {
        **work,
        "compile_s": compile_s,
        "temporary_bytes": memory.temp_size_in_bytes,
    }


def measure_phases(
    arguments: argparse.Namespace, config: RunConfig, bounds: Bounds
) -> list[dict[str, Any]]:
    """Train step, prefill and decode: times, and the fraction of the bound that they reach."""
    arguments.depth = config.model.recurrence.mean_steps
    arguments.precision = "auto"
    generation = GenerationPhases(arguments, config.model)
    capacity = arguments.capacities[0]
    rows = arguments.rows
    phases = [train_phase(config, generation.policy)]
    phases += [
        (generation.prefill(rows, capacity), dataclasses.asdict(generation.prefill_work(rows))),
        (generation.decode(rows, capacity), dataclasses.asdict(generation.decode_work(rows))),
    ]
    for phase, _ in phases:
        call_first(phase)
    alternate([phase for phase, _ in phases], arguments.rounds)
    found = []
    for phase, work in phases:
        bound_s = max(work["flops"] / bounds.flops_per_s, work["num_bytes"] / bounds.bytes_per_s)
        found.append(
            {
                "name": phase.name,
                **work,
                "first_call_s": phase.first_call_s,
                "seconds": phase.seconds,
                "bound_s": bound_s,
                "tokens_per_s": work["tokens"] / phase.median_s,
                "fraction": quartiles([bound_s / seconds for seconds in phase.seconds]),
            }
        )
    return found


# ------------------------------------------------------------------------------
# The command.


def print_summary(summary: dict[str, Any]) -> None:
    bounds = summary["bounds"]
    print(
        f"device    {summary['device']}, {summary['name']}, {summary['compute_type']}\n"
        f"versions  {summary['versions']}\n"
        f"bounds    {bounds['flops_per_s'] / 1e12:.1f} TFLOP/s, "
        f"{bounds['bytes_per_s'] / 1e9:.0f} GB/s ({bounds['source']})\n"
        f"shape     {', '.join(f'{name} {value}' for name, value in summary['shape'].items())}\n\n"
        "attention, forward and backward: error relative to float32, and time"
    )
    for row in summary["attention"]:
        parts = (
            f"{part} {error:.1e} (xla {row['error']['xla'][part]:.1e})"
            for part, error in row["error"]["kernel"].items()
        )
        verdict = "right" if row["is_right"] else "WRONG"
        print(
            f"  {row['mask']:10} {row['kernel']}: {verdict}: {', '.join(parts)}\n"
            f"  {'':10} {spread(row['kernel_s'])}, xla {spread(row['xla_s'])}"
        )
    print("\nphases: median (quartiles); fraction of the bound")
    for phase in summary["phases"]:
        low, median, high = phase["fraction"]
        print(
            f"  {phase['name']:36} {spread(phase['seconds'])}, {phase['tokens_per_s']:.0f} tokens/s"
            f"\n  {'':36} {median:.3f} ({low:.3f} to {high:.3f}) of the bound; "
            f"first call {phase['first_call_s'] + phase.get('compile_s', 0.0):.1f} s"
        )


def main() -> None:
    arguments = parse_arguments()
    name = require_device(arguments.platform)
    bounds = device_bounds(arguments, name)
    config = make_config(arguments)
    policy = DTypePolicy.from_precision("auto", arguments.platform)
    attention_rows = check_attention(config, arguments.platform, arguments.rounds)
    keys = ("preset", "batch", "length", "remat", "prompt", "new", "rows", "rounds")
    summary = {
        **environment(),
        "name": name,
        "compute_type": str(policy.compute),
        "bounds": dataclasses.asdict(bounds),
        "shape": {key: getattr(arguments, key) for key in keys},
        "attention": attention_rows,
        "phases": measure_phases(arguments, config, bounds),
    }
    print_summary(summary)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(summary, file, indent=2)
    if not all(row["is_right"] for row in attention_rows):
        sys.exit("attention by the fused kernel differs from XLA's by more than is allowed")


if __name__ == "__main__":
    main()
