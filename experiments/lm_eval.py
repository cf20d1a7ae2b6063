"""EleutherAI's lm-eval with one more model: 'megatransformer', a run of ours or a Huginn folder.

  python -m experiments.lm_eval run --model megatransformer \\
      --model_args path=runs/recurrent,depth=16 --batch_size 8 --tasks my_task \\
      --include_path my/tasks --output_path results

Everything is lm-eval's own command line (`run --help`, `ls tasks`), but for one switch: data sets
are read from files and from Hugging Face's cache only, unless --online lets lm-eval download them.

Arguments in --model_args:
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

from experiments import launch
from megatransformer_jax.config.option import UserError

ONLINE = "--online"
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs lm-eval's command line.

    Args:
      argv: the command line with the program's name; None: `sys.argv`.
    """
    argv = list(sys.argv if argv is None else argv)
    words = [word for word in argv[1:] if word != ONLINE]
    with launch.errors_in_one_line(interrupted="interrupted."):
        # Hugging Face's libraries read this when they are imported.
        if ONLINE not in argv:
            os.environ.update(dict.fromkeys(_OFFLINE, "1"))
        _check_installed()
        # Importing JAX and lm-eval takes long.
        from experiments import lm_eval_model  # noqa: PLC0415

        if not words or words[0] in ("-h", "--help"):
            print(_help(lm_eval_model.ModelArguments))
            return
        lm_eval_model.register()
        parsed = parse(argv)
        from lm_eval.utils import setup_logging  # noqa: PLC0415

        setup_logging()
        parsed.func(parsed)


def _check_installed() -> None:
    try:
        import lm_eval  # noqa: F401, PLC0415
    except ImportError as error:
        raise UserError(
            f"this needs lm-eval ({error}); install the extra 'eval': "
            "pip install 'megatransformer_jax[eval]'."
        ) from error


def _help(arguments: type) -> str:
    from experiments.flags import described  # noqa: PLC0415
    from megatransformer_jax.config.schema import options_of  # noqa: PLC0415

    lines = [line for option in options_of(arguments) for line in described(option, option.path)]
    return "\n".join([(__doc__ or "").strip(), *(line.replace("  --", "  ", 1) for line in lines)])


def parse(argv: Sequence[str]) -> Any:
    """What a command line asks for (argv[0] is the program), as lm-eval parses it.

    Raises:
      UserError: for model arguments that cannot be used. Other errors end the program, as they do
        in lm-eval.
    """
    from lm_eval._cli import HarnessCLI  # noqa: PLC0415

    from experiments import lm_eval_model  # noqa: PLC0415

    before = sys.argv
    # lm-eval's parser reads it from here.
    sys.argv = ["lm-eval", *(word for word in argv[1:] if word != ONLINE)]
    try:
        parsed = HarnessCLI().parse_args()
    finally:
        sys.argv = before
    if getattr(parsed, "model", None) == lm_eval_model.NAME:
        # Known before tasks are loaded.
        lm_eval_model.parse_arguments(
            parsed.model_args or {},
            {"device": parsed.device, "max_batch_size": parsed.max_batch_size},
        )
    return parsed


if __name__ == "__main__":
    main()
