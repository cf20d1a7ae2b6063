"""Settings and prompts that were read, for the tests of speculative decoding."""

import jax
import jax.numpy as jnp
import numpy as np
from tiny_model import PROMPTS, depth_rule, make

from megatransformer_jax.generation.decode_loop import DecodeSettings, decode, start
from megatransformer_jax.generation.endings import Ending
from megatransformer_jax.generation.history import history_of_prompts
from megatransformer_jax.generation.prefill import left_padded, prefill
from megatransformer_jax.generation.speculative import speculate
from megatransformer_jax.nn.kv_cache import CacheShape, init_cache

COLUMNS = 16
# Deep enough for shallow drafts to be wrong.
DEPTH = 6


def settings(depth=DEPTH, count=40, end_ids=(), stops=None, chain=(), num_rows=3, **options):
    return DecodeSettings(
        depth_rule(depth),
        chain,
        Ending(jnp.asarray(end_ids, jnp.int32), jnp.asarray(count, jnp.int32), stops),
        jax.random.split(jax.random.key(8), num_rows),
        **options,
    )


def read_prompts(config, given, prompts=PROMPTS, capacity=64, num_slots=8):
    """Prompts and their cache."""
    model, params = make(config)
    history = history_of_prompts(prompts, capacity, pad_id=0)
    cache = init_cache(
        config,
        CacheShape(
            len(prompts),
            capacity,
            num_slots=num_slots,
            dtype=jnp.dtype(jnp.float32),
            platform="cpu",
        ),
    )
    prompts = left_padded(history, given.row_keys, COLUMNS)
    prefilled = prefill(model, params, prompts, cache, given.rule)
    return prefilled, history


def begin(config, given, **options):
    """The state that both ways of decoding start from."""
    return start(given, *read_prompts(config, given, **options))


def decoded(config, given, **options):
    """One by one."""
    return decode(*make(config), given, begin(config, given, **options), jnp.int32(1000))


def speculated(config, given, draft_depth=1, draft_length=3, **options):
    """State and statistics."""
    return speculate(
        *make(config),
        given,
        begin(config, given, **options),
        draft_depth=draft_depth,
        draft_length=draft_length,
    )


def rows(state):
    """The new tokens of each row."""
    history = state.history
    return [
        np.asarray(tokens)[first:last].tolist()
        for tokens, first, last in zip(
            history.tokens, history.prompt_lengths, history.lengths, strict=True
        )
    ]
