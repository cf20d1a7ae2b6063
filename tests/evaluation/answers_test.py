import jax
import jax.numpy as jnp

from megatransformer_jax.evaluation.answers import answer_samples
from megatransformer_jax.evaluation.validation import EvalSums
from megatransformer_jax.types import Batch


def test_problem_wanted_answer_and_an_answer_per_depth():
    tokens = jnp.array([[1, 2, 3, 0], [4, 5, 6, 0], [7, 7, 7, 7]], jnp.int32)
    targets = jnp.array([[2, 3, 4, 0], [5, 6, 7, 0], [7, 7, 7, 7]], jnp.int32)
    mask = jnp.array([[0, 1, 1, 0], [0, 0, 1, 0], [1, 1, 1, 1]], jnp.float32)
    segments = jnp.array([[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]], jnp.int32)
    batch = Batch(tokens, targets, mask, segments, jnp.zeros_like(tokens))

    def eval_step(params, batch, num_steps):
        zero = jnp.float32(0)
        return EvalSums(zero, zero, zero, zero, zero), batch.tokens + num_steps

    def decode(ids):
        return "".join(map(str, ids))

    texts = answer_samples({}, jax.jit(eval_step), batch, (1, 2), decode, count=2)
    assert texts[0].splitlines() == [
        "123",
        "  wanted: 34",
        "  depth 1: 34  [right]",
        "  depth 2: 45  [wrong]",
    ]
    assert texts[1].splitlines()[0] == "456" and "depth 1: 7  [right]" in texts[1]
    assert len(texts) == 2
