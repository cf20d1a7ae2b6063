"""A run or a Huginn folder as lm-eval's model 'megatransformer', made from its model arguments."""

import dataclasses
import pathlib
import typing
from collections.abc import Mapping
from typing import Any

from lm_eval.api.registry import model_registry
from lm_eval.utils import simple_parse_args_string

from experiments.evaluation_data import read_run_config
from experiments.load_model import is_huginn_folder
from experiments.model_choice import load_chosen_model
from experiments.model_options import (
    param_dtype_option,
    precision_option,
    step_option,
    weights_option,
)
from megatransformer_jax.config.option import MAX_COUNT, MAX_SEED, UserError, check_options, option
from megatransformer_jax.evaluation.lm_eval import MAX_GEN_TOKS, MegaTransformerLM

NAME = "megatransformer"
# lm-eval's command line passes it on if the user names none.
_DEFAULT_DEVICE = "cuda:0"


@dataclasses.dataclass(frozen=True)
class ModelArguments:
    """What --model_args may hold; --batch_size may be given beside them as well."""

    path: str = option("", "Folder of a run of ours, or of a Huginn checkpoint.")
    step: str = step_option()
    weights: str = weights_option()
    depth: int | None = option(
        None,
        "Iterations of the core. None: the mean in training.",
        minimum=1,
        maximum=MAX_COUNT,
    )
    batch_size: int = option(1, "Rows that are scored at once.", minimum=1, maximum=MAX_COUNT)
    max_length: int | None = option(
        None,
        "Most tokens that the model reads at once. None: data.sequence_length of the run, as in "
        "training; of a Huginn folder the model's max_length.",
        minimum=1,
    )
    max_gen_toks: int = option(
        MAX_GEN_TOKS, "Tokens per answer of tasks that do not say.", minimum=1, maximum=MAX_COUNT
    )
    add_bos_token: bool = option(True, "Puts the start token before every context.")
    precision: str | None = precision_option()
    param_dtype: str = param_dtype_option()
    seed: int = option(
        0, "Seed of draws and of the core's first states.", minimum=0, maximum=MAX_SEED
    )

    def __post_init__(self) -> None:
        check_options(self)
        if not self.path:
            raise UserError("--model_args: path is missing; give path=runs/recurrent or another.")


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
        loaded = load_chosen_model(pathlib.Path(arguments.path).expanduser(), arguments)
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
            loaded.params,
            loaded.tokenizer,
            depth=loaded.trained_depth if arguments.depth is None else arguments.depth,
            end_ids=loaded.end_ids,
            batch_size=arguments.batch_size,
            max_length=arguments.max_length or _trained_length(pathlib.Path(arguments.path)),
            max_gen_toks=arguments.max_gen_toks,
            add_bos_token=arguments.add_bos_token,
            seed=arguments.seed,
        )


def _trained_length(folder: pathlib.Path) -> int | None:
    """Tokens per row in training; None where nothing says."""
    folder = folder.expanduser()
    return None if is_huginn_folder(folder) else read_run_config(folder).data.sequence_length


def parse_arguments(given: Mapping[str, Any], of_lm_eval: Mapping[str, Any]) -> ModelArguments:
    """The arguments of --model_args, and those that lm-eval passes beside them.

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
    """Checks that the folder is there and is a run or Huginn's, without reading its weights.

    Raises:
      UserError: if it is not.
    """
    try:
        is_huginn_folder(pathlib.Path(path).expanduser())
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
