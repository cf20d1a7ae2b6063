"""Text to token ids and back: SentencePiece with byte fallback, or plain bytes.

Both are lossless: `decode(encode(text)) == text`, with one exception: SentencePiece writes a space
as U+2581, so that character itself comes back as a space. Special tokens never come out of
`encode`; packing adds them. At the end of the file a SentencePiece model is trained.
"""

import dataclasses
import functools
import hashlib
import io
import json
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence

import sentencepiece
from absl import logging

from megatransformer_jax.config.data import TokenizerConfig
from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.storage import AnyPath, as_path, write_atomically, write_json

# The options of TokenizerConfig that decide what a model trained on given texts looks like.
TRAINING_OPTIONS = ("vocab_size", "model_type", "character_coverage", "max_training_bytes")
MODEL_DIGEST = "sha256 of the model"


@typing.runtime_checkable
class Tokenizer(typing.Protocol):
    """What the pipeline, the sampler and the checkpoints need. Tokenizers pickle."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, special ones included."""
        ...

    @property
    def pad_id(self) -> int:
        """Fills rows. Padding is marked by segment ids, so it never counts as content."""
        ...

    @property
    def bos_id(self) -> int:
        """Stands before every document."""
        ...

    @property
    def eos_id(self) -> int:
        """Target after the last token of every document."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without special tokens."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; special tokens are left out."""
        ...

    def piece_bytes(self, token: int) -> bytes:
        """UTF-8 bytes that the id stands for; none for a special token.

        Joined, those of several ids are the bytes of their text, except that `decode` writes U+FFFD
        for bytes that are not text, or for a character with a special token inside.
        """
        ...

    def digest(self) -> str:
        """Hexadecimal hash that two tokenizers share only if they are the same."""
        ...


@dataclasses.dataclass(frozen=True)
class BytesTokenizer:
    """UTF-8 bytes after padding (0), start (1) and end (2).

    Examples:
      >>> tokenizer = mt.BytesTokenizer()
      >>> tokenizer.encode("Hi"), tokenizer.vocab_size
      ([75, 108], 259)
      >>> tokenizer.decode([75, 108])
      'Hi'
    """

    pad_id: int = 0
    bos_id: int = 1
    eos_id: int = 2

    @property
    def vocab_size(self) -> int:
        """Three special tokens and 256 bytes."""
        return 259

    def encode(self, text: str) -> list[int]:
        """One id per UTF-8 byte."""
        return [3 + byte for byte in text.encode("utf-8")]

    def decode(self, ids: Sequence[int]) -> str:
        """Bytes that are not UTF-8, as a sampler may write, become U+FFFD."""
        return bytes(token - 3 for token in map(int, ids) if token >= 3).decode("utf-8", "replace")

    def piece_bytes(self, token: int) -> bytes:
        """One byte."""
        _check_id(token, self.vocab_size)
        return bytes([token - 3]) if token >= 3 else b""

    def digest(self) -> str:
        """The same for all, as there is nothing to choose."""
        return hashlib.sha256(b"bytes after pad, bos, eos").hexdigest()


