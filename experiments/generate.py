"""Continues prompts with a trained model, at any depth and by any decoding strategy.

The texts go to stdout, a line about speed to stderr.
"""

import os
import sys
from collections.abc import Sequence

from experiments import generate_flags, launch
from experiments.generate_help import help_text
from experiments.prompts import read_prompts
from experiments.workdir import quiet_libraries

# As a shell reports a program that a closed pipe has ended.
BROKEN_PIPE = 141


def main(argv: Sequence[str] | None = None) -> None:
    """Does what a command line asks for.

    Args:
      argv: the command line with the program's name; None: `sys.argv`.
    """
    argv = list(sys.argv if argv is None else argv)
    with launch.errors_in_one_line(interrupted="interrupted."):
        if launch.wants_help(argv):
            print(help_text(__doc__ or ""))
            return
        command = generate_flags.parse(argv)
        prompts = read_prompts(command.options)
        launch.start_logging("info")
        with quiet_libraries("info"):
            # Importing JAX takes long; bad input is known before.
            from experiments.run_generation import run  # noqa: PLC0415

            try:
                run(command, prompts)
            except BrokenPipeError:
                # The reader of the texts, such as `head`, has enough. At exit Python would write
                # what is left, and fail again.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                sys.exit(BROKEN_PIPE)


if __name__ == "__main__":
    main()
