"""Beam search over any model of the next token, compiled into one loop.

In every round the running texts of a prompt are continued by each token, and the best
continuations are kept. Of these, a text that ends among the best `num_beams` competes for one of
the prompt's `num_beams` places for finished texts; the best `num_beams` that do not end go on. All
rules are those of Hugging Face's `generate`:

* A text's score is the sum of its tokens' scores, divided by length ** length_penalty when it
  finishes; length counts the generated tokens, the end token included.
* A token's score is its log-probability after the chain of logits processors, which gets
  log-probabilities in place of logits. They are not normalised again.
* A prompt is done once all its places for finished texts are taken, and: with early_stopping, at
  once; without, when its best running text, were it to end now, would not beat the worst finished
  one. That is a guess if length_penalty > 0, as a longer text may gain.

Other than there, prompts of a batch never wait for or change each other, -inf bans for good, and a
text in which the chain bans every token is finished as it is, for the reason EXHAUSTED.
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from megatransformer_jax.generation.endings import EXHAUSTED, RUNNING, Ending, EndState, exhaust
from megatransformer_jax.generation.history import History
from megatransformer_jax.generation.processors.processor import (
    Chain,
    apply_chain,
    init_chain,
    is_exhausted,
    update_chain,
)

# ------------------------------------------------------------------------------
# The texts that beam search holds, running or finished: pytrees with the axes [B, N].
#
# B prompts have N places each. A place whose score is -inf holds no text.

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


# ------------------------------------------------------------------------------
# The loop.


@runtime_checkable
class BeamModel(Protocol):
    """Continues texts; M = B * num_beams of them, those of a prompt next to each other.

    What it remembers of them is a pytree that the loop carries.
    """

    def advance(
        self, memory: Any, tokens: Int[Array, "M"], is_running: Bool[Array, "M"]
    ) -> tuple[Float[Array, "M V"], Int[Array, "M"], Any]:
        """Reads one token of each running text: the next one's logits, iterations, memory."""
        ...

    def reorder(self, memory: Any, rows: Int[Array, "M"]) -> Any:
        """The memory in which text m is what text rows[m] was; of the same prompt always."""
        ...


@struct.dataclass
class BeamSettings:
    """What stays the same from token to token. Numbers are for all, [], or per prompt, [B].

    Attributes:
      chain: logits processors; they see one text of each prompt at a time.
      ending: what ends a text.
      length_penalty: float32.
      early_stopping: bool.
      num_beams: N, static.
    """

    chain: Chain
    ending: Ending
    length_penalty: Any
    early_stopping: Any
    num_beams: int = struct.field(pytree_node=False)

    @property
    def num_candidates(self) -> int:
        """Continuations that are looked at per beam.

        One that goes on remains for every beam even if each end token comes first. More tokens may
        complete a stop text; then fewer beams may go on for a round.
        """
        num_ends = max(1, self.ending.end_ids.shape[0])
        return 1 + num_ends + (self.ending.stops is not None)


@struct.dataclass
class _State:
    """What changes from token to token.

    The last token of a running text is in the history, but not in the memory yet.
    """

    memory: Any
    running: Hypotheses
    chain_states: Any
    finished: Hypotheses


def search(
    model: BeamModel,
    memory: Any,
    settings: BeamSettings,
    history: History,
    logits: Float[Array, "B V"],
    num_steps: Int[Array, "B"],
) -> Hypotheses:
    """The best finished texts of each prompt, [B, N], best first.

    To be called under jit.

    Args:
      model: continues texts.
      memory: the model's, of every prompt N times.
      settings: of the search.
      history: the prompts, with room for the new tokens: a text that is full would never end.
      logits: behind each prompt.
      num_steps: iterations that led to them.
    """
    num_beams = settings.num_beams
    running = first_hypotheses(history, settings.ending, num_beams)
    state = _State(
        memory=memory,
        running=running,
        chain_states=repeat_beams(init_chain(settings.chain, history), num_beams),
        finished=no_hypotheses(running),
    )

    def add_one(state: _State) -> _State:
        running = state.running
        logits, num_steps, memory = model.advance(
            state.memory, running.last_tokens.reshape(-1), running.is_text.reshape(-1)
        )
        shape = running.scores.shape
        state = state.replace(memory=memory)  # type: ignore[attr-defined]
        return _add_token(
            model, settings, state, logits.reshape(*shape, -1), num_steps.reshape(shape)
        )

    state = _add_token(
        model, settings, state, repeat_beams(logits, num_beams), repeat_beams(num_steps, num_beams)
    )
    return jax.lax.while_loop(lambda state: jnp.any(state.running.is_text), add_one, state).finished


