"""Texts of different depths in one batch, against a batch that keeps step and `Generator`.

    python -m benchmarks.serving
    python -m benchmarks.serving --model=runs/recurrent --rows=8 --json=result.json

The engine of `megatransformer serve` without HTTP, on random weights (width 256, core of two
layers) or on a run. Rows advance by iterations: a token that is done goes on to the next while
others iterate. `min_waiting=rows` makes all rows keep step, as servers of plain models do (token
level).
The ways alternate in every round, with the same texts. Greedy, prompts of 8 tokens. Throughput is
that of texts that nobody streams, as `Generator`'s; times between tokens are of streamed ones.

Workloads:
  mixed     half of the texts at depth 4, a quarter each at 8 and 32
  similar   a depth for each text, normal with mean 6.9 and standard deviation 1.7
  uniform   all at depth 8
  criterion with --model: every token leaves when latent_diff says so, at most 32 iterations
"""

import argparse
import dataclasses
import functools
import itertools
import json
import pathlib
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import megatransformer_jax as mt
from benchmarks.timing import by_round, environment, quartiles
from megatransformer_jax.config.generation import GenerationConfig
from megatransformer_jax.config.serving import ServingConfig
from megatransformer_jax.serving.engine import Engine
from megatransformer_jax.serving.requests import Event, Failed, Finished, Job, NewToken
from megatransformer_jax.serving.served import settle

MAX_DEPTH = 32
PROMPT = 8


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder of a run; without it random weights")
    parser.add_argument("--width", type=int, default=256, help="of random weights")
    parser.add_argument("--rows", type=int, default=8, help="texts at once")
    parser.add_argument("--texts", type=int, default=48, help="of a workload")
    parser.add_argument("--new", type=int, default=48, help="tokens per text")
    parser.add_argument("--chunk", type=int, default=64, help="prompt tokens per pass")
    parser.add_argument("--slots", type=int, default=MAX_DEPTH, help="of the cache")
    parser.add_argument("--long-prompt", type=int, default=1000, help="tokens of a long prompt")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    parser.add_argument("--json", help="also write all numbers to this file")
    return parser.parse_args()


