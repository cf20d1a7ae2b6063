"""Speed of generation with random weights, against what the machine reaches in the same run.

    python -m benchmarks.generate
    python -m benchmarks.generate --rounds=5 --capacities=256,4096 --json=result.json

The shape is that of the issue: width 256, 4 heads, gated feed-forward of 704, prelude 1, core 2,
coda 1, vocabulary 4096, depth 8, first state zero, greedy, a full cache. Prompts have 128 tokens.

Bounds, each measured in every round right before the phases:
  compute  matrix-product FLOPs of the phase (`models.cost.flops`, visible keys only, a prompt's
           head once) per second / FLOPs per second of a chain of 1024 x 1024 products.
  chain    bytes of a phase per second / bytes per second of a chain of the model's own products
           (rows as in the phase, same shapes, order and repetitions) with nothing in between.
  stream   bytes of a phase per second / bytes per second of reading an array of 256 MiB once.
           Above 1 where weights stay in the processor's caches.
The bytes of a token: weights of prelude, adapter, coda and head, those of the core once per
iteration (once per pass for all rows), and the keys and values of all earlier tokens, in all rows.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from benchmarks.bounds import (
    CHAIN_TOKENS,
    MATMUL_FLOPS,
    STREAM_BYTES,
    product_chain,
    stream,
    weight_bytes,
    weight_chain,
)
from benchmarks.generation_phases import GenerationPhases, Work
from benchmarks.timing import Phase, alternate, by_round, call_first, environment, quartiles, spread

ROWS = (1, 8)
ALLOWED_GROWTH = 1.2


def parse_arguments() -> argparse.Namespace:
    def sizes(text: str) -> tuple[int, ...]:
        return tuple(int(size) for size in text.split(","))

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="new tokens")
    parser.add_argument("--depth", type=int, default=8, help="iterations of the core")
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument(
        "--capacities",
        type=sizes,
        default=(256, 512, 1024, 2048, 4096),
        help="rows of the caches whose speed is compared; the others use the first",
    )
    parser.add_argument("--rounds", type=int, default=11, help="timed rounds")
    parser.add_argument("--json", help="also write all numbers to this file")
    arguments = parser.parse_args()
    # Decoding appends one token more than it passes through the model.
    needed = arguments.prompt + arguments.new + 1
    if min(arguments.capacities) < needed:
        parser.error(f"--capacities: each must hold the {needed} tokens of --prompt and --new")
    return arguments


def measure(benchmark: GenerationPhases, capacities: Sequence[int], rounds: int) -> dict[str, Any]:
    """All numbers, as they go to the JSON file."""
    config, depth, dtype = benchmark.config, benchmark.depth, benchmark.policy.compute
    products, reading = product_chain(dtype), stream()
    chains = {rows: weight_chain(config, depth, rows, dtype) for rows in ROWS}
    phases = [(benchmark.prefill(1, capacities[0]), benchmark.prefill_work(1))]
    for rows in ROWS:
        phases.append((benchmark.decode(rows, capacities[0]), benchmark.decode_work(rows)))
    first, uncached = phases[1][0], benchmark.uncached()
    larger = [benchmark.decode(1, capacity) for capacity in capacities[1:]]
    bounds = [products, reading, *chains.values()]
    everything = [*bounds, *(phase for phase, _ in phases), *larger, uncached]
    for phase in everything:
        call_first(phase)
    alternate(everything, rounds)

    chain_bytes = CHAIN_TOKENS * weight_bytes(config, depth, dtype)
    rates = {
        "product_flops_per_s": MATMUL_FLOPS / products.median_s,
        "stream_bytes_per_s": STREAM_BYTES / reading.median_s,
        **{
            f"chain_{rows}_bytes_per_s": chain_bytes / chain.median_s
            for rows, chain in chains.items()
        },
    }

    def fractions(phase: Phase, work: Work) -> dict[str, Any]:
        chain = chains[work.rows]
        bound_s = {  # Seconds that the phase would take at the bound, in each round.
            "compute": [s / MATMUL_FLOPS * work.flops for s in products.seconds],
            "chain": [s / chain_bytes * work.num_bytes for s in chain.seconds],
            "stream": [s / STREAM_BYTES * work.num_bytes for s in reading.seconds],
        }
        return {name: quartiles(by_round(s, phase.seconds)) for name, s in bound_s.items()}

    growth = {
        capacity: quartiles(by_round(phase.seconds, first.seconds))
        for capacity, phase in zip(capacities, [first, *larger], strict=True)
    }
    per_token = [seconds / benchmark.new for seconds in first.seconds]
    return {
        **environment(),
        "compute_type": str(dtype),
        "shape": {
            "width": config.width,
            "heads": config.attention.num_heads,
            "hidden_width": config.mlp.hidden_width,
            "layers": (config.prelude_layers, config.core_layers, config.coda_layers),
            "vocab_size": config.vocab_size,
            "depth": depth,
            "prompt": benchmark.prompt,
            "new": benchmark.new,
        },
        "rounds": rounds,
        "rates": rates,
        "phases": [
            {
                **_times(phase),
                **dataclasses.asdict(work),
                "tokens_per_s": work.tokens / phase.median_s,
                "fractions": fractions(phase, work),
            }
            for phase, work in phases
        ],
        "bounds": [_times(phase) for phase in bounds],
        "capacities": [_times(phase) for phase in [first, *larger]],
        "growth": growth,
        "uncached": _times(uncached),
        "uncached_ratio": quartiles(by_round(uncached.seconds, per_token)),
    }


def _times(phase: Phase) -> dict[str, Any]:
    return {"name": phase.name, "first_call_s": phase.first_call_s, "seconds": phase.seconds}


def print_summary(summary: dict[str, Any]) -> None:
    shape = ", ".join(f"{name} {value}" for name, value in summary["shape"].items())
    print(f"device    {summary['device']}, {summary['compute_type']}")
    print(f"versions  {summary['versions']}\nshape     {shape}")
    print(
        f"times     median (quartiles) of {summary['rounds']} rounds; first call with compilation"
    )
    print("\nbounds")
    for (name, rate), phase in zip(summary["rates"].items(), summary["bounds"], strict=True):
        print(f"  {name:22} {rate / 1e9:7.1f} G/s   {spread(phase['seconds'])} per round")
    print("\nphases: fraction of the bound, median of the rounds")
    for phase in summary["phases"]:
        parts = (f"{name} {values[1]:.3f}" for name, values in phase["fractions"].items())
        print(
            f"  {phase['name']:36} {spread(phase['seconds'])}, {phase['tokens_per_s']:.0f} tokens/s"
            f"\n  {'':36} {', '.join(parts)}; {phase['flops'] / 1e9:.2f} GFLOP, "
            f"{phase['num_bytes'] / 1e9:.2f} GB; first call {phase['first_call_s']:.1f} s"
        )
    first = next(iter(summary["growth"]))
    print(f"\ncapacity: time of decoding relative to {first} (at most {ALLOWED_GROWTH} is wanted)")
    for (capacity, (low, median, high)), phase in zip(
        summary["growth"].items(), summary["capacities"], strict=True
    ):
        ratio = f"{median:.3f} ({low:.3f} to {high:.3f})"
        print(f"  {capacity:6} {ratio}   {spread(phase['seconds'])}")
    low, median, high = summary["uncached_ratio"]
    print(f"\n{summary['uncached']['name']}: {spread(summary['uncached']['seconds'])},")
    print(f"  {median:.1f} ({low:.1f} to {high:.1f}) times a cached token")


def main() -> None:
    arguments = parse_arguments()
    summary = measure(GenerationPhases(arguments), arguments.capacities, arguments.rounds)
    print_summary(summary)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(summary, file, indent=2)


if __name__ == "__main__":
    main()
