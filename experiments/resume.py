"""Where a run starts: afresh, from another model, or from the newest checkpoint of its workdir."""

from typing import Any

import jax
import optax
from absl import logging

from experiments.admin_start import admin_state, first_batch
from experiments.assemble import Vocabulary, abstract_train_state
from experiments.image_vae_start import latent_state
from experiments.pretrained import pretrained_state
from experiments.run_kinds.run_kind import Identified, RunKind
from megatransformer_jax.checkpoints.compatibility import (
    CheckpointMismatch,
    check_resumable,
    resume_warnings,
)
from megatransformer_jax.checkpoints.manager import CheckpointManager
from megatransformer_jax.config.build import to_dict
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.data.batches import Pipeline
from megatransformer_jax.data.fingerprint import data_fingerprint
from megatransformer_jax.models.megatransformer import MegaTransformer
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.training.state import TrainState, init_state


def run_info(config: RunConfig, vocabulary: Identified) -> dict[str, Any]:
    """What a checkpoint says about the run that wrote it."""
    return {
        "config": to_dict(config),
        "vocabulary": vocabulary.digest,
        "data": data_fingerprint(config.data),
    }


def check_workdir(config: RunConfig, checkpoints: CheckpointManager) -> None:
    """Checks that the newest checkpoint, if there is one, can be continued by this config.

    Called before anything is built, so that the error comes at once.

    Raises:
      CheckpointMismatch: listing what differs, or if the data has changed.
      ConfigError: if the run has already gone further than `train.steps`.
    """
    step = checkpoints.latest_step()
    if step is None:
        return
    where = str(checkpoints.directory / str(step))
    run = checkpoints.run_info(step)
    saved = run["config"]
    if "averaged" in run:
        raise CheckpointMismatch(
            f"{where} is a mean of checkpoints and has no optimiser state, so no run goes on from "
            "it. Choose another workdir; to start from its parameters, name it as "
            "fine_tuning.init_from."
        )
    check_resumable(saved, config, where)
    _check_data(run.get("data"), config, where)
    if step > config.train.steps:
        raise ConfigError(
            "train.steps",
            f"{config.train.steps}, but {checkpoints.directory} already has step {step}; raise "
            "it, or choose another workdir to start afresh.",
        )
    for warning in resume_warnings(saved, config, where):
        logging.warning("%s", warning)


def _check_data(saved: str | None, config: RunConfig, where: str) -> None:
    if saved is None:
        logging.warning(
            "%s was written by a version that did not note what the data was; if it has changed, "
            "the run does not go on as it would have.",
            where,
        )
        return
    current = data_fingerprint(config.data)
    if current != saved:
        raise CheckpointMismatch(
            f"the data has changed since the checkpoint {where} was written, and with it the "
            f"order of the documents and what is held out:\n  saved {saved}\n  now   {current}\n"
            "Put the data back as it was to resume the run, or choose another workdir to start "
            "afresh."
        )


def start_state(run: RunKind, checkpoints: CheckpointManager) -> tuple[TrainState, int]:
    """The train state and the steps done. Sets the batches of `run` to where they go on.

    Raises:
      CheckpointMismatch: if the checkpoint's arrays or vocabulary are not this run's.
    """
    step = checkpoints.latest_step()
    if step is None:
        return run.fresh_state(), 0
    if checkpoints.run_info(step)["vocabulary"] != run.vocabulary.digest:
        raise CheckpointMismatch(
            f"the checkpoint {checkpoints.directory / str(step)} was trained with another "
            "vocabulary (tokenizer or task) than the one of this run. Put the workdir's "
            "tokenizer.model back, or choose another workdir."
        )
    restored = checkpoints.restore(run.abstract_state(), step)
    run.batches.set_state(restored.iterator_state)
    logging.info("resuming from step %d of %s", step, checkpoints.directory)
    return restored.state, step


def fresh_state(
    config: RunConfig,
    model: MegaTransformer,
    optimizer: optax.GradientTransformation,
    sharder: Sharder,
    vocabulary: Vocabulary,
    batches: Pipeline,
) -> TrainState:
    """The train state of a run that begins. `batches` may be looked at, and are put back."""
    abstract = abstract_train_state(model, optimizer, sharder, config.fine_tuning)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    if config.fine_tuning.init_from is not None:
        return pretrained_state(config, model, optimizer, sharder, shardings, vocabulary)
    if config.fine_tuning.freeze or config.fine_tuning.train_only:
        logging.warning(
            "fine_tuning.init_from is None, so what fine_tuning freezes stays as it is drawn, "
            "before any training. Give --config.fine_tuning.init_from=WORKDIR to start from a "
            "trained model."
        )
    if model.config.residual == "admin":
        return admin_state(config, model, optimizer, shardings, first_batch(batches, sharder))
    if config.model.image.decoder.vae is not None:
        return latent_state(config, model, optimizer, shardings)

    def initialise(key: jax.Array) -> TrainState:
        return init_state(model, optimizer, key, fine_tuning=config.fine_tuning)

    return jax.jit(initialise, out_shardings=shardings)(jax.random.key(config.train.seed))
