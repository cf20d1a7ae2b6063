"""Throughput of the train step, against what a matrix product reaches in the same run.

    python -m benchmarks.train_step
    python -m benchmarks.train_step --remat=full --unroll=4 --batch=8 --json=result.json

The shape is that of the issue: width 256, 4 heads, gated feed-forward of 704, prelude 1, core 2,
coda 1, vocabulary 4096, 4 x 256 tokens, 4 iterations without and 4 with gradients.
Model FLOPs are matrix products as `megatransformer_jax.models.cost.flops` counts them; nothing that
is computed again counts, and attention counts visible keys only ("all keys": the square).
"""

import argparse
import dataclasses
import functools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jaxlib
import numpy as np

from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.optimizer import OptimizerConfig
from megatransformer_jax.config.recurrence import RecurrenceConfig
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.models.cost.flops import forward_flops, train_flops
from megatransformer_jax.models.megatransformer import build_model
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.training.optimizers import build_optimizer
from megatransformer_jax.training.state import init_state
from megatransformer_jax.training.step import make_train_step
from megatransformer_jax.types import Batch, DTypePolicy

MATMUL_SIZE = 1024
MATMULS_PER_ROUND = 5


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Seconds of every round; of one train step, and of one matrix product."""

    compile_s: float
    temporary_bytes: int
    step_s: list[float]
    matmul_s: list[float]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=4, help="rows")
    parser.add_argument("--length", type=int, default=256, help="tokens per row")
    parser.add_argument("--steps-without-gradient", type=int, default=4, help="n")
    parser.add_argument("--steps-with-gradient", type=int, default=4, help="k")
    parser.add_argument("--remat", default="none", choices=("none", "full", "dots"))
    parser.add_argument("--unroll", type=int, default=1, help="gradient iterations per loop turn")
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds")
    parser.add_argument("--json", help="also write all numbers to this file")
    return parser.parse_args()


def make_config(arguments: argparse.Namespace) -> RunConfig:
    n, k = arguments.steps_without_gradient, arguments.steps_with_gradient
    recurrence = RecurrenceConfig(
        mean_steps=n + k,
        backprop_depth=k,
        max_steps=n + k,
        sampling="fixed",
        unroll=arguments.unroll,
    )
    model = ModelConfig(
        vocab_size=4096,
        max_length=arguments.length,
        remat=arguments.remat,
        recurrence=recurrence,
    )
    data = dataclasses.replace(
        RunConfig().data, batch_size=arguments.batch, sequence_length=arguments.length
    )
    return RunConfig(model=model, data=data, optimizer=OptimizerConfig())


def make_batch(config: RunConfig) -> Batch:
    """Random tokens, one document per row."""
    shape = (config.data.batch_size, config.data.sequence_length)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, np.int32)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    ones = np.ones(shape, np.int32)
    batch = Batch(tokens, np.roll(tokens, -1, axis=1), ones.astype(np.float32), ones, positions)
    return jax.device_put(batch)


def measure(config: RunConfig, policy: DTypePolicy, rounds: int) -> Measurement:
    """Alternates matrix products and train steps, so that both meet the same load."""
    model = build_model(config.model, policy, Sharder(), jax.default_backend())
    optimizer = build_optimizer(config.optimizer, config.train.steps, config.train.ema_decay)
    state = init_state(model, optimizer, jax.random.key(0))
    batch = make_batch(config)
    train_step = jax.jit(make_train_step(model, optimizer, config), donate_argnums=0)
    start = time.perf_counter()
    compiled = train_step.lower(state, batch).compile()
    compile_s = time.perf_counter() - start
    analysis: Any = compiled.memory_analysis()

    shape = (MATMUL_SIZE, MATMUL_SIZE)
    # Of norm about 2, so that a chain of products stays in range.
    matrix = jax.random.normal(jax.random.key(1), shape, policy.compute) / MATMUL_SIZE**0.5
    multiply = jax.jit(lambda a, b: a @ b)

    def multiply_some() -> Any:
        product = matrix
        for _ in range(MATMULS_PER_ROUND):  # A chain: one after the other, as in the step.
            product = multiply(product, matrix)
        return product

    step_s, matmul_s = [], []
    for round_number in range(rounds + 2):
        product_s, _ = timed(multiply_some)
        duration_s, (state, metrics) = timed(functools.partial(compiled, state, batch))
        if round_number >= 2:  # The first two warm up.
            matmul_s.append(product_s / MATMULS_PER_ROUND)
            step_s.append(duration_s)
    if not np.isfinite(metrics["loss"]) or int(state.skipped_steps):
        raise RuntimeError("the train step gave a loss that is not finite")
    return Measurement(compile_s, analysis.temp_size_in_bytes, step_s, matmul_s)


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds until all results are there, and the results."""
    start = time.perf_counter()
    result = jax.block_until_ready(function())
    return time.perf_counter() - start, result


