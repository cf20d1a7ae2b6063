"""Speed of exported programs, StableHLO and ONNX, next to the same step by jax.jit.

    python -m benchmarks.exported
    python -m benchmarks.exported --width=512 --rows=8 --json=result.json

Random weights: 4 heads, gated feed-forward layers, prelude 1, core 2, coda 1, vocabulary 4096,
first state zero. One step passes one token per row through the model with a cache that is half
full. The three ways alternate in every round, and both runtimes use all cores.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import Phase, alternate, by_round, call_first, environment, quartiles, spread
from megatransformer_jax.config.exporting import ProgramConfig
from megatransformer_jax.config.layers import AttentionConfig
from megatransformer_jax.config.model import MlpConfig, ModelConfig
from megatransformer_jax.config.recurrence import RecurrenceConfig
from megatransformer_jax.export import loop
from megatransformer_jax.export.folder import export_program
from megatransformer_jax.export.program import build_programs, named
from megatransformer_jax.models.megatransformer import build_model, init_params
from megatransformer_jax.runs.load import LoadedModel
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy

FORMATS = ("stablehlo", "onnx")
DEPTH = 8


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=256, help="of the model")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8], help="rows of a step")
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 8], help="iterations")
    parser.add_argument("--capacity", type=int, default=256, help="rows of the cache")
    parser.add_argument("--criterion", default="latent_diff", help="an exit criterion")
    parser.add_argument("--rounds", type=int, default=21, help="timed rounds")
    parser.add_argument("--json", help="also write all numbers to this file")
    return parser.parse_args()


def random_model(width: int, length: int) -> LoadedModel:
    """A model with a core of two layers and random weights."""
    hidden = -(-width * 11 // 4 // 64) * 64
    config = ModelConfig(
        vocab_size=4096,
        width=width,
        max_length=length,
        core_layers=2,
        attention=AttentionConfig(num_heads=4),
        mlp=MlpConfig(hidden_width=hidden),
        recurrence=RecurrenceConfig(mean_steps=DEPTH, state_init="zero"),
    )
    model = build_model(config, DTypePolicy(), Sharder(), jax.default_backend())
    params = init_params(model, jax.random.key(0))
    return LoadedModel(config, model, params, None, DEPTH, "random weights")


def step_phases(
    loaded: LoadedModel, options: argparse.Namespace, rows: int, folder: pathlib.Path
) -> dict[str, dict[str, Any]]:
    """What a step is called with, and the step, of every way."""
    config = ProgramConfig(
        batch=rows,
        capacity=options.capacity,
        chunk=options.capacity // 2,
        criterion=(options.criterion,),
        cache_slots=max(options.depths),
    )
    ways: dict[str, dict[str, Any]] = {}
    for format in FORMATS:
        begin = time.perf_counter()
        target = folder / f"{format}_{rows}"
        of_format = dataclasses.replace(config, format=format)
        export_program(loaded, target, of_format)
        about, programs = loop.open_folder(target)
        size = sum(path.stat().st_size for path in target.iterdir())
        ways[format] = {
            "about": about,
            "programs": programs,
            "export_s": time.perf_counter() - begin,
            "bytes": size,
        }
    made = build_programs(loaded.model, loaded.params, loaded.trained_depth, config)
    params, compiled = named(loaded.params), jax.jit(made.call, donate_argnums=2)
    program = functools.partial(compiled, params)
    about = ways["stablehlo"]["about"]
    ways["jit"] = {"about": about, "programs": dict.fromkeys(made.columns, program)}
    return ways


def filled(way: dict[str, Any], depth: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs of a step, and a cache that a chunk has filled."""
    about = way["about"]
    rng = np.random.default_rng(0)
    shape = (about["batch"], about["chunk"])
    given = {"depth": depth, "min_depth": 1, "threshold": 0.0}
    settings = {
        entry["name"]: np.asarray(given[entry["name"]], entry["dtype"])
        for entry in about["programs"]["step"]["inputs"]
        if entry["name"] in given
    }
    cache = {c["name"]: np.full(c["shape"], c["fill"], c["dtype"]) for c in about["cache"]}
    tokens = rng.integers(0, 4096, shape).astype(np.int32)
    inputs = {"tokens": tokens, "is_token": np.ones(shape, bool), **settings}
    _, cache = way["programs"]["prefill"](inputs, cache)
    one = {"tokens": tokens[:, :1], "is_token": np.ones((shape[0], 1), bool), **settings}
    return one, jax.block_until_ready(cache)


def phase_of(name: str, way: dict[str, Any], depth: int) -> Phase:
    inputs, cache = filled(way, depth)
    # A step donates its cache; copying is not timed.
    copy = jax.jit(lambda cache: jax.tree.map(jnp.copy, cache)) if name != "onnx" else dict

    def run(cache: Any) -> Any:
        outputs, _ = way["programs"]["step"](inputs, cache)
        return outputs

    return Phase(name, functools.partial(copy, cache), run)


def main() -> None:
    options = parse_arguments()
    shown = environment()
    import onnxruntime  # noqa: PLC0415

    print("\n".join(f"{key}: {value}" for key, value in shown.items()))
    print(f"onnxruntime {onnxruntime.__version__}, float32, width {options.width}, ", end="")
    print(f"criterion {options.criterion} that never settles, capacity {options.capacity}\n")
    loaded = random_model(options.width, options.capacity)
    results: list[dict[str, Any]] = []
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for rows in options.rows:
            ways = step_phases(loaded, options, rows, pathlib.Path(folder))
            for depth in options.depths:
                phases = [phase_of(name, ways[name], depth) for name in ("jit", *FORMATS)]
                for phase in phases:
                    call_first(phase)
                alternate(phases, options.rounds)
                jit, *others = phases
                ratios = [quartiles(by_round(each.seconds, jit.seconds))[1] for each in others]
                times = " | ".join(spread(phase.seconds) for phase in phases)
                told = " | ".join(f"{ratio:.2f}" for ratio in ratios)
                lines.append(f"| {rows} | {depth} | {times} | {told} |")
                results.append(
                    {"rows": rows, "depth": depth} | {phase.name: phase.seconds for phase in phases}
                )
            for format in FORMATS:
                way = ways[format]
                size = f"{way['bytes'] / 1e6:.1f} MB"
                print(f"{format}, {rows} rows: written in {way['export_s']:.1f} s, {size}")
    print("\n| rows | depth | jax.jit | StableHLO | ONNX | StableHLO / jit | ONNX / jit |")
    print("|---:|---:|---|---|---|---:|---:|")
    print("\n".join(lines))
    if options.json:
        text = json.dumps({"environment": shown, "options": vars(options), "results": results})
        pathlib.Path(options.json).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
