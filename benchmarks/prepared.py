"""Preparing data once, and what reading it costs with many processes, compared with texts.

    python -m benchmarks.prepared
    python -m benchmarks.prepared --mb=20 --workers=1

Texts are made of the words of `pydoc_data.topics` by Zipf's law. They are prepared without a stop,
then again with a SIGKILL in the middle, and the files are compared. Then the first of 1, 4, 16 and
64 processes makes its share of batches of 64 rows x 512 tokens, from the texts and from the rows.
"""

import argparse
import dataclasses
import hashlib
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pydoc_data.topics import topics
from typing import Any

import numpy as np

from benchmarks.timing import environment
from megatransformer_jax.checkpoints.compatibility import flatten_config
from megatransformer_jax.config.build import configure
from megatransformer_jax.config.data import DataConfig
from megatransformer_jax.config.run_kinds import require_transformer
from megatransformer_jax.data.pipeline import build_pipeline
from megatransformer_jax.data.tokenizer import Tokenizer, load_sentencepiece
from megatransformer_jax.runs.prepare import prepare

ROWS, LENGTH = 64, 512
PROCESSES = (1, 4, 16, 64)
WARM_UP = 3
ROUNDS = 3


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mb", type=int, default=200, help="megabytes of text")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--shard-mb", type=int, default=16, help="megabytes of text per file")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument(
        "--kill",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also prepare with a SIGKILL in the middle",
    )
    parser.add_argument("--seconds", type=float, default=5, help="CPU time per measurement")
    return parser.parse_args()


def write_texts(path: pathlib.Path, megabytes: int) -> None:
    """JSON lines with about so many megabytes of text."""
    rng = np.random.default_rng(0)
    words = np.array(sorted({word for text in topics.values() for word in text.split()}))
    rng.shuffle(words)
    weights = np.arange(1, len(words) + 1) ** -0.9
    written = number = 0
    with path.open("w") as file:
        while written < megabytes * 1_000_000:
            lengths = np.clip(rng.lognormal(5.5, 1.0, 500), 5, 20_000).astype(int)
            drawn = words[rng.choice(len(words), lengths.sum(), p=weights / weights.sum())]
            for part in np.split(drawn, np.cumsum(lengths)[:-1]):
                text = f"{number}: {' '.join(part.tolist())}"
                file.write(json.dumps({"text": text}) + "\n")
                written, number = written + len(text), number + 1


def run_command(values: dict[str, Any], words: list[str], kill_after_s: float | None) -> float:
    """Runs `megatransformer prepare`, perhaps not to its end; returns its seconds."""
    options = [f"--config.{name}={value}" for name, value in flatten_config(values).items()]
    command = [sys.executable, "-m", "experiments.prepare", "--config=recurrent", *options, *words]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            process.wait(kill_after_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            return time.perf_counter() - start
    if process.returncode:
        raise SystemExit(process.returncode)
    return time.perf_counter() - start


def digests(folder: pathlib.Path) -> dict[str, str]:
    """Of every file in a folder."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


def cpu_s_per_batch(
    data: DataConfig, tokenizer: Tokenizer, process_count: int, seconds: float
) -> float:
    """CPU seconds that the first process takes for its share of a batch, the least of 3 rounds."""
    with build_pipeline(data, tokenizer, split="train", process_count=process_count) as batches:
        for _ in range(WARM_UP):
            next(batches)
        rounds = []
        for _ in range(ROUNDS):
            count, start = 0, time.process_time()
            while time.process_time() - start < seconds / ROUNDS:
                next(batches)
                count += 1
            rounds.append((time.process_time() - start) / count)
        return min(rounds)


def main() -> None:
    """Measures and prints."""
    given = parse_arguments()
    for name, value in environment().items():
        print(f"{name}: {value}")
    folder = pathlib.Path(tempfile.mkdtemp(prefix="prepared"))
    try:
        measure(given, folder)
    finally:
        shutil.rmtree(folder)


def measure(given: argparse.Namespace, folder: pathlib.Path) -> None:
    """Prepares, compares and times in a folder."""
    texts, whole = folder / "texts.jsonl", folder / "whole"
    write_texts(texts, given.mb)
    values: dict[str, Any] = {
        "data": {
            "source": "jsonl",
            "files": (str(texts),),
            "sequence_length": LENGTH,
            "batch_size": ROWS,
            "tokenizer": {"max_training_bytes": 3_000_000},
        },
        "model": {"vocab_size": given.vocabulary, "max_length": LENGTH},
    }
    run = require_transformer(configure("recurrent", values))
    done = prepare(run, str(whole), num_workers=given.workers, shard_mb=given.shard_mb)
    megabytes = done.num_bytes / 1e6
    print(
        f"{given.workers} workers prepared {megabytes:.0f} MB, {done.tokens:,} tokens in "
        f"{done.rows:,} rows, in {done.duration_s:.1f} s: {megabytes / done.duration_s:.1f} MB/s"
    )
    if given.kill:
        killed = folder / "killed"
        words = [f"--output={killed}", f"--workers={given.workers}", f"--shard_mb={given.shard_mb}"]
        stopped_s = run_command(values, words, done.duration_s / 2)
        finished = len(list(killed.glob("*-of-*.json")))
        more_s = run_command(values, words, None)
        same = digests(whole) == digests(killed)
        print(
            f"killed after {stopped_s:.1f} s with {finished} files finished, then went on for "
            f"{more_s:.1f} s: {'the same files, byte for byte' if same else 'OTHER FILES'}"
        )
    print_costs(run.data, whole, given.seconds)


def print_costs(config: DataConfig, folder: pathlib.Path, seconds: float) -> None:
    """A table of what batches cost with many processes, of texts and of prepared rows."""
    tokenizer = load_sentencepiece(folder / "tokenizer.model")
    prepared = dataclasses.replace(config, source="tokens", files=(str(folder),))
    print(
        "\n| processes | rows of one | CPU per batch: texts | rows | useful tokens per CPU second: "
        "texts | rows |\n|---:|---:|---:|---:|---:|---:|"
    )
    for count in PROCESSES:
        times = [cpu_s_per_batch(data, tokenizer, count, seconds) for data in (config, prepared)]
        useful = ROWS // count * LENGTH
        print(
            f"| {count} | {ROWS // count} | {1e3 * times[0]:.2f} ms | {1e3 * times[1]:.3f} ms | "
            f"{useful / times[0]:,.0f} | {useful / times[1]:,.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
