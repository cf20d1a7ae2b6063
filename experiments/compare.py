"""Compares finished runs by depth: a Markdown table on the screen and a plot in a file.

python -m experiments.compare runs/reasoning runs/reasoning_diagonal --output=depth.png
"""

import argparse
import pathlib
import sys

from megatransformer_jax.config.option import UserError
from megatransformer_jax.evaluation.depth_table import (
    METRICS,
    default_metric,
    markdown_table,
    plot_curves,
    plot_formats,
    read_curve,
)


def main(arguments: list[str] | None = None) -> None:
    """Reads the runs' depth_table.json files, prints the table and writes the plot."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("workdirs", nargs="+", type=pathlib.Path, help="workdirs of finished runs")
    parser.add_argument(
        "--metric",
        choices=METRICS,
        help="default: exact_accuracy if all runs are of reasoning tasks, otherwise loss",
    )
    parser.add_argument("--output", default=pathlib.Path("depth.png"), type=pathlib.Path)
    options = parser.parse_args(arguments)
    try:
        metric = options.metric or default_metric(options.workdirs)
        curves = [read_curve(workdir, metric) for workdir in options.workdirs]
        _check_output(options.output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{METRICS[metric]}\n")
    print(markdown_table(curves))
    plot_curves(curves, metric).savefig(options.output, dpi=120)
    print(f"plot: {options.output}")


def _check_output(path: pathlib.Path) -> None:
    if not path.parent.is_dir():
        raise UserError(f"folder {path.parent} does not exist; make it first.")
    if path.suffix.removeprefix(".") not in plot_formats():
        raise UserError(
            f"--output={path}: {path.suffix!r} is no format of plots; end the name in one of "
            f".{', .'.join(plot_formats())}."
        )


if __name__ == "__main__":
    main()
