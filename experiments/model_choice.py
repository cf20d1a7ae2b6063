"""The finished model that a command names with the options of `model_options`."""

import pathlib
from typing import Protocol

from absl import logging

from experiments.load_model import LoadedModel, is_huginn_folder, load_model
from megatransformer_jax.config.option import ConfigError


class ModelChoice(Protocol):
    """A command's options."""

    @property
    def step(self) -> str:
        """latest, best or a number."""

    @property
    def precision(self) -> str | None:
        """Type of activations."""

    @property
    def param_dtype(self) -> str:
        """Type of parameters in memory."""

    @property
    def weights(self) -> str:
        """average or raw."""


def load_chosen_model(folder: pathlib.Path, choice: ModelChoice) -> LoadedModel:
    """The model in a folder, as the options say.

    Raises:
      UserError: if an option does not fit the folder, or something in it cannot be used.
    """
    if choice.param_dtype != "float32" and not is_huginn_folder(folder):
        raise ConfigError(
            "param_dtype",
            f"{choice.param_dtype!r} is for Huginn checkpoints, and {folder} is a run of ours; "
            "leave it out.",
        )
    loaded = load_model(
        folder,
        step=choice.step,
        precision=choice.precision,
        param_dtype="stored" if choice.param_dtype == "stored" else "float32",
        weights="raw" if choice.weights == "raw" else "average",
    )
    logging.info("%s", loaded.description)
    return loaded
