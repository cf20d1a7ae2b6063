"""A request on the host: prompts to ids, size of the cache, keys of rows, and what comes back."""

import contextlib
import dataclasses
import functools
import html
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from megatransformer_jax.config.generation import GenerationConfig
from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.config.sampling import CacheConfig, check_encodable
from megatransformer_jax.data.hf_tokenizer import HuggingFaceTokenizer
from megatransformer_jax.data.media_tokenizer import MediaTokenizer
from megatransformer_jax.data.tokenizer import Tokenizer
from megatransformer_jax.generation.endings import cut_at_stop, num_held_back
from megatransformer_jax.models.megatransformer import MegaTransformer
from megatransformer_jax.nn.kv_cache import CacheShape, rows_to_blocks
from megatransformer_jax.types import NO_MEDIUM

# ------------------------------------------------------------------------------
# Prompts.

# Ids may be in a list, a tuple or an array.
Prompt = str | Sequence[int] | np.ndarray | jax.Array


class PromptTooLong(UserError):
    """A prompt that leaves no room in the model for the new tokens."""


def encode_prompts(
    prompts: Sequence[Any] | np.ndarray, tokenizer: Tokenizer | None, vocab_size: int
) -> list[list[int]]:
    """The ids of each prompt.

    A text gets the start token in front, unless it spells it itself, as chat formats do, or the
    tokenizer's files say that the model reads texts without it. Ids are taken as they are.

    Args:
      prompts: texts or ids (see `Prompt`; anything else is refused); ids may also be the rows of
        one array.
      tokenizer: of the model. None: all prompts must be ids.
      vocab_size: of the model.

    Raises:
      UserError: if there is no prompt, or one is empty or has something that is not an id.
    """
    if isinstance(prompts, str):
        raise UserError(f"prompts are a list of texts, not the text {prompts!r}; put it in a list.")
    if not len(prompts):
        raise UserError("there is no prompt to continue; give at least one.")
    return [_encode(prompt, tokenizer, vocab_size) for prompt in prompts]


def _encode(prompt: Any, tokenizer: Tokenizer | None, vocab_size: int) -> list[int]:
    if not hasattr(prompt, "__len__"):
        raise UserError(f"a prompt is a text or a sequence of token ids, not {prompt!r}.")
    if not len(prompt):
        raise UserError("the prompt is empty; give it text, or token ids such as the start's.")
    if isinstance(prompt, str):
        if tokenizer is None:
            raise UserError("this model has no tokenizer; give prompts as token ids.")
        check_encodable("prompt", (prompt,))
        ids = tokenizer.encode(prompt)
        if ids and isinstance(tokenizer, HuggingFaceTokenizer) and not tokenizer.begins_texts:
            return ids
        return ids if ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *ids]
    try:
        array = np.asarray(prompt)
    except ValueError:  # Lists of several lengths.
        array = np.asarray(None)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise UserError(f"prompt ids must be whole numbers, one after the other, not {prompt!r}.")
    # A model may have more rows than its tokenizer has ids; nothing has been learned for them.
    size = vocab_size if tokenizer is None else min(vocab_size, tokenizer.vocab_size)
    wrong = array[(array < 0) | (array >= size)]
    if wrong.size:
        raise UserError(f"prompt ids must be in 0 .. {size - 1}, not {wrong[0]}.")
    return [int(token) for token in array]


# ------------------------------------------------------------------------------
# How large a cache a request needs; sizes are rounded so that most requests compile nothing.

# A full cache has a multiple of this many slots per core layer.
SLOT_MULTIPLE = 8
# Prompts are padded to a power of two from here on, and above MAX_DOUBLED to a multiple of it.
MIN_COLUMNS = 16
MAX_DOUBLED = 256


@dataclasses.dataclass(frozen=True)
class CachePlan:
    """Static sizes of one request.

    Attributes:
      num_columns: what prompts are padded to.
      capacity: rows of the cache, and tokens of a history.
      num_slots: slots of each core layer.
    """

    num_columns: int
    capacity: int
    num_slots: int

    def shape(
        self,
        model: MegaTransformer,
        config: CacheConfig,
        batch_size: int,
        *,
        with_media: bool = False,
    ) -> CacheShape:
        """The cache of so many rows; `config` is the request's."""
        return CacheShape(
            batch_size,
            self.capacity,
            self.num_slots,
            model.policy.compute,
            model.platform,
            config.sharing,
            config.exited_reads,
            with_media,
            model.sharder.num_heads(model.config.attention.kv_heads),
        )


