"""EleutherAI's lm-eval with one more model: `megatransformer lm-eval`.

Importing this module imports lm-eval, and with it Hugging Face's libraries, which read the
environment.
"""

import contextlib
import dataclasses
import pathlib
import sys
import traceback
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lm_eval._cli import HarnessCLI
from lm_eval.api.registry import model_registry
from lm_eval.utils import setup_logging, simple_parse_args_string

import megatransformer_jax
from megatransformer_jax.checkpoints.hub import find_model
from megatransformer_jax.checkpoints.quantized import is_quantized_folder
from megatransformer_jax.cli.flags import described
from megatransformer_jax.cli.model_options import (
    ModelOptions,
    load_chosen_model,
    param_dtype_option,
    precision_option,
    step_option,
    weights_option,
)
from megatransformer_jax.config.option import (
    MAX_COUNT,
    MAX_SEED,
    UserError,
    check_options,
    option,
    options_of,
    parse_text,
)
from megatransformer_jax.evaluation.lm_eval import MAX_GEN_TOKS, MegaTransformerLM
from megatransformer_jax.runs.load import LoadedModel, foreign_format

ONLINE = "--online"
DEBUG = "--debug"
NAME = "megatransformer"
# lm-eval's own commands; anything else is ours.
_OF_LM_EVAL = ("run", "ls", "validate")
# lm-eval's command line passes it on if the user names none.
_DEFAULT_DEVICE = "cuda:0"
# What our commands call what lm-eval calls otherwise.
_OUTPUT = {"output": "output_path"}

_HELP = """\
Usage: megatransformer lm-eval [--option=VALUE ...]

Runs tasks of EleutherAI's lm-eval on a megatransformer run or a folder of a known format.

Examples:
  megatransformer lm-eval --model=runs/recurrent --depth=16 --tasks=my_task \\
      --include_path=my/tasks --output=results
  megatransformer lm-eval ls tasks
  megatransformer lm-eval run --model megatransformer \\
      --model_args path=runs/recurrent,depth=16 --tasks my_task

Options below are ours; all others are lm-eval's own (`megatransformer lm-eval run --help`). Data
sets are read from files and from Hugging Face's cache only, unless --online lets lm-eval download
them. What lm-eval cannot use (an unknown task, a file that is missing) is one line and exit code 2;
--debug prints the traceback instead. The form with `run` is lm-eval's: there our options stand in
--model_args, and the folder is `path`.

Options:
"""


def run(arguments: Sequence[str]) -> None:
    """Runs lm-eval's command line, or ours.

    Args:
      arguments: the words after the command's name.

    Raises:
      UserError: for what cannot be used.
    """
    words = [word for word in arguments if word not in (ONLINE, DEBUG)]
    if not words or words[0] in ("-h", "--help"):
        print(_HELP + "\n".join(_described_options()))
        return
    register()
    parsed = parse(words)
    if getattr(parsed, "model", None) == NAME:
        check_path(parsed.model_args["path"])
    setup_logging()
    with _bad_input(is_online=ONLINE in arguments, is_debug=DEBUG in arguments):
        parsed.func(parsed)


def parse(words: Sequence[str]) -> Any:
    """What a command line asks for, as lm-eval parses it.

    Raises:
      UserError: for model arguments that cannot be used. Other errors end the program, as they do
        in lm-eval.
    """
    own: dict[str, Any] = {}
    if words[0] not in _OF_LM_EVAL:
        own, rest = _split(words)
        words = ["run", "--model", NAME, *rest]
    before = sys.argv
    # lm-eval's parser reads it from here.
    sys.argv = ["lm-eval", *words]
    try:
        parsed = HarnessCLI().parse_args()
    finally:
        sys.argv = before
    if getattr(parsed, "model", None) == NAME:
        parsed.model_args = (parsed.model_args or {}) | own
        # Known before tasks are loaded.
        parse_arguments(
            parsed.model_args, {"device": parsed.device, "max_batch_size": parsed.max_batch_size}
        )
    return parsed


