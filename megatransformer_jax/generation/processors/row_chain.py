"""One chain for rows that each have settings of their own, for batches whose rows come and go.

`build_chain` leaves out what is off, so that a chain's structure depends on its settings. Here
every processor is always there, at its neutral value where a row does not use it, and all numbers
are per row: another request in a row compiles nothing. What no row uses is not computed.

    chain = RowChain(neutral_rows(8, RowSizes()), is_allowed, vocab_size)
    one = row_numbers(SamplingConfig(top_p=0.9), is_drawn=True, sizes=RowSizes())
    rows = jax.tree.map(lambda all, own: all.at[row].set(own), chain.rows, one)
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from megatransformer_jax.config.option import UserError
from megatransformer_jax.config.sampling import SamplingConfig
from megatransformer_jax.generation.history import NO_TOKEN, History
from megatransformer_jax.generation.processors.cuts import (
    GREEDY_BELOW,
    MinP,
    Temperature,
    TopK,
    TopP,
    Typical,
)
from megatransformer_jax.generation.processors.penalties import (
    CountPenalty,
    LogitBias,
    MinNewTokens,
    NoRepeatNgram,
    RepetitionPenalty,
)
from megatransformer_jax.generation.processors.processor import AllowedTokens, Number, Processor

# Largest n of `no_repeat_ngram` in such a chain.
MAX_NGRAM = 4
# A top_k that keeps everything.
_ALL = 2**31 - 1

# ------------------------------------------------------------------------------
# The numbers of each row.


@flax.struct.dataclass
class RowNumbers:
    """The settings of each row. Leaves have the axis B; those of `row_numbers` have it not.

    Attributes:
      temperature: float32 [B]; 0 takes the likeliest token.
      top_k: int32 [B].
      top_p: float32 [B]; 1 is off.
      min_p: float32 [B]; 0 is off.
      typical_p: float32 [B]; 1 is off.
      repetition_penalty: float32 [B]; 1 is off.
      presence_penalty: float32 [B]; 0 is off.
      frequency_penalty: float32 [B]; 0 is off.
      no_repeat_ngram: int32 [B], up to MAX_NGRAM; 0 is off.
      bias_ids: int32 [B, K], NO_TOKEN where there is none.
      bias: float32 [B, K], added to the scores of these tokens.
      min_new_tokens: int32 [B]; 0 is off.
      end_ids: int32 [B, E], NO_TOKEN where there is none. They also say what ends the row.
    """

    temperature: Number
    top_k: Number
    top_p: Number
    min_p: Number
    typical_p: Number
    repetition_penalty: Number
    presence_penalty: Number
    frequency_penalty: Number
    no_repeat_ngram: Number
    bias_ids: Number
    bias: Number
    min_new_tokens: Number
    end_ids: Number

    @property
    def is_drawn(self) -> Bool[Array, "B"]:
        """Rows whose tokens are drawn; the others take the likeliest."""
        return self.temperature >= GREEDY_BELOW


@dataclasses.dataclass(frozen=True)
class RowSizes:
    """Static widths of a row's lists: most biased tokens, and most end tokens."""

    num_bias: int = 32
    num_ends: int = 4


def neutral_rows(num_rows: int, sizes: RowSizes) -> RowNumbers:
    """Rows that take the likeliest token and change no score."""
    one = row_numbers(SamplingConfig(), is_drawn=False, sizes=sizes)
    numbers: RowNumbers = jax.tree.map(lambda leaf: jnp.stack([leaf] * num_rows), one)
    return numbers


def row_numbers(
    sampling: SamplingConfig,
    *,
    is_drawn: bool,
    sizes: RowSizes,
    logit_bias: Mapping[int, float] | None = None,
    min_new_tokens: int = 0,
    end_ids: Sequence[int] = (),
) -> RowNumbers:
    """The numbers of one row, NumPy arrays on the host.

    Args:
      sampling: what is done to the scores; checked already.
      is_drawn: whether tokens are drawn. Otherwise what belongs to draws is not used.
      sizes: of the chain.
      logit_bias: added to the scores of these tokens, before all else.
      min_new_tokens: no token of `end_ids` comes before so many.
      end_ids: that end the row.

    Raises:
      UserError: if the chain has no place for all of it.
    """
    bias = dict(logit_bias or {})
    _check_count("tokens with a logit_bias", len(bias), sizes.num_bias)
    _check_count("end tokens", len(end_ids), sizes.num_ends)
    _check_count("tokens of no_repeat_ngram", sampling.no_repeat_ngram or 0, MAX_NGRAM)
    if sampling.banned_words or sampling.forced_words:
        raise UserError(
            "banned_words and forced_words are the same for all prompts of a call; leave them out "
            "of what a prompt sets for itself."
        )
    cuts = sampling if is_drawn else SamplingConfig()
    return RowNumbers(
        temperature=np.float32(cuts.temperature if is_drawn else 0),
        top_k=np.int32(cuts.top_k or _ALL),
        top_p=np.float32(cuts.top_p or 1),
        min_p=np.float32(cuts.min_p or 0),
        typical_p=np.float32(cuts.typical_p or 1),
        repetition_penalty=np.float32(sampling.repetition_penalty),
        presence_penalty=np.float32(sampling.presence_penalty),
        frequency_penalty=np.float32(sampling.frequency_penalty),
        no_repeat_ngram=np.int32(sampling.no_repeat_ngram or 0),
        bias_ids=_padded(list(bias), sizes.num_bias, NO_TOKEN, np.int32),
        bias=_padded(list(bias.values()), sizes.num_bias, 0, np.float32),
        min_new_tokens=np.int32(min_new_tokens),
        end_ids=_padded(end_ids, sizes.num_ends, NO_TOKEN, np.int32),
    )