def plan_cache(
    model: ModelConfig,
    config: GenerationConfig,
    trained_depth: int | None,
    longest_prompt: int,
    new_rows: int,
    platform: str,
) -> CachePlan:
    """The sizes for prompts of up to `longest_prompt` tokens.

    Args:
      model: the model.
      config: of the generation; its depth is a number.
      trained_depth: mean iterations in training.
      longest_prompt: tokens, the start token included.
      new_rows: rows that the new tokens may take: max_new_tokens, or more if some are rejected.
      platform: of the devices.

    Raises:
      PromptTooLong: if prompt and new tokens exceed the model.
      ConfigError: if they exceed the cache that was asked for.
    """
    _check_length(model, config, longest_prompt)
    columns, rows = round_columns(longest_prompt), config.cache.capacity
    if rows is None:
        rows = columns + new_rows
    elif longest_prompt + new_rows > rows:
        raise ConfigError(
            "cache.capacity",
            f"{rows} is less than the {longest_prompt} tokens of the longest prompt and {new_rows} "
            f"rows for new ones; raise it to {longest_prompt + new_rows}, or lower max_new_tokens.",
        )
    capacity = rows_to_blocks(rows, platform)
    columns = min(columns, capacity - new_rows)
    return CachePlan(columns, capacity, _num_slots(config, trained_depth))


def _num_slots(config: GenerationConfig, trained_depth: int | None) -> int:
    if config.cache.slots is not None:
        return config.cache.slots
    deepest = max(config.depth.depth or 1, trained_depth or 1)
    return -(-deepest // SLOT_MULTIPLE) * SLOT_MULTIPLE


def round_columns(longest: int) -> int:
    """What prompts of up to `longest` tokens are padded to."""
    if longest > MAX_DOUBLED:
        return -(-longest // MAX_DOUBLED) * MAX_DOUBLED
    return max(MIN_COLUMNS, 1 << (longest - 1).bit_length())


def _check_length(model: ModelConfig, config: GenerationConfig, longest_prompt: int) -> None:
    total = longest_prompt + config.max_new_tokens
    if total > model.max_length:
        raise PromptTooLong(
            f"the longest prompt has {longest_prompt} tokens (the start token included); with "
            f"max_new_tokens={config.max_new_tokens} that is more than the model's "
            f"max_length={model.max_length}. Shorten it or lower max_new_tokens."
        )


# ------------------------------------------------------------------------------
# Keys of draws: every text has its own, whatever else is generated in the same batch.


def prompt_keys(seed: int, numbers: Sequence[int]) -> Key[Array, "B"]:
    """A key per prompt; which batch it is in does not matter."""
    return _prompt_keys(np.uint32(seed), np.asarray(numbers, np.int32))


@jax.jit
def _prompt_keys(seed: jax.Array, numbers: jax.Array) -> jax.Array:
    # One program: operation by operation there would be seven to compile, and so below.
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    return fold(jax.random.key(seed), numbers)


@functools.partial(jax.jit, static_argnums=1)
def sample_keys(prompt_keys: Key[Array, "B"], count: int) -> Key[Array, "B2"]:
    """A key per text. The first text of a prompt has the same whatever `num_samples` is."""
    split = jax.vmap(lambda key: jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count)))
    return split(prompt_keys).reshape(-1)


# ------------------------------------------------------------------------------
# What generation gives back: finished texts with their media, and tokens as they come.

# What decoders write for bytes that are not a character (yet).
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
# Tokens that a stream decodes again with every new one: as many before them, and at most so many
# (but for a character that does not end) that have come since.
_MAX_DECODED_AGAIN = 16


@dataclasses.dataclass(frozen=True)
class GeneratedImage:
    """float32 [height, width, C] in [-1, 1]."""

    pixels: np.ndarray


@dataclasses.dataclass(frozen=True)
class GeneratedClip:
    """A normalised mel spectrogram, float32 [frames, M]. `is_voice` if it was asked for as speech.

    Vocoders and `griffin_lim` make a waveform of it.
    """

    mel: np.ndarray
    is_voice: bool


