import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from megatransformer_jax.evaluation.validation import (
    PROBLEM_SCORES,
    TEXT_SCORES,
    EvalSums,
    ScoreHook,
    ValidationSet,
    depth_argument,
    make_eval_step,
    mean_scores,
    scores_by_name,
)
from megatransformer_jax.types import Batch, ModelOutput

VOCAB = 7


class Traces:
    """Counts how often a module is traced."""

    count = 0


class FakeModel(nn.Module):
    """Says token + num_steps; `traces` counts how often it is traced."""

    traces: Traces

    @nn.compact
    def __call__(self, tokens, *, positions, segment_ids, num_steps, **options):
        assert options == {"deterministic": True, "backprop_depth": 0, "media": None}
        self.traces.count += 1
        scale = self.param("scale", nn.initializers.ones, ())
        logits = scale * 4.0 * jax.nn.one_hot((tokens + num_steps) % VOCAB, VOCAB)
        return ModelOutput(logits, logits)


def make_batch(tokens, targets, mask) -> Batch:
    tokens, targets = jnp.array(tokens, jnp.int32), jnp.array(targets, jnp.int32)
    ones = jnp.ones_like(tokens)
    return Batch(tokens, targets, jnp.array(mask, jnp.float32), ones, ones)


BATCH = make_batch(
    [[0, 1, 2], [3, 4, 5], [0, 0, 0], [1, 1, 1]],
    [[1, 2, 3], [4, 0, 6], [6, 1, 6], [2, 2, 2]],
    [[1, 1, 1], [1, 1, 1], [0, 1, 0], [0, 0, 0]],
)
PARAMS = {"scale": jnp.float32(1.0)}


class RandomModel(nn.Module):
    """Says what the stream 'state' draws, more of it at a greater depth."""

    @nn.compact
    def __call__(self, tokens, *, num_steps, **options):
        noise = jax.random.normal(self.make_rng("state"), (*tokens.shape, VOCAB))
        return ModelOutput(noise * num_steps, noise)


def test_votes_against_numpy():
    """The likeliest tokens of separate passes, the more probable of those with as many votes."""
    key = jax.random.key(3)
    keys = [key, *(jax.random.fold_in(key, vote) for vote in (1, 2, 3))]
    logits = np.stack(
        [
            RandomModel().apply({}, BATCH.tokens, num_steps=2, rngs={"state": one}).logits
            for one in keys
        ]
    )
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    said, mean = logits.argmax(-1), probs.mean(0)
    wanted = np.zeros(BATCH.tokens.shape, np.int32)
    has_equal_votes = False
    for place in np.ndindex(*wanted.shape):
        counts = np.bincount(said[(slice(None), *place)], minlength=VOCAB)
        most = np.flatnonzero(counts == counts.max())
        has_equal_votes |= len(most) > 1
        wanted[place] = max(most, key=lambda token: mean[place][token])
    assert has_equal_votes
    step = make_eval_step(RandomModel(), key, votes=4)
    sums, predictions = jax.jit(step)({}, BATCH, jnp.int32(2))
    np.testing.assert_array_equal(predictions, wanted)
    mask, targets = np.asarray(BATCH.loss_mask), np.asarray(BATCH.targets)
    of_targets = np.take_along_axis(mean, targets[..., None], -1)[..., 0]
    assert sums.cross_entropy == pytest.approx(-np.sum(np.log(of_targets) * mask), rel=1e-5)
    assert sums.correct == np.sum((wanted == targets) * mask)
    # One vote is the pass from the same key.
    alone = make_eval_step(RandomModel(), key)({}, BATCH, jnp.int32(2))[1]
    np.testing.assert_array_equal(alone, said[0])


def test_sums_against_numpy():
    step = make_eval_step(FakeModel(Traces()), jax.random.key(0))
    sums, predictions = step(PARAMS, BATCH, jnp.int32(1))
    np.testing.assert_array_equal(predictions, (np.asarray(BATCH.tokens) + 1) % VOCAB)
    right = np.exp(4.0) / (np.exp(4.0) + VOCAB - 1)
    wrong = 1.0 / (np.exp(4.0) + VOCAB - 1)
    # Seven tokens count, all but one of them right; the last row has none that counts.
    assert float(sums.cross_entropy) == pytest.approx(-6 * np.log(right) - np.log(wrong), rel=1e-5)
    assert [float(x) for x in sums[1:]] == [7, 6, 2, 3]


def test_one_compilation_serves_all_depths():
    traces = Traces()
    eval_step = jax.jit(make_eval_step(FakeModel(traces), jax.random.key(0)))
    validation_set = ValidationSet([BATCH, BATCH], eval_step)
    accuracies = [validation_set.score(PARAMS, depth).accuracy for depth in (1, 2, 4, 8, 16, 32)]
    assert traces.count == 1
    assert accuracies[0] == pytest.approx(6 / 7)
    assert accuracies[3] == pytest.approx(6 / 7)  # 8 = 1 modulo 7
    assert accuracies[1] < 0.2


def test_scores_are_means_over_tokens_of_all_batches_not_of_batch_means():
    sums = [
        EvalSums(*map(np.float32, (10.0, 10, 5, 1, 2))),
        EvalSums(*map(np.float32, (90.0, 30, 25, 2, 2))),
    ]
    scores = mean_scores(4, sums)
    assert scores.loss == pytest.approx(2.5) and scores.perplexity == pytest.approx(np.exp(2.5))
    assert scores.accuracy == pytest.approx(0.75) and scores.exact_accuracy == pytest.approx(0.75)
    assert (scores.depth, scores.tokens) == (4, 40)


def test_no_token_that_counts_is_an_error():
    with pytest.raises(ValueError, match="no token"):
        mean_scores(1, [EvalSums(*[np.float32(0)] * 5)])


@pytest.mark.parametrize("names", [TEXT_SCORES, PROBLEM_SCORES])
def test_hook_names_what_the_checkpoint_looks_for(names):
    class State:
        params = PARAMS

    step = jax.jit(make_eval_step(FakeModel(Traces()), jax.random.key(0)))
    validation = ValidationSet([BATCH], step)

    def score(params):
        return scores_by_name(validation.score(params, 1), names)

    values = ScoreHook(10, score, lambda state: state.params)(10, State(), {})
    assert list(values) == [f"validation/{name}" for name in names]
    assert values["validation/accuracy"] == validation.score(PARAMS, 1).accuracy
    if "exact_accuracy" in names:
        assert values["validation/exact_accuracy"] == pytest.approx(2 / 3)


def test_depth_argument_of_a_model_without_core_is_one():
    assert int(depth_argument(None)) == 1 and depth_argument(5).dtype == jnp.int32
