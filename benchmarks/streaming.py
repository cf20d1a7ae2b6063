"""Speed of `Model.stream` against `Model.generate`, by the tokens that a call of the device makes.

    python -m benchmarks.streaming
    python -m benchmarks.streaming --preset=tiny --new=512 --calls=1,8

Random weights, greedy, one text. Every round runs all variants one after the other. "First" is the
time from the call to the first token, "between" the longest time in which no token came after it.
Each is the median over the rounds. On a busy machine the CPU time of all threads, relative to that
of `generate` in the same round, is the one that compares.
"""

import argparse
import statistics
import time
from typing import NamedTuple

import numpy as np

import megatransformer_jax as mt
from benchmarks.timing import environment
from megatransformer_jax.config.generation import GenerationConfig


class Times(NamedTuple):
    """Of one text: tokens per second, seconds of the CPU, seconds to the first token, most seconds
    between tokens."""

    rate: float
    cpu_s: float
    first_s: float
    between_s: float


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="recurrent_small")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=256, help="new tokens")
    parser.add_argument(
        "--calls",
        type=lambda text: tuple(int(size) for size in text.split(",")),
        default=(1, 8, 64),
        help="tokens per call, next to the default, which adapts",
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    return parser.parse_args()


def time_generate(lm: mt.Model, prompt: list[int], new: int) -> Times:
    """All tokens at once."""
    began, cpu = time.perf_counter(), time.process_time()
    text = lm.generate(prompt, strategy="greedy", max_new_tokens=new)
    seconds = time.perf_counter() - began
    return Times(len(text.token_ids) / seconds, time.process_time() - cpu, seconds, 0.0)


def time_stream(lm: mt.Model, prompt: list[int], new: int, per_call: int | None) -> Times:
    """Token by token."""
    came, cpu = [time.perf_counter()], time.process_time()
    given = GenerationConfig(strategy="greedy", max_new_tokens=new)
    for _ in lm.stream(prompt, given, tokens_per_call=per_call):
        came.append(time.perf_counter())
    between = float(np.diff(came[1:]).max(initial=0.0))
    cpu_s = time.process_time() - cpu
    return Times((len(came) - 1) / (came[-1] - came[0]), cpu_s, came[1] - came[0], between)


def main() -> None:
    arguments = parse_arguments()
    lm = mt.create(arguments.preset, seed=0)
    prompt, new = list(range(5, 5 + arguments.prompt)), arguments.new
    calls = (*arguments.calls, None)
    found: dict[str, list[Times]] = {}
    for number in range(-1, arguments.rounds):
        times = {"generate": time_generate(lm, prompt, new)}
        for per_call in calls:
            name = "stream, default" if per_call is None else f"stream, {per_call} per call"
            times[name] = time_stream(lm, prompt, new, per_call)
        if number >= 0:  # The first round compiles.
            for name, one in times.items():
                found.setdefault(name, []).append(one)
    for name, value in environment().items():
        print(f"{name:8}  {value}")
    print("\n| variant | tokens/s | CPU time | first | between |\n|:--|--:|--:|--:|--:|")
    for name, rounds in found.items():
        rate, _, first, between = (
            statistics.median(values) for values in zip(*rounds, strict=True)
        )
        share = statistics.median(
            one.cpu_s / other.cpu_s for one, other in zip(rounds, found["generate"], strict=True)
        )
        waits = " | ".join(f"{1e3 * seconds:.1f} ms" for seconds in (first, between))
        print(f"| {name} | {rate:.0f} | {share:.2f} | {waits} |")


if __name__ == "__main__":
    main()