def get_model(options: argparse.Namespace) -> Any:
    if options.model:
        return mt.load(options.model)
    hidden = -(-options.width * 11 // 4 // 64) * 64
    return mt.create(
        "tiny",
        vocab_size=4096,
        width=options.width,
        max_length=2048,
        core_layers=2,
        attention={"num_heads": 4},
        mlp={"hidden_width": hidden},
        recurrence={"mean_steps": 8, "state_init": "zero"},
    )


# ------------------------------------------------------------------------------
# Texts in, times out.


@dataclasses.dataclass
class Times:
    """When the tokens of a text came.

    Attributes:
      depth: that was asked for.
      moments: of each token.
      ended: of the end; None before.
    """

    depth: int
    moments: list[float] = dataclasses.field(default_factory=list)
    ended: float | None = None

    def gaps(self, begin: float = 0.0, end: float = float("inf")) -> list[float]:
        """Seconds between two tokens, of those in a span of time."""
        inside = [moment for moment in self.moments if begin <= moment <= end]
        return [later - one for one, later in itertools.pairwise(inside)]


class Run:
    """Jobs on an engine, and when their tokens come."""

    def __init__(self, engine: Engine, jobs: Sequence[Job]):
        self.times = [Times(job.config.depth.depth or 0) for job in jobs]
        self.failure = ""
        self._left = len(jobs)
        self._over = threading.Event()
        self.began = time.perf_counter()
        self.ticket = engine.submit(jobs, self._deliver)

    def _deliver(self, number: int, event: Event) -> None:
        now = time.perf_counter()
        if isinstance(event, NewToken):
            self.times[number].moments.append(now)
        elif isinstance(event, Finished | Failed):
            if isinstance(event, Failed):
                self.failure = event.message
            self.times[number].ended = now
            self._left -= 1
            if not self._left:
                self._over.set()

    def wait(self) -> float:
        """Seconds from the start to the end of the last text."""
        self._over.wait()
        if self.failure:
            raise SystemExit(self.failure)
        return max(times.ended or 0.0 for times in self.times) - self.began

    def steady_rate(self) -> float:
        """Tokens per second while no row was free: from the first end to the last first token."""
        begin = min(times.ended or 0.0 for times in self.times)
        end = max(times.moments[0] for times in self.times)
        count = sum(begin < moment <= end for times in self.times for moment in times.moments)
        return count / (end - begin) if end > begin else float("nan")

    def wait_for_tokens(self, count: int) -> None:
        """Waits until each text has so many, or all have ended."""
        while min(len(times.moments) for times in self.times) < count and not self._over.is_set():
            time.sleep(0.002)


def job(
    rng: np.random.Generator,
    size: int,
    length: int,
    new: int,
    *,
    is_streamed: bool = True,
    **depth: Any,
) -> Job:
    """A text of random ids that ends after `new` tokens."""
    ids = tuple(int(token) for token in rng.integers(3, size, length))
    config = GenerationConfig.of(strategy="greedy", max_new_tokens=new, **depth)
    return Job(ids, config, ends=False, is_streamed=is_streamed)


def workloads(lm: Any, options: argparse.Namespace) -> dict[str, list[Job]]:
    """The same texts for every way, in an order drawn once."""
    rng = np.random.default_rng(0)
    size, count = lm.tokenizer.vocab_size if lm.tokenizer else 4096, options.texts
    make = functools.partial(job, rng, size, PROMPT, options.new, is_streamed=False)
    mixed = rng.permutation(np.resize([4, 4, 8, 32], count))
    similar = np.clip(np.rint(rng.normal(6.9, 1.7, count)), 1, MAX_DEPTH)
    found = {
        "mixed": [make(depth=int(depth)) for depth in mixed],
        "similar": [make(depth=int(depth)) for depth in similar],
        "uniform": [make(depth=8) for _ in range(count)],
    }
    if options.model:
        exits: dict[str, Any] = {"depth": MAX_DEPTH, "exit_criterion": "latent_diff"}
        found["criterion"] = [make(**exits) for _ in range(count)]
    return found


# ------------------------------------------------------------------------------
# What is measured.


class Ways:
    """An engine for each way of choosing `min_waiting`; they share their programs."""

    def __init__(self, lm: Any, options: argparse.Namespace):
        rows = options.rows
        base = ServingConfig(
            name="benchmark",
            rows=rows,
            capacity=options.long_prompt + 256,
            chunk=options.chunk,
            criteria=("fixed", "latent_diff"),
            max_depth=MAX_DEPTH,
            cache_slots=options.slots,
            queue=4 * options.texts,
            prefix_reuse=False,
        )
        chosen = {"token level": rows, "automatic": None, f"{max(rows // 4, 1)} wait": rows // 4}
        self.engines: dict[str, Engine] = {}
        for name, number in chosen.items():
            number = None if number is None else max(number, 1)
            config = settle(dataclasses.replace(base, min_waiting=number), lm)
            self.engines[name] = Engine(lm, config)
            self.engines[name].start()
            self.engines[name].wait_until_ready()

    def close(self) -> None:
        for engine in self.engines.values():
            engine.close()


def throughput(
    ways: Ways, jobs: Sequence[Job], rounds: int, generator: Callable[[], float]
) -> dict[str, dict[str, list[float]]]:
    """Per way and round; a round before them warms up.

    Returns:
      'rates': tokens per second of the engines while no row was free. Towards the end of a limited
      number of texts rows are, and how many depends on the order of the texts.
      'seconds': until all texts are there, also of the generator.
    """
    rates: dict[str, list[float]] = {name: [] for name in ways.engines}
    seconds: dict[str, list[float]] = {name: [] for name in (*ways.engines, "generator")}
    for round_number in range(-1, rounds):
        for name, engine in ways.engines.items():
            run = Run(engine, jobs)
            took = run.wait()
            if round_number >= 0:
                seconds[name].append(took)
                rates[name].append(run.steady_rate())
        took = generator()
        if round_number >= 0:
            seconds["generator"].append(took)
    return {"rates": rates, "seconds": seconds}


def by_generator(lm: Any, jobs: Sequence[Job], rows: int) -> Callable[[], float]:
    """The same texts by `Model.generate`: texts of one depth together, `rows` at a time."""
    depths = sorted({job.config.depth.depth or 0 for job in jobs})
    calls = []
    for depth in depths:
        same = [job for job in jobs if job.config.depth.depth == depth]
        calls += [same[first : first + rows] for first in range(0, len(same), rows)]

    def run() -> float:
        begin = time.perf_counter()
        for batch in calls:
            config = batch[0].config
            lm.generate(
                [list(job.ids) for job in batch],
                strategy="greedy",
                depth=config.depth.depth,
                exit_criterion=config.depth.exit_criterion,
                max_new_tokens=config.max_new_tokens,
            )
        return time.perf_counter() - begin

    return run


def one_shallow_text(ways: Ways, lm: Any, options: argparse.Namespace) -> dict[str, list[float]]:
    """Time between tokens of one text of depth 4 among texts of depth 32, per way and round."""
    rng, size = np.random.default_rng(1), lm.tokenizer.vocab_size if lm.tokenizer else 4096
    make = functools.partial(job, rng, size, PROMPT)
    jobs = [make(200, depth=MAX_DEPTH) for _ in range(options.rows - 1)]
    jobs.insert(0, make(options.new, depth=4))
    found: dict[str, list[float]] = {name: [] for name in ways.engines}
    for round_number in range(-1, options.rounds):
        for name, engine in ways.engines.items():
            run = Run(engine, jobs)
            while run.times[0].ended is None:
                time.sleep(0.002)
            run.ticket.cancel()
            run.wait()
            if round_number >= 0:
                # Without the first ones, when prompts were still being read.
                found[name].append(statistics.median(run.times[0].gaps()[4:]))
    return found


def a_long_prompt(ways: Ways, lm: Any, options: argparse.Namespace) -> list[tuple[float, float]]:
    """While all rows but one decode: median time between tokens, and p95 while a prompt is read."""
    rng, size = np.random.default_rng(2), lm.tokenizer.vocab_size if lm.tokenizer else 4096
    make = functools.partial(job, rng, size)
    engine, found = ways.engines["automatic"], []
    for round_number in range(-1, options.rounds):
        run = Run(engine, [make(PROMPT, 240, depth=8) for _ in range(options.rows - 1)])
        run.wait_for_tokens(40)
        arrived = time.perf_counter()
        long = Run(engine, [make(options.long_prompt, 2, depth=8)])
        long.wait_for_tokens(1)
        read = time.perf_counter()
        long.wait()
        run.ticket.cancel()
        run.wait()
        began = run.times[0].moments[8]
        before = [gap for times in run.times for gap in times.gaps(began, arrived)]
        during = [gap for times in run.times for gap in times.gaps(arrived, read)]
        if round_number >= 0:
            found.append((statistics.median(before), float(np.percentile(during, 95))))
    return found


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> str:
    low, median, high = quartiles(by_round(numerators, denominators))
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    options = parse_arguments()
    shown = environment()
    print("\n".join(f"{key}: {value}" for key, value in shown.items()))
    lm = get_model(options)
    print(f"{lm.description}, {lm.num_parameters:,} parameters, float32; {options.rows} rows, ")
    print(f"{options.texts} texts of {options.new} tokens, {options.slots} slots, ", end="")
    print(f"chunks of {options.chunk}\n", flush=True)
    ways = Ways(lm, options)
    names = [name for name in ways.engines if name != "token level"]
    result: dict[str, Any] = {"environment": shown, "options": vars(options)}
    print(
        "tokens per second while no row is free, but for the last column, which compares the time"
    )
    print("of all texts; in brackets quartiles of the ratios of the rounds\n")
    head = " | ".join(f"{name} / token level" for name in names)
    print(f"| texts | token level | {head} | automatic / Generator |")
    print("|---|---:|" + "---:|" * (len(names) + 1))
    for load, jobs in workloads(lm, options).items():
        found = throughput(ways, jobs, options.rounds, by_generator(lm, jobs, options.rows))
        result[load] = found
        rates, seconds = found["rates"], found["seconds"]
        level = rates["token level"]
        cells = [ratios(rates[name], level) for name in names]
        cells.append(ratios(seconds["generator"], seconds["automatic"]))
        rate = statistics.median(level)
        print(f"| {load} | {rate:.0f} | " + " | ".join(cells) + " |", flush=True)
    shallow = result["shallow"] = one_shallow_text(ways, lm, options)
    print(f"\none text of depth 4 among {options.rows - 1} of depth 32, ms between its tokens:")
    for name, medians in shallow.items():
        share = ratios(medians, shallow["token level"])
        print(f"  {name}: {1e3 * statistics.median(medians):.1f}, of token level's {share}")
    if options.long_prompt:
        result["long_prompt"] = a_long_prompt(ways, lm, options)
        before, during = zip(*result["long_prompt"], strict=True)
        print(f"\na prompt of {options.long_prompt} tokens comes while others decode at depth 8:")
        print(f"  ms between their tokens before, median: {1e3 * statistics.median(before):.1f}")
        print(f"  while it is read, p95: {1e3 * statistics.median(during):.1f}, ", end="")
        print(f"as a multiple: {ratios(during, before)}")
    ways.close()
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
