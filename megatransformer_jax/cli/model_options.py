"""The options by which commands name a finished model, the same in all of them."""

import dataclasses
from typing import TYPE_CHECKING, Any

from absl import logging

from megatransformer_jax.config.loop import (
    ModelMeshConfig,
    data_ways_option,
    tensor_ways_option,
)
from megatransformer_jax.config.option import (
    ConfigError,
    check_options,
    compilation_cache_option,
    option,
    rule,
)
from megatransformer_jax.storage import CHECKPOINTS, NO_CHECKPOINTS, AnyPath, as_path

if TYPE_CHECKING:
    from megatransformer_jax.runs.load import LoadedModel

# What commands called the folder of a model before all of them said --model.
OLD_MODEL_NAMES = {"workdir": "model", "from": "model"}


def model_option() -> Any:
    """The folder."""
    return option(
        None,
        "Folder of the model: a megatransformer run.",
    )


def output_option() -> Any:
    """Where a command writes; `check_output_is_named` goes with it."""
    return option(None, "Folder to make; must be given.")


def check_output_is_named(output: str | None) -> None:
    """Checks that `output_option` is given.

    Raises:
      ConfigError: otherwise.
    """
    if output is None:
        raise ConfigError("output", "is missing; give the folder to make.")


def step_option() -> Any:
    """Which checkpoint of a run."""
    return option(
        "latest",
        "Checkpoint of a run: latest, best (by checkpoint.best_metric) or the number of its step.",
    )


def weights_option() -> Any:
    """Averaged weights or those that are trained."""
    return option(
        "average",
        "Of a run that averages its weights (train.ema_decay, schedule-free): average, or raw for "
        "the weights it trains.",
        choices=("average", "raw"),
    )


def precision_option() -> Any:
    """Type of activations."""
    return option(
        None,
        "Type of activations. Default (None): as in training. auto: bfloat16 on accelerators, "
        "float32 on CPU.",
        choices=("auto", "float32", "bfloat16"),
    )


def param_dtype_option() -> Any:
    """Type of parameters in memory."""
    return option(
        "float32",
        "Type of the parameters of another project's checkpoint in memory. stored: as they are in "
        "the file.",
        choices=("float32", "stored"),
    )


@dataclasses.dataclass(frozen=True)
class MeshOptions:
    """Devices that the model is laid over."""

    mesh_data: int = data_ways_option()
    mesh_tensor: int = tensor_ways_option()

    @property
    def mesh(self) -> ModelMeshConfig:
        """The same for `load_model`."""
        return ModelMeshConfig(self.mesh_data, self.mesh_tensor)


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Which finished model, and as what."""

    model: str | None = option(
        None,
        "Folder of the model: a megatransformer run, or a checkpoint of another project "
        "(config.json, *.safetensors; docs/checkpoints.md lists the formats). Or the name of such "
        "a checkpoint on the Hugging Face hub: org/name, or org/name@revision.",
    )
    step: str = step_option()
    weights: str = weights_option()
    precision: str | None = precision_option()
    param_dtype: str = param_dtype_option()
    compilation_cache_dir: str | None = compilation_cache_option()

    def __post_init__(self) -> None:
        check_options(self)

    @rule("step")
    def _step_is_known(self) -> None:
        """latest, best, or a whole number."""
        if self.step not in ("best", "latest") and not self.step.isdecimal():
            raise ConfigError(
                "step",
                f"{self.step!r} is not a checkpoint; use best, latest or a number such as 600.",
            )

    @property
    def folder(self) -> AnyPath:
        """The folder.

        Raises:
          ConfigError: if none is given.
        """
        return model_folder(self.model)

    def check_model_is_named(self) -> None:
        """Raises ConfigError unless a folder is given; it may still be the wrong one."""
        _ = self.folder


def model_folder(name: str | None) -> AnyPath:
    """The folder that --model names.

    Raises:
      ConfigError: if it is missing.
    """
    if not name:
        raise ConfigError("model", "is missing; give the folder of a run, as runs/recurrent.")
    return as_path("model", name, CHECKPOINTS, NO_CHECKPOINTS)


def load_chosen_model(options: ModelOptions) -> "LoadedModel":
    """The model that the options name.

    Raises:
      UserError: if an option does not fit the folder, or something in it cannot be used.
    """
    from megatransformer_jax.checkpoints.hub import find_model  # noqa: PLC0415
    from megatransformer_jax.models.attention_kernels import (  # noqa: PLC0415
        describe_choices,
        prompt_kernels,
    )
    from megatransformer_jax.runs.load import foreign_format, load_model  # noqa: PLC0415
    from megatransformer_jax.runs.workdir import use_compilation_cache  # noqa: PLC0415

    folder = options.folder
    if options.param_dtype != "float32" and foreign_format(find_model(folder)) is None:
        raise ConfigError(
            "param_dtype",
            f"{options.param_dtype!r} is for checkpoints of other projects, and {folder} is a run "
            "of ours; leave it out.",
        )
    use_compilation_cache(options.compilation_cache_dir)
    loaded = load_model(
        folder,
        step=options.step,
        precision=options.precision,
        param_dtype="stored" if options.param_dtype == "stored" else "float32",
        weights="raw" if options.weights == "raw" else "average",
        mesh=options.mesh if isinstance(options, MeshOptions) else None,
    )
    logging.info("%s", loaded.description)
    logging.info("attention: %s", describe_choices(prompt_kernels(loaded.model)))
    return loaded
