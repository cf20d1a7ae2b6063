"""Continues prompts of text, images and sound, by any strategy, at once or token by token.

    generator = Generator(model, params, tokenizer, GenerationConfig(), trained_depth=8)
    for completion in generator.generate(["Once upon a time"]):
        print(completion.text)
    prompt = MediaPrompt(("a handwritten three",), opens="<|IMAGE|>")
    image = generator.generate([prompt])[0].images[0]

Another generator with other numbers compiles nothing new; what recompiles is listed in
`decode_loop`. On a mesh texts are cut over the devices, see `placement`.

How media come between the words is told in `media_making`. A row's draws depend on the seed, its
prompt's number and its sample's: not on other rows.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from megatransformer_jax.config.calibration import Calibration
from megatransformer_jax.config.generation import (
    GenerationConfig,
    MediaGenerationConfig,
    for_model,
)
from megatransformer_jax.config.option import MAX_SEED, ConfigError, UserError
from megatransformer_jax.data.media.records import MediaFormats
from megatransformer_jax.data.media_tokenizer import MediaTokenizer
from megatransformer_jax.data.tokenizer import Tokenizer
from megatransformer_jax.generation.continuous.prompts import TextModel, continue_each
from megatransformer_jax.generation.decode_loop import DecodeSettings, DecodeState, start
from megatransformer_jax.generation.endings import (
    END_OF_TEXT,
    FINISH_REASONS,
    RUNNING,
    Ending,
    TextAutomaton,
    end_ids_of,
    piece_table,
    stop_strings,
)
from megatransformer_jax.generation.history import History, history_of_prompts
from megatransformer_jax.generation.media_making import MediaMaker
from megatransformer_jax.generation.media_prompt import (
    EncodedPrompt,
    MediaPlan,
    MediaPrompt,
    MediaRow,
    encode_media_prompt,
    media_tokenizer,
    plan_making,
    plan_media,
)
from megatransformer_jax.generation.placement import (
    constrain_rows,
    empty_cache,
    fetch,
    for_rows,
    put_rows,
    replicate,
)
from megatransformer_jax.generation.prefill import Prefilled, left_padded, prefill, repeat_rows
from megatransformer_jax.generation.processors.build import build_chain
from megatransformer_jax.generation.request import (
    CachePlan,
    Completion,
    GeneratedMedium,
    Prompt,
    StreamedToken,
    encode_prompts,
    parts_of_ids,
    plan_cache,
    prompt_keys,
    sample_keys,
)
from megatransformer_jax.generation.strategies import (
    Decoded,
    add_tokens,
    rows_for_new_tokens,
    search_beams,
)
from megatransformer_jax.generation.streaming import Pace, TokenStream
from megatransformer_jax.models.exit_criteria import DepthRule, exit_criterion
from megatransformer_jax.models.gate_readout import make_readout
from megatransformer_jax.models.megatransformer import MegaTransformer
from megatransformer_jax.nn.kv_cache import check_can_continue, constrain_cache
from megatransformer_jax.sharding.rules import Sharder

# A text, token ids, or a prompt that may hold media.
AnyPrompt = Prompt | MediaPrompt | EncodedPrompt


@dataclasses.dataclass
class _Rows:
    """Texts while they are decoded together.

    Attributes:
      model: laid out for them.
      settings: of all of them.
      state: donated to whatever goes on with it.
      media: of each row.
      plan: None if no row has media or can get any.
    """

    model: MegaTransformer
    settings: DecodeSettings
    state: DecodeState
    media: list[MediaRow]
    plan: MediaPlan | None


class Generator:
    """Continues prompts with one model and one setting.

    Without media in a prompt, and with the default of `config.media`, a model with parts for media
    continues text as every model does and never opens a medium.

    Args:
      model: the model. If it is on a mesh that several processes share, each of them must make the
        same calls.
      params: its parameters, laid out as the model's sharder says.
      tokenizer: between text and ids. None: prompts must be ids, and completions have no text.
      config: how; see `config.generation`. Its `max_new_tokens` counts the tokens around media too.
      trained_depth: mean iterations in training, used if `config.depth.depth` is None. None: the
        model has no core.
      end_ids: tokens that end a text. None: the tokenizer's.
      calibration: what exit_threshold=auto stands for.

    Attributes:
      config: how, with the depth that is used.

    Raises:
      UserError: if the configuration does not fit the model.
    """

    def __init__(
        self,
        model: MegaTransformer,
        params: Any,
        tokenizer: Tokenizer | None,
        config: GenerationConfig,
        trained_depth: int | None,
        end_ids: Sequence[int] | None = None,
        calibration: Calibration | None = None,
    ):
        check_can_continue(model.config)
        check_depth(model, trained_depth)
        self._model, self._params, self._tokenizer = model, params, tokenizer
        self.config = for_model(
            config,
            trained_depth,
            has_exit_gate=model.config.exit_gate.enabled,
            makes_media=model.config.has_media,
            calibration=calibration,
        )
        self._trained_depth = trained_depth
        self._maker: MediaMaker | None = None
        if model.config.has_media and isinstance(tokenizer, MediaTokenizer):
            self._maker = MediaMaker(model, params, tokenizer, self.config)
        self._end_ids = tuple(end_ids_of(tokenizer) if end_ids is None else end_ids)
        texts = model, params, tokenizer, trained_depth, self._end_ids
        self._text_model = TextModel(*texts, calibration)
        # First, as it finds out whether the tokenizer fits the model.
        self._chain = build_chain(self.config, tokenizer, model.config.vocab_size)
        self._stops = self._stop_texts()
        self._rule = replicate(model.sharder, depth_rule(self.config))

    def generate(
        self,
        prompts: Sequence[AnyPrompt] | np.ndarray,
        each: Any = None,
    ) -> list[Completion]:
        """`num_samples` completions per prompt, in the order of the prompts.

        Args:
          prompts: texts, token ids, which are taken as they are (no start token is added), or
            prompts with media.
          each: a dict of options per prompt, which change the configuration for it alone, see
            `continuous.prompts`. None: all prompts have the same.

        Raises:
          UserError: if a prompt is empty, too long, has wrong ids or media that do not fit the
            model, or if there is none.
          ConfigError: if a prompt's own options cannot be used.
        """
        encoded, count = self._encode(prompts), self.config.num_samples
        if each is not None:
            if self._has_media(encoded):
                raise UserError("each is for prompts of text alone; leave out either.")
            num_rows = self._prompts_per_batch(len(encoded)) * count
            ids = [prompt.ids for prompt in encoded]
            return continue_each(self._text_model, self.config, prompts, ids, each, num_rows)
        completions: list[Completion] = []
        for numbers, filled in self._batches(len(encoded)):
            decoded, media = self._decode([encoded[number] for number in filled], filled)
            for row in range(len(numbers) * count):
                number = numbers[row // count]
                completions.append(
                    self._completion(prompts[number], encoded[number], decoded, row, media[row])
                )
        return completions

    def make(self, prompts: Sequence[AnyPrompt]) -> list[GeneratedMedium]:
        """The media that prompts ask for by their last token, `num_samples` per prompt.

        As `generate` makes them, but nothing is decoded: one pass over the prompts, and the
        decoders' samplers.

        Args:
          prompts: each must end with an opening token.

        Raises:
          UserError: as `generate`, or if a prompt asks for no medium.
        """
        encoded = self._encode(prompts)
        if self._maker is None or not all(self._opens(prompt.ids[-1]) for prompt in encoded):
            raise UserError("a prompt asks for no medium; let each end with an opening token.")
        count = self.config.num_samples
        num_tokens, slots = plan_making(self._model.config, encoded)
        media: list[GeneratedMedium] = []
        for numbers, filled in self._batches(len(encoded)):
            given = [encoded[number] for number in filled for _ in range(count)]
            model = for_rows(self._model, len(given))
            keys = sample_keys(prompt_keys(self.config.seed, filled), count)
            keys = put_rows(model.sharder, keys)
            made = self._maker.make_for(model, given, num_tokens, slots, keys)
            media += made[: len(numbers) * count]
        return media

    def check(self, prompts: Sequence[AnyPrompt] | np.ndarray) -> None:
        """Checks prompts without continuing them.

        Raises:
          UserError: as `generate` would.
        """
        self._plan(self._encode(prompts))

    def stream(
        self, prompt: AnyPrompt, tokens_per_call: int | None = None
    ) -> Iterator[StreamedToken]:
        """One completion, token by token as they are made, with its media.

        The first token comes alone. Those of a round of speculative decoding come together, those
        of beam and parallel decoding all at once at the end.

        Args:
          prompt: as of `generate`.
          tokens_per_call: tokens that the device makes before it hands them over, see
            `streaming.Pace`.

        Raises:
          UserError: at once, as `generate`, or if `num_samples` asks for more than one text.
        """
        if self.config.num_samples > 1:
            raise ConfigError(
                "num_samples",
                f"{self.config.num_samples} texts cannot be streamed at once; leave it at 1, or "
                "use generate.",
            )
        return self._stream(self._encode([prompt])[0], Pace(tokens_per_call))

    def _stream(self, prompt: EncodedPrompt, pace: Pace) -> Iterator[StreamedToken]:
        shown = TokenStream(self._tokenizer, prompt.ids, self.config.stop, self._opens)
        for decoded, media, is_over in self._progress(prompt, pace):
            tokens, steps = self._new_tokens(decoded, 0, len(prompt.ids))
            yield from shown.take(tokens, steps, media.made, is_over=is_over)

    # --------------------------------------------------------------------------
    # One batch: from its prompts to its end.

    def _progress(
        self, prompt: EncodedPrompt, pace: Pace
    ) -> Iterator[tuple[Decoded, MediaRow, bool]]:
        """One row as it grows, with its media, and whether it has ended."""
        if self.config.strategy == "beam":
            decoded, media = self._decode([prompt], [0])
            yield decoded, media[0], True
            return
        rows, is_first = self._start([prompt], [0]), True
        while True:
            decoded = _on_host(rows)
            pace.end()
            is_running = decoded.reasons[0] == RUNNING
            is_waiting = bool(self._waiting(rows, decoded).any())
            # The device goes on while this call's tokens are shown. Before the first token that
            # could mean to compile.
            if is_running and not is_first:
                self._add_tokens(rows, pace.begin())
            yield decoded, rows.media[0], not (is_running or is_waiting)
            if is_running and is_first:
                self._add_tokens(rows, pace.begin())
                is_first = False
            elif not (is_running or self._make_waiting(rows, decoded)):
                return

    def _decode(
        self, prompts: Sequence[EncodedPrompt], numbers: Sequence[int]
    ) -> tuple[Decoded, list[MediaRow]]:
        """Runs the strategy on a batch of prompts; also the media of each row."""
        if self.config.strategy == "beam":
            settings, prefilled, history, _ = self._prefill(prompts, numbers)
            model = for_rows(self._model, len(prompts) * self.config.beam.num_beams)
            best = search_beams(model, self._params, self.config, settings, prefilled, history)
            arrays = (best.history.tokens, best.history.lengths, best.steps, best.scores)
            decoded = Decoded(*fetch(settings.sharder, (*arrays, best.reasons)))
            return decoded, [MediaRow([], [])] * len(decoded.lengths)
        rows = self._start(prompts, numbers)
        while True:
            self._add_tokens(rows)
            decoded = _on_host(rows)
            if not self._make_waiting(rows, decoded):
                return decoded, rows.media

    def _add_tokens(self, rows: _Rows, max_tokens: int | None = None) -> None:
        model, settings = rows.model, rows.settings
        rows.state = add_tokens(
            model, self._params, self.config, settings, rows.state, max_tokens=max_tokens
        )

    def _start(self, prompts: Sequence[EncodedPrompt], numbers: Sequence[int]) -> _Rows:
        """Reads the prompts and chooses the first new token of each row that does not wait."""
        settings, prefilled, history, plan = self._prefill(prompts, numbers)
        count = self.config.num_samples
        given = [prompt for prompt in prompts for _ in range(count)]
        media = [MediaRow.of_prompt(prompt) for prompt in given]
        model, is_waiting = for_rows(self._model, len(given)), None
        if self._maker is not None and plan is not None:
            settings = self._maker.with_openings(settings, media)
            waits = np.asarray([self._opens(prompt.ids[-1]) > 0 for prompt in given])
            is_waiting = put_rows(model.sharder, waits)
        state = start(settings, prefilled, history, is_waiting)
        return _Rows(model, settings, state, media, plan)

    def _prefill(
        self, prompts: Sequence[EncodedPrompt], numbers: Sequence[int]
    ) -> tuple[DecodeSettings, Prefilled, History, MediaPlan | None]:
        """Reads each prompt once, for all of its samples. A prompt's number is its draws' own."""
        config, (plan, media_plan) = self.config, self._plan(prompts)
        model = for_rows(self._model, len(prompts))
        # Which id fills a history does not matter; nobody reads it.
        capacity = plan.capacity if media_plan is None else media_plan.num_tokens
        history = history_of_prompts([prompt.ids for prompt in prompts], capacity, pad_id=0)
        history = put_rows(model.sharder, history)
        keys = prompt_keys(config.seed, numbers)
        row_keys = put_rows(model.sharder, keys)
        if self._maker is not None and media_plan is not None:
            read = self._maker.enter(model, prompts, media_plan, row_keys)
        else:
            read = left_padded(history, row_keys, num_columns=plan.num_columns)
        with_media = media_plan is not None
        shape = plan.shape(self._model, config.cache, len(prompts), with_media=with_media)
        cache = empty_cache(model.sharder, model.config, shape)
        chunk = config.cache.prefill_chunk
        is_cut_alike = model.config.is_recurrent and plan.num_slots < (config.depth.depth or 1)
        prefilled = prefill(
            model, self._params, read, cache, self._rule, chunk=chunk, is_cut_alike=is_cut_alike
        )
        count = 1 if config.strategy == "beam" else config.num_samples
        sharder = for_rows(self._model, len(prompts) * count).sharder
        settings = DecodeSettings(
            self._rule,
            replicate(model.sharder, self._chain),
            replicate(model.sharder, self._ending(with_media)),
            put_rows(sharder, sample_keys(keys, count)),
            is_drawn=not config.is_deterministic,
            warm_start=config.depth.warm_start,
            sharder=sharder,
        )
        if count > 1:
            prefilled, history = _repeat(sharder, prefilled, history, count)
        return settings, prefilled, history, media_plan

    def _plan(self, prompts: Sequence[EncodedPrompt]) -> tuple[CachePlan, MediaPlan | None]:
        config, depth, new_rows = (
            self.config,
            self._trained_depth,
            rows_for_new_tokens(self.config),
        )
        if self._has_media(prompts):
            plan = plan_media(self._model, config, depth, prompts, new_rows)
            return plan.cache, plan
        longest, platform = max(len(prompt.ids) for prompt in prompts), self._model.platform
        return plan_cache(self._model.config, config, depth, longest, new_rows, platform), None

    def _has_media(self, prompts: Sequence[EncodedPrompt]) -> bool:
        """Whether the request is one with media: by a prompt, or by its options."""
        if self._maker is None:
            return False
        if self.config.media != MediaGenerationConfig():
            return True
        marker_of = self._maker.tokenizer.marker_of
        return any(marker_of(token) for prompt in prompts for token in prompt.ids)

    def _opens(self, token: int) -> int:
        """Kind of the medium that follows a token; 0 for none."""
        return 0 if self._maker is None else self._maker.tokenizer.medium_after(token)

    def _waiting(self, rows: _Rows, decoded: Decoded) -> np.ndarray:
        """Kind of the medium that each row waits for, int32 [B]; 0 for none."""
        if self._maker is None or rows.plan is None:
            return np.zeros(len(decoded.lengths), np.int32)
        return self._maker.waiting(decoded)

    def _make_waiting(self, rows: _Rows, decoded: Decoded) -> bool:
        """Gives rows that wait for a medium theirs, so that they go on; False if none waits."""
        if not self._waiting(rows, decoded).any():
            return False
        assert self._maker is not None and rows.plan is not None  # As rows wait.
        rows.settings, rows.state = self._maker.give(
            rows.model, rows.settings, rows.state, decoded, rows.media, rows.plan.slots
        )
        return True

    # --------------------------------------------------------------------------
    # From prompts to ids, and from ids to completions.

    def _encode(self, prompts: Sequence[AnyPrompt] | np.ndarray) -> list[EncodedPrompt]:
        if not any(isinstance(prompt, MediaPrompt | EncodedPrompt) for prompt in prompts):
            ids = encode_prompts(prompts, self._tokenizer, self._model.config.vocab_size)
            encoded = [EncodedPrompt(tuple(own)) for own in ids]
        else:
            encoded = [self._encode_one(prompt) for prompt in prompts]
        for number, prompt in enumerate(encoded, 1):
            if self._maker is not None and self._has_media([prompt]):
                self._maker.check(prompt, f"prompt {number}")
        return encoded

    def _encode_one(self, prompt: AnyPrompt) -> EncodedPrompt:
        if isinstance(prompt, EncodedPrompt):
            return prompt
        if isinstance(prompt, MediaPrompt):
            tokenizer = media_tokenizer(self._model.config, self._tokenizer)
            formats = MediaFormats.of_model(self._model.config)
            return encode_media_prompt(prompt, tokenizer, formats)
        ids = encode_prompts([prompt], self._tokenizer, self._model.config.vocab_size)
        return EncodedPrompt(tuple(ids[0]))

    def _batches(self, num_prompts: int) -> Iterator[tuple[list[int], list[int]]]:
        """Numbers of the prompts of each batch; and the same, filled up.

        A batch that is not full is filled up, so that it compiles nothing and divides by the
        devices. What fills it ends when the first text does.
        """
        size = self._prompts_per_batch(num_prompts)
        for first in range(0, num_prompts, size):
            numbers = list(range(first, min(first + size, num_prompts)))
            yield numbers, [*numbers, *[first] * (size - len(numbers))]

    def _prompts_per_batch(self, num_prompts: int) -> int:
        """As many as asked for, or more if that leaves fewer texts to each device of a mesh."""
        size, texts = num_prompts, self.config.texts_per_prompt
        if self.config.batch_size is not None:
            size = min(size, self.config.batch_size // texts)
        ways = self._model.sharder.ways("batch")
        multiple = ways // math.gcd(ways, texts)
        filled = -(-size // multiple) * multiple
        return filled if filled < size * ways else size

    def _stop_texts(self) -> TextAutomaton | None:
        config = self.config
        if not config.stop:
            return None
        if self._tokenizer is None:
            raise ConfigError("stop", "texts need a tokenizer, and this model has none.")
        pieces = piece_table(self._tokenizer, self._model.config.vocab_size)
        return stop_strings(config.stop, pieces)

    def _ending(self, with_media: bool) -> Ending:
        openings = self._maker.openings if self._maker is not None and with_media else ()
        end_ids = [*self._end_ids, *openings]
        ids = jnp.asarray(end_ids, jnp.int32).reshape(-1)
        return Ending(ids, jnp.int32(self.config.max_new_tokens), self._stops)

    def _new_tokens(
        self, decoded: Decoded, row: int, prompt_length: int
    ) -> tuple[list[int], list[int]]:
        """New tokens of a row and their iterations, without an end token."""
        length = int(decoded.lengths[row])
        is_ended = decoded.reasons[row] == END_OF_TEXT
        is_ended = is_ended and not self._opens(int(decoded.tokens[row, length - 1]))
        columns = slice(prompt_length, length - is_ended)
        return decoded.tokens[row, columns].tolist(), decoded.steps[row, columns].tolist()

    def _completion(
        self,
        prompt: AnyPrompt,
        encoded: EncodedPrompt,
        decoded: Decoded,
        row: int,
        media: MediaRow,
    ) -> Completion:
        tokens, steps = self._new_tokens(decoded, row, len(encoded.ids))
        parts = parts_of_ids(self._tokenizer, encoded.ids, tokens, media.made, self.config.stop)
        return Completion(
            prompt=prompt if isinstance(prompt, str | MediaPrompt) else None,
            parts=parts,
            token_ids=tuple(tokens),
            depths=tuple(steps),
            score=float(decoded.scores[row]),
            finish_reason=FINISH_REASONS[decoded.reasons[row]],
        )


def check_depth(model: MegaTransformer, trained_depth: int | None) -> None:
    """Raises:
    UserError: if only one of model and number has a core.
    """
    is_recurrent = model.config.is_recurrent
    if is_recurrent != (trained_depth is not None):
        fix = "a core; give its mean iterations in training" if is_recurrent else "none; give None"
        raise UserError(f"trained_depth, of the core, is {trained_depth}, but the model has {fix}.")


def depth_rule(config: GenerationConfig) -> DepthRule:
    """How deep the tokens of a generation go; its depth is a number, unless there is no core."""
    criterion = exit_criterion(config.depth.exit_criterion)
    threshold = config.depth.threshold
    return DepthRule(
        depth=jnp.int32(config.depth.depth or 1),
        threshold=jnp.float32(criterion.default_threshold if threshold is None else threshold),
        min_depth=jnp.int32(config.depth.min_depth),
        criterion=criterion,
        readout=make_readout(config.depth.gate_readout, config.depth.gate_threshold),
    )


@functools.partial(jax.jit, static_argnames=("sharder", "count"))
def _repeat(
    sharder: Sharder, prefilled: Prefilled, prompts: History, count: int
) -> tuple[Prefilled, History]:
    """Each row `count` times; the cut may be another than before."""
    prefilled = repeat_rows(prefilled, count)
    prompts = jax.tree.map(lambda array: jnp.repeat(array, count, axis=0), prompts)
    cache = constrain_cache(sharder, prefilled.cache)
    prefilled = prefilled.replace(cache=cache)  # type: ignore[attr-defined]
    return prefilled, constrain_rows(sharder, prompts)


def _on_host(rows: _Rows) -> Decoded:
    state = rows.state
    history, sharder = state.history, rows.settings.sharder
    arrays = (history.tokens, history.lengths, state.steps, state.scores, state.end.reason)
    return Decoded(*fetch(sharder, arrays))


# ------------------------------------------------------------------------------
# Continues many prompts, batch by batch, with progress.


def continue_in_batches(
    make_generator: Callable[[GenerationConfig], Generator],
    config: GenerationConfig,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int,
    progress: Callable[[int], object] = lambda count: None,
) -> list[Completion]:
    """One completion per prompt, in the order of the prompts.

    The longest prompts come first and go together with others of their length, and a batch that is
    not full is filled up, so that few programs are compiled. If tokens are drawn, each batch has
    its own seed.

    Args:
      make_generator: from a configuration to a generator of the model.
      config: of one text per prompt.
      prompts: token ids.
      batch_size: prompts that are continued at once.
      progress: called with the number of prompts that were continued since.

    Raises:
      ValueError: if `config` asks for several texts per prompt, or batch_size is not positive.
      UserError: if a prompt does not fit.
    """
    if config.num_samples != 1:
        raise ValueError(f"num_samples is {config.num_samples}; one text per prompt is scored.")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
    generator = make_generator(config)
    longest_first = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    found: dict[int, Completion] = {}
    for first in range(0, len(prompts), batch_size):
        if first and not config.is_deterministic:
            generator = make_generator(_with_next_seed(config, first))
        numbers = longest_first[first : first + batch_size]
        filled = [*numbers, *numbers[:1] * (batch_size - len(numbers))]
        completions = generator.generate([prompts[number] for number in filled])
        found.update(zip(numbers, completions[: len(numbers)], strict=True))
        progress(len(numbers))
    return [found[number] for number in range(len(prompts))]


def _with_next_seed(config: GenerationConfig, batch: int) -> GenerationConfig:
    return dataclasses.replace(config, seed=(config.seed + batch) % (MAX_SEED + 1))
