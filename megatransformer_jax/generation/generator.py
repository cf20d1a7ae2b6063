"""Continues prompts: from texts or ids on the host to texts, by any strategy.

    generator = Generator(model, params, tokenizer, GenerationConfig(), trained_depth=8)
    for completion in generator.generate(["Once upon a time"]):
        print(completion.text)

Another generator with other numbers compiles nothing new; what recompiles is listed in
`decode_loop`. On a mesh texts are cut over the devices, see `placement`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from megatransformer_jax.config.generation import GenerationConfig, for_model
from megatransformer_jax.config.option import MAX_SEED, ConfigError, UserError
from megatransformer_jax.data.hf_tokenizer import HuggingFaceTokenizer
from megatransformer_jax.data.tokenizer import Tokenizer
from megatransformer_jax.generation.decode_loop import (
    DecodeSettings,
    DecodeState,
    start,
)
from megatransformer_jax.generation.endings import (
    END_OF_TEXT,
    FINISH_REASONS,
    Ending,
    cut_at_stop,
    piece_table,
    stop_strings,
)
from megatransformer_jax.generation.history import History, history_of_prompts
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
from megatransformer_jax.generation.processors.processor import Chain
from megatransformer_jax.generation.request import (
    CachePlan,
    Completion,
    Prompt,
    StreamedToken,
    TextStream,
    continuation_text,
    encode_prompts,
    plan_cache,
    prompt_keys,
    sample_keys,
)
from megatransformer_jax.generation.strategies import (
    add_tokens,
    rows_for_new_tokens,
    search_beams,
)
from megatransformer_jax.models.exit_criteria import DepthRule, exit_criterion
from megatransformer_jax.models.megatransformer import MegaTransformer
from megatransformer_jax.nn.kv_cache import KVCache, constrain_cache
from megatransformer_jax.sharding.rules import Sharder


@dataclasses.dataclass(frozen=True)
class Decoded:
    """Rows as strategies leave them, on the host: `num_samples` per prompt, next to each other.

    Attributes:
      tokens: int32 [rows, C], prompt and new tokens, left-aligned.
      lengths: int32 [rows].
      steps: int32 [rows, C], iterations in the columns of new tokens.
      scores: float32 [rows].
      reasons: int32 [rows], see `ending`.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    steps: np.ndarray
    scores: np.ndarray
    reasons: np.ndarray


