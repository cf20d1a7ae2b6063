"""Folders of rows, prepared from a few short texts by this process."""

import dataclasses
import json
import pathlib

from megatransformer_jax.config.data import DataConfig, TokenizerConfig
from megatransformer_jax.data.prepare import (
    Corpus,
    finish_folder,
    start_folder,
    write_shards,
)
from megatransformer_jax.data.sources.build import build_splits
from megatransformer_jax.data.token_rows import RowCodec
from megatransformer_jax.data.tokenizer import BytesTokenizer

TOKENIZER = BytesTokenizer()


def texts_config(folder: pathlib.Path, name: str, count: int = 60, **changes) -> DataConfig:
    """JSON lines with texts of different lengths, every tenth of which is held out."""
    path = folder / f"{name}.jsonl"
    texts = [f"{name} {number} " + "word " * (number * 7 % 23) for number in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    values = {
        "source": "jsonl",
        "files": (str(path),),
        "validation_fraction": 0.1,
        "tokenizer": TokenizerConfig(kind="bytes"),
        "batch_size": 8,
        "sequence_length": 48,
        "prefetch_batches": 0,
    }
    return DataConfig(**{**values, **changes})


def corpus_of(config: DataConfig) -> Corpus:
    """What is prepared of it."""
    return Corpus(
        sources=build_splits(config),
        tokenizer=TOKENIZER,
        codec=RowCodec.of(config, TOKENIZER),
        packing=config.packing,
        on_bad_record=config.on_bad_record,
        origin={"training data": str(config.files)},
        tokenizer_kind="bytes",
    )


def prepare_texts(
    config: DataConfig, folder: pathlib.Path, shard_bytes: int = 500, report=None, workers: int = 1
) -> None:
    """Prepares a configuration's texts, or goes on with them."""
    folder.mkdir(exist_ok=True)
    corpus = corpus_of(config)
    plan = corpus.plan(shard_bytes)
    tasks = corpus.tasks(plan)
    finished = start_folder(folder, plan)
    missing = [task for task in tasks if task.name not in finished]
    write_shards(corpus, missing, folder, workers, report or (lambda documents, num_bytes: None))
    finish_folder(folder, plan, tasks)


def tokens_config(config: DataConfig, *folders: pathlib.Path, **changes) -> DataConfig:
    """The configuration of a run on prepared folders."""
    values = {
        "source": "tokens",
        "files": tuple(map(str, folders)),
        "validation_fraction": 0.05,
    }
    return dataclasses.replace(config, **{**values, **changes})
