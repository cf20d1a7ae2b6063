"""Hugging Face's tokenizer.json, as it lies next to published weights such as Huginn's or Llama's.

Needs the `tokenizers` library (extra 'hub').
"""

import dataclasses
import functools
import hashlib
import json
import re
import typing
from collections.abc import Iterator, Mapping, Sequence

from megatransformer_jax.config.build import read_text, read_values
from megatransformer_jax.config.option import UserError
from megatransformer_jax.data.chat_template import (
    TEMPLATE_FILE,
    ChatTemplate,
    Message,
    read_chat_template,
)
from megatransformer_jax.extras import import_extra
from megatransformer_jax.storage import AnyPath, write_atomically, write_json

TOKENIZER_FILE = "tokenizer.json"

# Where the special tokens are named, in the order in which they are looked for: as text in the
# first two, as ids in the others. A folder may have any of them.
TOKEN_FILES = ("tokenizer_config.json", "special_tokens_map.json")
ID_FILES = ("generation_config.json", "config.json")
# Tokens by name that chat templates may write.
_NAMED_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_SENTENCEPIECE_BLANK = "\u2581"


@dataclasses.dataclass(frozen=True)
class HuggingFaceTokenizer:
    """A tokenizer of the `tokenizers` library, given as the text of its tokenizer.json.

    Special tokens that are written out in a text ('<|begin_header|>') are recognised, as chat
    formats need it; none is added. `decode` gives the text of the pieces as it is: the cleaning of
    spaces before punctuation that some tokenizer_config.json ask for is not made.

    Attributes:
      definition: the text of tokenizer.json.
      bos_id: stands before a text.
      eos_id: stands after a text.
      pad_id: fills rows.
      end_ids: all ids that end a text, `eos_id` first; chat models have one for a turn as well.
      name: for messages only.
      chat: the templates that write messages as a prompt. None: there are none.
      begins_texts: whether a prompt gets `bos_id` in front. Some models read texts without it,
        as tokenizer_config.json says with "add_bos_token": false.

    Raises:
      UserError: if the text is not a tokenizer, or the library is not installed.
    """

    definition: str = dataclasses.field(repr=False)
    bos_id: int
    eos_id: int
    pad_id: int
    end_ids: tuple[int, ...]
    name: str = TOKENIZER_FILE
    chat: ChatTemplate | None = None
    begins_texts: bool = True

    def __post_init__(self) -> None:
        self._check_ids()

    def __reduce__(self) -> tuple[typing.Any, ...]:
        fields = [getattr(self, field.name) for field in dataclasses.fields(self)]
        return HuggingFaceTokenizer, tuple(fields)

    @functools.cached_property
    def _tokenizer(self) -> typing.Any:
        return _parse(self.definition, self.name)

    @functools.cached_property
    def _added_tokens(self) -> dict[int, typing.Any]:
        return self._tokenizer.get_added_tokens_decoder()

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str) -> list[int]:
        """Ids of the text; special tokens only where the text spells them."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; special tokens are left out."""
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        **options: typing.Any,
    ) -> str:
        """Messages as the text that the model was trained on; `encode` makes ids of it.

        Args:
          messages: {"role": "user", "content": "..."} one after the other.
          add_generation_prompt: ends with what opens an answer.
          **options: of `ChatTemplate.render`: tools, documents, template, and what the template
            reads besides.

        Raises:
          UserError: if the tokenizer has no chat template, or as `ChatTemplate.render`.
        """
        return require_chat_template(self).render(
            messages, add_generation_prompt=add_generation_prompt, **options
        )

    def files(self) -> dict[str, str]:
        """Files of a folder by name: tokenizer.json, and if there is something to say in them
        tokenizer_config.json and chat_template.jinja. Special ids are not in them.
        """
        described: dict[str, typing.Any] = {} if self.begins_texts else {"add_bos_token": False}
        files = {TOKENIZER_FILE: self.definition}
        if self.chat is not None:
            files |= self.chat.files()
            described |= self.chat.special_tokens
        if described:
            described |= json.loads(files.get(TOKEN_FILES[0], "{}"))
            files[TOKEN_FILES[0]] = json.dumps(described, indent=2) + "\n"
        return files

    def save(self, folder: AnyPath) -> None:
        """Writes its files, and special ids as generation_config.json, into a folder."""
        for name, text in self.files().items():
            write_atomically(folder / name, text)
        ids = {
            "bos_token_id": self.bos_id,
            "eos_token_id": list(self.end_ids),
            "pad_token_id": self.pad_id,
        }
        write_json(folder / ID_FILES[0], ids)

    def digest(self) -> str:
        """SHA-256 of the definition and the special ids."""
        ids = (self.bos_id, self.eos_id, self.pad_id, self.end_ids)
        return hashlib.sha256(f"{self.definition}{ids}".encode()).hexdigest()

    def piece_bytes(self, token: int) -> bytes:
        """What a token adds to the text, in UTF-8; a piece may be a part of a character.

        Special tokens and ids without a piece add nothing.

        Raises:
          UserError: if the tokenizer's decoder is neither byte-level nor like SentencePiece's.
        """
        added = self._added_tokens.get(int(token))
        if added is not None:
            return b"" if added.special else added.content.encode()
        piece = self._tokenizer.id_to_token(int(token))
        if piece is None:
            return b""
        if self._decoder_kind == "bytes":
            return bytes(_byte_of_character()[character] for character in piece)
        if byte := _BYTE_PIECE.fullmatch(piece):
            return bytes([int(byte[1], 16)])
        return piece.replace(_SENTENCEPIECE_BLANK, " ").encode()

    @functools.cached_property
    def _decoder_kind(self) -> str:
        kinds = set(_decoder_types(json.loads(self.definition).get("decoder")))
        if "ByteLevel" in kinds:
            return "bytes"
        if kinds & {"Metaspace", "ByteFallback"}:
            return "sentencepiece"
        raise UserError(
            f"{self.name}: the bytes of single tokens, which stop strings need, are unknown for "
            f"the decoder {', '.join(sorted(kinds)) or 'none'}; known: ByteLevel, Metaspace, "
            "ByteFallback. Leave stop strings out."
        )

    def _check_ids(self) -> None:
        for name in ("bos_id", "eos_id", "pad_id"):
            value = getattr(self, name)
            if not 0 <= value < self.vocab_size:
                raise UserError(
                    f"{self.name}: {name} is {value}, but the tokenizer has the ids 0 to "
                    f"{self.vocab_size - 1}; correct it in {' or '.join(ID_FILES)}."
                )


