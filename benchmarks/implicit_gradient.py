"""The implicit and the truncated gradient of a trained core against that of all iterations.

    python -m benchmarks.implicit_gradient runs/implicit
    python -m benchmarks.implicit_gradient runs/implicit --terms 1 4 16 --json=result.json

Runs of reasoning tasks. The loss of the first held-out problems (--rows) after --depth iterations
is differentiated by all parameters: through all iterations, which is the reference, through the
last k (truncated), and by k terms of the implicit sum. Per run, gradient and k:

  cosine    with the reference
  length    as a share of the reference's
  memory    temporary bytes of the compiled program
  time      of one gradient, median; the programs take turns

The line above each table tells how settled the core is: the residual |h_i - h_{i-1}| / |h_i| of the
last iteration, and the largest |eigenvalue| of its Jacobian.
"""

import argparse
import dataclasses
import json
import pathlib
import platform
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from benchmarks.stability import load_run, parser_of_runs
from benchmarks.timing import Phase, alternate
from megatransformer_jax.config.option import UserError
from megatransformer_jax.evaluation.recurrence import iteration_curves, spectral_radius
from megatransformer_jax.losses.tokens import token_loss
from megatransformer_jax.models.megatransformer import MegaTransformer
from megatransformer_jax.types import Batch


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to differentiate one run."""

    run: str
    gradient: str
    terms: int
    cosine: float
    length: float
    memory_mib: float
    milliseconds: float


def parse_arguments() -> argparse.Namespace:
    parser = parser_of_runs(__doc__)
    parser.add_argument("--depth", type=int, default=48, help="iterations")
    parser.add_argument("--terms", type=int, nargs="+", default=[1, 2, 4, 8, 16], metavar="K")
    parser.add_argument("--rows", type=int, default=32, help="problems")
    parser.add_argument("--rounds", type=int, default=10, help="timed calls of each program")
    return parser.parse_args()


def differentiator(
    model: MegaTransformer, gradient: str, terms: int, params: Any, batch: Batch, key: jax.Array
) -> Any:
    """A compiled program: parameters, batch and depth to the mean loss's gradient."""
    recurrence = dataclasses.replace(
        model.config.recurrence, gradient=gradient, implicit_tolerance=0.0, unroll=1, kept_every=1
    )
    config = dataclasses.replace(model.config, remat="none", recurrence=recurrence)
    model = model.copy(config=config)

    def loss(params: Any, batch: Batch, num_steps: jax.Array) -> jax.Array:
        output: Any = model.apply(
            {"params": params},
            batch.tokens,
            positions=batch.positions,
            segment_ids=batch.segment_ids,
            num_steps=num_steps,
            backprop_depth=terms,
            rngs={"state": key},
        )
        sums = token_loss(output.logits, batch.targets, batch.loss_mask)
        return sums.cross_entropy / sums.tokens

    return jax.jit(jax.grad(loss)).lower(params, batch, jnp.int32(0)).compile()


def _call(program: Any, params: Any, batch: Batch) -> Callable[[Any], Any]:
    return lambda depth: program(params, batch, depth)


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in jax.tree.leaves(tree)])


def measure(
    name: str, model: MegaTransformer, params: Any, batch: Batch, arguments: argparse.Namespace
) -> list[Row]:
    """The rows of one run."""
    key, depth = jax.random.key(arguments.seed), arguments.depth
    ways = [("truncated", depth)]
    for terms in sorted(set(arguments.terms)):
        ways += [("truncated", terms), ("implicit", terms)]
    phases, found, memory = [], {}, {}
    for way in dict.fromkeys(ways):
        program = differentiator(model, *way, params, batch, key)
        memory[way] = program.memory_analysis().temp_size_in_bytes / 2**20
        found[way] = flat(program(params, batch, jnp.int32(depth)))
        phases.append(
            Phase(f"{way[0]} {way[1]}", lambda: jnp.int32(depth), _call(program, params, batch))
        )
    alternate(phases, arguments.rounds)
    reference = found["truncated", depth]
    return [
        Row(
            run=name,
            gradient=way[0],
            terms=way[1],
            cosine=float(
                found[way] @ reference / np.linalg.norm(found[way]) / np.linalg.norm(reference)
            ),
            length=float(np.linalg.norm(found[way]) / np.linalg.norm(reference)),
            memory_mib=memory[way],
            milliseconds=1e3 * phase.median_s,
        )
        for way, phase in zip(found, phases, strict=True)
    ]


def print_table(rows: list[Row]) -> None:
    print("\n| gradient | k | cosine | length | memory | time |")
    print("|---|---:|---:|---:|---:|---:|")
    for row in rows:
        print(
            f"| {row.gradient} | {row.terms} | {row.cosine:.4f} | {row.length:.3f} | "
            f"{row.memory_mib:.1f} MiB | {row.milliseconds:.0f} ms |",
            flush=True,
        )


def main() -> None:
    arguments = parse_arguments()
    rows: list[Row] = []
    try:
        for name in ("depth", "terms", "rows", "rounds"):
            if np.min(getattr(arguments, name)) < 1:
                raise UserError(f"--{name}={getattr(arguments, name)}: at least 1.")
        for workdir in map(pathlib.Path, arguments.workdirs):
            loaded, batches = load_run(workdir, arguments.step)
            batch = jax.device_put(jax.tree.map(lambda array: array[: arguments.rows], batches[0]))
            given = (loaded.model, loaded.params, batch, arguments.depth)
            key = jax.random.key(arguments.seed)
            residual = float(iteration_curves(*given, key).residual[-1])
            radius = float(spectral_radius(*given, key, 30)[-1])
            print(f"\n{loaded.description}; residual {residual:.1e}, spectral radius {radius:.3f}")
            new = measure(workdir.name, loaded.model, loaded.params, batch, arguments)
            print_table(new)
            rows += new
    except UserError as error:
        sys.exit(f"error: {error}")
    device = jax.devices()[0].device_kind
    versions = {"jax": jax.__version__, "jaxlib": jaxlib.__version__}
    shapes = f"{arguments.rows} problems, {arguments.depth} iterations"
    print(f"\n{device}, jax {versions['jax']}, float32; {shapes}")
    if arguments.json:
        summary = {
            "device": device,
            "versions": {"python": platform.python_version(), **versions},
            "arguments": vars(arguments),
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        pathlib.Path(arguments.json).write_text(json.dumps(summary, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
