"""A tiny model, a tokenizer of its size, and greedy decoding without a cache.

The tests of generation share them.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from megatransformer_jax.config.layers import AttentionConfig
from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.recurrence import RecurrenceConfig
from megatransformer_jax.models.exit_criteria import DepthRule, exit_criterion
from megatransformer_jax.models.megatransformer import build_model, init_params
from megatransformer_jax.models.passes.cached import token_states
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy

DEPTH = 3
# By latent_diff at 0.3, its tokens leave after 2 to 8 iterations.
TINY = ModelConfig(
    vocab_size=32,
    width=16,
    max_length=80,
    core_layers=1,
    attention=AttentionConfig(num_heads=4),
    mlp=dataclasses.replace(ModelConfig().mlp, hidden_width=24),
    recurrence=RecurrenceConfig(
        mean_steps=DEPTH, backprop_depth=2, state_init="zero", iteration_norm=True
    ),
)
# Of unequal length, as most tests want them.
PROMPTS = ([1, 9, 4, 20, 7, 7, 21], [1, 5], [1, 12, 3, 3, 8, 17, 2, 25, 11, 6, 24])


def tiny(**changes):
    """TINY with changes to its sections, such as attention={'window': 3}."""
    values = {
        name: dataclasses.replace(getattr(TINY, name), **value)
        if isinstance(value, dict)
        else value
        for name, value in changes.items()
    }
    return dataclasses.replace(TINY, **values)


PLAIN = tiny(core_layers=0, prelude_layers=2, recurrence=RecurrenceConfig())


@functools.cache
def make(config=TINY, seed=0):
    """(model, parameters), the same objects for the same config, so that nothing compiles twice."""
    model = build_model(config, DTypePolicy(), Sharder(), "cpu")
    # Not `init_params` itself, which takes longer to compile than all else, and whose models score
    # all tokens nearly alike.
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        mean = float(path[-1].key == "scale")
        return jnp.asarray(rng.normal(mean, 0.25, leaf.shape), leaf.dtype)

    return model, jax.tree_util.tree_map_with_path(draw, shapes)


def depth_rule(depth=DEPTH, criterion="fixed", threshold=0.0, min_depth=1):
    return DepthRule(
        jnp.asarray(depth, jnp.int32),
        jnp.asarray(threshold, jnp.float32),
        jnp.asarray(min_depth, jnp.int32),
        exit_criterion(criterion),
    )


@functools.partial(jax.jit, static_argnames="model")
def _all_logits(model, params, tokens, depth, keys):
    config, state = model.config, None
    if keys is not None:
        places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        injected = jnp.zeros((*tokens.shape, config.core_width), jnp.float32)
        state = token_states(config, keys, places, injected)
    return model.apply({"params": params}, tokens, num_steps=depth, state=state).logits


def all_logits(model, params, ids, depth=DEPTH, key=None):
    """Logits of one whole text without a cache: [tokens, V].

    Args:
      ids: the text.
      depth: iterations.
      key: of the row, if its first states are drawn.
    """
    # What stands behind cannot be seen from before, so all lengths share one shape.
    padded = np.zeros((1, model.config.max_length), np.int32)
    padded[0, : len(ids)] = ids
    keys = None if key is None else key[None]
    logits = _all_logits(model, params, jnp.asarray(padded), jnp.int32(depth), keys)
    return np.asarray(logits)[0, : len(ids)]


def recomputed_greedy(model, params, prompt, count, depth=DEPTH, key=None, allowed=None):
    """The likeliest tokens behind a prompt, the whole text recomputed for each."""
    ids = list(prompt)
    for _ in range(count):
        logits = all_logits(model, params, ids, depth, key)[-1]
        if allowed is not None:
            logits = np.where(np.isin(np.arange(len(logits)), allowed), logits, -np.inf)
        ids.append(int(np.argmax(logits)))
    return ids[len(prompt) :]


def recomputed_score(model, params, prompt, new_ids, depth=DEPTH, key=None):
    """Sum of the new tokens' log-probabilities."""
    if not new_ids:
        return 0.0
    logits = all_logits(model, params, [*prompt, *new_ids], depth, key).astype(np.float64)
    log_probs = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    rows = np.arange(len(prompt) - 1, len(prompt) + len(new_ids) - 1)
    return float(np.sum(log_probs[rows, list(new_ids)]))


class Pieces:
    """A tokenizer for TINY: tokens of several letters, and parts of characters."""

    pad_id, bos_id, eos_id = 0, 1, 2
    pieces = (
        *(b"", b"", b""),
        *(b"a", b"b", b"c", b"ab", b"bc", b"abc", b" ", b" a", b"b c", b"\n", b"x", b"xab"),
        *(b"\xe2", b"\x82", b"\xac", b"\xe2\x82", b"\xc3", b"\xa9", b"\xac b", b"\xff", b"ca"),
        *(b"ba", b"cc"),
    )
    vocab_size = len(pieces)

    def digest(self) -> str:
        return "pieces"

    def encode(self, text: str) -> list[int]:
        ids, rest = [], text.encode()
        while rest:
            token = max(
                (i for i in range(3, self.vocab_size) if rest.startswith(self.pieces[i])),
                key=lambda i: len(self.pieces[i]),
            )
            ids.append(token)
            rest = rest[len(self.pieces[token]) :]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", "replace")

    def piece_bytes(self, token: int) -> bytes:
        return self.pieces[token]