def _check_count(what: str, count: int, most: int) -> None:
    if count > most:
        raise UserError(f"{count} {what} are more than the {most} there is room for; give fewer.")


def _padded(values: Sequence[int | float], size: int, fill: int, dtype: Any) -> np.ndarray:
    array = np.full(size, fill, dtype)
    array[: len(values)] = values
    return array


# ------------------------------------------------------------------------------
# The chain.


@flax.struct.dataclass
class RowChain:
    """All processors but those about words, in the order of `build_chain`, as one processor.

    A row's scores are, bit for bit, those of `build_chain` with its settings. The bias comes first.
    The state counts tokens: twice how often one was generated, plus 1 if the prompt has it.

    Attributes:
      rows: numbers of each row.
      is_allowed: bool [V], the tokens that may be drawn at all, see `allowed_tokens`.
      vocab_size: width of the logits; static.
    """

    rows: RowNumbers
    is_allowed: Number
    vocab_size: int = flax.struct.field(pytree_node=False)

    def init(self, history: History) -> Int[Array, "B V"]:
        """The counts of a history."""
        rows = jnp.arange(history.tokens.shape[0])[:, None]
        is_new = history.generated_mask()
        tokens = jnp.where(history.content_mask(), history.tokens, self.vocab_size)
        counts = jnp.zeros((history.tokens.shape[0], self.vocab_size), jnp.int32)
        in_prompt = jnp.where(is_new, self.vocab_size, tokens)
        counts = counts.at[rows, in_prompt].set(1, mode="drop")
        return counts.at[rows, jnp.where(is_new, tokens, self.vocab_size)].add(2, mode="drop")

    def __call__(
        self, state: Int[Array, "B V"], history: History, logits: Float[Array, "B V"]
    ) -> Float[Array, "B V"]:
        """The changed scores."""
        rows = self.rows
        logits = AllowedTokens(self.is_allowed)(
            (), history, self._penalised(state, history, logits)
        )
        logits = Temperature(rows.temperature)((), history, logits)
        cuts: list[tuple[jax.Array, Processor]] = [
            (rows.top_k < self.vocab_size, TopK(rows.top_k)),
            (rows.top_p < 1, TopP(rows.top_p)),
            (rows.min_p > 0, MinP(rows.min_p)),
            (rows.typical_p < 1, Typical(rows.typical_p)),
        ]
        for is_used, cut in cuts:
            logits = _if_any(is_used, cut, (), history, logits)
        return logits

    def _penalised(
        self, state: Int[Array, "B V"], history: History, logits: Float[Array, "B V"]
    ) -> Float[Array, "B V"]:
        rows, size = self.rows, self.vocab_size
        repetition = RepetitionPenalty(rows.repetition_penalty, size)
        counts = CountPenalty(rows.presence_penalty, rows.frequency_penalty, size)
        steps: list[tuple[jax.Array, Processor, Any]] = [
            (rows.bias_ids[:, 0] != NO_TOKEN, LogitBias(rows.bias_ids, rows.bias), ()),
            (rows.repetition_penalty != 1, repetition, state > 0),
            ((rows.presence_penalty != 0) | (rows.frequency_penalty != 0), counts, state >> 1),
            (rows.no_repeat_ngram > 0, NoRepeatNgram(rows.no_repeat_ngram, MAX_NGRAM), ()),
            (
                history.num_generated < rows.min_new_tokens,
                MinNewTokens(rows.min_new_tokens, rows.end_ids),
                (),
            ),
        ]
        for is_used, processor, own in steps:
            logits = _if_any(is_used, processor, own, history, logits)
        return logits

    def update(
        self, state: Int[Array, "B V"], history: History, tokens: Int[Array, "B"]
    ) -> Int[Array, "B V"]:
        """One token more."""
        return state.at[jnp.arange(tokens.shape[0]), tokens].add(2, mode="drop")


def _if_any(
    is_used: Bool[Array, "B"],
    processor: Processor,
    state: Any,
    history: History,
    logits: Float[Array, "B V"],
) -> Float[Array, "B V"]:
    """The processor's scores, or at no cost the same ones if no row uses it."""
    changed: jax.Array = jax.lax.cond(
        jnp.any(is_used), lambda: processor(state, history, logits), lambda: logits
    )
    return changed
