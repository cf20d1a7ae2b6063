"""Continues prompts of text, images and sound with text, images and sound.

    generator = MediaGenerator(model, params, tokenizer, GenerationConfig(), trained_depth=4)
    prompt = MediaPrompt(("a handwritten three",), opens="<|IMAGE|>")
    image = generator.generate([prompt])[0].images[0]

Text is decoded with a cache, as `Generator` does, until a row draws an opening token. Rows that did
wait until none writes text any more; then all get their media at once, which are read back into the
cache with their closing tokens, and the rows go on.

What a medium is made from (its condition) comes from a pass over the whole row without a cache: it
is what training computed, at the fixed depth of the request even if tokens of text exit early. That
costs as much as reading the row again, once per medium, which is cheap compared with a sampler's
steps.

A row's draws depend on the seed, its prompt's number and its sample's: not on other rows.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from megatransformer_jax.config.generation import GenerationConfig, for_model
from megatransformer_jax.config.option import UserError
from megatransformer_jax.data.media.records import MediaFormats
from megatransformer_jax.data.media_tokenizer import MediaTokenizer
from megatransformer_jax.generation.decode_loop import DecodeSettings, DecodeState, decode
from megatransformer_jax.generation.endings import (
    END_OF_TEXT,
    FINISH_REASONS,
    RUNNING,
    Ending,
    piece_table,
    stop_strings,
)
from megatransformer_jax.generation.generator import check_depth, depth_rule
from megatransformer_jax.generation.history import history_of_prompts
from megatransformer_jax.generation.media_making import MediaMaker, begin, enter_prompts, read_media
from megatransformer_jax.generation.media_prompt import (
    EncodedPrompt,
    MediaCompletion,
    MediaPlan,
    MediaPrompt,
    MediaRow,
    encode_media_prompt,
    follows_of,
    media_batch,
    parts_of_ids,
    plan_media,
)
from megatransformer_jax.generation.placement import (
    empty_cache,
    fetch,
    for_rows,
    put_rows,
    replicate,
)
from megatransformer_jax.generation.prefill import prefill
from megatransformer_jax.generation.processors.build import build_chain
from megatransformer_jax.generation.processors.processor import AllowedTokens, Chain
from megatransformer_jax.generation.request import prompt_keys, sample_keys
from megatransformer_jax.models.megatransformer import MegaTransformer
from megatransformer_jax.types import AUDIO, IMAGE


@dataclasses.dataclass
class _Rows:
    """A batch of texts while it is generated, as the host knows it."""

    prompts: list[EncodedPrompt]
    media: list[MediaRow]
    plan: MediaPlan
    keys: jax.Array
    tokens: np.ndarray
    lengths: np.ndarray
    reasons: np.ndarray


class MediaGenerator:
    """Continues prompts with one model and one setting.

    Args:
      model: with parts for images or sound; on a mesh every process must make the same calls.
      params: its parameters, laid out as the model's sharder says.
      tokenizer: between text and ids.
      config: how; its `max_new_tokens` counts the tokens around media too.
      trained_depth: mean iterations in training, used if `config.depth.depth` is None. None: the
        model has no core.

    Raises:
      UserError: if the configuration does not fit the model.
    """

    def __init__(
        self,
        model: MegaTransformer,
        params: Any,
        tokenizer: MediaTokenizer,
        config: GenerationConfig,
        trained_depth: int | None,
    ):
        check_depth(model, trained_depth)
        if not model.config.has_media:
            raise UserError("the model has no parts for images or sound; use Generator.")
        self._model = model
        self._params = params
        self._tokenizer = tokenizer
        self._formats = MediaFormats.of_model(model.config)
        has_exit_gate = model.config.exit_gate.enabled
        self._config = for_model(
            config, trained_depth, has_exit_gate=has_exit_gate, makes_media=True
        )
        self._trained_depth = trained_depth
        self._maker = MediaMaker(model, params, tokenizer, self._config)
        # Markers are allowed row by row, see `_allowed`.
        self._chain = build_chain(self._config, tokenizer, model.config.vocab_size)
        self._rule = replicate(model.sharder, depth_rule(self._config))
        self._ending = replicate(model.sharder, self._make_ending())

    def generate(self, prompts: Sequence[MediaPrompt]) -> list[MediaCompletion]:
        """`num_samples` completions per prompt, in the order of the prompts.

        Args:
          prompts: at least one.

        Raises:
          UserError: if there is no prompt, or one has media that do not fit the model, or is too
            long with what is to be made.
        """
        if not prompts:
            raise UserError("there is no prompt to continue; give at least one.")
        encoded = [
            encode_media_prompt(prompt, self._tokenizer, self._formats) for prompt in prompts
        ]
        count = self._config.num_samples
        size = len(prompts)
        if self._config.batch_size is not None:
            size = min(size, max(1, self._config.batch_size // count))
        completions: list[MediaCompletion] = []
        for first in range(0, len(prompts), size):
            numbers = list(range(first, min(first + size, len(prompts))))
            # A batch that is not full is filled up, so that it compiles nothing.
            filled = numbers + numbers[:1] * (size - len(numbers))
            rows, scores = self._generate_rows([encoded[number] for number in filled], filled)
            for row in range(len(numbers) * count):
                prompt = prompts[numbers[row // count]]
                completions.append(self._completion(prompt, rows, scores, row))
        return completions

    def _generate_rows(
        self, prompts: Sequence[EncodedPrompt], numbers: Sequence[int]
    ) -> tuple[_Rows, np.ndarray]:
        config = self._config
        rows, state, settings = self._begin(prompts, numbers)
        model = for_rows(self._model, len(rows.prompts))
        max_tokens = replicate(model.sharder, jnp.int32(config.max_new_tokens))
        while True:
            if np.any(rows.reasons == RUNNING):
                settings = dataclasses.replace(settings, chain=self._row_chain(model, rows))
                state = decode(model, self._params, settings, state, max_tokens)
                self._look(rows, state, model)
            opened = self._opened(rows)
            if not opened.any():
                break
            state = self._make_media(model, rows, opened, state, settings)
            self._look(rows, state, model)
        return rows, fetch(model.sharder, state.scores)

    def _begin(
        self, prompts: Sequence[EncodedPrompt], numbers: Sequence[int]
    ) -> tuple[_Rows, DecodeState, DecodeSettings]:
        """Reads all tokens of the prompts but the last; the first step of decoding takes that."""
        config = self._config
        prompts = [prompt for prompt in prompts for _ in range(config.num_samples)]
        plan = plan_media(self._model, config, self._trained_depth, prompts)
        keys = sample_keys(prompt_keys(config.seed, numbers), config.num_samples)
        model = for_rows(self._model, len(prompts))
        sharder = model.sharder
        keys = put_rows(sharder, keys)
        ids = [prompt.ids for prompt in prompts]
        history = put_rows(sharder, history_of_prompts(ids, plan.num_tokens, pad_id=0))
        tokens, lengths = (
            np.asarray(fetch(sharder, history.tokens)),
            np.asarray(list(map(len, ids))),
        )
        media = [
            MediaRow(list(prompt.images), list(prompt.mels), (len(prompt.images), len(prompt.mels)))
            for prompt in prompts
        ]
        reasons = [END_OF_TEXT if self._tokenizer.medium_after(row[-1]) else RUNNING for row in ids]
        rows = _Rows(prompts, media, plan, keys, tokens, lengths, np.asarray(reasons, np.int32))
        prefilled = self._prefill(model, rows)
        settings = DecodeSettings(
            self._rule,
            self._row_chain(model, rows),
            self._ending,
            keys,
            is_drawn=not config.is_deterministic,
            warm_start=config.depth.warm_start,
            sharder=sharder,
        )
        state = begin(settings, prefilled, history, put_rows(sharder, rows.reasons))
        return rows, state, settings

    def _prefill(self, model: MegaTransformer, rows: _Rows) -> Any:
        plan, sharder, cache = rows.plan, model.sharder, self._config.cache
        width = plan.num_prompt_tokens
        tokens, lengths = rows.tokens[:, :width], (rows.lengths - 1).astype(np.int32)
        media = media_batch(
            model.config,
            follows_of(tokens, lengths, self._tokenizer),
            [row.images for row in rows.media],
            [row.mels for row in rows.media],
            plan.prompt_slots,
        )
        tokens, lengths, media = put_rows(sharder, (tokens, lengths, media))
        prompts: Any = enter_prompts(
            model, self._params, tokens, lengths, media, num_columns=plan.cache.num_columns
        )
        shape = plan.cache.shape(model, cache, len(rows.prompts), with_media=True)
        empty = empty_cache(sharder, model.config, shape)
        prompts = prompts.replace(state_keys=rows.keys)
        return prefill(model, self._params, prompts, empty, self._rule, chunk=cache.prefill_chunk)

    def _make_media(
        self,
        model: MegaTransformer,
        rows: _Rows,
        opened: np.ndarray,
        state: DecodeState,
        settings: DecodeSettings,
    ) -> DecodeState:
        """Gives each row at an opening token its medium, closes it and lets it go on."""
        made = self._maker.make(
            model, rows.tokens, rows.lengths, rows.media, opened, rows.plan.slots, rows.keys
        )
        images: list[list[np.ndarray]] = [[] for _ in rows.media]
        mels: list[list[np.ndarray]] = [[] for _ in rows.media]
        for row, medium in made.items():
            is_image = opened[row] == IMAGE
            (images if is_image else mels)[row].append(medium)
            (rows.media[row].images if is_image else rows.media[row].mels).append(medium)
        media = media_batch(model.config, opened[:, None], images, mels, (1, 1))
        last = rows.tokens[np.arange(len(rows.lengths)), rows.lengths - 1]
        closing = np.where(opened > 0, last + 1, 0).astype(np.int32)
        media, closing = put_rows(model.sharder, (media, closing))
        return read_media(model, self._params, settings, state, media, closing)

    def _opened(self, rows: _Rows) -> np.ndarray:
        """Kind of the medium that each row waits for, int32 [B]; 0 for none."""
        last = rows.tokens[np.arange(len(rows.lengths)), rows.lengths - 1]
        kinds = np.asarray([self._tokenizer.medium_after(token) for token in last], np.int32)
        return np.where(rows.reasons == END_OF_TEXT, kinds, 0)

    def _look(self, rows: _Rows, state: DecodeState, model: MegaTransformer) -> None:
        arrays = (state.history.tokens, state.history.lengths, state.end.reason)
        rows.tokens, rows.lengths, rows.reasons = fetch(model.sharder, arrays)

    def _row_chain(self, model: MegaTransformer, rows: _Rows) -> Chain:
        allowed = put_rows(model.sharder, self._allowed(rows))
        return tuple(
            AllowedTokens(allowed) if isinstance(processor, AllowedTokens) else processor
            for processor in self._chain
        )

    def _allowed(self, rows: _Rows) -> np.ndarray:
        """Text, and opening tokens of what the model makes, as long as a row may have more media.

        bool [B, V]. Closing tokens are never chosen: they follow media by themselves.
        """
        own = next(p for p in self._chain if isinstance(p, AllowedTokens)).is_allowed
        allowed = np.tile(np.asarray(own), (len(rows.media), 1))
        for row, media in enumerate(rows.media):
            if media.num_made < self._config.media.max_media:
                allowed[row, list(self._openings())] = True
        return allowed

    def _openings(self) -> list[int]:
        kinds = {IMAGE: self._formats.image.enabled, AUDIO: self._formats.audio.enabled}
        tokenizer = self._tokenizer
        return [token for token in tokenizer.opening_ids if kinds[tokenizer.medium_after(token)]]

    def _make_ending(self) -> Ending:
        config, tokenizer = self._config, self._tokenizer
        stops = None
        if config.stop:
            table = piece_table(tokenizer, self._model.config.vocab_size)
            stops = stop_strings(config.stop, table)
        end_ids = jnp.asarray([tokenizer.eos_id, *self._openings()], jnp.int32)
        return Ending(end_ids, jnp.int32(config.max_new_tokens), stops)

    def _completion(
        self, prompt: MediaPrompt, rows: _Rows, scores: np.ndarray, row: int
    ) -> MediaCompletion:
        ids = rows.prompts[row].ids
        new = rows.tokens[row, len(ids) : rows.lengths[row]].tolist()
        if rows.reasons[row] == END_OF_TEXT:
            new = new[:-1]
        media = rows.media[row]
        num_images, num_mels = media.num_given
        parts = parts_of_ids(
            self._tokenizer,
            ids,
            new,
            media.images[num_images:],
            media.mels[num_mels:],
            self._config.stop,
        )
        reason = FINISH_REASONS[rows.reasons[row]]
        return MediaCompletion(prompt, parts, tuple(new), float(scores[row]), reason)
