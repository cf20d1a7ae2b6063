"""What every decoder of media must do, for tests that give it a decoder.

A case has a decoder, media that it takes and their lengths (None for images). All its weights are
random, because some start at zero and would hide what comes before them.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from megatransformer_jax.models.media.decoder import Condition

CONTEXT_LENGTH = 3


@dataclasses.dataclass
class DecoderCase:
    """A decoder with weights, and media for it; compiled functions are kept."""

    decoder: Any
    media: jax.Array  # of at least 3 media
    lengths: jax.Array | None
    context_width: int
    settings: Any  # few steps

    def __post_init__(self):
        self.condition = random_condition(len(self.media), self.context_width)
        self.variables = self._random_variables()
        # One program for the terms and the gradients takes less time to compile than two.
        self._terms_and_gradients = jax.jit(self._apply_loss)
        self._sample = jax.jit(self._apply_sample)

    def loss(self, media, lengths, condition, key, variables=None):
        arguments = media, lengths, condition, key
        return self._terms_and_gradients(variables or self.variables, *arguments)[0]

    def gradients(self, condition, key):
        """Of the mean loss by the weights."""
        arguments = self.variables, self.media, self.lengths, condition, key
        return self._terms_and_gradients(*arguments)[1]

    def sample(self, condition, key, lengths=None):
        return self._sample(self.variables, condition, key, lengths)

    def _apply_loss(self, variables, *arguments):
        def mean_loss(variables):
            terms = self.decoder.apply(variables, *arguments, method="loss")
            return jnp.mean(terms["loss"]), terms

        gradients, terms = jax.grad(mean_loss, has_aux=True)(variables)
        return terms, gradients

    def _apply_sample(self, variables, condition, key, lengths):
        return self.decoder.apply(
            variables, condition, key, lengths, self.settings, method="sample"
        )

    def _random_variables(self):
        arguments = self.media[:1], first(self.lengths), first(self.condition), jax.random.key(1)
        init = lambda key: self.decoder.init(key, *arguments, method="loss")  # noqa: E731
        boxed = jax.eval_shape(init, jax.random.key(0))
        for leaf in jax.tree.leaves(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned)):
            assert isinstance(leaf, nn.Partitioned), "a parameter without axes"
        leaves, tree = jax.tree.flatten(nn.meta.unbox(boxed))
        rng = np.random.default_rng(0)
        made = [
            rng.normal(size=leaf.shape) / max(1, np.prod(leaf.shape[:-1])) ** 0.5 for leaf in leaves
        ]
        return jax.tree.unflatten(tree, [jnp.asarray(leaf, jnp.float32) for leaf in made])


def first(tree, count=1):
    """The first media of everything."""
    return jax.tree.map(lambda leaf: leaf[:count], tree)


def random_condition(count, width):
    """Conditions of CONTEXT_LENGTH, 1, 2, ... vectors; they stand last, as windows have them."""
    lengths = np.array([CONTEXT_LENGTH, *(1 + np.arange(count - 1) % CONTEXT_LENGTH)])
    is_context = np.arange(CONTEXT_LENGTH) >= CONTEXT_LENGTH - lengths[:, None]
    context = jax.random.normal(jax.random.key(7), (count, CONTEXT_LENGTH, width))
    return Condition(context, jnp.asarray(is_context))


def check_protocol_and_shapes(case):
    terms = case.loss(case.media, case.lengths, case.condition, jax.random.key(2))
    for name, values in terms.items():
        assert values.shape == (len(case.media),), name
        assert values.dtype == jnp.float32
        assert np.all(np.isfinite(values))
    assert np.all(np.asarray(terms["loss"]) > 0)
    made, lengths = case.sample(case.condition, jax.random.key(3), case.lengths)
    assert made.shape == case.media.shape
    assert made.dtype == jnp.float32
    assert np.all(np.isfinite(made))
    if case.lengths is None:
        assert lengths is None
    else:
        np.testing.assert_array_equal(lengths, case.lengths)
        beyond = np.arange(made.shape[1]) >= np.asarray(lengths)[:, None]
        assert np.all(np.asarray(made)[beyond] == 0)


def check_media_are_independent(case):
    """Other media, their conditions and their lengths change nothing of the first medium."""
    key = jax.random.key(4)
    last = len(case.media) - 1
    terms = case.loss(case.media, case.lengths, case.condition, key)
    others = jax.tree.map(lambda leaf: leaf.at[last].set(leaf[0]), case.condition)
    lengths = None if case.lengths is None else case.lengths.at[last].set(1)
    changed = case.loss(case.media.at[last].multiply(-0.5), lengths, others, key)
    for name, values in terms.items():
        np.testing.assert_allclose(changed[name][:last], values[:last], rtol=1e-5, atol=1e-6)
    assert abs(changed["loss"][last] - terms["loss"][last]) > 1e-4
    made, _ = case.sample(case.condition, key, case.lengths)
    other, _ = case.sample(others, key, lengths)
    np.testing.assert_allclose(other[:last], made[:last], rtol=1e-4, atol=1e-4)
    assert np.max(np.abs(made[0] - made[last])) > 1e-3


def check_conditions_matter_and_masked_ones_do_not(case):
    key, condition = jax.random.key(5), case.condition
    terms = case.loss(case.media, case.lengths, condition, key)["loss"]
    made, _ = case.sample(condition, key, case.lengths)
    hidden = jnp.where(condition.is_context[..., None], condition.context, 1e3)
    masked = condition.replace(context=hidden)
    np.testing.assert_allclose(
        case.loss(case.media, case.lengths, masked, key)["loss"], terms, rtol=1e-5
    )
    np.testing.assert_allclose(
        case.sample(masked, key, case.lengths)[0], made, rtol=1e-4, atol=1e-4
    )
    # Earlier vectors of a context count as well as the last.
    earlier = condition.replace(context=condition.context.at[0, 0].multiply(-1))
    assert np.max(np.abs(case.sample(earlier, key, case.lengths)[0][0] - made[0])) > 1e-4
    nothing = condition.replace(is_context=jnp.zeros_like(condition.is_context))
    unsaid = case.loss(case.media, case.lengths, nothing, key)["loss"]
    assert np.all(np.isfinite(unsaid))
    assert np.max(np.abs(unsaid - terms)) > 1e-4
    other = case.loss(case.media, case.lengths, nothing.replace(context=-hidden), key)["loss"]
    np.testing.assert_array_equal(other, unsaid)


def check_gradients_reach_all_parameters(case, without=()):
    """Of a mean loss over conditions that are said and not said.

    Args:
      case: of which.
      without: words in the paths of parameters that the loss must leave alone.
    """
    half = case.condition.replace(is_context=case.condition.is_context.at[1].set(False))
    gradients = case.gradients(half, jax.random.key(6))
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        name = jax.tree_util.keystr(path)
        assert np.all(np.isfinite(leaf)), name
        if any(word in name for word in without):
            assert np.all(leaf == 0), name
        else:
            assert np.max(np.abs(leaf)) > 0, name


def check_remat_keeps_less_and_changes_nothing(case, rematerialized):
    """The same gradients of the same parameters from less than is kept without.

    Args:
      case: of a decoder without rematerialisation.
      rematerialized: the decoder of the case with remat='full'.
    """
    other = DecoderCase(rematerialized, case.media, case.lengths, case.context_width, case.settings)
    plain, again = (c.gradients(c.condition, jax.random.key(6)) for c in (case, other))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), plain, again)
    assert _kept_bytes(other) < 0.6 * _kept_bytes(case)


def _kept_bytes(case):
    """What the forward pass hands to the backward pass beyond its arguments."""
    sizes = []

    def trace(variables, *arguments):
        loss = lambda variables: case.decoder.apply(variables, *arguments, method="loss")["loss"]  # noqa: E731
        backward = jax.vjp(loss, variables)[1]
        given = {id(leaf) for leaf in jax.tree.leaves((variables, arguments))}
        kept = {id(leaf): leaf for leaf in jax.tree.leaves(backward) if id(leaf) not in given}
        sizes.extend(leaf.size * leaf.dtype.itemsize for leaf in kept.values())

    arguments = case.media, case.lengths, case.condition, jax.random.key(6)
    jax.eval_shape(trace, case.variables, *arguments)
    return sum(sizes)


CHECKS = (
    check_protocol_and_shapes,
    check_media_are_independent,
    check_conditions_matter_and_masked_ones_do_not,
)
