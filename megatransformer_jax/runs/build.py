"""Builds the parts of a run from its config: vocabulary, mesh, model, abstract train state.

A fine-tuned run gets the tokenizer of the model that it starts from, and a run with a memory budget
its micro-batches.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax
from absl import logging

from megatransformer_jax.checkpoints.manager import CheckpointManager
from megatransformer_jax.config.build import load_config
from megatransformer_jax.config.data import TokenizerConfig
from megatransformer_jax.config.fine_tuning import FineTuningConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.data.augmentation.text import TextAugmentation
from megatransformer_jax.data.fingerprint import training_text_identity
from megatransformer_jax.data.hf_tokenizer import (
    ID_FILES,
    TOKEN_FILES,
    TOKENIZER_FILE,
    load_huggingface_tokenizer,
)
from megatransformer_jax.data.media.records import MediaFormats
from megatransformer_jax.data.media_tokenizer import MediaTokenizer
from megatransformer_jax.data.reasoning import build_task
from megatransformer_jax.data.sources import training_texts
from megatransformer_jax.data.tokenizer import (
    TRAINING_OPTIONS,
    Tokenizer,
    build_tokenizer,
    load_sentencepiece,
)
from megatransformer_jax.files import write_atomically
from megatransformer_jax.models.megatransformer import MegaTransformer, build_model
from megatransformer_jax.runs.load import (
    HUGGINGFACE_FOLDER,
    SENTENCEPIECE_FILE,
    find_sentencepiece,
    is_huginn_folder,
)
from megatransformer_jax.sharding.mesh import check_run_fits_mesh, make_mesh
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.training.micro_batch import (
    CompiledStep,
    Shape,
    StepProgram,
    choose_accumulation,
    compile_step,
    possible_accumulations,
)
from megatransformer_jax.training.state import TrainState, init_state, state_shardings
from megatransformer_jax.training.step import make_train_step
from megatransformer_jax.types import DTypePolicy

# ------------------------------------------------------------------------------
# The parts.


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


# ------------------------------------------------------------------------------
# A fine-tuned run reads text as the model that it starts from: it gets that tokenizer's files.


def inherited_tokenizer(config: RunConfig, workdir: pathlib.Path) -> Tokenizer:
    """The tokenizer of `fine_tuning.init_from`.

    Its files are copied into the workdir and read from there from then on, so that the run does
    not need its source again: tokenizer.model, or a folder tokenizer/ with Hugging Face's files.

    Raises:
      ConfigError: if the source has no such file, or options of the tokenizer's training contradict
        it.
      UserError: if a file cannot be read.
    """
    own, own_folder = workdir / SENTENCEPIECE_FILE, workdir / HUGGINGFACE_FOLDER
    if not own.is_file() and not (own_folder / TOKENIZER_FILE).is_file():
        assert config.fine_tuning.init_from is not None  # The caller has asked.
        _copy(pathlib.Path(config.fine_tuning.init_from).expanduser(), config, workdir)
    if own.is_file():
        return load_sentencepiece(own)
    return load_huggingface_tokenizer(own_folder)


def _copy(source: pathlib.Path, config: RunConfig, workdir: pathlib.Path) -> None:
    is_huginn = is_huginn_folder(source)
    folder = source if is_huginn else source / HUGGINGFACE_FOLDER
    if (folder / TOKENIZER_FILE).is_file():
        _check_training_options(config.data.tokenizer, {}, source)
        # The definition last: where it is, the others are.
        for name in (*TOKEN_FILES, *ID_FILES, TOKENIZER_FILE):
            if (folder / name).is_file():
                content = (folder / name).read_bytes()
                write_atomically(workdir / HUGGINGFACE_FOLDER / name, content)
    else:
        path = _sentencepiece_of(source, is_huginn=is_huginn)
        description = path.with_suffix(".json")
        trained_with = json.loads(description.read_text()) if description.is_file() else {}
        _check_training_options(config.data.tokenizer, trained_with, source)
        write_atomically(workdir / SENTENCEPIECE_FILE, path.read_bytes())
    logging.info("the tokenizer is that of %s", source)


def _sentencepiece_of(source: pathlib.Path, *, is_huginn: bool) -> pathlib.Path:
    if is_huginn:
        if (source / SENTENCEPIECE_FILE).is_file():
            return source / SENTENCEPIECE_FILE
        raise ConfigError(
            "fine_tuning.init_from",
            f"{source} has neither {TOKENIZER_FILE} nor {SENTENCEPIECE_FILE}; put the one that the "
            "model was trained with there, or name it as data.tokenizer.model_file.",
        )
    data = load_config(source / "config.json").data
    if data.source == "reasoning":
        raise ConfigError(
            "data.source",
            f"text, but {source} was trained on reasoning problems, whose symbols it knows alone; "
            "set data.source='reasoning' and data.reasoning as there.",
        )
    if data.tokenizer.kind == "bytes":
        raise ConfigError(
            "data.tokenizer.kind",
            f"'sentencepiece', but {source} was trained on bytes; set it to 'bytes'.",
        )
    return find_sentencepiece(source, data.tokenizer.model_file)


def _check_training_options(
    options: TokenizerConfig, trained_with: Mapping[str, Any], source: pathlib.Path
) -> None:
    """None may ask for another tokenizer than the one that there is."""
    for name in TRAINING_OPTIONS:
        value, path = getattr(options, name), f"data.tokenizer.{name}"
        if value != getattr(TokenizerConfig(), name) and trained_with.get(path) != value:
            raise ConfigError(
                path,
                f"{value!r} would be ignored, because the run reads text as {source} does; leave "
                f"it at {getattr(TokenizerConfig(), name)!r}.",
            )


# ------------------------------------------------------------------------------
# Micro-batches of a run with a memory budget: chosen at its start, kept when it goes on.
#
# The chosen number becomes `train.accumulation` of the resolved configuration, in place of the
# budget, so that the run's config.json and its checkpoints name what the run does.


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """What is known before anything is built.

    Attributes:
      budget_gib: `train.memory_budget_gib`.
      accumulation: what the run has been started with; None: it starts now.
    """

    budget_gib: float
    accumulation: int | None

    def compile(
        self,
        config: RunConfig,
        model: MegaTransformer,
        optimizer: optax.GradientTransformation,
        sharder: Sharder,
    ) -> tuple[RunConfig, CompiledStep]:
        """The resolved configuration and its train step, compiled.

        Raises:
          ConfigError: if the step does not fit the budget.
        """
        assert sharder.mesh is not None  # `assemble` always makes one.
        ways = sharder.mesh.shape["data"] * sharder.mesh.shape["fsdp"]
        candidates = possible_accumulations(config.data.batch_size, ways)
        if self.accumulation is not None:
            # Another number would not go on bit for bit.
            logging.info("accumulation=%d is that of the run that goes on", self.accumulation)
            candidates = [self.accumulation]
        state = abstract_train_state(model, optimizer, sharder, config.fine_tuning)

        def compile_for(accumulation: int, shape: Shape) -> StepProgram:
            step = make_train_step(model, optimizer, _resolved(config, accumulation))
            return compile_step(step, state, shape, sharder)

        chosen, step = choose_accumulation(
            compile_for, candidates, config.data.batch_shapes, self.budget_gib
        )
        return _resolved(config, chosen), step


def plan_memory(
    config: RunConfig, checkpoints: CheckpointManager
) -> tuple[RunConfig, MemoryPlan | None]:
    """The configuration without a budget, and what is to be done about that; None if nothing is.

    If the run goes on, the configuration has the accumulation that it was started with.
    """
    budget = config.train.memory_budget_gib
    if budget is None:
        return config, None
    step = checkpoints.latest_step()
    accumulation = None
    if step is not None:
        accumulation = int(checkpoints.run_info(step)["config"]["train"]["accumulation"])
        if config.data.batch_size % accumulation:
            # Another batch than the saved one: what compares the configurations says so.
            accumulation = None
    return _resolved(config, accumulation or 1), MemoryPlan(budget, accumulation)


def _resolved(config: RunConfig, accumulation: int) -> RunConfig:
    train = dataclasses.replace(config.train, accumulation=accumulation, memory_budget_gib=None)
    return dataclasses.replace(config, train=train)
