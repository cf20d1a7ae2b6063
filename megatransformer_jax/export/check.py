"""Exported programs next to the model that they come from: logits, iterations, greedy tokens, time.

The same prompts are continued three times: by the programs as the folder's own loop runs them, by
the same functions compiled here, and by this package's generation.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from rich.table import Table

from megatransformer_jax.config.generation import GenerationConfig
from megatransformer_jax.evaluation.report import Report
from megatransformer_jax.export import loop
from megatransformer_jax.export.program import Programs, named
from megatransformer_jax.generation.generator import Generator
from megatransformer_jax.runs.load import LoadedModel

# Depths that are compared, and tokens that are added to a prompt.
DEPTHS = (2, 8, 16)
MAX_TOKENS = 32
# Largest difference between logits: StableHLO is the same program, ONNX rounds elsewhere.
TOLERANCES = {"stablehlo": 0.0, "onnx": 1e-4}
_PROMPT_TOKENS = 7

# (inputs, cache) -> (outputs, cache), named arrays.
Pass = Callable[[Mapping[str, Any], Mapping[str, Any]], tuple[dict[str, Any], dict[str, Any]]]


@dataclasses.dataclass
class _Run:
    """One way's texts: of each pass tokens, iterations and logits; and seconds per step."""

    tokens: np.ndarray
    steps: np.ndarray
    logits: list[np.ndarray]
    step_s: float


def check_program(folder: pathlib.Path, loaded: LoadedModel, programs: Programs) -> Report:
    """Compares the programs of a folder with the model.

    Args:
      folder: as `export_program` wrote it.
      loaded: the model.
      programs: what was exported.

    Returns:
      A row per criterion and depth; `passed` says whether logits differ by at most `TOLERANCES`,
      and iterations and tokens by nothing.
    """
    about, exported = loop.open_folder(folder)
    params = named(loaded.params)
    compiled = jax.jit(programs.call, donate_argnums=2)

    def call(inputs: Any, cache: Any) -> Any:
        return compiled(params, inputs, cache)

    ours = {name: call for name in programs.columns}
    is_recurrent = programs.model.config.is_recurrent
    cases = [
        {"criterion": name, "depth": depth}
        for name in programs.config.criterion
        for depth in DEPTHS
    ]
    rows = []
    for case in cases if is_recurrent else [{}]:
        got, wanted = (_continue(about, way, case) for way in (exported, ours))
        rows.append({**case, **_compare(got, wanted, about["format"])})
        rows[-1]["same_as_generate"] = _same_as_generate(loaded, programs, got, case)
        rows[-1]["passed"] &= rows[-1]["same_as_generate"] == 1.0
    return Report(rows, [_table(rows, about)], lambda folder: [])


def _prompts(about: Mapping[str, Any], vocab_size: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    sizes = [min(_PROMPT_TOKENS, about["capacity"] // 2) - row % 3 for row in range(about["batch"])]
    return [rng.integers(3, vocab_size, max(size, 1)).tolist() for size in sizes]


def _num_tokens(about: Mapping[str, Any]) -> int:
    """As many as fit behind the prompt."""
    columns = -(-(_PROMPT_TOKENS - 1) // about["chunk"]) * about["chunk"]
    room = min(about["capacity"] - columns, about["max_length"] - _PROMPT_TOKENS)
    return max(1, min(MAX_TOKENS, room))


def _continue(
    about: Mapping[str, Any], programs: Mapping[str, Pass], case: Mapping[str, Any]
) -> _Run:
    logits, seconds = [], []

    def recorded(run: Pass) -> Pass:
        def call(inputs: Any, cache: Any) -> Any:
            begin = time.perf_counter()
            outputs, cache = run(inputs, cache)
            logits.append(np.asarray(outputs["logits"]))
            seconds.append(time.perf_counter() - begin)
            return outputs, cache

        return call

    vocab_size = about["programs"]["step"]["outputs"][0]["shape"][1]
    passes = {name: recorded(run) for name, run in programs.items()}
    given = _prompts(about, vocab_size)
    found = [*loop.generate(about, passes, given, _num_tokens(about), **case)]
    tokens, steps = (np.stack([item[part] for item in found], axis=1) for part in (0, 1))
    # The first of a kind compiles.
    return _Run(tokens, steps, logits, float(np.median(seconds[-len(found) // 2 :])))


def _compare(got: _Run, wanted: _Run, format: str) -> dict[str, Any]:
    is_same = got.tokens == wanted.tokens
    # Behind another token everything may differ.
    num_passes = len(got.logits) - got.tokens.shape[1] + 1
    num_passes += int(is_same.all(axis=0).cumprod().sum())
    pairs = zip(got.logits[:num_passes], wanted.logits[:num_passes], strict=True)
    difference = max(float(np.max(np.abs(a - b))) for a, b in pairs)
    steps = bool((got.steps == wanted.steps).all())
    return {
        "difference": difference,
        "same_iterations": steps,
        "mean_depth": float(got.steps.mean()),
        "exported_ms": 1e3 * got.step_s,
        "jitted_ms": 1e3 * wanted.step_s,
        "passed": steps and bool(is_same.all()) and difference <= TOLERANCES[format],
    }


def _same_as_generate(
    loaded: LoadedModel, programs: Programs, got: _Run, case: Mapping[str, Any]
) -> float:
    """The part of the tokens that this package's own generation chooses too."""
    config, options = programs.config, {}
    if case:
        options = {"depth": case["depth"], "exit_criterion": case["criterion"]}
        options["gate_readout"] = config.gate_readout
        slots = config.cache_slots
        if slots is not None and slots < case["depth"]:
            options |= {"cache_slots": slots, "cache_sharing": config.cache_sharing}
        if case["criterion"] != "fixed":
            options["cache_exited_reads"] = config.cache_exited_reads
    generation = GenerationConfig.of(
        strategy="greedy", max_new_tokens=got.tokens.shape[1], seed=config.seed, **options
    )
    generator = Generator(
        programs.model, loaded.params, None, generation, loaded.trained_depth, end_ids=()
    )
    about = {"capacity": config.capacity, "batch": config.batch}
    wanted = generator.generate(_prompts(about, programs.model.config.vocab_size))
    ids = np.asarray([completion.token_ids for completion in wanted])
    return float((ids == got.tokens).mean())


def _table(rows: list[dict[str, Any]], about: Mapping[str, Any]) -> Table:
    table = Table(title=f"{about['format']} next to jax.jit, {_num_tokens(about)} greedy tokens")
    for name in ("criterion", "depth", "logits differ by", "iterations", "mean depth"):
        table.add_column(name)
    for name in ("as generate", "ms per token", "jax.jit", "passed"):
        table.add_column(name)
    for row in rows:
        table.add_row(
            row.get("criterion", "-"),
            str(row.get("depth", "-")),
            f"{row['difference']:.2g}",
            "equal" if row["same_iterations"] else "differ",
            f"{row['mean_depth']:.2f}",
            f"{row['same_as_generate']:.0%}",
            f"{row['exported_ms']:.2f}",
            f"{row['jitted_ms']:.2f}",
            "yes" if row["passed"] else "NO",
        )
    return table