class Generator:
    """Continues prompts with one model and one setting.

    Args:
      model: the model. If it is on a mesh that several processes share, each of them must make the
        same calls.
      params: its parameters, laid out as the model's sharder says.
      tokenizer: between text and ids. None: prompts must be ids, and completions have no text.
      config: how; see `config.generation`.
      trained_depth: mean iterations in training, used if `config.depth.depth` is None. None: the
        model has no core.
      end_ids: tokens that end a text. None: the tokenizer's.

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
    ):
        check_depth(model, trained_depth)
        self._model = model
        self._params = params
        self._tokenizer = tokenizer
        has_exit_gate = model.config.exit_gate.enabled
        self._config = for_model(config, trained_depth, has_exit_gate=has_exit_gate)
        self._trained_depth = trained_depth
        if end_ids is None:
            end_ids = end_ids_of(tokenizer)
        chain, ending = self._chain_and_ending(end_ids)
        self._chain, self._ending, self._rule = replicate(
            model.sharder, (chain, ending, depth_rule(self._config))
        )

    def generate(self, prompts: Sequence[Prompt] | np.ndarray) -> list[Completion]:
        """`num_samples` completions per prompt, in the order of the prompts.

        Args:
          prompts: texts, or token ids, which are taken as they are (no start token is added).

        Raises:
          UserError: if a prompt is empty, too long or has wrong ids, or there is none.
        """
        ids = encode_prompts(prompts, self._tokenizer, self._model.config.vocab_size)
        size = self._prompts_per_batch(len(ids))
        completions: list[Completion] = []
        for first in range(0, len(ids), size):
            batch = ids[first : first + size]
            # A batch that is not full is filled up, so that it compiles nothing and divides by the
            # devices. What fills it ends when the first text does.
            numbers = [*range(first, first + len(batch)), *[first] * (size - len(batch))]
            decoded = self._decode([ids[number] for number in numbers], numbers)
            for row in range(len(batch) * self._config.num_samples):
                prompt = first + row // self._config.num_samples
                completions.append(self._completion(prompts[prompt], ids[prompt], decoded, row))
        return completions

    def check(self, prompts: Sequence[Prompt] | np.ndarray) -> None:
        """Checks prompts without continuing them.

        Raises:
          UserError: as `generate` would.
        """
        self._plan(encode_prompts(prompts, self._tokenizer, self._model.config.vocab_size))

    def stream(self, prompt: Prompt) -> Iterator[StreamedToken]:
        """One completion, token by token as they are made.

        Those of a round of speculative decoding come together, those of beam and parallel decoding
        all at once at the end.

        Args:
          prompt: text or ids.

        Raises:
          UserError: if the prompt is empty, too long or has wrong ids, or `num_samples` asks for
            more than one text.
        """
        if self._config.num_samples > 1:
            raise ConfigError(
                "num_samples",
                f"{self._config.num_samples} texts cannot be streamed at once; leave it at 1, or "
                "use generate.",
            )
        ids = encode_prompts([prompt], self._tokenizer, self._model.config.vocab_size)[0]
        shown = self._text_stream(ids)
        for token, steps, is_last in self._token_stream(ids):
            text = "" if shown is None else shown.add(token, is_last)
            yield StreamedToken(text, token, steps)

    def _token_stream(self, ids: Sequence[int]) -> Iterator[tuple[int, int, bool]]:
        """(token, steps, whether it is the last) of one row; end tokens are not yielded."""
        num_given = 0
        for decoded in self._progress(ids):
            tokens, steps = _new_tokens(decoded, 0, len(ids))
            is_ended = bool(decoded.reasons[0])
            # The newest token waits for the next: only then is known whether it is the last.
            num_ready = len(tokens) if is_ended else len(tokens) - 1
            for index in range(num_given, num_ready):
                yield tokens[index], steps[index], is_ended and index == num_ready - 1
            num_given = max(num_given, num_ready)

    def _progress(self, ids: Sequence[int]) -> Iterator[Decoded]:
        """One row as it grows, until it has ended."""
        if self._config.strategy == "beam":
            yield self._decode([ids], [0])
            return
        state, settings = self._start([ids], [0])
        decoded = _on_host(settings.sharder, state)
        while not decoded.reasons[0]:
            yield decoded
            state = self._add_tokens(settings, state, is_brief=True)
            decoded = _on_host(settings.sharder, state)
        yield decoded

    def _decode(self, ids: Sequence[Sequence[int]], numbers: Sequence[int]) -> Decoded:
        """Runs the strategy on a batch of prompts."""
        if self._config.strategy == "beam":
            settings, prefilled, history = self._prefill(ids, numbers)
            model = for_rows(self._model, len(ids) * self._config.beam.num_beams)
            result = search_beams(model, self._params, self._config, settings, prefilled, history)
            history, reasons = result.history, result.reasons
            return _fetch(settings.sharder, history, result.steps, result.scores, reasons)
        state, settings = self._start(ids, numbers)
        state = self._add_tokens(settings, state, is_brief=False)
        return _on_host(settings.sharder, state)

    def _add_tokens(
        self, settings: DecodeSettings, state: DecodeState, *, is_brief: bool
    ) -> DecodeState:
        model = for_rows(self._model, state.scores.shape[0])
        return add_tokens(model, self._params, self._config, settings, state, is_brief=is_brief)

    def _start(
        self, ids: Sequence[Sequence[int]], numbers: Sequence[int]
    ) -> tuple[DecodeState, DecodeSettings]:
        """Reads the prompts and chooses each row's first new token."""
        settings, prefilled, history = self._prefill(ids, numbers)
        return start(settings, prefilled, history), settings

    def _prefill(
        self, ids: Sequence[Sequence[int]], numbers: Sequence[int]
    ) -> tuple[DecodeSettings, Prefilled, History]:
        """Reads each prompt once, for all of its samples. A prompt's number is its draws' own."""
        config, plan = self._config, self._plan(ids)
        model = for_rows(self._model, len(ids))
        # Which id fills a history does not matter; nobody reads it.
        prompts = put_rows(model.sharder, history_of_prompts(ids, plan.capacity, pad_id=0))
        keys = prompt_keys(config.seed, numbers)
        prefilled = prefill(
            model,
            self._params,
            left_padded(prompts, put_rows(model.sharder, keys), num_columns=plan.num_columns),
            self._empty_cache(model.sharder, len(ids), plan),
            self._rule,
            chunk=config.cache.prefill_chunk,
        )
        count = 1 if config.strategy == "beam" else config.num_samples
        sharder = for_rows(self._model, len(ids) * count).sharder
        settings = DecodeSettings(
            self._rule,
            self._chain,
            self._ending,
            put_rows(sharder, sample_keys(keys, count)),
            is_drawn=not config.is_deterministic,
            warm_start=config.depth.warm_start,
            sharder=sharder,
        )
        if count == 1:
            return settings, prefilled, prompts
        return settings, *_repeat(sharder, prefilled, prompts, count)

    def _empty_cache(self, sharder: Sharder, batch_size: int, plan: CachePlan) -> KVCache:
        shape = plan.shape(self._model, self._config.cache, batch_size)
        return empty_cache(sharder, self._model.config, shape)

    def _plan(self, ids: Sequence[Sequence[int]]) -> CachePlan:
        return plan_cache(
            self._model.config,
            self._config,
            self._trained_depth,
            longest_prompt=max(map(len, ids)),
            new_rows=rows_for_new_tokens(self._config),
            platform=self._model.platform,
        )

    def _prompts_per_batch(self, num_prompts: int) -> int:
        """As many as asked for, or more if that leaves fewer texts to each device of a mesh."""
        size, texts = num_prompts, self._config.texts_per_prompt
        if self._config.batch_size is not None:
            size = min(size, self._config.batch_size // texts)
        ways = self._model.sharder.ways("batch")
        multiple = ways // math.gcd(ways, texts)
        filled = -(-size // multiple) * multiple
        return filled if filled < size * ways else size

    def _chain_and_ending(self, end_ids: Sequence[int]) -> tuple[Chain, Ending]:
        config, vocab_size = self._config, self._model.config.vocab_size
        # First, as it finds out whether the tokenizer fits the model.
        chain = build_chain(config, self._tokenizer, vocab_size)
        stops = None
        if config.stop:
            if self._tokenizer is None:
                raise ConfigError("stop", "texts need a tokenizer, and this model has none.")
            stops = stop_strings(config.stop, piece_table(self._tokenizer, vocab_size))
        ending = Ending(
            jnp.asarray(end_ids, jnp.int32).reshape(-1), jnp.int32(config.max_new_tokens), stops
        )
        return chain, ending

    def _completion(
        self, prompt: Prompt, ids: Sequence[int], decoded: Decoded, row: int
    ) -> Completion:
        tokens, steps = _new_tokens(decoded, row, len(ids))
        text = ""
        if self._tokenizer is not None:
            text = cut_at_stop(continuation_text(self._tokenizer, ids, tokens), self._config.stop)
        return Completion(
            prompt=prompt if isinstance(prompt, str) else None,
            text=text,
            token_ids=tuple(tokens),
            depths=tuple(steps),
            score=float(decoded.scores[row]),
            finish_reason=FINISH_REASONS[decoded.reasons[row]],
        )

    def _text_stream(self, ids: Sequence[int]) -> TextStream | None:
        if self._tokenizer is None:
            return None
        return TextStream(self._tokenizer, ids, self._config.stop)


def check_depth(model: MegaTransformer, trained_depth: int | None) -> None:
    """Raises:
    UserError: if only one of model and number has a core.
    """
    is_recurrent = model.config.is_recurrent
    if is_recurrent != (trained_depth is not None):
        fix = "a core; give its mean iterations in training" if is_recurrent else "none; give None"
        raise UserError(f"trained_depth, of the core, is {trained_depth}, but the model has {fix}.")


def end_ids_of(tokenizer: Tokenizer | None) -> Sequence[int]:
    """Ids that end a text."""
    if tokenizer is None:
        return ()
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer.end_ids
    return (tokenizer.eos_id,)


def depth_rule(config: GenerationConfig) -> DepthRule:
    """How deep the tokens of a generation go; its depth is a number, unless there is no core."""
    criterion = exit_criterion(config.depth.exit_criterion)
    threshold = config.depth.exit_threshold
    return DepthRule(
        depth=jnp.int32(config.depth.depth or 1),
        threshold=jnp.float32(criterion.default_threshold if threshold is None else threshold),
        min_depth=jnp.int32(config.depth.min_depth),
        criterion=criterion,
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


def _on_host(sharder: Sharder, state: DecodeState) -> Decoded:
    return _fetch(sharder, state.history, state.steps, state.scores, state.end.reason)


def _fetch(
    sharder: Sharder, history: History, steps: jax.Array, scores: jax.Array, reasons: jax.Array
) -> Decoded:
    return Decoded(*fetch(sharder, (history.tokens, history.lengths, steps, scores, reasons)))


def _new_tokens(decoded: Decoded, row: int, prompt_length: int) -> tuple[list[int], list[int]]:
    """New tokens of a row and their iterations, without an end token."""
    is_ended = decoded.reasons[row] == END_OF_TEXT
    columns = slice(prompt_length, decoded.lengths[row] - is_ended)
    return decoded.tokens[row, columns].tolist(), decoded.steps[row, columns].tolist()


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