GeneratedMedium = GeneratedImage | GeneratedClip
GeneratedPart = str | GeneratedMedium


@dataclasses.dataclass(frozen=True)
class Completion:
    """A finished continuation.

    Attributes:
      prompt: what it continues; None if that was given as ids.
      parts: texts, images and clips, in the order in which they were made; no text is empty. There
        is no text without a tokenizer.
      token_ids: the new tokens, without an end token; those of a stop text and those around media
        included. A prompt's own opening token is not among them.
      depths: iterations of the core that led to each of them; 0 for a model without a core, and for
        tokens that close media.
      score: sum of the log-probabilities of all new tokens under the model, the end token's
        included, those that close media left out; of beam search its penalised score.
      finish_reason: 'end_of_text', 'stop', 'length', or 'exhausted' if every token was banned.

    Examples:
      >>> completion = lm.generate("The ", strategy="greedy", max_new_tokens=4, depth=6)
      >>> completion.depths, completion.finish_reason
      ((6, 6, 6, 6), 'length')
    """

    prompt: Any
    parts: tuple[GeneratedPart, ...]
    token_ids: tuple[int, ...]
    depths: tuple[int, ...]
    score: float
    finish_reason: str

    @property
    def text(self) -> str:
        """Its texts, joined, without a stop text."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def media(self) -> list[GeneratedMedium]:
        """Its images and clips, in order."""
        return [part for part in self.parts if not isinstance(part, str)]

    @property
    def images(self) -> list[np.ndarray]:
        """Its images, see `GeneratedImage`."""
        return [part.pixels for part in self.parts if isinstance(part, GeneratedImage)]

    @property
    def mels(self) -> list[np.ndarray]:
        """Its clips, see `GeneratedClip`."""
        return [part.mel for part in self.parts if isinstance(part, GeneratedClip)]

    def _repr_html_(self) -> str:
        mean = sum(self.depths) / max(len(self.depths), 1)
        notes = f"{len(self.token_ids)} tokens, mean depth {mean:.1f}, {self.finish_reason}"
        before = "" if self.prompt is None else str(self.prompt)
        prompt = f"<span style='opacity:0.6'>{html.escape(before)}</span>"
        text = f"<span style='white-space:pre-wrap'>{prompt}{html.escape(self.text)}</span>"
        return f"<div>{text}<br><small>{notes}</small></div>"


@dataclasses.dataclass(frozen=True)
class StreamedToken:
    """A token as it comes.

    Attributes:
      text: what it adds to the text; empty while a character, or what may become a stop text, is
        not complete. The last token before a medium or the end brings all that was held back.
      token_id: its id.
      depth: iterations of the core that led to it; 0 for a model without a core, and for a token
        that closes a medium.
      medium: what was made, with the token that closes it; None with all others.
    """

    text: str
    token_id: int
    depth: int
    medium: GeneratedMedium | None = None

    def __str__(self) -> str:
        return self.text


def continuation_text(
    tokenizer: Tokenizer, prompt_ids: Sequence[int], new_ids: Sequence[int]
) -> str:
    """Text of the new tokens behind the prompt's.

    Decoded together, since a token's text can depend on the one before: SentencePiece drops a space
    at the start.
    """
    prompt = [token for token in prompt_ids if token != tokenizer.bos_id]
    before = tokenizer.decode(prompt)
    after = tokenizer.decode([*prompt, *new_ids])
    # A prompt whose last character was not complete has none to compare with.
    return after[len(before) :] if after.startswith(before) else tokenizer.decode(new_ids)


class TextStream:
    """Turns tokens into text piece by piece.

    Text right behind the prompt's own continues it, text behind a medium starts a new one. A token
    costs the same wherever it stands, as only those close before it are decoded with it.

    Args:
      tokenizer: of the model.
      prompt_ids: what is continued.
      stops: stop texts, which are never shown.

    Attributes:
      holds_back: whether text of the tokens so far waits for the next one.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stops: Sequence[str]):
        self.holds_back = False
        self._markers = tokenizer if isinstance(tokenizer, MediaTokenizer) else None
        self._tokenizer = tokenizer if self._markers is None else self._markers.base
        self._stops = stops
        self._before: list[int] = []
        self._new_ids: list[int] = []
        self._held_back = ""
        self._num_shown = 0
        for token in prompt_ids:
            if self.is_marker(token):
                self._before.clear()
            else:
                self._before.append(int(token))
        self._before = self._last_of(self._before)

    def is_marker(self, token: int) -> bool:
        """Whether the token stands around a medium, so is not text."""
        return self._markers is not None and self._markers.marker_of(token) is not None

    def is_opening(self, token: int) -> bool:
        """Whether a medium follows the token."""
        return self._markers is not None and self._markers.medium_after(token) != NO_MEDIUM

    def add(self, token: int, is_last: bool) -> str:
        """What can be shown once this token has come; all that is left if it is the last, or not
        text."""
        if self.is_marker(token):
            return self.end_text()
        self.take(token)
        return self._rest(is_last)

    def take(self, token: int) -> None:
        """Adds a token of text and shows nothing yet."""
        self._new_ids.append(int(token))

    def end_text(self) -> str:
        """All that is left; what comes now is another text."""
        piece = self._rest(is_last=True)
        self._before, self._new_ids = [], []
        self._held_back, self._num_shown = "", 0
        self.holds_back = False
        return piece

    def _rest(self, is_last: bool) -> str:
        if not self._new_ids:
            return self._held_back[self._num_shown :] if is_last else ""
        text = continuation_text(self._tokenizer, self._before, self._new_ids)
        is_complete = not text.endswith(_INCOMPLETE)
        text = whole = self._held_back + text
        text = cut_at_stop(text, self._stops)
        is_stopped, length = text != whole, len(text)
        if not is_last:
            text = text.rstrip(_INCOMPLETE)
            text = text[: len(text) - num_held_back(text, self._stops)]
        piece = text[self._num_shown :]
        self._num_shown += len(piece)
        self.holds_back = self._num_shown < length
        if is_complete and not is_stopped and len(self._new_ids) >= _MAX_DECODED_AGAIN:
            self._settle(whole)
        return piece

    def _settle(self, text: str) -> None:
        """Decodes no token of this text again, except for a few before the next ones."""
        self._before = self._last_of(self._before + self._new_ids)
        self._new_ids = []
        # No stop begins in what was shown, else it would have been held back.
        self._held_back, self._num_shown = text[self._num_shown :], 0

    def _last_of(self, ids: list[int]) -> list[int]:
        """Tokens at the end that the text of the next ones can depend on.

        That is whether a text begins there, so they have text of their own, and a character that
        is not complete, which has at most four bytes.
        """
        num_tokens = _MAX_DECODED_AGAIN
        while num_tokens < len(ids) and not self._tokenizer.decode(ids[-num_tokens:]).strip():
            num_tokens *= 2
        return ids[-num_tokens:]


