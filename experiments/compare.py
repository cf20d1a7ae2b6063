"""Compares finished runs by depth: a Markdown table on the screen and a plot in a file.

python -m experiments.compare runs/reasoning runs/reasoning_diagonal --output=depth.png
"""

import argparse
import pathlib
import sys

from megatransformer_jax.config.option import UserError
from megatransformer_jax.evaluation.depth_comparison import (
    METRICS,
    markdown_table,
    plot_curves,
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
    parser.add_argument("--metric", default="exact_accuracy", choices=METRICS)
    parser.add_argument("--output", default=pathlib.Path("depth.png"), type=pathlib.Path)
    options = parser.parse_args(arguments)
    try:
        curves = [read_curve(workdir, options.metric) for workdir in options.workdirs]
        if not options.output.parent.is_dir():
            raise UserError(f"folder {options.output.parent} does not exist; make it first.")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(markdown_table(curves))
    plot_curves(curves, options.metric).savefig(options.output, dpi=120)
    print(f"plot: {options.output}")


if __name__ == "__main__":
    main()
