"""Writes a checkpoint of a run as a Huginn folder: config.json and safetensors.

python -m experiments.export --workdir=runs/mine --output=exported --step=best

Only models of Huginn's architecture can be exported; the error lists what differs. A SentencePiece
tokenizer goes along as tokenizer.model. experiments.generate reads the folder as a --workdir.
"""

import argparse
import pathlib

from experiments import launch
from experiments.workdir import quiet_libraries


def main(arguments: list[str] | None = None) -> None:
    """Exports the checkpoint that the command line names."""
    options = _parser().parse_args(arguments)
    # JAX takes seconds to import, which --help need not wait for.
    from experiments.export_model import export_model  # noqa: PLC0415

    launch.start_logging("info")
    with launch.errors_in_one_line(interrupted="interrupted."), quiet_libraries("info"):
        description = export_model(options)
    print(f"{description} -> {options.output}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--workdir", required=True, type=pathlib.Path, help="of the run")
    add("--output", required=True, type=pathlib.Path, help="folder to make")
    add("--step", default="latest", help="latest (default), best, or a number")
    add("--max_shard", default="5GiB", help="size of a weights file at most; default: 5GiB")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="stores the weights as this, which rounds them; default: float32, as they are",
    )
    add(
        "--rotary_table",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also stores freqs_cis, which Huginn's own model class wants among the weights",
    )
    add("--overwrite", action="store_true", help="replaces an older export in the same folder")
    return parser


if __name__ == "__main__":
    main()
