"""Trains a SentencePiece model that loses nothing of the text."""

import io
import re
from collections.abc import Iterable, Iterator

import sentencepiece

from megatransformer_jax.config.data import TokenizerConfig
from megatransformer_jax.config.option import ConfigError, UserError

# SentencePiece drops training sentences longer than its max_sentence_length without an error, so
# lines are cut to this many characters, and the limit is set above what they take in bytes.
MAX_LINE_CHARACTERS = 4096
NO_LOG_BELOW_ERRORS = 2


def train_sentencepiece(config: TokenizerConfig, texts: Iterable[str]) -> bytes:
    """The model file, the same bytes for the same texts and options.

    Ids: padding 0, start 1, end 2, unknown 3 (never used, as bytes are the fallback), 256 bytes,
    then the learned pieces. Text is not normalised, and no blank is added before it.

    Raises:
      ConfigError: if the text does not support the vocabulary size.
      UserError: if there is no text.
      BadRecordError: or whatever else `texts` raises, unchanged.
    """
    if config.vocab_size is None:
        raise ConfigError(
            "data.tokenizer.vocab_size",
            "None stands for model.vocab_size, which is not known here; give a number, or use "
            "TokenizerConfig.with_vocab_size.",
        )
    # SentencePiece turns an exception of the iterator into text with the frames of this process.
    failures: list[Exception] = []
    lines = _remembering(_lines(texts, config.max_training_bytes), failures)
    first = next(lines, None)
    if first is None:
        raise UserError(
            "the tokenizer cannot be trained: the training split holds no text. Give files with "
            "text, or set data.tokenizer.model_file."
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_chain(first, lines),
            model_writer=model,
            model_type=config.model_type,
            vocab_size=config.vocab_size,
            character_coverage=config.character_coverage,
            byte_fallback=True,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=4 * MAX_LINE_CHARACTERS + 4,
            num_threads=1,  # sums of floats in a fixed order
            minloglevel=NO_LOG_BELOW_ERRORS,
        )
    except RuntimeError as error:
        if failures:
            raise failures[0] from None
        raise _readable(error, config) from error
    return model.getvalue()


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _remembering(lines: Iterator[str], failures: list[Exception]) -> Iterator[str]:
    """The lines; an exception that ends them is kept in `failures` too."""
    try:
        yield from lines
    except Exception as error:
        failures.append(error)
        raise


def _lines(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    """Lines of the texts up to about `max_bytes`; line ends are left to the byte fallback."""
    used = 0
    for text in texts:
        for line in text.splitlines():
            for start in range(0, len(line), MAX_LINE_CHARACTERS):
                if used >= max_bytes:
                    return
                piece = line[start : start + MAX_LINE_CHARACTERS]
                used += len(piece.encode("utf-8"))
                # SentencePiece reserves NUL for itself; the byte fallback still covers it.
                yield piece.replace("\0", "")


def _readable(error: RuntimeError, config: TokenizerConfig) -> UserError:
    """SentencePiece's complaint in terms of our options."""
    path = "data.tokenizer.vocab_size"
    too_high = re.search(r"Please set it to a value <= (\d+)", str(error))
    if too_high:
        return ConfigError(
            path,
            f"{config.vocab_size} is more than the training text supports; set it to at most "
            f"{too_high[1]}, or give more text.",
        )
    too_low = re.search(r"smaller than required_chars. \d+ vs (\d+)", str(error))
    if too_low:
        return ConfigError(
            path,
            f"{config.vocab_size} is less than the {too_low[1]} that characters, bytes and special "
            "tokens take; raise it to more than that, or lower data.tokenizer.character_coverage.",
        )
    return UserError(f"the tokenizer cannot be trained: {error}")
