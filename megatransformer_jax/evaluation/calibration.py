"""The cheapest threshold of an exit criterion that keeps the accuracy of the full depth.

One pass at full depth gives each token's value and answer at every iteration. What a threshold
would do follows from these at once, if tokens that exit change nothing for the others. So the pass
names the thresholds that are worth a try, and where to begin. Then they are tried as generation
would use them: token by token with the cache, where later tokens read what exited ones have left.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from megatransformer_jax.evaluation.answers import CachedAnswers, pass_problems
from megatransformer_jax.models.exit_criteria import (
    EXIT_CRITERIA,
    DepthRule,
    Observation,
    one_of,
)
from megatransformer_jax.models.megatransformer import MegaTransformer
from megatransformer_jax.models.passes.observed import open_core
from megatransformer_jax.nn.kv_cache import CacheShape, init_cache
from megatransformer_jax.types import Batch

# Thresholds that a criterion may get: quantiles of its values.
NUM_CANDIDATES = 64


@dataclasses.dataclass(frozen=True)
class ExitScores:
    """What exits come to, over the tokens that count.

    Attributes:
      accuracy: see `Judge`.
      mean_steps: iterations per token.
    """

    accuracy: float
    mean_steps: float


@dataclasses.dataclass(frozen=True)
class Exits:
    """The threshold that was found for a criterion; None: no threshold keeps the accuracy."""

    criterion: str
    threshold: float | None
    scores: ExitScores | None


class Judge:
    """What is right: the answers of problems, or on text what the full depth says.

    Args:
      batches: on the host; of each row only the first document counts.
      is_exact: a row counts as right if all of its answer is. Otherwise tokens count alone.
      wanted: the right tokens of each batch.
    """

    def __init__(self, batches: Sequence[Batch], is_exact: bool, wanted: Sequence[np.ndarray]):
        self._counts = [counted(batch) for batch in batches]
        self._is_exact, self._wanted = is_exact, wanted

    def score(self, predictions: Sequence[np.ndarray], steps: Sequence[np.ndarray]) -> ExitScores:
        """Scores what was predicted after so many iterations, per batch [B, T]."""
        right = total = iterations = tokens = 0
        for counts, wanted, said, made in zip(
            self._counts, self._wanted, predictions, steps, strict=True
        ):
            is_right = said == wanted
            if self._is_exact:
                has_answer = counts.any(axis=1)
                right += int(((is_right | ~counts).all(axis=1) & has_answer).sum())
                total += int(has_answer.sum())
            else:
                right += int((is_right & counts).sum())
                total += int(counts.sum())
            iterations += int(made[counts].sum())
            tokens += int(counts.sum())
        return ExitScores(right / total, iterations / tokens)


def counted(batch: Batch) -> np.ndarray:
    """The tokens of each row's first document that count, bool [B, T]."""
    segments = np.asarray(batch.segment_ids)
    return (np.asarray(batch.loss_mask) > 0) & (segments == segments[:, :1])


@functools.partial(jax.jit, static_argnames=("model", "names", "depth"))
def watch_criteria(
    model: MegaTransformer,
    params: Any,
    batch: Batch,
    key: Key[Array, ""],
    *,
    names: tuple[str, ...],
    depth: int,
) -> tuple[Float[Array, "n C B T"], Int[Array, "n B T"]]:
    """Each criterion's value of every token after every iteration, and its likeliest next token."""
    core = open_core(
        model, params, batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids
    )
    apply = functools.partial(model.apply, {"params": params})
    members = [EXIT_CRITERIA[name] for name in names]
    state = core.first_state(key)
    memories = tuple(member.init(state, model.config.vocab_size) for member in members)

    def body(carry: Any, number: jax.Array) -> Any:
        state, memories = carry
        state = core.iterate(state, number)
        _, hidden = apply(state, core.outer, method="run_coda")
        logits: Any = apply(hidden, method="run_head")
        gate: Any = apply(state, method="run_gate") if model.config.exit_gate.enabled else None
        seen = Observation(state, logits, gate)
        pairs = [member.measure(kept, seen) for member, kept in zip(members, memories, strict=True)]
        values = jnp.stack([value for value, _ in pairs])
        said = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return (state, tuple(kept for _, kept in pairs)), (values, said)

    _, seen = jax.lax.scan(body, (state, memories), jnp.arange(depth))
    return seen


@functools.partial(jax.jit, static_argnames=("model", "names", "depth"))
def pass_with_exits(
    model: MegaTransformer,
    params: Any,
    batch: Batch,
    keys: Key[Array, "B"],
    code: Int[Array, ""],
    threshold: Float[Array, ""],
    *,
    names: tuple[str, ...],
    depth: int,
) -> CachedAnswers:
    """Passes a batch token by token; the criterion is `names[code]`.

    As in generation, a criterion that reads logits leaves the tokens of a prompt alone, which here
    are those without a loss: they make all iterations.
    """
    size, length = batch.tokens.shape
    shape = CacheShape(size, length, depth, dtype=model.policy.compute, platform=model.platform)
    criterion = one_of(names, code)
    reads_logits = jnp.asarray([EXIT_CRITERIA[name].needs_logits for name in names])[code]
    waits = reads_logits & ~(batch.loss_mask > 0)
    least: Any = jnp.where(waits, depth, 1).astype(jnp.int32)
    rule = DepthRule(jnp.int32(depth), threshold, least, criterion)
    cache = init_cache(model.config, shape)
    return pass_problems(model, params, batch, cache, rule, keys)


