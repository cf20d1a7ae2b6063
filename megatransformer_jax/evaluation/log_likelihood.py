"""Log-likelihoods of continuations, by batches of few shapes.

scorer = LogLikelihoodScorer(model, params, depth=16, batch_size=8, max_length=1024)
(likelihood,) = scorer.score([Continuation(context=[1, 17, 4], tokens=[9, 2])])
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.models.megatransformer import MegaTransformer
from megatransformer_jax.models.passes.cached import token_states

# Rows are padded to a power of two from here on.
MIN_LENGTH = 16


@dataclasses.dataclass(frozen=True)
class Continuation:
    """Tokens to score behind others; neither is empty."""

    context: Sequence[int]
    tokens: Sequence[int]


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """What a model says about a continuation.

    Attributes:
      log_prob: sum of the tokens' log-probabilities, nats.
      is_greedy: whether each of them is the likeliest at its place.
    """

    log_prob: float
    is_greedy: bool


class LogLikelihoodScorer:
    """Scores continuations with one model at one depth.

    The longest come first, so that memory that does not suffice shows at once; results are in the
    order of the requests. Rows are padded to a power of two and batches are filled up, so few
    programs are compiled. A first state that is drawn at random depends on the place of a token
    only: what else is scored, and padding, change nothing.

    Args:
      model: the model, without a mesh.
      params: its parameters.
      depth: iterations of the core; None: the model has none.
      batch_size: rows that are scored at once.
      max_length: most tokens that the model reads at once. Longer contexts lose their beginning.
      seed: of the first states.

    Raises:
      ConfigError: if the model is not causal.
      ValueError: if depth does not go with the model, or a number is out of range.
    """

    def __init__(
        self,
        model: MegaTransformer,
        params: Any,
        *,
        depth: int | None,
        batch_size: int,
        max_length: int,
        seed: int = 0,
    ):
        if not model.config.attention.is_causal:
            raise ConfigError(
                "model.attention.is_causal",
                "is False, so every token sees the one that it must predict; likelihoods of text "
                "need a causal model.",
            )
        if model.config.is_recurrent != (depth is not None):
            fix = "a core, so give a number" if model.config.is_recurrent else "no core; give None"
            raise ValueError(f"depth is {depth}, but the model has {fix}.")
        if depth is not None and depth < 1:
            raise ValueError(f"depth is {depth}; it must be at least 1.")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
        if not 1 <= max_length <= model.config.max_length:
            raise ValueError(
                f"max_length is {max_length}; it must be 1 to {model.config.max_length}, the "
                "model's own."
            )
        self._model = model
        self._params = params
        self._depth = jnp.int32(1 if depth is None else depth)
        self._batch_size = batch_size
        self._max_length = max_length
        self._key = jax.random.key(seed)

    def score(
        self,
        requests: Sequence[Continuation],
        progress: Callable[[int], object] = lambda count: None,
    ) -> list[Likelihood]:
        """Scores continuations, in the order in which they are given.

        Args:
          requests: what to score. If context and continuation are longer than the model can read,
            the beginning of the context is left out.
          progress: called with the number of requests that were scored since.

        Raises:
          ValueError: if a context or a continuation is empty, or a continuation too long.
        """
        rows = [self._row(number, request) for number, request in enumerate(requests)]
        longest_first = sorted(range(len(rows)), key=lambda number: -len(rows[number][0]))
        found: dict[int, Likelihood] = {}
        for first in range(0, len(rows), self._batch_size):
            numbers = longest_first[first : first + self._batch_size]
            likelihoods = self._score_batch([rows[number] for number in numbers])
            found.update(zip(numbers, likelihoods, strict=True))
            progress(len(numbers))
        return [found[number] for number in range(len(rows))]

    def _row(self, number: int, request: Continuation) -> tuple[list[int], int]:
        """Tokens and how many of them, at the end, are scored."""
        count = len(request.tokens)
        if not count or not len(request.context):
            what = "context" if count else "continuation"
            raise ValueError(f"request {number} has an empty {what}; give at least one token.")
        if count > self._max_length:
            raise ValueError(
                f"request {number} has a continuation of {count} tokens, more than max_length="
                f"{self._max_length}; shorten it or raise max_length."
            )
        tokens = [*request.context, *request.tokens]
        # The last one is predicted, not read.
        return tokens[-(self._max_length + 1) :], count

    def _score_batch(self, rows: Sequence[tuple[list[int], int]]) -> list[Likelihood]:
        length = _padded_length(max(len(tokens) for tokens, _ in rows) - 1, self._max_length)
        shape = (self._batch_size, length)
        tokens, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        is_token, counts = np.zeros(shape, bool), np.zeros(shape, bool)
        for index, (row, count) in enumerate(rows):
            read = len(row) - 1
            tokens[index, :read] = row[:-1]
            targets[index, :read] = row[1:]
            is_token[index, :read] = True
            counts[index, read - count : read] = True
        log_probs, is_greedy = jax.device_get(
            _score(
                self._model,
                self._params,
                *map(jnp.asarray, (tokens, targets, is_token, counts)),
                self._depth,
                self._key,
            )
        )
        return [Likelihood(float(log_probs[row]), bool(is_greedy[row])) for row in range(len(rows))]


def _padded_length(length: int, max_length: int) -> int:
    return min(max(MIN_LENGTH, 1 << (length - 1).bit_length()), max_length)


@functools.partial(jax.jit, static_argnums=0)
def _score(
    model: MegaTransformer,
    params: Any,
    tokens: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    is_token: Bool[Array, "B T"],
    counts: Bool[Array, "B T"],
    depth: Int[Array, ""],
    key: Key[Array, ""],
) -> tuple[Float[Array, "B"], Bool[Array, "B"]]:
    output: Any = model.apply(
        {"params": params},
        tokens,
        segment_ids=is_token.astype(jnp.int32),
        num_steps=depth,
        state=_first_states(model, tokens, key),
    )
    log_probs = jax.nn.log_softmax(output.logits.astype(jnp.float32), axis=-1)
    of_targets = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    is_likeliest = jnp.argmax(output.logits, axis=-1) == targets
    total = jnp.sum(jnp.where(counts, of_targets, 0.0), axis=-1)
    return total, jnp.all(is_likeliest | ~counts, axis=-1)


def _first_states(
    model: MegaTransformer, tokens: Int[Array, "B T"], key: Key[Array, ""]
) -> Float[Array, "B T D"] | None:
    """The same draws in each row; None: the model makes its own, which are not drawn."""
    config = model.config
    if not config.is_recurrent or config.recurrence.state_init in ("zero", "none"):
        return None
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    keys = jnp.broadcast_to(key, tokens.shape[:1])
    like = jnp.zeros((*tokens.shape, config.core_width), model.policy.compute)
    return token_states(config, keys, places, like)
