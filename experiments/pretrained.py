"""The start of a run from another model: its parameters, checked and put in place."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict

from experiments.assemble import Vocabulary
from experiments.load_model import LoadedModel, load_model
from megatransformer_jax.checkpoints.compatibility import (
    SAME_UP_TO_ROUNDING,
    TRAINING_ONLY,
    CheckpointMismatch,
    config_differences,
)
from megatransformer_jax.config.build import to_dict
from megatransformer_jax.config.fine_tuning import EXIT_GATE
from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.data.reasoning.symbol_tokenizer import SymbolTokenizer
from megatransformer_jax.models.megatransformer import MegaTransformer
from megatransformer_jax.models.retrofit import plan_retrofit, retrofit_params
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.training.state import TrainState, init_state

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
    vocabulary: Vocabulary,
) -> TrainState:
    """A state at step 0 with the parameters of `fine_tuning.init_from`.

    Args:
      config: of the run.
      model: of the run.
      optimizer: starts afresh.
      sharder: where the source's parameters are put when they are read.
      shardings: of the state.
      vocabulary: of the run; it must be the source's.

    Raises:
      CheckpointMismatch: listing what the source has otherwise.
      ConfigError: if the source cannot be retrofitted as asked, or has no exit gate and this run
        does not train its own.
      UserError: if the source cannot be read.
    """
    options = config.fine_tuning
    assert options.init_from is not None  # The caller has asked.
    source = load_model(options.init_from, step=options.init_step, sharder=sharder)
    _check_vocabulary(source, vocabulary)
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


def _check_vocabulary(source: LoadedModel, vocabulary: Vocabulary) -> None:
    tokenizer = source.tokenizer
    if tokenizer is None:
        logging.warning(
            "%s has no tokenizer, so that of this run cannot be compared with it.",
            source.description,
        )
        return
    digest = tokenizer.digest()
    if isinstance(tokenizer, SymbolTokenizer):
        digest = " ".join(tokenizer.symbols)
    if digest != vocabulary.digest:
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
    names = [field.name for field in dataclasses.fields(ModelConfig)]
    if config.fine_tuning.retrofit:
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
    added = {path: new[path] for path in new if path.startswith(_FRESH_PARTS)}
    return unflatten_dict(added | old, sep="/")
