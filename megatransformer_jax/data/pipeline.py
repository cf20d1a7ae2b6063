"""From the data configuration to batches: the one entry point of the data layer."""

from collections.abc import Callable
from typing import Any

from megatransformer_jax.config.data import DataConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.data.batches import (
    BatchStream,
    BucketBatches,
    Pipeline,
    ProblemBatches,
    Share,
    TextBatches,
    first_batches,
)
from megatransformer_jax.data.documents import Documents
from megatransformer_jax.data.media.records import MediaFormats
from megatransformer_jax.data.media_tokenizer import MediaTokenizer
from megatransformer_jax.data.packing import PackedRows, PaddedRows, Row, SpecialIds
from megatransformer_jax.data.reasoning import ProblemSet, build_task
from megatransformer_jax.data.reasoning.symbol_tokenizer import SymbolTokenizer
from megatransformer_jax.data.sources import BadRecordPolicy, build_source
from megatransformer_jax.data.token_rows import TokenBatches
from megatransformer_jax.data.tokenizer import Tokenizer
from megatransformer_jax.types import Batch

# Prepared rows are handed over by at least so many; one takes as long to hand over as to read.
_ROWS_OF_A_GROUP = 8


def data_tokenizer(config: DataConfig, read_text: Callable[[], Tokenizer]) -> Tokenizer:
    """What turns the data into ids: symbols of problems, or what reads text.

    Args:
      config: where the data comes from.
      read_text: makes or reads the tokenizer of text; called only if there is text.
    """
    match config.task:
        case "reasoning":
            return SymbolTokenizer.of_task(build_task(config.reasoning))
        case "media":
            return MediaTokenizer(read_text())
    return read_text()


def build_pipeline(
    config: DataConfig,
    tokenizer: Tokenizer | None,
    *,
    split: str,
    media: MediaFormats | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Pipeline:
    """The batches of `split`, 'train' or 'validation', for one process.

    The global batch is the batches of the processes one below the other.

    Args:
      config: where the data comes from.
      tokenizer: see `data_tokenizer`; source='reasoning' needs none.
      split: 'train' is endless, 'validation' one pass.
      media: the model's formats, for source='media', which needs a MediaTokenizer too.
      process_index: which process this is, from 0.
      process_count: how many share each global batch.

    Raises:
      ConfigError: if the batch cannot be shared equally, or a problem does not fit in a row.
      UserError: if the data cannot be read.
    """
    if config.batch_size % process_count:
        raise ConfigError(
            "data.batch_size",
            f"{config.batch_size} rows cannot be shared equally by {process_count} processes; "
            "use a multiple.",
        )
    if split not in ("train", "validation"):
        raise ValueError(f"no split {split!r}; there are 'train' and 'validation'")
    share = Share(config.batch_size, process_index, process_count)
    bad_records = BadRecordPolicy(config.on_bad_record)
    match config.task:
        case "reasoning":
            stream: BatchStream = _problem_batches(config, split, share)
        case "media":
            if media is None or not isinstance(tokenizer, MediaTokenizer):
                raise ValueError("source='media' needs `media` formats and a MediaTokenizer")
            # scikit-learn and the like take a second to import, which text needs not pay.
            from megatransformer_jax.data.media.batches import MediaBatches  # noqa: PLC0415

            stream = MediaBatches(config, tokenizer, media, split, share, bad_records)
        case _:
            stream = _text_batches(config, tokenizer, split, share, bad_records)
    rows = share.rows.stop - share.rows.start
    group = max(_ROWS_OF_A_GROUP // rows, 1) if isinstance(stream, TokenBatches) else 1
    return Pipeline(stream, bad_records, config.prefetch_batches, group)


def validation_batches(
    config: DataConfig,
    tokenizer: Tokenizer | None,
    *,
    num_batches: int | None = None,
    media: MediaFormats | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> list[Batch]:
    """The first validation batches of one process, or all; the same at every call.

    There are fewer than `num_batches` if the split is smaller, and at least one.
    """
    with build_pipeline(
        config,
        tokenizer,
        split="validation",
        media=media,
        process_index=process_index,
        process_count=process_count,
    ) as batches:
        return first_batches(batches, num_batches)


def _problem_batches(config: DataConfig, split: str, share: Share) -> ProblemBatches:
    problems = ProblemSet.from_config(
        config.reasoning,
        sequence_length=config.sequence_length,
        seed=config.seed,
        held_out=split == "validation",
    )
    return ProblemBatches(problems, share, num_workers=config.num_workers, **_order(config, split))


def _text_batches(
    config: DataConfig,
    tokenizer: Tokenizer | None,
    split: str,
    share: Share,
    bad_records: BadRecordPolicy,
) -> BatchStream:
    if tokenizer is None:
        raise ValueError(f"source={config.source!r} needs a tokenizer; see build_tokenizer")
    if config.source == "tokens":
        return TokenBatches(config, tokenizer, split, share)
    documents = Documents(
        build_source(config, split),
        tokenizer,
        bad_records,
        num_workers=config.num_workers,
        augmentation=config.augmentation if split == "train" else None,
        **_order(config, split),
    )
    ids = SpecialIds(tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id)
    if config.packing == "bucket":
        return BucketBatches(documents, ids, config.batch_shapes, share)
    make_rows = PackedRows if config.packing == "pack" else PaddedRows
    rows = make_rows(documents.open, ids, config.sequence_length)
    return TextBatches(documents, rows, share, Row.empty(config.sequence_length, ids.pad))


def _order(config: DataConfig, split: str) -> dict[str, Any]:
    train = split == "train"
    return {"seed": config.seed, "shuffle": train and config.shuffle, "repeat": train}
