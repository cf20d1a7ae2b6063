"""Where a run starts: afresh, from another model, or from the newest checkpoint of its workdir."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict

from megatransformer_jax import streams
from megatransformer_jax.checkpoints.compatibility import (
    SAME_UP_TO_ROUNDING,
    TRAINING_ONLY,
    CheckpointMismatch,
    check_resumable,
    config_differences,
    resume_warnings,
)
from megatransformer_jax.checkpoints.hub import find_model
from megatransformer_jax.checkpoints.manager import CheckpointManager
from megatransformer_jax.checkpoints.quantized import refuse_quantized
from megatransformer_jax.config.build import to_dict
from megatransformer_jax.config.fine_tuning import EXIT_GATE
from megatransformer_jax.config.model import STACKS, ModelConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.config.recurrence import LOOP_OPTIONS, is_loop_parameter
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.config.run_base import BaseRunConfig
from megatransformer_jax.data.batches import Pipeline
from megatransformer_jax.data.fingerprint import data_fingerprint
from megatransformer_jax.data.tokenizer import Tokenizer
from megatransformer_jax.models.media.build import check_image_vae, insert_image_vae
from megatransformer_jax.models.megatransformer import MegaTransformer
from megatransformer_jax.models.passes.observed import profile_admin
from megatransformer_jax.models.retrofit import plan_retrofit, retrofit_params
from megatransformer_jax.runs.build import abstract_train_state
from megatransformer_jax.runs.load import LoadedModel, load_model
from megatransformer_jax.runs.task import Task
from megatransformer_jax.runs.tasks.load_medium import load_image_vae
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.training.distributed import make_global_batch
from megatransformer_jax.training.state import TrainState, init_state
from megatransformer_jax.training.trainable import path_text
from megatransformer_jax.types import Batch

# ------------------------------------------------------------------------------
# The start.


def run_info(config: BaseRunConfig, digest: str) -> dict[str, Any]:
    """What a checkpoint says about the run that wrote it; `digest` is that of its tokenizer."""
    return {
        "config": to_dict(config),
        "vocabulary": digest,
        "data": data_fingerprint(config.data),
    }


def check_workdir(config: BaseRunConfig, checkpoints: CheckpointManager) -> None:
    """Checks that the newest checkpoint, if there is one, can be continued by this config.

    Called before anything is built, so that the error comes at once.

    Raises:
      CheckpointMismatch: listing what differs, or if the data has changed.
      ConfigError: if the run has already gone further than `train.steps`.
    """
    refuse_quantized(checkpoints.directory.parent)
    step = checkpoints.latest_step()
    if step is None:
        return
    where = str(checkpoints.directory / str(step))
    run = checkpoints.run_info(step)
    saved = run["config"]
    if "averaged" in run:
        raise CheckpointMismatch(
            f"{where} holds parameters only, as a mean of checkpoints or a saved model does, and "
            "no optimiser state, so no run goes on from it. Choose another workdir; to start from "
            "its parameters, name it as fine_tuning.init_from."
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


def _check_data(saved: str | None, config: BaseRunConfig, where: str) -> None:
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


def start_state(task: Task, checkpoints: CheckpointManager) -> tuple[TrainState, int]:
    """The train state and the steps done. Sets the batches of `task` to where they go on.

    Raises:
      CheckpointMismatch: if the checkpoint's arrays or vocabulary are not this run's.
    """
    step = checkpoints.latest_step()
    if step is None:
        return task.fresh_state(), 0
    if checkpoints.run_info(step)["vocabulary"] != task.digest:
        raise CheckpointMismatch(
            f"the checkpoint {checkpoints.directory / str(step)} was trained with another "
            "vocabulary (tokenizer or task) than the one of this run. Put the workdir's "
            "tokenizer.model back, or choose another workdir."
        )
    restored = checkpoints.restore(task.abstract_state(), step)
    task.batches.set_state(restored.iterator_state)
    logging.info("resuming from step %d of %s", step, checkpoints.directory)
    return restored.state, step


def fresh_state(
    config: RunConfig,
    model: MegaTransformer,
    optimizer: optax.GradientTransformation,
    sharder: Sharder,
    tokenizer: Tokenizer,
    batches: Pipeline,
) -> TrainState:
    """The train state of a run that begins. `batches` may be looked at, and are put back."""
    abstract = abstract_train_state(model, optimizer, sharder, config.fine_tuning)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    if config.fine_tuning.init_from is not None:
        return pretrained_state(config, model, optimizer, sharder, shardings, tokenizer)
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


# ------------------------------------------------------------------------------
# The start of a run from another model: its parameters, checked and put in place.

# Decided by the retrofit, not by the plain model.
_NEW_IN_RETROFIT = ("prelude_layers", "core_layers", "coda_layers", "recurrence", "exit_gate")
# Parameters that a model may have beyond those of the one it starts from.
_FRESH_PARTS = (EXIT_GATE,)


def pretrained_state(
    config: RunConfig,
    model: MegaTransformer,
    optimizer: optax.GradientTransformation,
    sharder: Sharder,
    shardings: TrainState,
    tokenizer: Tokenizer,
) -> TrainState:
    """A state at step 0 with the parameters of `fine_tuning.init_from`.

    Args:
      config: of the run.
      model: of the run.
      optimizer: starts afresh.
      sharder: where the source's parameters are put when they are read.
      shardings: of the state.
      tokenizer: of the run; it must be the source's.

    Raises:
      CheckpointMismatch: listing what the source has otherwise.
      ConfigError: if the source cannot be retrofitted as asked, or has no exit gate and this run
        does not train its own.
      UserError: if the source cannot be read.
    """
    options = config.fine_tuning
    assert options.init_from is not None  # The caller has asked.
    refuse_quantized(find_model(options.init_from))
    source = load_model(options.init_from, step=options.init_step, sharder=sharder)
    _check_tokenizer(source, tokenizer)
    _check_model(source, config)
    if not source.config.exit_gate.enabled:
        config.check_fresh_gate()
    adopt = _retrofit(source, config) if options.retrofit else _adopt
    logging.info("starting from %s", source.description)

    def initialise(key: jax.Array, params: Any) -> TrainState:
        def replace(fresh: Any) -> Any:
            return adopt(fresh, params)

        return init_state(model, optimizer, key, replace, fine_tuning=options)

    start = jax.jit(initialise, out_shardings=shardings)
    return start(jax.random.key(config.train.seed), source.params)


def _check_tokenizer(source: LoadedModel, tokenizer: Tokenizer) -> None:
    if source.tokenizer is None:
        logging.warning(
            "%s has no tokenizer, so that of this run cannot be compared with it.",
            source.description,
        )
        return
    if source.tokenizer.digest() != tokenizer.digest():
        raise CheckpointMismatch(
            f"fine_tuning.init_from: {source.description} was trained with another vocabulary "
            "(tokenizer or task) than the one of this run. Leave data.tokenizer at its defaults, "
            "so that the source's is taken, or name the same one."
        )


def _check_model(source: LoadedModel, config: RunConfig) -> None:
    """Every option of the model that is not free must be the source's."""
    free = [*TRAINING_ONLY, *SAME_UP_TO_ROUNDING]
    if config.model.positions.scheme != "learned":
        free.append("model.max_length")
    if config.model.exit_gate.enabled:
        free.append("model.exit_gate.enabled")
    if not source.config.recurrence.has_loop_parameters:
        free += [f"model.recurrence.{name}" for name in LOOP_OPTIONS]
    names = [field.name for field in dataclasses.fields(ModelConfig)]
    if config.fine_tuning.retrofit:
        # Compared layer by layer in `plan_retrofit`.
        free += ["model.attention.window", *(f"model.attention.{s}_windows" for s in STACKS)]
        names = [name for name in names if name not in _NEW_IN_RETROFIT]
    sections = [f"model.{name}" for name in names]
    lines = config_differences(_resolved(source.config), _resolved(config.model), sections, free)
    if lines:
        raise CheckpointMismatch(
            f"fine_tuning.init_from: {source.description} is another model than that of this "
            "run:\n"
            + "\n".join(f"  {line}" for line in lines)
            + "\nGive these options their saved values; of a run, --config=WORKDIR/config.json has "
            "them all."
        )