@dataclasses.dataclass(frozen=True)
class SentencePieceTokenizer:
    """A SentencePiece model, given as the bytes of its .model file.

    Raises:
      UserError: if the bytes are not a model, or the model has no start or end token.

    Examples:
      >>> tokenizer = mt.SentencePieceTokenizer((run / "tokenizer.model").read_bytes())
      >>> tokenizer.decode(tokenizer.encode("If it rains")), tokenizer.vocab_size
      ('If it rains', 512)
    """

    model: bytes = dataclasses.field(repr=False)
    name: str = "SentencePiece model"  # for messages only

    def __post_init__(self) -> None:
        try:
            processor = self._processor
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"{self.name}: not a SentencePiece model ({error}). Give a .model file, or delete "
                "it to have one trained."
            ) from error
        for kind in ("bos", "eos"):
            if getattr(processor, f"{kind}_id")() < 0:
                raise UserError(
                    f"{self.name}: the model has no {kind} token, which packing needs between "
                    f"documents. Train it with {kind}_id >= 0."
                )

    def __reduce__(self) -> tuple[typing.Any, ...]:
        return SentencePieceTokenizer, (self.model, self.name)

    @functools.cached_property
    def _processor(self) -> sentencepiece.SentencePieceProcessor:
        return sentencepiece.SentencePieceProcessor(model_proto=self.model)

    @property
    def vocab_size(self) -> int:
        """Number of pieces."""
        return self._processor.vocab_size()

    @property
    def pad_id(self) -> int:
        """The model's padding token. A model without one pads with its end token."""
        own = self._processor.pad_id()
        return own if own >= 0 else self.eos_id

    @property
    def bos_id(self) -> int:
        """The model's start token."""
        return self._processor.bos_id()

    @property
    def eos_id(self) -> int:
        """The model's end token."""
        return self._processor.eos_id()

    def encode(self, text: str) -> list[int]:
        """Pieces of the text; what the vocabulary lacks is spelt in bytes."""
        return self._processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the pieces."""
        return self._processor.decode([int(token) for token in ids])

    def piece_bytes(self, token: int) -> bytes:
        """The piece's text, or its byte.

        A model with a dummy prefix has a space before its first piece that `decode` drops.
        """
        _check_id(token, self.vocab_size)
        processor = self._processor
        if processor.is_control(token):
            return b""
        if processor.is_unknown(token):
            return processor.decode([token]).encode("utf-8")
        piece = processor.id_to_piece(token)
        if processor.is_byte(token):  # written <0x0A>
            return bytes([int(piece[1:-1], 16)])
        return piece.replace("\u2581", " ").encode("utf-8")

    def digest(self) -> str:
        """SHA-256 of the model file."""
        return hashlib.sha256(self.model).hexdigest()


def _check_id(token: int, vocab_size: int) -> None:
    if not 0 <= token < vocab_size:
        raise ValueError(f"{token} is not an id of this tokenizer; it has 0 to {vocab_size - 1}.")


def build_tokenizer(
    config: TokenizerConfig,
    training_texts: Iterable[str],
    path: AnyPath,
    trained_on: Mapping[str, typing.Any],
) -> Tokenizer:
    """The tokenizer of a run.

    A tokenizer that the run trains is stored at `path` and read from there the next time, so that
    a resumed run has the same one. Beside it, `.json` instead of `.model`, stands what it was
    trained with and on; another configuration or other texts are an error, never a tokenizer that
    does not belong to them. Training is deterministic: processes that do it at the same time write
    the same files, each in one atomic step.

    Args:
      config: which tokenizer.
      training_texts: documents of the training split; read only if one is trained now.
      path: where the trained model is kept, for example `<workdir>/tokenizer.model`.
      trained_on: what decides the training texts, ready for JSON; see `training_text_identity`.

    Raises:
      UserError: if a model file is missing, unreadable or was trained with other options or on
        other texts, or the text does not support the vocabulary size.
    """
    if config.kind == "bytes":
        return BytesTokenizer()
    if config.model_file is not None:
        return load_sentencepiece(as_path("data.tokenizer.model_file", config.model_file))
    description_path = path.with_suffix(".json")
    description = {f"data.tokenizer.{name}": getattr(config, name) for name in TRAINING_OPTIONS}
    description |= trained_on
    if not path.exists():
        model = train_sentencepiece(config, training_texts)
        # The description first: a model without one can then not come from a crash in between.
        digest = hashlib.sha256(model).hexdigest()
        write_json(description_path, description | {MODEL_DIGEST: digest})
        write_atomically(path, model)
        logging.info("Trained a tokenizer of %d pieces: %s", config.vocab_size, path)
    tokenizer = load_sentencepiece(path)
    _check_description(description | {MODEL_DIGEST: tokenizer.digest()}, description_path, path)
    return tokenizer


def _check_description(
    current: Mapping[str, typing.Any], description_path: AnyPath, path: AnyPath
) -> None:
    """Checks that the stored model is the one that this run would train."""
    fix = f"use another workdir, or delete {path} to have it trained again."
    try:
        saved = json.loads(description_path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: there is no readable {description_path.name} next to it, which says what it "
            f"was trained on ({type(error).__name__}). To go on, {fix}"
        ) from error
    if not isinstance(saved, dict):
        raise UserError(f"{description_path}: not a description of a tokenizer. To go on, {fix}")
    lines = [
        f"  {name}: then {saved.get(name, '(not there)')!r}, now "
        f"{current.get(name, '(not there)')!r}"
        for name in sorted(saved.keys() | current.keys())
        if saved.get(name, "(not there)") != current.get(name, "(not there)")
    ]
    if lines:
        raise UserError(
            f"{path} is of an earlier run and was trained with other options or on other "
            "texts:\n" + "\n".join(lines) + f"\nGive back what it was trained with, {fix}"
        )


def load_sentencepiece(path: AnyPath) -> SentencePieceTokenizer:
    """The tokenizer stored in a .model file.

    Raises:
      UserError: if the file is missing or no usable model.
    """
    try:
        model = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: cannot read the SentencePiece model ({error.strerror or error}). Correct "
            "data.tokenizer.model_file, or leave it None to have one trained."
        ) from error
    return SentencePieceTokenizer(model, str(path))


# ------------------------------------------------------------------------------
# Training of a SentencePiece model that loses nothing of the text.

# SentencePiece drops training sentences longer than its max_sentence_length without an error, so
# lines are cut to this many characters, and the limit is set above what they take in bytes.
MAX_LINE_CHARACTERS = 4096
NO_LOG_BELOW_ERRORS = 2


def train_sentencepiece(config: TokenizerConfig, texts: Iterable[str]) -> bytes:
    """The model file, the same bytes for the same texts and options.

    Ids: padding 0, start 1, end 2, unknown 3 (never used, as bytes are the fallback), 256 bytes,
    then the learned pieces. Text is not normalised, and no space is added before it.

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
