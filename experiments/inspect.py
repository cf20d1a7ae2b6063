"""Shows what a run costs, without allocating the model: parameters by module, FLOPs per token and
key/value cache as a function of depth, memory of training. Takes seconds for any size.

The depths are evaluation.final_depths, the mesh need not exist here, and types and attention
kernels are those of this machine's kind of device.
"""

import json
import pathlib

from absl import flags

from experiments import launch
from experiments.workdir import quiet_libraries
from megatransformer_jax.config.option import UserError
from megatransformer_jax.config.run import RunConfig

JSON = flags.DEFINE_string("json", None, "Also writes the numbers, exact, to this file.")

# A pipe or a file has no width, and a table should not be cut there.
PLAIN_WIDTH = 140


def main(config: RunConfig) -> None:
    """Prints the costs of `config`."""
    # JAX reads its environment when it is imported, and `launch` sets it just before.
    from rich.console import Console  # noqa: PLC0415

    from experiments.cost_report import make_report  # noqa: PLC0415
    from experiments.cost_tables import print_tables  # noqa: PLC0415

    with quiet_libraries(config.logging.level):
        report = make_report(config)
    console = Console()
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    print_tables(console, report, config)
    if JSON.value is not None:
        _write(JSON.value, json.dumps(report.to_dict(), indent=2) + "\n")


def _write(path: str, text: str) -> None:
    try:
        pathlib.Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--json={path}: cannot be written ({error.strerror}); choose another file."
        ) from error


if __name__ == "__main__":
    launch.run(main)