def load_huggingface_tokenizer(folder: AnyPath) -> HuggingFaceTokenizer:
    """The tokenizer of a folder with a tokenizer.json.

    Start, end and padding are those that tokenizer_config.json or special_tokens_map.json name, or
    else generation_config.json or config.json; without padding the end token pads. If the latter
    two have several `eos_token_id`, all of them end a text. Where no start token is named, the end
    token stands between the documents of training, and a prompt gets none in front.

    Raises:
      UserError: if a file is missing or damaged, no end token is named, or the `tokenizers` library
        is not installed.
    """
    path = folder / TOKENIZER_FILE
    definition = read_text(path)
    vocabulary = _parse(definition, str(path)).get_vocab(with_added_tokens=True)
    named = {file: _read(folder / file) for file in (*TOKEN_FILES, *ID_FILES)}
    found = {kind: list(_special_ids(kind, named, vocabulary)) for kind in ("bos", "eos", "pad")}
    if not found["eos"]:
        raise UserError(
            f"{folder}: no file names the eos token; add 'eos_token_id' to "
            "generation_config.json or 'eos_token' to tokenizer_config.json."
        )
    eos = found["eos"][0]
    adds_bos = named[TOKEN_FILES[0]].get("add_bos_token")
    return HuggingFaceTokenizer(
        definition,
        bos_id=found["bos"][0] if found["bos"] else eos,
        eos_id=eos,
        pad_id=found["pad"][0] if found["pad"] else eos,
        end_ids=tuple(dict.fromkeys(found["eos"])),
        name=str(path),
        chat=read_chat_template(folder, _named_tokens(named)),
        begins_texts=bool(found["bos"]) and adds_bos is not False,
    )


def require_chat_template(tokenizer: typing.Any) -> ChatTemplate:
    """The chat templates of a tokenizer.

    Raises:
      UserError: if it has none, or there is no tokenizer.
    """
    if tokenizer is None:
        raise UserError("this model has no tokenizer, so no chat; give prompts as token ids.")
    chat = getattr(tokenizer, "chat", None)
    if chat is None:
        raise UserError(
            "this model's tokenizer has no chat template, so how it was trained to read messages "
            f"is unknown; give the prompt as a text, or put {TEMPLATE_FILE} next to the model's "
            f"{TOKENIZER_FILE}."
        )
    return chat


def _named_tokens(named: Mapping[str, Mapping[str, typing.Any]]) -> dict[str, str]:
    """The texts of special tokens by their names, tokenizer_config.json first."""
    tokens: dict[str, str] = {}
    for kind in _NAMED_TOKENS:
        for file in TOKEN_FILES:
            token = named[file].get(f"{kind}_token")
            token = token.get("content") if isinstance(token, Mapping) else token
            if isinstance(token, str):
                tokens.setdefault(f"{kind}_token", token)
    return tokens


def _parse(definition: str, name: str) -> typing.Any:
    tokenizers = import_extra("tokenizers", "hub", name)
    try:
        return tokenizers.Tokenizer.from_str(definition)
    except Exception as error:  # The library raises no narrower type.
        raise UserError(
            f"{name}: not a tokenizer of the tokenizers library ({error}); get the file again."
        ) from error


def _read(path: AnyPath) -> Mapping[str, typing.Any]:
    return read_values(path) if path.is_file() else {}


def _special_ids(
    kind: str,
    named: Mapping[str, Mapping[str, typing.Any]],
    vocabulary: Mapping[str, int],
) -> Iterator[int]:
    """The ids of a kind of special token, the files in their order."""
    for file in TOKEN_FILES:
        token = named[file].get(f"{kind}_token")
        token = token.get("content") if isinstance(token, Mapping) else token
        if token is None:
            continue
        if token not in vocabulary:
            raise UserError(
                f"{file}: {kind}_token is {token!r}, which {TOKENIZER_FILE} does not have; correct "
                "either."
            )
        yield vocabulary[token]
    for file in ID_FILES:
        value = named[file].get(f"{kind}_token_id")
        for token_id in value if isinstance(value, list) else [value]:
            if token_id is None:
                continue
            if not isinstance(token_id, int):
                raise UserError(f"{file}: {kind}_token_id is {value!r}; it must be whole numbers.")
            yield token_id


def _decoder_types(decoder: typing.Any) -> Iterator[str]:
    if not decoder:
        return
    yield decoder["type"]
    for inner in decoder.get("decoders", ()):
        yield from _decoder_types(inner)


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """The byte that a character of a byte-level piece stands for.

    Printable bytes stand for themselves; the others are the characters from 256 on, in order.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + number): byte for number, byte in enumerate(others)
    }
