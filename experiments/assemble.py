"""Builds the parts of a run from its config: vocabulary, mesh, model, abstract train state."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from experiments.inherited_tokenizer import inherited_tokenizer
from megatransformer_jax.config.fine_tuning import FineTuningConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.data.augmentation.text import TextAugmentation
from megatransformer_jax.data.fingerprint import training_text_identity
from megatransformer_jax.data.media.records import MediaFormats
from megatransformer_jax.data.media_tokenizer import MediaTokenizer
from megatransformer_jax.data.reasoning import build_task
from megatransformer_jax.data.sources import training_texts
from megatransformer_jax.data.tokenizer import Tokenizer, build_tokenizer
from megatransformer_jax.models.megatransformer import MegaTransformer, build_model
from megatransformer_jax.sharding.mesh import check_run_fits_mesh, make_mesh
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.training.state import TrainState, init_state, state_shardings
from megatransformer_jax.types import DTypePolicy


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What token ids mean.

    Attributes:
      tokenizer: None for reasoning tasks, which have symbols instead.
      size: number of ids.
      decode: from ids to text.
      digest: the same only for the same vocabulary.
    """

    tokenizer: Tokenizer | None
    size: int
    decode: Callable[[Sequence[int]], str]
    digest: str


def check_augmentation(config: RunConfig) -> None:
    """Reads the file of synonyms and imports the function that `data.augmentation` names.

    Called before anything is built, so that the error comes at once.

    Raises:
      ConfigError: if either cannot be used.
    """
    TextAugmentation.from_config(config.data.augmentation, config.data.seed)


def require_transformer(config: RunConfig) -> None:
    """Checks that the run trains a transformer, for commands that know no other kind.

    Raises:
      ConfigError: otherwise.
    """
    if config.kind != "transformer":
        raise ConfigError(
            "kind", f"{config.kind!r}: this command needs a transformer; set it to 'transformer'."
        )


def build_vocabulary(config: RunConfig, workdir: pathlib.Path) -> Vocabulary:
    """The tokenizer of a text run (trained now if it must be, or that of the model which the run
    starts from), or a task's symbols.

    Raises:
      ConfigError: if the model has fewer embeddings than there are ids, or the tokenizer of
        `fine_tuning.init_from` is not what the options say.
    """
    if config.data.source == "reasoning":
        task = build_task(config.data.reasoning)
        vocabulary = Vocabulary(None, task.vocab_size, task.decode, " ".join(task.symbols))
    else:
        tokenizer = _build_tokenizer(config, workdir)
        vocabulary = Vocabulary(
            tokenizer, tokenizer.vocab_size, tokenizer.decode, tokenizer.digest()
        )
    if config.model.vocab_size < vocabulary.size:
        source = "task" if vocabulary.tokenizer is None else "tokenizer"
        is_trained = vocabulary.tokenizer is not None and config.data.tokenizer.is_trained
        raise ConfigError(
            "model.vocab_size",
            f"{config.model.vocab_size} is less than the {vocabulary.size} ids of the {source}; "
            f"set model.vocab_size={vocabulary.size} or more"
            + (" or data.tokenizer.vocab_size lower." if is_trained else "."),
        )
    return vocabulary


def _build_tokenizer(config: RunConfig, workdir: pathlib.Path) -> Tokenizer:
    options = config.data.tokenizer
    if options.is_trained and config.fine_tuning.init_from is not None:
        return inherited_tokenizer(config, workdir)
    if config.data.source == "media":
        # Bytes or a given model: captions are too few to train one on.
        return MediaTokenizer(build_tokenizer(options, [], workdir / "tokenizer.model", {}))
    return build_tokenizer(
        options.with_vocab_size(config.model.vocab_size),
        training_texts(config.data),
        workdir / "tokenizer.model",
        training_text_identity(config.data),
    )


def media_formats(config: RunConfig) -> MediaFormats | None:
    """What media of the run's data must look like; None for a run without."""
    return MediaFormats.of_model(config.model) if config.data.source == "media" else None


def build_sharded_model(config: RunConfig) -> tuple[MegaTransformer, Sharder]:
    """The model on a mesh over all devices.

    Raises:
      ConfigError: if mesh, devices, model and batch do not fit each other.
    """
    mesh = make_mesh(config.mesh, jax.devices())
    check_run_fits_mesh(config, mesh)
    sharder = Sharder(mesh)
    platform = jax.default_backend()
    policy = DTypePolicy.from_precision(config.train.precision, platform)
    return build_model(config.model, policy, sharder, platform), sharder


def abstract_train_state(
    model: MegaTransformer,
    optimizer: optax.GradientTransformation,
    sharder: Sharder,
    fine_tuning: FineTuningConfig,
) -> TrainState:
    """Shapes, types and shardings of the train state, without allocating it."""
    shapes = jax.eval_shape(
        lambda key: init_state(model, optimizer, key, fine_tuning=fine_tuning), jax.random.key(0)
    )
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(model, optimizer, sharder, fine_tuning=fine_tuning),
    )


def trained_depth(config: RunConfig) -> int | None:
    """Mean iterations in training, or None for a model without a core."""
    return config.model.recurrence.mean_steps if config.model.is_recurrent else None


def count_parameters(params: Any) -> dict[str, int]:
    """Parameters per top-level module, largest first."""
    counts = {
        name: sum(leaf.size for leaf in jax.tree.leaves(module)) for name, module in params.items()
    }
    return dict(sorted(counts.items(), key=lambda item: -item[1]))
