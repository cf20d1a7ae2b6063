"""Scores a trained model at several depths: perplexity of text, answers to problems, or texts that
it generates, by BLEU, chrF, ROUGE and exact match. Of a model with images and sound also its
captions, transcripts and losses, and how many of the digits that it makes a judge recognises.

The table goes to stdout; files with the same numbers and plots go to a folder.
"""

import sys
from collections.abc import Sequence

from experiments import evaluate_flags, launch
from experiments.evaluate_help import help_text
from experiments.workdir import quiet_libraries


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
        command = evaluate_flags.parse(argv)
        launch.start_logging("info")
        with quiet_libraries("info"):
            # Importing JAX takes long; bad input is known before.
            from experiments.run_evaluation import run  # noqa: PLC0415

            run(command)


if __name__ == "__main__":
    main()
