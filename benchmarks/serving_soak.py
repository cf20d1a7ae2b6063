"""A server under random traffic for a long time: errors, memory, times of tokens.

    python -m benchmarks.serving_soak --model=runs/recurrent
    python -m benchmarks.serving_soak --model=runs/recurrent --minutes=2 --rows=4

Starts `megatransformer serve` in a separate process. First as many clients as there are rows, and
as many again, find out how many requests per second it serves; then requests come at random moments
at `--load` of that rate. Depth (4, 8 or 32), exit criterion, temperature, seed and both lengths are
drawn per request, and some clients hang up in the middle. At the end nothing may be open, and the
server must stop at SIGTERM.
"""

import argparse
import asyncio
import json
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from typing import Any

import numpy as np

from benchmarks.serving_traffic import Seen, bodies, closed_loop, open_loop
from benchmarks.timing import environment

_START_SECONDS = 900
# Part of the time after which memory is compared with the end: pools and caches are full by then.
_SETTLED = 0.2


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of a text model")
    parser.add_argument("--minutes", type=float, default=30.0, help="of random traffic")
    parser.add_argument("--load", type=float, default=0.8, help="share of what it can serve")
    parser.add_argument("--rate", type=float, help="requests per second; None: measured")
    parser.add_argument("--calibration", type=float, default=60.0, help="seconds of measuring that")
    parser.add_argument("--rows", type=int, default=8, help="of the server")
    parser.add_argument("--capacity", type=int, default=256, help="tokens per row")
    parser.add_argument("--max-new", type=int, default=64, help="most new tokens")
    parser.add_argument("--prompt-words", type=int, default=60, help="most words of a prompt")
    parser.add_argument("--drop-share", type=float, default=0.05, help="of clients that hang up")
    parser.add_argument("--json", help="also write all numbers to this file")
    return parser.parse_args()


class Served:
    """`megatransformer serve` in another process; a context manager.

    Args:
      options: of the command line.
      log: file for what it prints.
    """

    def __init__(self, options: argparse.Namespace, log: pathlib.Path):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        code = "from megatransformer_jax.cli.commands import main; import sys; "
        code += "main('serve', sys.argv[1:])"
        self._command = [
            *(sys.executable, "-c", code, f"--model={options.model}", f"--port={port}"),
            *(f"--rows={options.rows}", f"--capacity={options.capacity}"),
            "--criteria=fixed,latent_diff",
        ]
        self._log = log

    def __enter__(self) -> "Served":
        with open(self._log, "wb") as output:
            self.process = subprocess.Popen(self._command, stdout=output, stderr=output)
        deadline = time.monotonic() + _START_SECONDS
        while not self._is_ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                raise SystemExit(f"the server did not start:\n{self._log.read_text()[-2000:]}")
            time.sleep(0.2)
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def resident_mib(self) -> float:
        """Memory of the process."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        [line] = [line for line in status.splitlines() if line.startswith("VmRSS")]
        return int(line.split()[1]) / 1024

    def metrics(self) -> dict[str, float]:
        """Counters and gauges, without labels and prefix; those of several labels are summed."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        found: dict[str, float] = {}
        for line in lines:
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                short = name.partition("{")[0].partition(":")[2]
                found[short] = found.get(short, 0.0) + float(value)
        return found

    def stop(self) -> float:
        """Sends SIGTERM; seconds until the process has ended well."""
        begin = time.perf_counter()
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        if code:
            raise SystemExit(f"after SIGTERM the server ended with code {code}")
        return time.perf_counter() - begin


def capacity_of(served: Served, options: argparse.Namespace) -> float:
    """Requests per second with all rows busy."""
    requests = bodies(1, (8, options.max_new), options.prompt_words)
    seconds = options.calibration
    for part in (seconds / 4, seconds):  # The first part warms up.
        begin = time.perf_counter()
        seen = asyncio.run(closed_loop(served.url, requests, 2 * options.rows, part))
        took = time.perf_counter() - begin
    return len(seen) / took