def _split(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Our options by lm-eval's names for them, and the words that are lm-eval's own."""
    declared = {option.path: option.declared for option in options_of(ModelArguments)}
    own: dict[str, Any] = {}
    rest: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        name, has_value, value = word.removeprefix("--").partition("=")
        key = "path" if name in ("model", "workdir", "from") else name
        if not word.startswith("--") or (key not in declared and name not in _OUTPUT):
            rest.append(word)
            continue
        if not has_value:
            if not left:
                raise UserError(f"--{name} needs a value; write --{name}=VALUE.")
            value = left.pop(0)
        if name in _OUTPUT:
            rest += [f"--{_OUTPUT[name]}", value]
            continue
        try:
            own[key] = parse_text(value, declared[key])
        except UserError as error:
            raise UserError(f"--{name}: {error}") from None
    return own, rest


def _described_options() -> Iterator[str]:
    for declared in options_of(ModelArguments):
        yield from described(declared, "model" if declared.path == "path" else declared.path)
    yield "  --output (str)"
    yield "      Folder for results, which lm-eval calls --output_path."


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
    files = [pathlib.Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    # The command calls lm-eval, so it is in every traceback.
    return any(
        file.is_relative_to(package) and not file.is_relative_to(package / "cli") for file in files
    )


# ------------------------------------------------------------------------------
# The model as lm-eval knows it.


@dataclasses.dataclass(frozen=True)
class ModelArguments:
    """What --model_args may hold; --batch_size may be given with them as well."""

    path: str = option("", "Folder of a megatransformer run, or of a checkpoint of a known format.")
    step: str = step_option()
    weights: str = weights_option()
    depth: int | None = option(
        None,
        "Iterations of the core. Default (None): the mean in training.",
        minimum=1,
        maximum=MAX_COUNT,
    )
    batch_size: int = option(1, "Number of rows to score at once.", minimum=1, maximum=MAX_COUNT)
    max_length: int | None = option(
        None,
        "Most tokens that the model reads at once. Default (None): data.sequence_length of the "
        "run, as in training; of another folder the model's max_length.",
        minimum=1,
    )
    max_gen_toks: int = option(
        MAX_GEN_TOKS,
        "Tokens per answer, for tasks that do not set it.",
        minimum=1,
        maximum=MAX_COUNT,
    )
    add_bos_token: bool = option(True, "Puts the start token before every context.")
    precision: str | None = precision_option()
    param_dtype: str = param_dtype_option()
    seed: int = option(
        0, "Seed of random draws and of the core's first states.", minimum=0, maximum=MAX_SEED
    )

    def __post_init__(self) -> None:
        check_options(self)
        if not self.path:
            raise UserError(
                "the model is missing; give --model=runs/recurrent, or path=runs/recurrent in "
                "--model_args."
            )

    @property
    def chosen_model(self) -> ModelOptions:
        """The same for `load_chosen_model`."""
        return ModelOptions(self.path, self.step, self.weights, self.precision, self.param_dtype)


class LoadedMegaTransformerLM(MegaTransformerLM):
    """The adapter, made as lm-eval makes models: from `path=runs/recurrent,depth=16`."""

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> "LoadedMegaTransformerLM":
        """From the text of --model_args; see `ModelArguments`.

        Raises:
          UserError: for an argument that is not known or cannot be used.
        """
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "LoadedMegaTransformerLM":
        """The same from values by name.

        Args:
          arg_dict: see `ModelArguments`.
          additional_config: lm-eval's own batch_size, max_batch_size and device.

        Raises:
          UserError: for an argument that is not known or cannot be used.
        """
        arguments = parse_arguments(arg_dict, additional_config or {})
        loaded = load_chosen_model(arguments.chosen_model)
        if loaded.tokenizer is None:
            raise UserError(f"{loaded.description} has no tokenizer, so it cannot read tasks.")
        if loaded.trained_depth is None and arguments.depth is not None:
            raise UserError(
                f"--model_args: depth={arguments.depth} would be ignored, as {loaded.description} "
                "has no recurrent core; leave it out."
            )
        limit = loaded.config.max_length
        if arguments.max_length is not None and arguments.max_length > limit:
            raise UserError(
                f"--model_args: max_length={arguments.max_length} exceeds the {limit} that the "
                "model was built for; lower it."
            )
        return cls(
            loaded.model,
            loaded.weights,
            loaded.tokenizer,
            depth=loaded.trained_depth if arguments.depth is None else arguments.depth,
            batch_size=arguments.batch_size,
            max_length=arguments.max_length or _trained_length(loaded),
            max_gen_toks=arguments.max_gen_toks,
            add_bos_token=arguments.add_bos_token,
            seed=arguments.seed,
        )


def _trained_length(loaded: LoadedModel) -> int | None:
    """Tokens per row in training; None where nothing says."""
    return None if loaded.run_config is None else loaded.run_config.data.sequence_length


def parse_arguments(given: Mapping[str, Any], of_lm_eval: Mapping[str, Any]) -> ModelArguments:
    """The arguments of --model_args, and those that lm-eval passes with them.

    Raises:
      UserError: for an argument that is not known or cannot be used.
    """
    values = dict(given)
    for name in ("device", "max_batch_size"):
        value = of_lm_eval.get(name)
        if value not in (None, _DEFAULT_DEVICE):
            raise UserError(
                f"--{name}={value}: JAX chooses the device, and the batch has the size that is "
                f"given; leave --{name} out."
            )
    if "batch_size" not in values and of_lm_eval.get("batch_size") is not None:
        values["batch_size"] = of_lm_eval["batch_size"]
    known = typing.get_type_hints(ModelArguments)
    unknown = sorted(values.keys() - known.keys())
    if unknown:
        raise UserError(
            f"--model_args: {unknown[0]}={values[unknown[0]]!r} is not known; known: "
            f"{', '.join(known)}."
        )
    if "batch_size" in values:
        values["batch_size"] = _whole_number(values["batch_size"])
    if "step" in values:
        values["step"] = str(values["step"])
    return ModelArguments(**values)


def check_path(path: str) -> None:
    """Checks that the folder is a run or of a known format, without reading its weights.

    Raises:
      UserError: if it is not.
    """
    try:
        folder = find_model(path)
        if not is_quantized_folder(folder):
            foreign_format(folder)
    except UserError as error:
        raise UserError(f"--model_args: path={error}") from error


def _whole_number(value: Any) -> int:
    text = str(value)
    if not text.isdecimal():
        raise UserError(f"batch_size={value}: must be a number; 'auto' is not known.")
    return int(text)


def register() -> None:
    """Makes the model known to lm-eval by its name."""
    if NAME not in model_registry:
        model_registry.register(NAME, target=LoadedMegaTransformerLM)
