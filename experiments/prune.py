"""Deletes checkpoints of a finished or stopped run that the rules of retention do not keep.

python -m experiments.prune --from=runs/mine --keep_last=2 --keep_best=1 --dry_run

The newest checkpoint is always kept. What is not given is as the run was configured
(checkpoint.keep_last and its like). Refused while a run is writing to the workdir.
"""

import argparse
import pathlib

from experiments import launch
from experiments.workdir import quiet_libraries
from megatransformer_jax.config.option import UserError

_RULES = ("keep_last", "keep_best", "keep_every_steps", "best_metric", "best_mode")


def main(arguments: list[str] | None = None) -> None:
    """Prunes the workdir that the command line names, or says what would be deleted."""
    options = _parser().parse_args(arguments)
    # JAX takes seconds to import, which --help need not wait for.
    from experiments.prune_checkpoints import prune_checkpoints  # noqa: PLC0415

    launch.start_logging("info")
    with launch.errors_in_one_line(interrupted="interrupted."), quiet_libraries("info"):
        if not (options.source / "checkpoints").is_dir():
            raise UserError(f"{options.source} has no checkpoints; name the workdir of a run.")
        rules = {name: getattr(options, name) for name in _RULES}
        given = {name: value for name, value in rules.items() if value is not None}
        pruned = prune_checkpoints(options.source, given, is_dry_run=options.dry_run)
    would_be = "would be " if options.dry_run else ""
    for step, size in pruned.deleted.items():
        print(f"step {step}: {_megabytes(size)} {would_be}deleted")
    freed = _megabytes(sum(pruned.deleted.values()))
    print(f"{freed} {would_be}freed; kept: {', '.join(map(str, pruned.kept))}")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.prune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--from", dest="source", required=True, type=pathlib.Path, help="workdir of the run")
    add("--keep_last", type=int, help="this many newest ones, at least 1")
    add("--keep_best", type=int, help="this many best ones")
    add("--keep_every_steps", type=int, help="those at multiples of this")
    add("--best_metric", help="what --keep_best goes by, such as validation/accuracy")
    add("--best_mode", help="auto, min or max: which end of it is better")
    add("--dry_run", action="store_true", help="deletes nothing, shows what would be deleted")
    return parser


if __name__ == "__main__":
    main()
