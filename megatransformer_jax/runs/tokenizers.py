"""The tokenizer that a run starts with: trained now, given, inherited, prepared, or symbols."""

import json
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging

from megatransformer_jax.checkpoints.hub import find_model
from megatransformer_jax.config.build import load_config
from megatransformer_jax.config.data import TokenizerConfig
from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.data.chat_template import template_files
from megatransformer_jax.data.fingerprint import training_text_identity
from megatransformer_jax.data.hf_tokenizer import (
    ID_FILES,
    TOKEN_FILES,
    TOKENIZER_FILE,
    load_huggingface_tokenizer,
)
from megatransformer_jax.data.pipeline import data_tokenizer
from megatransformer_jax.data.reasoning.symbol_tokenizer import SymbolTokenizer
from megatransformer_jax.data.sources import training_texts
from megatransformer_jax.data.token_rows import read_prepared
from megatransformer_jax.data.tokenizer import (
    TRAINING_OPTIONS,
    SentencePieceTokenizer,
    Tokenizer,
    build_tokenizer,
    load_sentencepiece,
)
from megatransformer_jax.runs.load import (
    HUGGINGFACE_FOLDER,
    SENTENCEPIECE_FILE,
    find_sentencepiece,
    foreign_format,
)
from megatransformer_jax.storage import AnyPath, write_atomically
from megatransformer_jax.training.distributed import wait_for_all


def start_tokenizer(config: RunConfig, workdir: AnyPath) -> Tokenizer:
    """The tokenizer of a run: of text trained now if it must be, given, or that of the model which
    the run starts from or of the prepared rows that it reads; of a reasoning task its symbols.

    Of several processes the first trains, and the others wait and read its files in the workdir.

    Raises:
      ConfigError: if the model has fewer embeddings than there are ids, or the tokenizer of
        `fine_tuning.init_from` or of prepared rows is not what the options say.
      UserError: if prepared rows were made by another tokenizer.
    """
    options = config.data.tokenizer

    def read_text() -> Tokenizer:
        if not options.is_trained:
            return build_tokenizer(options, [], workdir / SENTENCEPIECE_FILE, {})
        if config.fine_tuning.init_from is not None:
            return inherited_tokenizer(config, workdir)
        if config.data.source == "tokens":
            return prepared_tokenizer(config, workdir)
        return _train_once(config, workdir)

    tokenizer = data_tokenizer(config.data, read_text)
    if config.data.source == "tokens":
        # Known before anything is compiled.
        for name in config.data.files:
            read_prepared(name).check(config.data, tokenizer)
    if config.model.vocab_size < tokenizer.vocab_size:
        is_symbols = isinstance(tokenizer, SymbolTokenizer)
        source = "task" if is_symbols else "tokenizer"
        is_trained = not is_symbols and options.is_trained
        raise ConfigError(
            "model.vocab_size",
            f"{config.model.vocab_size} is less than the {tokenizer.vocab_size} ids of the "
            f"{source}; set model.vocab_size={tokenizer.vocab_size} or more"
            + (" or data.tokenizer.vocab_size lower." if is_trained else "."),
        )
    return tokenizer


def _train_once(config: RunConfig, workdir: AnyPath) -> Tokenizer:
    """A tokenizer of the training texts, trained by process 0 unless the workdir has it.

    Where processes do not share the workdir, each trains it: the result is the same.
    """
    options = config.data.tokenizer.with_vocab_size(config.model.vocab_size)
    path = workdir / SENTENCEPIECE_FILE

    def build() -> Tokenizer:
        identity = training_text_identity(config.data)
        return build_tokenizer(options, training_texts(config.data), path, identity)

    if jax.process_index() == 0:
        try:
            return build()
        finally:
            # The others need not wait longer where this fails: it fails there in the same way.
            wait_for_all("tokenizer")
    wait_for_all("tokenizer")
    return build()


# ------------------------------------------------------------------------------
# A fine-tuned run reads text as the model that it starts from: it gets that tokenizer's files.


def inherited_tokenizer(config: RunConfig, workdir: AnyPath) -> Tokenizer:
    """The tokenizer of `fine_tuning.init_from`.

    Its files are copied into the workdir and read from there from then on, so that the run does
    not need its source again: tokenizer.model, or a folder tokenizer/ with Hugging Face's files.

    Raises:
      ConfigError: if the source has no such file, or options of the tokenizer's training contradict
        it.
      UserError: if a file cannot be read.
    """
    assert config.fine_tuning.init_from is not None  # The caller has asked.
    if not _has_tokenizer(workdir):
        _copy(find_model(config.fine_tuning.init_from), config, workdir)
    return _own_tokenizer(workdir)


