"""Beam search with a model's cache; see `beam_loop` for the rules.

    prefilled = prefill(model, params, left_padded(history, keys, 64), cache, rule)
    result = beam_search(model, params, settings, prefilled, history, Beams(4, 1))

Numbers are data, so changing them compiles nothing; the numbers of beams and of results do.

When beams change places, their keys and values are moved: per token, those of the rows behind the
prompt, once read and once written. With 8 beams of the benchmark's model and up to 64 new tokens
that is about 3 ms, compared with 18 ms for the pass. With one beam, or in a round in which all keep
their places, nothing is moved.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from megatransformer_jax.config.option import UserError
from megatransformer_jax.generation.beam_loop import BeamSettings, Hypotheses, search
from megatransformer_jax.generation.decode_loop import DecodeSettings
from megatransformer_jax.generation.history import History
from megatransformer_jax.generation.placement import constrain_rows, fetch, replicate
from megatransformer_jax.generation.prefill import Prefilled, repeat_rows
from megatransformer_jax.models.megatransformer import MegaTransformer, gather_weights
from megatransformer_jax.models.passes.cached import NewTokens, cached_forward
from megatransformer_jax.nn.cache_rows import reorder_new_rows
from megatransformer_jax.nn.kv_cache import KVCache, constrain_cache


@struct.dataclass
class BeamResult:
    """The best texts, those of a prompt next to each other, best first: M = B * num_return rows.

    Attributes:
      history: `History` of prompts and new tokens; the end token is one of them.
      steps: int32 [M, C], in the history's columns: iterations of the pass that led to a generated
        token; 0 in the prompt.
      scores: float32 [M], what texts are ranked by. -inf: there is no such text, as the prompt has
        fewer continuations; the row is the prompt.
      log_probs: float32 [M], sum of the new tokens' log-probabilities under the model's own
        distribution, before the chain.
      reasons: int32 [M], codes of `ending`.
    """

    # Any because transformations put other things in the arrays' place.
    history: Any
    steps: Any
    scores: Any
    log_probs: Any
    reasons: Any


@struct.dataclass
class Beams:
    """How many texts are searched for, and how they are ranked.

    Attributes:
      num_beams: texts that are kept at every token; static.
      num_return: best texts per prompt that are returned, at most `num_beams`; static.
      length_penalty: a text's score is its sum of log-probabilities divided by its number of
        generated tokens to this power. For all or per prompt.
      early_stopping: a prompt is done once `num_beams` texts are finished. Otherwise once, besides,
        its best running text would not beat the worst of them if it ended now. For all or per
        prompt.
    """

    num_beams: int = struct.field(pytree_node=False)
    num_return: int = struct.field(pytree_node=False)
    length_penalty: Float[Array, "..."] | float = 1.0
    early_stopping: Bool[Array, "..."] | bool = False


def beam_search(
    model: MegaTransformer,
    params: Any,
    settings: DecodeSettings,
    prefilled: Prefilled,
    history: History,
    beams: Beams,
) -> BeamResult:
    """Searches the likeliest continuations of each prompt.

    Args:
      model: static; on a mesh, its sharder must suit B * num_beams rows (`placement.for_rows`).
      params: parameters.
      settings: what is per row is per prompt, [B]; `is_drawn` must be off. The depth rule applies
        to every beam on its own.
      prefilled: the prompts' cache, with a free row per new token but the last.
      history: the prompts, with room for the new tokens.
      beams: how many and which.

    Raises:
      UserError: if one of the numbers cannot be used, tokens are to be drawn, or there is no room
        for the new tokens.
    """
    _check(model, settings, prefilled, history, beams)
    penalty, stopping = replicate(
        model.sharder,
        (jnp.asarray(beams.length_penalty, jnp.float32), jnp.asarray(beams.early_stopping, bool)),
    )
    beams = beams.replace(  # type: ignore[attr-defined]
        length_penalty=penalty, early_stopping=stopping
    )
    return _search(model, params, settings, prefilled, history, beams)


@struct.dataclass
class _Memory:
    """What the model remembers of the beams.

    Attributes:
      cache: of all tokens but the last.
      core_state: the core's last state at the newest token of the cache.
    """

    cache: KVCache
    core_state: Any  # [M, 1, state width]


@dataclasses.dataclass(frozen=True)
class _CachedModel:
    """The model as beam search sees it.

    Attributes:
      model: the model.
      params: its parameters.
      settings: per beam, [B * num_beams].
      first_row: the cache's rows before it are the same for all beams of a prompt.
    """

    model: MegaTransformer
    params: Any
    settings: DecodeSettings
    first_row: Any

    def advance(
        self, memory: Any, tokens: Int[Array, "M"], is_running: Bool[Array, "M"]
    ) -> tuple[Float[Array, "M V"], Int[Array, "M"], Any]:
        """One pass; beams that are not running are padding in it."""
        new = NewTokens(
            tokens[:, None],
            is_running[:, None],
            state=memory.core_state if self.settings.warm_start else None,
            state_keys=self.settings.row_keys,
        )
        output = cached_forward(self.model, self.params, new, memory.cache, self.settings.rule)
        # On a mesh every processor would gather the vocabulary, so it is whole from here on.
        logits = constrain_rows(self.model.sharder, output.logits[:, 0])
        return logits, output.num_steps[:, 0], _Memory(output.cache, output.state)

    def reorder(self, memory: Any, rows: Int[Array, "M"]) -> Any:
        """Moves keys and values."""
        cache = reorder_new_rows(memory.cache, rows, self.first_row)
        cache = constrain_cache(self.model.sharder, cache)
        return _Memory(cache, constrain_rows(self.model.sharder, memory.core_state[rows]))


@functools.partial(jax.jit, static_argnums=0)
def _search(
    model: MegaTransformer,
    params: Any,
    settings: DecodeSettings,
    prefilled: Prefilled,
    history: History,
    beams: Beams,
) -> BeamResult:
    num_beams = beams.num_beams
    params = gather_weights(model, params)
    repeated = repeat_rows(prefilled, num_beams)

    def per_beam(number: jax.Array) -> jax.Array:
        return jnp.repeat(number, num_beams) if jnp.ndim(number) else number

    per_beam_settings: Any = settings.replace(  # type: ignore[attr-defined]
        rule=jax.tree.map(per_beam, settings.rule),
        row_keys=None if settings.row_keys is None else per_beam(settings.row_keys),
    )
    best = search(
        _CachedModel(model, params, per_beam_settings, prefilled.cache.length),
        _Memory(constrain_cache(model.sharder, repeated.cache), repeated.core_state),
        BeamSettings(
            settings.chain,
            settings.ending,
            beams.length_penalty,
            beams.early_stopping,
            num_beams,
        ),
        history,
        prefilled.logits,
        prefilled.num_steps,
    )
    return _result(best, beams.num_return)


def _result(best: Hypotheses, num_return: int) -> BeamResult:
    def rows(leaf: jax.Array) -> jax.Array:
        return leaf[:, :num_return].reshape(-1, *leaf.shape[2:])

    best = jax.tree.map(rows, best)
    return BeamResult(best.history, best.steps, best.scores, best.log_probs, best.end.reason)


def _check(
    model: MegaTransformer,
    settings: DecodeSettings,
    prefilled: Prefilled,
    history: History,
    beams: Beams,
) -> None:
    if settings.is_drawn:
        raise UserError("is_drawn is set, and beam search draws no token; set it to False.")
    if not 1 <= beams.num_return <= beams.num_beams:
        raise UserError(
            f"num_return is {beams.num_return} with num_beams={beams.num_beams}; it must be from 1 "
            "to num_beams."
        )
    lengths, new_tokens, used = fetch(
        model.sharder, (history.lengths, settings.ending.max_new_tokens, prefilled.cache.length)
    )
    if np.min(new_tokens) < 1:
        raise UserError(f"max_new_tokens is {np.min(new_tokens)}; it must be at least 1.")
    needed = int(np.max(lengths + new_tokens))
    if needed > history.capacity:
        raise UserError(
            f"prompt and max_new_tokens take {needed} tokens, and the history holds "
            f"{history.capacity}; raise its capacity or lower max_new_tokens."
        )
    # The last new token is never passed through the model.
    needed = int(used + np.max(new_tokens)) - 1
    if needed > prefilled.cache.capacity:
        raise UserError(
            f"prompt and max_new_tokens take {needed} rows of the cache, which has "
            f"{prefilled.cache.capacity}; raise its capacity or lower max_new_tokens."
        )