def summarize(config: RunConfig, policy: DTypePolicy, measured: Measurement) -> dict[str, Any]:
    recurrence, length = config.model.recurrence, config.data.sequence_length
    tokens = config.data.batch_size * length
    visible, every = (
        tokens
        * train_flops(
            config.model,
            forward_flops(config.model, length, visible_keys_only=visible_only),
            recurrence.mean_steps,
        ).model
        for visible_only in (True, False)
    )
    step_s = statistics.median(measured.step_s)
    matmul_rate = 2 * MATMUL_SIZE**3 / statistics.median(measured.matmul_s)
    # Of each round's step and products, which ran right after each other.
    ratios = [
        visible / step / (2 * MATMUL_SIZE**3 / product)
        for step, product in zip(measured.step_s, measured.matmul_s, strict=True)
    ]
    return {
        "device": jax.devices()[0].device_kind,
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
        },
        "compute_type": str(policy.compute),
        "shape": {
            "batch": config.data.batch_size,
            "length": length,
            "width": config.model.width,
            "heads": config.model.attention.num_heads,
            "hidden_width": config.model.mlp.hidden_width,
            "layers": (
                config.model.prelude_layers,
                config.model.core_layers,
                config.model.coda_layers,
            ),
            "vocab_size": config.model.vocab_size,
            "steps_without_gradient": recurrence.mean_steps - recurrence.backprop_depth,
            "steps_with_gradient": recurrence.backprop_depth,
            "remat": config.model.remat,
            "unroll": recurrence.unroll,
        },
        "compile_s": measured.compile_s,
        "temporary_bytes": measured.temporary_bytes,
        "step_s": measured.step_s,
        "matmul_s": measured.matmul_s,
        "tokens_per_s": tokens / step_s,
        "matmul_flops_per_s": matmul_rate,
        "model_flops": visible,
        "model_flops_all_keys": every,
        "model_flops_per_s": visible / step_s,
        "ratio": visible / step_s / matmul_rate,
        "ratio_all_keys": every / step_s / matmul_rate,
        "ratio_quartiles": quartiles(ratios),
    }


def quartiles(values: list[float]) -> list[float]:
    return [float(value) for value in np.percentile(values, (25, 50, 75))]


def print_summary(summary: dict[str, Any]) -> None:
    def spread(seconds: list[float]) -> str:
        low, median, high = (1e3 * value for value in quartiles(seconds))
        return f"{median:.1f} ms (quartiles {low:.1f} to {high:.1f}, {len(seconds)} rounds)"

    low, median, high = summary["ratio_quartiles"]
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    shape = ", ".join(f"{name} {value}" for name, value in summary["shape"].items())
    print(
        f"device        {summary['device']} ({summary['processor']}), {summary['compute_type']}",
        f"versions      {versions}",
        f"shape         {shape}",
        f"compile       {summary['compile_s']:.1f} s",
        f"temporary     {summary['temporary_bytes'] / 2**20:.0f} MiB",
        f"train step    {spread(summary['step_s'])}, {summary['tokens_per_s']:.0f} tokens/s",
        f"matmul {MATMUL_SIZE}   {spread(summary['matmul_s'])}, "
        f"{summary['matmul_flops_per_s'] / 1e9:.1f} GFLOP/s",
        f"model FLOPs   {summary['model_flops'] / 1e9:.1f} G per step, "
        f"{summary['model_flops_per_s'] / 1e9:.1f} GFLOP/s",
        f"ratio         {summary['ratio']:.3f} of medians; by round {median:.3f} "
        f"(quartiles {low:.3f} to {high:.3f})",
        f"  all keys    {summary['ratio_all_keys']:.3f}, attention counted as the whole square "
        f"({summary['model_flops_all_keys'] / 1e9:.1f} G per step)",
        sep="\n",
    )


def main() -> None:
    arguments = parse_arguments()
    config = make_config(arguments)
    policy = DTypePolicy.from_precision(arguments.precision, jax.default_backend())
    summary = summarize(config, policy, measure(config, policy, arguments.rounds))
    print_summary(summary)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(summary, file, indent=2)


if __name__ == "__main__":
    main()
