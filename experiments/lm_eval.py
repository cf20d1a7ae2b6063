"""EleutherAI's lm-eval with one more model: 'megatransformer', a run of ours or a Huginn folder.

  python -m experiments.lm_eval run --model megatransformer \\
      --model_args path=runs/recurrent,depth=16 --batch_size 8 --tasks my_task \\
      --include_path my/tasks --output_path results

Everything is lm-eval's own command line (`run --help`, `ls tasks`), but for two switches. Data sets
are read from files and from Hugging Face's cache only, unless --online lets lm-eval download them.
What lm-eval cannot use (an unknown task, a file that is missing) is one line and exit code 2;
--debug prints the traceback instead.

Arguments in --model_args:
"""

import contextlib
import os
import pathlib
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import megatransformer_jax
from experiments import launch
from megatransformer_jax.config.option import UserError

ONLINE = "--online"
DEBUG = "--debug"
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs lm-eval's command line.

    Args:
      argv: the command line with the program's name; None: `sys.argv`.
    """
    argv = list(sys.argv if argv is None else argv)
    words = _words(argv)
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
        if getattr(parsed, "model", None) == lm_eval_model.NAME:
            lm_eval_model.check_path(parsed.model_args["path"])
        from lm_eval.utils import setup_logging  # noqa: PLC0415

        setup_logging()
        with _bad_input(is_online=ONLINE in argv, is_debug=DEBUG in argv):
            parsed.func(parsed)


def _words(argv: Sequence[str]) -> list[str]:
    """What is lm-eval's of a command line."""
    return [word for word in argv[1:] if word not in (ONLINE, DEBUG)]


@contextlib.contextmanager
def _bad_input(*, is_online: bool, is_debug: bool) -> Iterator[None]:
    """Turns what lm-eval raises about a user's input into one line.

    Its types do not tell input from bugs. What passes through our package is a bug of ours and
    keeps its traceback.
    """
    try:
        yield
    except UserError:
        raise
    except (ValueError, KeyError, FileNotFoundError, ConnectionError) as error:
        if is_debug or _comes_from_us(error):
            raise
        # The text of a KeyError is the repr of its argument.
        name = f"{type(error).__name__}: " if isinstance(error, KeyError) else ""
        hint = f"{DEBUG} prints the traceback."
        if isinstance(error, FileNotFoundError | ConnectionError) and not is_online:
            hint = f"Nothing is downloaded without {ONLINE}; {hint}"
        text = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"lm-eval: {name}{text}. {hint}") from error


def _comes_from_us(error: Exception) -> bool:
    package = pathlib.Path(megatransformer_jax.__path__[0])
    frames = traceback.extract_tb(error.__traceback__)
    return any(pathlib.Path(frame.filename).is_relative_to(package) for frame in frames)


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
    from megatransformer_jax.config.option import options_of  # noqa: PLC0415

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
    sys.argv = ["lm-eval", *_words(argv)]
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