def soak(served: Served, options: argparse.Namespace, rate: float) -> dict[str, Any]:
    """The random traffic, and what came of it."""
    memory: list[tuple[float, float]] = []

    def watch(seconds: float, found: list[Seen]) -> None:
        if not memory or seconds - memory[-1][0] >= 10:
            memory.append((seconds, served.resident_mib()))
            errors = sum(bool(seen.error) for seen in found)
            print(
                f"{seconds:6.0f} s: {len(found)} answered, {errors} errors, "
                f"{memory[-1][1]:.0f} MiB",
                file=sys.stderr,
                flush=True,
            )

    found = asyncio.run(
        open_loop(
            served.url,
            bodies(2, (8, options.max_new), options.prompt_words),
            rate,
            60 * options.minutes,
            drop_share=options.drop_share,
            watch=watch,
        )
    )
    memory.append((60 * options.minutes, served.resident_mib()))
    time.sleep(1)  # Until the last client that hung up has been noticed.
    return {"seen": found, "memory": memory, "metrics": served.metrics()}


def percentiles(seconds: list[float]) -> str:
    """p50, p95 and p99 in milliseconds, as cells of a table."""
    if not seconds:
        return "| | |"
    return " | ".join(f"{1e3 * value:.0f}" for value in np.percentile(seconds, (50, 95, 99)))


def report(result: dict[str, Any], options: argparse.Namespace, rate: float) -> list[str]:
    """Lines for people."""
    found: list[Seen] = result["seen"]
    memory, metrics = result["memory"], result["metrics"]
    refused = sum(seen.status == 429 for seen in found)
    errors = [seen for seen in found if seen.error]
    tokens = metrics["generation_tokens_total"]
    lines = [
        f"{len(found)} requests in {options.minutes:g} minutes ({rate:.2f} per second), "
        f"{sum(seen.is_dropped for seen in found)} hung up, {refused} refused (429), "
        f"{len(errors)} errors; {tokens:.0f} tokens since the start",
        "",
        "| | depth | requests | p50 | p95 | p99 |",
        "|---|---|---:|---:|---:|---:|",
    ]
    groups = {"all": found}
    for depth in sorted({seen.depth for seen in found}):
        groups[str(depth)] = [seen for seen in found if seen.depth == depth]
    for name, group in groups.items():
        firsts = [seen.first for seen in group if seen.first is not None]
        lines.append(f"| time to first token, ms | {name} | {len(group)} | {percentiles(firsts)} |")
    for name, group in groups.items():
        between = [gap for seen in group for gap in seen.between]
        cells = percentiles(between)
        lines.append(f"| between tokens, ms | {name} | {len(group)} | {cells} |")
    settled = [mib for seconds, mib in memory if seconds >= 60 * options.minutes * _SETTLED]
    growth = settled[-1] / settled[0] - 1
    lines += [
        "",
        f"resident memory: {memory[0][1]:.0f} MiB at the start, {settled[0]:.0f} after "
        f"{_SETTLED:.0%} of the time, {settled[-1]:.0f} at the end ({growth:+.1%}; "
        f"{min(settled):.0f} to {max(settled):.0f} between)",
        f"open at the end: {metrics['num_requests_running']:.0f} running, "
        f"{metrics['num_requests_waiting']:.0f} waiting; compiled after the start: "
        f"{metrics['compilations_total']:.0f}; failed: {metrics['request_failed_total']:.0f}",
    ]
    lines += sorted({f"error: {seen.error}" for seen in errors})[:5]
    return lines


def main() -> None:
    options = parse_arguments()
    shown = environment()
    print("\n".join(f"{key}: {value}" for key, value in shown.items()), flush=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        Served(options, pathlib.Path(folder) / "server.log") as served,
    ):
        print(f"{options.rows} rows of {options.capacity} tokens, up to {options.max_new} new")
        rate = options.rate
        if rate is None:
            most = capacity_of(served, options)
            rate = options.load * most
            print(f"all rows busy: {most:.2f} requests per second", flush=True)
        result = soak(served, options, rate)
        seconds = served.stop()
    lines = report(result, options, rate)
    print("\n".join(lines))
    print(f"ended {seconds:.1f} s after SIGTERM")
    if options.json:
        values = {"environment": shown, "options": vars(options), "rate": rate, "report": lines}
        values |= {"memory": result["memory"], "metrics": result["metrics"]}
        values["seen"] = [vars(seen) for seen in result["seen"]]
        pathlib.Path(options.json).write_text(json.dumps(values), encoding="utf-8")


if __name__ == "__main__":
    main()