def _resolved(config: ModelConfig) -> dict[str, Any]:
    """Nested values, None resolved where it stands for another option's value."""
    values = to_dict(config)
    values["attention"]["num_kv_heads"] = config.attention.kv_heads
    values["attention"]["head_dim"] = config.head_dim(config.width)
    values["recurrence"]["core_width"] = config.core_width
    return {"model": values}


def _retrofit(source: LoadedModel, config: RunConfig) -> Callable[[Any, Any], Any]:
    plan = plan_retrofit(source.config, config.model, config.fine_tuning.core_start)
    logging.info(
        "retrofit: prelude of layers %s, core of %s, coda of %s; dropped: %s",
        *(_shown(layers) for layers in (plan.prelude, plan.core, plan.coda, plan.dropped)),
    )

    def adopt(fresh: Any, params: Any) -> Any:
        return retrofit_params(source.config, params, config.model, fresh, plan)

    return adopt


def _shown(layers: tuple[int, ...]) -> str:
    return ", ".join(map(str, layers)) or "none"


def _adopt(fresh: Any, params: Any) -> Any:
    """The source's parameters; fresh ones for the parts that only this run's model has."""
    new, old = flatten_dict(fresh, sep="/"), flatten_dict(params, sep="/")
    added = {
        path: new[path] for path in new if path.startswith(_FRESH_PARTS) or is_loop_parameter(path)
    }
    return unflatten_dict(added | old, sep="/")