def _add_token(
    model: BeamModel,
    settings: BeamSettings,
    state: _State,
    logits: Float[Array, "B N V"],
    num_steps: Int[Array, "B N"],
) -> _State:
    """Continues the running texts, sorts out which have ended, and which prompts are done."""
    candidates, parents = _continuations(
        settings, state.running, state.chain_states, logits, num_steps
    )
    has_ended = candidates.end.reason != RUNNING
    finished = _finished(settings, state.finished, candidates, has_ended)

    scores, places = jax.lax.top_k(
        jnp.where(has_ended, NO_TEXT, candidates.scores), settings.num_beams
    )
    running: Any = take_beams(candidates, places).replace(scores=scores)  # type: ignore[attr-defined]
    is_done = _is_done(settings, running, finished)
    running = running.replace(scores=jnp.where(is_done[:, None], NO_TEXT, scores))

    # Places without a text keep what they have, so that done prompts cost nothing.
    own_places = jnp.arange(settings.num_beams)
    parents = jnp.where(running.is_text, jnp.take_along_axis(parents, places, axis=1), own_places)

    def update(states: Any, history: History, tokens: jax.Array) -> Any:
        return update_chain(settings.chain, states, history, tokens)

    chain_states = _over_beams(update)(
        take_beams(state.chain_states, parents), running.history, running.last_tokens
    )
    first_rows = settings.num_beams * jnp.arange(parents.shape[0])[:, None]
    memory = state.memory
    if settings.num_beams > 1:
        memory = model.reorder(memory, (first_rows + parents).reshape(-1))
    return _State(memory, running, chain_states, finished)


def _continuations(
    settings: BeamSettings,
    running: Hypotheses,
    chain_states: Any,
    logits: Float[Array, "B N V"],
    num_steps: Int[Array, "B N"],
) -> tuple[Hypotheses, Int[Array, "B M"]]:
    """The best continuations of each prompt's texts, best first, and which places they are from.

    Their scores are sums without a length penalty.
    """
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)

    def process(states: Any, history: History, log_probs: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores = apply_chain(settings.chain, states, history, log_probs)
        return scores, is_exhausted(scores)

    added, exhausted = _over_beams(process)(chain_states, running.history, log_probs)
    # A text that cannot go on stands in the place of its first continuation.
    is_stand_in = exhausted[..., None] & (jnp.arange(added.shape[-1]) == 0)
    added = jnp.where(is_stand_in, 0.0, added)
    # The logits in an empty place may be anything.
    sums = jnp.where(running.is_text[..., None], running.scores[..., None] + added, NO_TEXT)

    num_tokens = logits.shape[-1]
    sums = sums.reshape(sums.shape[0], -1)
    count = min(settings.num_candidates * settings.num_beams, sums.shape[1])
    scores, places = jax.lax.top_k(sums, count)
    parents, tokens = places // num_tokens, (places % num_tokens).astype(jnp.int32)

    is_added = ~take_beams(exhausted, parents)
    before = take_beams(running, parents)
    history = _over_beams(History.append)(before.history, tokens, is_added)
    columns = jnp.arange(history.tokens.shape[-1])
    is_new = is_added[..., None] & (columns == before.history.lengths[..., None])
    gained = log_probs[jnp.arange(parents.shape[0])[:, None], parents, tokens]
    end = _over_beams(exhaust)(before.end, ~is_added)
    num_generated = history.lengths - history.prompt_lengths
    continuations = Hypotheses(
        history=history,
        steps=jnp.where(is_new, take_beams(num_steps, parents)[..., None], before.steps),
        scores=scores,
        log_probs=before.log_probs + jnp.where(is_added, gained, 0.0),
        end=_over_beams(settings.ending.update)(end, tokens, num_generated),
    )
    return continuations, parents


def _finished(
    settings: BeamSettings,
    finished: Hypotheses,
    candidates: Hypotheses,
    has_ended: Bool[Array, "B M"],
) -> Hypotheses:
    """The best of what was finished and of the candidates that end among the best num_beams."""
    num_beams = settings.num_beams
    sums = jnp.where(has_ended, candidates.scores, NO_TEXT)
    scores = penalise_length(sums, candidates.num_generated, settings.length_penalty)
    ended: Any = candidates.replace(scores=scores)  # type: ignore[attr-defined]
    first = jax.tree.map(lambda leaf: leaf[:, :num_beams], ended)
    return best_of(finished, first, num_beams)


def _is_done(settings: BeamSettings, running: Hypotheses, finished: Hypotheses) -> Bool[Array, "B"]:
    """Prompts for which no running text is to go on."""
    best = slice(0, 1)  # Running texts are in order too.
    best_running = penalise_length(
        running.scores[:, best], running.num_generated[:, best], settings.length_penalty
    )[:, 0]
    cannot_improve = best_running <= finished.scores[:, -1]
    return jnp.all(finished.is_text, axis=1) & (settings.early_stopping | cannot_improve)


def _over_beams(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of one text per prompt, applied to all texts: [B, ...] becomes [B, N, ...].

    So settings may be per prompt without anyone knowing which axes of theirs are.
    """
    return jax.vmap(function, in_axes=1, out_axes=1)