class Search:
    """Finds thresholds for one model and its data.

    Args:
      model: with a core, on one device.
      params: its parameters.
      batches: on the host, without media.
      depth: the full depth, at least 2.
      key: of the core's first states.
      has_answers: whether the data are problems, whose answers are judged whole.
      names: of the criteria.
    """

    def __init__(
        self,
        model: MegaTransformer,
        params: Any,
        batches: Sequence[Batch],
        depth: int,
        key: jax.Array,
        *,
        has_answers: bool,
        names: Sequence[str],
    ):
        self._model, self._params, self._depth = model, params, depth
        self._batches = [jax.device_put(batch) for batch in batches]
        self._keys = [
            jax.random.split(jax.random.fold_in(key, number), len(batch.tokens))
            for number, batch in enumerate(batches)
        ]
        self._names = ("fixed", *names)
        said, steps = self._decode("fixed", 0.0)
        wanted = [np.asarray(batch.targets) for batch in batches] if has_answers else said
        self._judge = Judge(batches, has_answers, wanted)
        self.full = self._judge.score(said, steps)
        self._watched = [self._watch(batch, key) for batch in self._batches]
        self._counts = [counted(batch) for batch in batches]

    def find(self, name: str, share: float) -> Exits:
        """The loosest threshold of a criterion whose accuracy is this share of the full depth's."""
        candidates = self._candidates(name)
        goal = share * self.full.accuracy
        scores = (self._score_watched(name, candidate) for candidate in candidates)
        passing = (place for place, found in enumerate(scores) if found.accuracy >= goal)
        start = next(passing, len(candidates) - 1)
        found = find_first(
            candidates,
            lambda threshold: self._judge.score(*self._decode(name, threshold)),
            lambda scores: scores.accuracy >= goal,
            start,
        )
        return Exits(name, *(found or (None, None)))

    def _watch(self, batch: Batch, key: jax.Array) -> tuple[np.ndarray, np.ndarray]:
        values, said = watch_criteria(
            self._model, self._params, batch, key, names=self._names[1:], depth=self._depth
        )
        return np.asarray(values), np.asarray(said)

    def _decode(self, name: str, threshold: float) -> tuple[list[np.ndarray], list[np.ndarray]]:
        code = jnp.int32(self._names.index(name))
        answers = [
            pass_with_exits(
                self._model,
                self._params,
                batch,
                keys,
                code,
                jnp.float32(threshold),
                names=self._names,
                depth=self._depth,
            )
            for batch, keys in zip(self._batches, self._keys, strict=True)
        ]
        said = [np.asarray(answer.predictions) for answer in answers]
        return said, [np.asarray(answer.num_steps) for answer in answers]

    def _candidates(self, name: str) -> list[float]:
        """Thresholds from the loosest to the strictest."""
        if name == "argmax_stability":
            return [float(count) for count in range(1, self._depth)]
        values = np.concatenate(
            [
                self._of(name, watched)[:-1, counts]
                for watched, counts in zip(self._watched, self._counts, strict=True)
            ],
            axis=1,
        )
        finite = values[np.isfinite(values) & (values > 0)]
        if not finite.size:
            return []
        levels = np.quantile(finite, np.linspace(0, 1, NUM_CANDIDATES))
        # Three digits, rounded up: a value equal to the threshold does not settle its token.
        rounded = {float(f"{level * 1.005:.3g}") for level in levels}
        most = 1.0 if name == "learned_gate" else np.inf
        return sorted((level for level in rounded if 0 < level < most), reverse=True)

    def _of(self, name: str, watched: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        return watched[0][:, self._names.index(name) - 1]

    def _score_watched(self, name: str, threshold: float) -> ExitScores:
        """What a threshold would do if exits changed nothing for other tokens."""
        said, steps = [], []
        is_settled: Any = jax.vmap(EXIT_CRITERIA[name].is_settled, (0, None))
        for watched in self._watched:
            settled = np.array(is_settled(self._of(name, watched), jnp.float32(threshold)))
            settled[-1] = True
            exit_ = settled.argmax(axis=0)
            said.append(np.take_along_axis(watched[1], exit_[None], axis=0)[0])
            steps.append(exit_ + 1)
        return self._judge.score(said, steps)


def find_first(
    candidates: Sequence[float],
    score: Callable[[float], ExitScores],
    passes: Callable[[ExitScores], bool],
    start: int,
) -> tuple[float, ExitScores] | None:
    """The first candidate that passes, taking it that all behind it pass too; with its score.

    Looks at `start` first, then ever further from it, then halfway.
    """
    low, high, stride, place = 0, len(candidates), 1, start
    best = None
    while low < high:
        found = score(candidates[place])
        if passes(found):
            best, high = (candidates[place], found), place
            near = place - stride
        else:
            low, near = place + 1, place + stride
        stride *= 2
        place = near if low <= near < high else (low + high) // 2
    return best