# ------------------------------------------------------------------------------
# Start of a run with `model.residual='admin'`: a profiling pass over its first batch.


def first_batch(batches: Pipeline, sharder: Sharder) -> Batch:
    """The batch that the pipeline gives next, which it will give again."""
    start = batches.get_state()
    batch = make_global_batch(next(batches), sharder)
    batches.set_state(start)
    return batch


def admin_state(
    config: RunConfig,
    model: MegaTransformer,
    optimizer: optax.GradientTransformation,
    shardings: TrainState,
    batch: Batch,
) -> TrainState:
    """A state at step 0 whose omegas are as `profile_admin` says; they are logged.

    Args:
      config: of the run.
      model: with `residual='admin'`.
      optimizer: of the run; it starts from the profiled parameters.
      shardings: of the state.
      batch: the first one.
    """

    def initialise(key: jax.Array, batch: Batch) -> TrainState:
        # A stream that neither the weights nor a training step draw from.
        profile_key = jax.random.fold_in(key, streams.ADMIN_PROFILE)

        def adjust(params: Any) -> Any:
            inputs = (batch.tokens, batch.positions, batch.segment_ids)
            return profile_admin(model, params, *inputs, profile_key)

        return init_state(model, optimizer, key, adjust, fine_tuning=config.fine_tuning)

    state = jax.jit(initialise, out_shardings=shardings)(jax.random.key(config.train.seed), batch)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        name = path_text(path).replace("/", ".")
        if name.endswith("_residual_scale"):
            logging.info("admin: %s starts at %.4g", name, float(leaf[0]))
    return state


# ------------------------------------------------------------------------------
# Start of a run that draws latents of a trained autoencoder (`model.image.decoder.vae`).


def latent_state(
    config: RunConfig,
    model: MegaTransformer,
    optimizer: optax.GradientTransformation,
    shardings: TrainState,
) -> TrainState:
    """A state at step 0 with the autoencoder's weights, which training leaves as they are.

    Args:
      config: of the run.
      model: with `model.image.decoder.vae`.
      optimizer: of the run.
      shardings: of the state.

    Raises:
      UserError: if there is no such autoencoder.
      ConfigError: if it is not the one that the model describes.
    """
    path = config.model.image.decoder.vae
    assert path is not None  # The caller has looked.
    trained, vae_params = load_image_vae(path)
    check_image_vae(config.model.image, trained)

    def initialise(key: jax.Array, vae_params: Any) -> TrainState:
        def adjust(params: Any) -> Any:
            return insert_image_vae(params, vae_params)

        return init_state(model, optimizer, key, adjust, fine_tuning=config.fine_tuning)

    key = jax.random.key(config.train.seed)
    # From the host: they are on one device, and the state may be on several.
    state = jax.jit(initialise, out_shardings=shardings)(key, jax.device_get(vae_params))
    logging.info("images are drawn as latents of the autoencoder in %s", path)
    return state
