"""Text to token ids and back: SentencePiece with byte fallback, or plain bytes.

Both are lossless: `decode(encode(text)) == text`, with one exception: SentencePiece writes a blank
as U+2581, so that character itself comes back as a blank. Special tokens never come out of
`encode`; packing adds them.
"""

import dataclasses
import functools
import hashlib
import os
import pathlib
import tempfile
import typing
from collections.abc import Iterable, Sequence

import sentencepiece
from absl import logging

from megatransformer_jax.config.data import TokenizerConfig
from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.data.sentencepiece_training import train_sentencepiece


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

    def digest(self) -> str:
        """Hexadecimal hash that two tokenizers share only if they are the same."""
        ...


@dataclasses.dataclass(frozen=True)
class BytesTokenizer:
    """UTF-8 bytes after padding (0), start (1) and end (2)."""

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
        """Bytes that are no UTF-8, as a sampler may write, become U+FFFD."""
        return bytes(token - 3 for token in map(int, ids) if token >= 3).decode("utf-8", "replace")

    def digest(self) -> str:
        """The same for all, as there is nothing to choose."""
        return hashlib.sha256(b"bytes after pad, bos, eos").hexdigest()


@dataclasses.dataclass(frozen=True)
class SentencePieceTokenizer:
    """A SentencePiece model, given as the bytes of its .model file.

    Raises:
      UserError: if the bytes are no model, or the model has no start or end token.
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

    def digest(self) -> str:
        """SHA-256 of the model file."""
        return hashlib.sha256(self.model).hexdigest()


def build_tokenizer(
    config: TokenizerConfig,
    training_texts: Iterable[str],
    path: str | os.PathLike,
) -> Tokenizer:
    """The tokenizer of a run.

    A tokenizer that the run trains is stored at `path` and read from there the next time, so that
    a resumed run has the same one. Training is deterministic: processes that do it at the same
    time write the same file, each in one atomic step.

    Args:
      config: which tokenizer.
      training_texts: documents of the training split; read only if one is trained now.
      path: where the trained model is kept, for example `<workdir>/tokenizer.model`.

    Raises:
      UserError: if a model file is missing, unreadable or of another size than configured, or the
        text does not support the vocabulary size.
    """
    if config.kind == "bytes":
        return BytesTokenizer()
    if config.model_file is not None:
        return load_sentencepiece(config.model_file)
    path = pathlib.Path(path)
    if not path.exists():
        model = train_sentencepiece(config, training_texts)
        _write_atomically(path, model)
        logging.info("Trained a tokenizer of %d pieces: %s", config.vocab_size, path)
    tokenizer = load_sentencepiece(path)
    if tokenizer.vocab_size != config.vocab_size:
        raise ConfigError(
            "data.tokenizer.vocab_size",
            f"{config.vocab_size}, but {path} of an earlier run has {tokenizer.vocab_size} pieces; "
            f"set it to {tokenizer.vocab_size}, or use another workdir.",
        )
    return tokenizer


def load_sentencepiece(path: str | os.PathLike) -> SentencePieceTokenizer:
    """The tokenizer stored in a .model file.

    Raises:
      UserError: if the file is missing or no usable model.
    """
    path = pathlib.Path(path)
    try:
        model = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: cannot read the SentencePiece model ({error.strerror}). Correct "
            "data.tokenizer.model_file, or leave it None to have one trained."
        ) from error
    return SentencePieceTokenizer(model, str(path))


def _write_atomically(path: pathlib.Path, content: bytes) -> None:
    """A reader, or a start after a crash, sees the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        pathlib.Path(temporary).unlink(missing_ok=True)
        raise
