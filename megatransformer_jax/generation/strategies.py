"""Which function decodes for which strategy, what it leaves, and how many rows of the cache it may
need."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from megatransformer_jax.config.generation import GenerationConfig
from megatransformer_jax.generation import parallel as parallel_sampler
from megatransformer_jax.generation import speculative
from megatransformer_jax.generation.beam_search import BeamResult, Beams, beam_search
from megatransformer_jax.generation.decode_loop import DecodeSettings, DecodeState, decode
from megatransformer_jax.generation.history import History
from megatransformer_jax.generation.placement import replicate
from megatransformer_jax.generation.prefill import Prefilled
from megatransformer_jax.models.megatransformer import MegaTransformer


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


def rows_for_new_tokens(config: GenerationConfig) -> int:
    """Rows of the cache behind the prompt that a text may take."""
    match config.strategy:
        case "greedy" | "sample" | "beam":
            return config.max_new_tokens
        case "speculative":
            return speculative.rows_needed(config.max_new_tokens, config.speculative.draft_length)
        case "parallel":
            return parallel_sampler.rows_needed(
                config.max_new_tokens, config.parallel.max_wavefront
            )
    raise _unknown(config)


def add_tokens(
    model: MegaTransformer,
    params: Any,
    config: GenerationConfig,
    settings: DecodeSettings,
    state: DecodeState,
    *,
    max_tokens: int | None = None,
) -> DecodeState:
    """Goes on until all rows have ended, or for `max_tokens` tokens.

    Speculative decoding goes on for as many whole rounds as make no more tokens, but at least one.
    Parallel decoding always goes on to the end, and beam search has `search_beams`.

    Args:
      model: the model.
      params: its parameters.
      config: strategy and its numbers.
      settings: of the whole generation.
      state: of `start` or from here; donated.
      max_tokens: of this call, for streaming; at least 1. None: all that are left.
    """

    def put(number: jax.Array) -> jax.Array:
        placed: jax.Array = replicate(settings.sharder, number)
        return placed

    match config.strategy:
        case "greedy" | "sample":
            count = config.max_new_tokens if max_tokens is None else max_tokens
            return decode(model, params, settings, state, put(jnp.int32(count)))
        case "speculative":
            per_round = config.speculative.draft_length + 1
            state, _ = speculative.speculate(
                model,
                params,
                settings,
                state,
                draft_depth=config.speculative.draft_depth,
                draft_length=config.speculative.draft_length,
                max_rounds=None if max_tokens is None else max(1, max_tokens // per_round),
            )
            return state
        case "parallel":
            result = parallel_sampler.sample_parallel(
                model,
                params,
                settings,
                state,
                iterations_per_round=put(jnp.int32(config.parallel.iterations_per_round)),
                settle_threshold=put(jnp.float32(config.parallel.settle_threshold)),
                max_wavefront=config.parallel.max_wavefront,
            )
            return result.state
    raise _unknown(config)


def search_beams(
    model: MegaTransformer,
    params: Any,
    config: GenerationConfig,
    settings: DecodeSettings,
    prefilled: Prefilled,
    history: History,
) -> BeamResult:
    """Strategy beam: `num_samples` texts per prompt, the best first."""
    return beam_search(
        model,
        params,
        settings,
        prefilled,
        history,
        Beams(
            config.beam.num_beams,
            config.num_samples,
            config.beam.length_penalty,
            config.beam.early_stopping,
        ),
    )


def _unknown(config: GenerationConfig) -> ValueError:
    return ValueError(f"strategy {config.strategy!r} has no function here")
