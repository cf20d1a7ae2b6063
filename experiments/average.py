"""Averages the parameters of several checkpoints of a run into a workdir of their own.

python -m experiments.average --from=runs/mine --last=5 --out=runs/mine_average
python -m experiments.average --from=runs/mine --best=3 --metric=validation/accuracy --out=runs/b
python -m experiments.average --from=runs/mine --steps=100,200 --out=runs/c

What is averaged is what generate and evaluate would load: the parameters, or their EMA. The new
workdir serves as --workdir of generate, evaluate and export, and to start fine-tuning from; it has
no optimiser state, so that no run goes on in it. The run needs to have kept enough checkpoints: see
checkpoint.keep_last and checkpoint.keep_best.
"""

import argparse
import pathlib

from experiments import launch
from experiments.workdir import quiet_libraries


def main(arguments: list[str] | None = None) -> None:
    """Averages the checkpoints that the command line names."""
    options = _parser().parse_args(arguments)
    # JAX takes seconds to import, which --help need not wait for.
    from experiments.average_checkpoints import average_checkpoints  # noqa: PLC0415

    launch.start_logging("info")
    with launch.errors_in_one_line(interrupted="interrupted."), quiet_libraries("info"):
        steps = average_checkpoints(
            options.source,
            options.out,
            last=options.last,
            best=options.best,
            steps=options.steps,
            metric=options.metric,
        )
    print(f"mean of steps {', '.join(map(str, steps))} of {options.source} -> {options.out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.average",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--from", dest="source", required=True, type=pathlib.Path, help="workdir of the run")
    add("--out", required=True, type=pathlib.Path, help="workdir to make")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--last", type=int, help="this many newest checkpoints")
    which.add_argument("--best", type=int, help="this many best checkpoints")
    which.add_argument("--steps", help="these checkpoints, as 100,200")
    add("--metric", help="what --best goes by; default: the run's checkpoint.best_metric")
    return parser


if __name__ == "__main__":
    main()
