"""A tokenizer with the tokens that stand around images and sound."""

import dataclasses
import hashlib
import re
import types
from collections.abc import Mapping, Sequence

from megatransformer_jax.config.option import UserError
from megatransformer_jax.data.tokenizer import Tokenizer
from megatransformer_jax.types import AUDIO, IMAGE, NO_MEDIUM

# In the order of their ids, behind those of the tokenizer within. AUDIO is any sound, VOICE speech.
MARKERS = ("<|AUDIO|>", "<|/AUDIO|>", "<|IMAGE|>", "<|/IMAGE|>", "<|VOICE|>", "<|/VOICE|>")
# What comes right after an opening marker.
MEDIUM_AFTER: Mapping[str, int] = types.MappingProxyType(
    {"<|AUDIO|>": AUDIO, "<|IMAGE|>": IMAGE, "<|VOICE|>": AUDIO}
)
_MARKER = re.compile("(" + "|".join(map(re.escape, MARKERS)) + ")")


@dataclasses.dataclass(frozen=True)
class MediaTokenizer:
    """Any tokenizer, and one id for each of `MARKERS`.

    Plain text that reads like a marker stays text: only `encode_with_media` makes markers of it.

    Examples:
      tokenizer = MediaTokenizer(BytesTokenizer())
      prompt = tokenizer.encode_with_media("a three: <|IMAGE|>")
    """

    base: Tokenizer

    @property
    def vocab_size(self) -> int:
        """Ids of the tokenizer within, and six."""
        return self.base.vocab_size + len(MARKERS)

    @property
    def pad_id(self) -> int:
        """That of the tokenizer within."""
        return self.base.pad_id

    @property
    def bos_id(self) -> int:
        """That of the tokenizer within."""
        return self.base.bos_id

    @property
    def eos_id(self) -> int:
        """That of the tokenizer within."""
        return self.base.eos_id

    def marker_id(self, marker: str) -> int:
        """The id of one of `MARKERS`."""
        return self.base.vocab_size + MARKERS.index(marker)

    def marker_of(self, token: int) -> str | None:
        """The marker that an id stands for, or None."""
        number = int(token) - self.base.vocab_size
        return MARKERS[number] if 0 <= number < len(MARKERS) else None

    def medium_after(self, token: int) -> int:
        """IMAGE or AUDIO for an opening token, NO_MEDIUM for every other."""
        return MEDIUM_AFTER.get(self.marker_of(token) or "", NO_MEDIUM)

    def closing_id(self, token: int) -> int:
        """The closing token that belongs to an opening one.

        Raises:
          ValueError: if `token` is not an opening token.
        """
        if not self.medium_after(token):
            raise ValueError(f"{token} is not an opening token; those are {self.opening_ids}.")
        return token + 1

    @property
    def opening_ids(self) -> tuple[int, ...]:
        """Ids after which a medium comes."""
        return tuple(map(self.marker_id, MEDIUM_AFTER))

    @property
    def closing_ids(self) -> tuple[int, ...]:
        """Ids behind media."""
        return tuple(token + 1 for token in self.opening_ids)

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without markers and other special tokens."""
        return self.base.encode(text)

    def encode_with_media(self, text: str) -> list[int]:
        """Ids of a text in which markers are tokens.

        An opening marker is followed by its closing one, or ends the text: the medium is then to
        be made. `number_of_media` tells how many of each kind the user has to give.

        Raises:
          UserError: for a closing marker without its opening one, or an opening one before text.
        """
        ids: list[int] = []
        opened: str | None = None
        for part in filter(None, _MARKER.split(text)):
            is_marker = part in MARKERS
            if opened is not None and part != _closing(opened):
                raise UserError(
                    f"{text!r}: after {opened} stands {part!r}; write {opened}{_closing(opened)} "
                    f"for a medium that you give, or end the text with {opened} to have one made."
                )
            if opened is None and is_marker and part not in MEDIUM_AFTER:
                raise UserError(
                    f"{text!r}: {part} closes nothing; write {part.replace('/', '')}{part}."
                )
            opened = part if part in MEDIUM_AFTER else None
            ids += [self.marker_id(part)] if is_marker else self.base.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; markers and other special tokens are left out."""
        return self.base.decode([token for token in ids if self.marker_of(token) is None])

    def decode_with_media(self, ids: Sequence[int]) -> str:
        """As `decode`, with the markers written out."""
        text, plain = "", list[int]()
        for token in ids:
            marker = self.marker_of(token)
            if marker is None:
                plain.append(int(token))
                continue
            text += (self.base.decode(plain) if plain else "") + marker
            plain = []
        return text + (self.base.decode(plain) if plain else "")

    def piece_bytes(self, token: int) -> bytes:
        """UTF-8 bytes that the id stands for; none for a special token."""
        return b"" if self.marker_of(token) is not None else self.base.piece_bytes(token)

    def digest(self) -> str:
        """Another one than that of the tokenizer within."""
        words = " ".join((*MARKERS, self.base.digest()))
        return hashlib.sha256(words.encode()).hexdigest()


def _closing(opening: str) -> str:
    return opening.replace("<|", "<|/")