def _has_tokenizer(folder: AnyPath) -> bool:
    is_huggingface = (folder / HUGGINGFACE_FOLDER / TOKENIZER_FILE).is_file()
    return is_huggingface or (folder / SENTENCEPIECE_FILE).is_file()


def _own_tokenizer(folder: AnyPath) -> Tokenizer:
    if (folder / SENTENCEPIECE_FILE).is_file():
        return load_sentencepiece(folder / SENTENCEPIECE_FILE)
    return load_huggingface_tokenizer(folder / HUGGINGFACE_FOLDER)


def _copy(source: AnyPath, config: RunConfig, workdir: AnyPath) -> None:
    is_foreign = foreign_format(source) is not None
    folder = source if is_foreign else source / HUGGINGFACE_FOLDER
    if (folder / TOKENIZER_FILE).is_file():
        _copy_huggingface(source, folder, config, workdir)
    else:
        path = _sentencepiece_of(source, is_foreign=is_foreign)
        _copy_sentencepiece(source, path, config, workdir)


def _copy_huggingface(
    source: AnyPath, folder: AnyPath, config: RunConfig, workdir: AnyPath
) -> None:
    _check_training_options(config.data.tokenizer, {}, source)
    templates = [str(path.relative_to(folder)) for path in template_files(folder)]
    # The definition last: where it is, the others are.
    for name in (*templates, *TOKEN_FILES, *ID_FILES, TOKENIZER_FILE):
        if (folder / name).is_file():
            content = (folder / name).read_bytes()
            write_atomically(workdir / HUGGINGFACE_FOLDER / name, content)
    logging.info("the tokenizer is that of %s", source)


def _copy_sentencepiece(
    source: AnyPath, path: AnyPath, config: RunConfig, workdir: AnyPath
) -> None:
    description = path.with_suffix(".json")
    trained_with = json.loads(description.read_text()) if description.is_file() else {}
    _check_training_options(config.data.tokenizer, trained_with, source)
    write_atomically(workdir / SENTENCEPIECE_FILE, path.read_bytes())
    logging.info("the tokenizer is that of %s", source)


def _sentencepiece_of(source: AnyPath, *, is_foreign: bool) -> AnyPath:
    if is_foreign:
        if (source / SENTENCEPIECE_FILE).is_file():
            return source / SENTENCEPIECE_FILE
        raise ConfigError(
            "fine_tuning.init_from",
            f"{source} has neither {TOKENIZER_FILE} nor {SENTENCEPIECE_FILE}; put the one that the "
            "model was trained with there, or name it as data.tokenizer.model_file.",
        )
    data = load_config(source / "config.json").data
    if data.task == "reasoning":
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
    options: TokenizerConfig, trained_with: Mapping[str, Any], source: AnyPath
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
# A run on prepared rows reads and writes text as these were made.


def prepared_tokenizer(config: RunConfig, workdir: AnyPath) -> Tokenizer:
    """The tokenizer in the first folder of `data.files`, copied into the workdir.

    Raises:
      ConfigError: if the rows were made of bytes, or options of the tokenizer's training contradict
        it.
      UserError: if a file is missing or cannot be read.
    """
    if not _has_tokenizer(workdir):
        prepared = read_prepared(config.data.files[0])
        source = prepared.path
        if prepared.tokenizer_kind == "bytes":
            raise ConfigError(
                "data.tokenizer.kind",
                f"'sentencepiece', but {source} was prepared with bytes; set it to 'bytes'.",
            )
        folder = source / HUGGINGFACE_FOLDER
        if (folder / TOKENIZER_FILE).is_file():
            _copy_huggingface(source, folder, config, workdir)
        elif (source / SENTENCEPIECE_FILE).is_file():
            _copy_sentencepiece(source, source / SENTENCEPIECE_FILE, config, workdir)
        else:
            raise UserError(
                f"{source} has no {SENTENCEPIECE_FILE}, and its tokens have no meaning without; "
                "copy it from where the data was prepared."
            )
    return _own_tokenizer(workdir)


def keep_tokenizer(tokenizer: Tokenizer, folder: AnyPath) -> None:
    """Puts a tokenizer that was given as a file into the folder of the rows that it makes."""
    if isinstance(tokenizer, SentencePieceTokenizer) and not _has_tokenizer(folder):
        write_atomically(folder / SENTENCEPIECE_FILE, tokenizer.model)
