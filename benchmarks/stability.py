"""What happens beyond the trained depth: accuracy, spectral radius, residual of several runs.

    python -m benchmarks.stability runs/reasoning runs/reasoning_stable
    python -m benchmarks.stability runs/reasoning --times 1 4 16 --rows=4 --json=result.json

Runs of reasoning tasks. Depths are multiples of the trained mean. Per run and depth:

  exact     share of the held-out problems whose whole answer is right
  radius    largest |eigenvalue| of the derivative of that iteration's state by the one before;
            above 1 a small disturbance grows
  residual  |h_i - h_{i-1}| / |h_i| of that iteration
  growth    |h_{i+1} - h_i| / |h_i - h_{i-1}|

Radius, residual and growth are means over the first problems only (--rows), as the radius costs
--products passes per iteration.
"""

import argparse
import dataclasses
import json
import pathlib
import platform
import sys

import jax
import jaxlib
import numpy as np

from megatransformer_jax.config.build import load_config
from megatransformer_jax.config.option import UserError
from megatransformer_jax.data.pipeline import validation_batches
from megatransformer_jax.evaluation.recurrence import iteration_curves, spectral_radius
from megatransformer_jax.evaluation.validation import ValidationSet, make_eval_step
from megatransformer_jax.runs.load import LoadedModel, load_model
from megatransformer_jax.types import Batch


@dataclasses.dataclass(frozen=True)
class Row:
    """One run at one depth."""

    run: str
    depth: int
    exact: float
    radius: float
    residual: float
    growth: float


def parser_of_runs(description: str | None) -> argparse.ArgumentParser:
    """What a benchmark of trained reasoning runs is told."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdirs", nargs="+", help="of trained reasoning runs")
    parser.add_argument("--step", default="latest", help="which checkpoint: latest, best, a number")
    parser.add_argument("--seed", type=int, default=0, help="of random first states")
    parser.add_argument("--json", help="also write all numbers to this file")
    return parser


def parse_arguments() -> argparse.Namespace:
    parser = parser_of_runs(__doc__)
    parser.add_argument("--times", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N")
    parser.add_argument("--rows", type=int, default=8, help="problems for radius and residual")
    parser.add_argument("--products", type=int, default=30, help="of the power iteration")
    return parser.parse_args()


def load_run(workdir: pathlib.Path, step: str) -> tuple[LoadedModel, list[Batch]]:
    """A trained model and its held-out problems.

    Raises:
      UserError: if the run is none of a recurrent model on a reasoning task.
    """
    loaded = load_model(workdir, step=step)
    data = load_config(workdir / "config.json").data
    if data.source != "reasoning" or loaded.trained_depth is None:
        raise UserError(
            f"{workdir} was trained on data.source={data.source!r}"
            f"{'' if loaded.trained_depth else ' without a core'}; this benchmark needs a "
            "recurrent model of a reasoning task, such as experiments/configs/reasoning.py."
        )
    return loaded, validation_batches(data, None, num_batches=None)


def measure(
    name: str, loaded: LoadedModel, batches: list[Batch], arguments: argparse.Namespace
) -> list[Row]:
    """The rows of one run."""
    assert loaded.trained_depth is not None
    model, params, key = loaded.model, loaded.params, jax.random.key(arguments.seed)
    depths = [times * loaded.trained_depth for times in sorted(set(arguments.times))]
    problems = ValidationSet(
        [jax.device_put(batch) for batch in batches], jax.jit(make_eval_step(model, key))
    )
    few = jax.device_put(jax.tree.map(lambda array: array[: arguments.rows], batches[0]))
    radius = np.asarray(spectral_radius(model, params, few, depths[-1], key, arguments.products))
    curves = iteration_curves(model, params, few, depths[-1], key)
    return [
        Row(
            run=name,
            depth=depth,
            exact=problems.score(params, depth).exact_accuracy,
            radius=float(radius[depth - 1]),
            residual=float(curves.residual[depth - 1]),
            growth=float(curves.contraction[depth - 1]),
        )
        for depth in depths
    ]


def print_table(rows: list[Row]) -> None:
    print("\n| run | depth | exact | radius | residual | growth |")
    print("|---|---:|---:|---:|---:|---:|")
    for row in rows:
        numbers = f"{row.exact:.3f} | {row.radius:.3f} | {row.residual:.2e} | {row.growth:.3f}"
        print(f"| {row.run} | {row.depth} | {numbers} |", flush=True)


def main() -> None:
    arguments = parse_arguments()
    rows: list[Row] = []
    try:
        for name in ("times", "rows", "products"):
            least = 2 if name == "products" else 1
            if np.min(getattr(arguments, name)) < least:
                raise UserError(f"--{name}={getattr(arguments, name)}: at least {least}.")
        for workdir in map(pathlib.Path, arguments.workdirs):
            loaded, batches = load_run(workdir, arguments.step)
            print(f"{loaded.description}; trained depth {loaded.trained_depth}", flush=True)
            rows += measure(workdir.name, loaded, batches, arguments)
    except UserError as error:
        sys.exit(f"error: {error}")
    print_table(rows)
    if arguments.json:
        versions = {"jax": jax.__version__, "jaxlib": jaxlib.__version__}
        summary = {
            "device": jax.devices()[0].device_kind,
            "versions": {"python": platform.python_version(), **versions},
            "arguments": vars(arguments),
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        pathlib.Path(arguments.json).write_text(json.dumps(summary, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
