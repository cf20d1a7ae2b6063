"""Looks into the model of a run: draws the figures that diagnostics draw during training.

python -m experiments.diagnose --from=runs/recurrent
python -m experiments.diagnose --from=runs/recurrent --kinds=recurrence,spectral_radius
python -m experiments.diagnose --from=runs/recurrent --step=best --num_steps=64 --out=figures

The figures (.png) and scalars.json with their numbers go to diagnostics/step_latest (or what
--step says) in the workdir of the run, or to --out. The kinds are those of diagnostics.kinds except
for depth_draws, which only a run that is going on has.
"""

import argparse
import pathlib

from experiments import launch
from experiments.workdir import quiet_libraries


def main(arguments: list[str] | None = None) -> None:
    """Diagnoses the run that the command line names."""
    options = _parser().parse_args(arguments)
    launch.start_logging("info")
    with launch.errors_in_one_line(interrupted="interrupted."), quiet_libraries("info"):
        # JAX takes seconds to import, which --help need not wait for.
        from experiments.diagnose_run import diagnose_run  # noqa: PLC0415

        folder = diagnose_run(
            options.source,
            step=options.step,
            kinds=tuple(options.kinds.split(",")) if options.kinds else (),
            num_rows=options.num_rows,
            num_steps=options.num_steps,
            out=options.out,
        )
    print(f"figures and numbers: {folder}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.diagnose",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--from", dest="source", required=True, type=pathlib.Path, help="workdir of the run")
    add("--step", default="latest", help="checkpoint: latest (default), best, or its step")
    add("--kinds", help="with commas between them; default: all that the model has")
    add("--num_rows", type=int, default=2, help="rows of the first validation batch; default 2")
    add("--num_steps", type=int, help="iterations; default: twice the trained mean")
    add("--out", type=pathlib.Path, help="folder for the files; default: in the workdir")
    return parser


if __name__ == "__main__":
    main()