def parts_of_ids(
    tokenizer: Tokenizer | None,
    prompt_ids: Sequence[int],
    new_ids: Sequence[int],
    media: Iterable[GeneratedMedium] = (),
    stops: Sequence[str] = (),
) -> tuple[GeneratedPart, ...]:
    """The parts that new tokens stand for.

    Args:
      tokenizer: of the model. None: there is no text.
      prompt_ids: before them. A medium that they open at their end is the first of the new ones.
      new_ids: without an end token.
      media: that were made, in order.
      stops: texts that end a text, which are not part of it.
    """
    if tokenizer is None:
        return ()
    stream, left = TextStream(tokenizer, prompt_ids, stops), iter(media)
    parts: list[GeneratedPart] = []
    is_open = stream.is_opening(prompt_ids[-1])
    for token in new_ids:
        if not stream.is_marker(token):
            stream.take(token)
            continue
        # A medium stands between its two markers, so before the second.
        parts += [next(left)] if is_open else [stream.end_text()]
        is_open = not is_open
    return tuple(part for part in (*parts, stream.end_text()) if part != "")


# ------------------------------------------------------------------------------
# Memory that a request asks for and does not get.


@contextlib.contextmanager
def out_of_memory_is_bad_input() -> Iterator[None]:
    """Turns exhausted memory into an error of one line that names what takes it.

    Raises:
      UserError: instead of the allocator's error, be it NumPy's or XLA's.
    """
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = (str(error) or "out of memory").splitlines()[0].rstrip(".")
        raise UserError(
            f"there is not enough memory: {reason}; lower batch_size, num_samples, num_beams, "
            "max_new_tokens, depth or cache_capacity, or set cache_slots."
        ) from error
