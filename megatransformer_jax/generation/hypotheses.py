"""The texts that beam search holds, running or finished: pytrees with the axes [B, N].

B prompts have N places each. A place whose score is -inf holds no text.
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from megatransformer_jax.generation.ending import EXHAUSTED, Ending, EndState
from megatransformer_jax.generation.history import History

NO_TEXT = -jnp.inf
Tree = TypeVar("Tree")


@struct.dataclass
class Hypotheses:
    """N texts of each prompt.

    Attributes:
      history: tokens [B, N, C], lengths and prompt_lengths [B, N].
      steps: int32 [B, N, C], in the history's columns: iterations of the pass that led to a
        generated token; 0 in the prompt.
      scores: float32 [B, N], what texts are ranked by; NO_TEXT in an empty place.
      log_probs: float32 [B, N], sum of the new tokens' log-probabilities under the model.
      end: why a text has ended, and its stop automaton's state, [B, N].
    """

    # Any because transformations put other things in the arrays' place.
    history: Any
    steps: Any
    scores: Any
    log_probs: Any
    end: Any

    @property
    def is_text(self) -> Bool[Array, "B N"]:
        """Places that hold a text."""
        return jnp.isfinite(self.scores)

    @property
    def num_generated(self) -> Int[Array, "B N"]:
        """Tokens behind the prompts."""
        return self.history.lengths - self.history.prompt_lengths

    @property
    def last_tokens(self) -> Int[Array, "B N"]:
        """The newest token of each text."""
        last = self.history.lengths[..., None] - 1
        return jnp.take_along_axis(self.history.tokens, last, axis=-1)[..., 0]


def first_hypotheses(history: History, ending: Ending, num_beams: int) -> Hypotheses:
    """Each prompt at score 0 in its first place; the others are empty, so no text comes twice."""
    batch_size = history.tokens.shape[0]
    prompts = Hypotheses(
        history=history,
        steps=jnp.zeros(history.tokens.shape, jnp.int32),
        scores=jnp.zeros((batch_size,), jnp.float32),
        log_probs=jnp.zeros((batch_size,), jnp.float32),
        end=ending.init(batch_size),
    )
    repeated: Any = repeat_beams(prompts, num_beams)
    is_first = jnp.arange(num_beams) == 0
    hypotheses: Hypotheses = repeated.replace(scores=jnp.where(is_first, repeated.scores, NO_TEXT))
    return hypotheses


def no_hypotheses(like: Hypotheses) -> Hypotheses:
    """Empty places: prompts without new tokens."""
    empty: Any = like
    end = EndState(jnp.full_like(empty.end.reason, EXHAUSTED), empty.end.stop_state)
    none = jnp.full_like(empty.scores, NO_TEXT)
    hypotheses: Hypotheses = empty.replace(scores=none, log_probs=none, end=end)
    return hypotheses


def repeat_beams(tree: Tree, num_beams: int) -> Tree:
    """Leaves [B, ...] as [B, N, ...]."""
    return jax.tree.map(lambda leaf: jnp.repeat(leaf[:, None], num_beams, axis=1), tree)


def take_beams(tree: Tree, places: Int[Array, "B M"]) -> Tree:
    """Of leaves [B, N, ...] the entries at `places`, as [B, M, ...]."""
    prompts = jnp.arange(places.shape[0])[:, None]
    return jax.tree.map(lambda leaf: leaf[prompts, places], tree)


def best_of(first: Hypotheses, second: Hypotheses, count: int) -> Hypotheses:
    """The best `count` of both, best first; of equal ones those of `first`."""
    both = jax.tree.map(lambda a, b: jnp.concatenate((a, b), axis=1), first, second)
    return take_beams(both, jax.lax.top_k(both.scores, count)[1])


def penalise_length(
    sums: Float[Array, "B M"],
    num_generated: Int[Array, "B M"],
    length_penalty: Float[Array, ""] | Float[Array, "B"],
) -> Float[Array, "B M"]:
    """sum / length ** length_penalty, where length counts the generated tokens, the end included.

    As Hugging Face's. It is finite for every text, whatever overflows, and NO_TEXT for none.
    """
    lengths = jnp.maximum(num_generated, 1).astype(jnp.float32)
    scores = sums / lengths ** length_penalty[..., None]
    return jnp.where(jnp.isfinite(sums), jnp.nan_to_num(scores, nan=0.0), NO_TEXT)
