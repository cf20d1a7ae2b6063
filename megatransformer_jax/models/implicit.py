"""The implicit gradient: that of a core which has settled, at the cost of one iteration's memory.

A settled state solves s = f(s, w): one more iteration f changes nothing. Its derivative by the
weights w follows from this equation alone, whatever iterations led there (deep equilibrium models,
arXiv 1909.01377):

    ds/dw = (1 - J)^-1 df/dw,   J = df/ds

So the loop stores nothing and may be as deep as it likes. A gradient v by s becomes

    u = v + J^T v + (J^T)^2 v + ...   k terms, each a product with J^T

and is pulled back through one iteration. This is what truncated backpropagation through k
iterations computes where all of them stand at the same state. With k = 1 the two are the same
anywhere, and so is the phantom gradient of arXiv 2111.05177 in its simplest form.

Near a fixed point the sum converges as fast as the iteration does. Away from one it is a guess,
whose size only the number of terms bounds.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from megatransformer_jax.models.core import Pass, first_iteration, recur

# ------------------------------------------------------------------------------
# Iterating until the state settles.


class Settled(NamedTuple):
    """Where a row's iterations have led.

    Attributes:
      state: the core's last state.
      residual: |s_n - s_{n-1}| / |s_n| of each row, over its tokens that are not padding.
      iterations: n, those that the row made; of its deepest token.
    """

    state: Float[Array, "B T D"]
    residual: Float[Array, "B"]
    iterations: Int[Array, "B"]


# What the loops carry: step, state, iterations made and what has settled; number, term and total.
_Iterated = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
_Summed = tuple[jax.Array, jax.Array, jax.Array]


class _Rule(NamedTuple):
    """What is static: terms of the sum, the tolerance, whether the backward pass computes the last
    iteration again rather than keep its values, and the structure of the pass."""

    terms: int
    tolerance: float
    recomputes: bool
    structure: jax.tree_util.PyTreeDef


def settle(
    core: Pass,
    state: Float[Array, "B T D"],
    num_steps: Int[Array, "*draws"],
    *,
    terms: int,
    tolerance: float = 0.0,
    recomputes: bool = False,
) -> Settled:
    """Iterates the core as `recur` does, and differentiates the result as a fixed point.

    Gradients reach the core's weights and what is injected, and not the first state. All iterations
    of a pass have the same dropout masks, because nothing settles under changing ones.

    Args:
      core: what its iterations are given; without loop parameters.
      state: the state to begin with.
      num_steps: as of `recur`, at least 1: the most iterations of all rows, of each, or of each
        token.
      terms: k, at least 1. A row that has not settled has at most as many terms as iterations.
      tolerance: a row whose residual is no larger has settled and is iterated once more only, for
        the gradient. Its sum ends before a term that is no larger than this share of the sum. 0:
        all iterations and terms.
      recomputes: the backward pass computes the last iteration again; otherwise its values wait
        for it.
    """
    if core.core is not None and recomputes:  # Once, and not once per term.
        config = dataclasses.replace(core.core.config, remat="none")
        core = core.replace(core=core.core.copy(config=config, parent=None))  # type: ignore[attr-defined]
    leaves, structure = jax.tree.flatten(core)
    rule = _Rule(terms, tolerance, recomputes, structure)
    return Settled(*_settle(rule, _learned(core), leaves, state, num_steps))


def _learned(core: Pass) -> tuple[Any, ...]:
    """What gradients flow to; the same as `Pass.stopped` stops."""
    return core.params, core.prepared, core.context.value_embeddings


def _with_learned(core: Pass, learned: tuple[Any, ...]) -> Pass:
    params, prepared, values = learned
    context = dataclasses.replace(core.context, value_embeddings=values)
    changed: Pass = core.replace(  # type: ignore[attr-defined]
        params=params, prepared=prepared, context=context
    )
    return changed


def _advance(core: Pass, state: jax.Array, has_begun: jax.Array) -> jax.Array:
    """One iteration of the tokens that have begun. Iterations do not differ, so each is number 0,
    also for dropout."""
    return jnp.where(has_begun, core.iterate(state, 0), state)


def _approach(
    rule: _Rule, core: Pass, state: jax.Array, num_steps: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """All iterations but the last one of each row: the state, how many were made, and whether the
    row has settled."""
    total = jnp.max(num_steps)
    begin = first_iteration(num_steps, total)
    by_token = jnp.broadcast_to(begin, (*state.shape[:2], 1))[..., 0]
    first, latest = jnp.min(by_token, axis=1), jnp.max(by_token, axis=1)
    is_settled = jnp.zeros(len(state), bool)
    if not rule.tolerance:
        state = jax.lax.fori_loop(0, total - 1, lambda i, s: _advance(core, s, i >= begin), state)
        return state, total - 1 - first, is_settled

    def go_on(carry: _Iterated) -> jax.Array:
        step, _, _, is_settled = carry
        return (step < total - 1) & ~jnp.all(is_settled)

    def iterate(carry: _Iterated) -> _Iterated:
        step, state, made, is_settled = carry
        moves = ~is_settled[:, None, None]
        new_state = _advance(core, state, moves & (step >= begin))
        is_still = _residual(core, state, new_state) <= rule.tolerance
        made = made + (~is_settled & (step >= first))
        return step + 1, new_state, made, is_settled | (is_still & (step >= latest))

    made = jnp.zeros(len(state), total.dtype)
    carry = (jnp.zeros_like(total), state, made, is_settled)
    _, state, made, is_settled = jax.lax.while_loop(go_on, iterate, carry)
    return state, made, is_settled


def _last(
    learned: tuple[Any, ...], core: Pass, state: jax.Array, num_steps: jax.Array
) -> jax.Array:
    """The last iteration, which all rows make together."""
    return _advance(_with_learned(core, learned), state, _has_any(num_steps))


def _has_any(num_steps: jax.Array) -> jax.Array:
    """Who makes any iteration, shaped to broadcast over [B, T, D]."""
    return first_iteration(num_steps, jnp.max(num_steps)) < jnp.max(num_steps)


def _residual(core: Pass, before: jax.Array, after: jax.Array) -> Float[Array, "B"]:
    change = _length(core, after.astype(jnp.float32) - before.astype(jnp.float32))
    # A row of padding has no length, and stands still.
    return jnp.where(change == 0, 0.0, change / jnp.maximum(_length(core, after), 1e-30))


def _length(core: Pass, rows: jax.Array) -> Float[Array, "B"]:
    squares = jnp.square(rows.astype(jnp.float32))
    segment_ids = core.context.mask.query_segment_ids
    if segment_ids is not None:
        squares = jnp.where(segment_ids[..., None] > 0, squares, 0.0)
    return jnp.sqrt(jnp.sum(squares, axis=(1, 2)))


# ------------------------------------------------------------------------------
# The gradient.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _settle(
    rule: _Rule, learned: tuple[Any, ...], leaves: list[Any], state: jax.Array, num_steps: jax.Array
) -> tuple[jax.Array, ...]:
    """The fields of `Settled`. The leaves are those of the pass, which has what is learned too.
    Gradients flow to `learned` alone."""
    return _forward(rule, learned, leaves, state, num_steps)[0]


def _forward(
    rule: _Rule, learned: tuple[Any, ...], leaves: list[Any], state: jax.Array, num_steps: jax.Array
) -> tuple[tuple[jax.Array, ...], Any]:
    core = jax.tree.unflatten(rule.structure, leaves)
    with jax.named_scope("settle"):
        before, made, is_settled = _approach(rule, core, state, num_steps)
    pullback = None
    if rule.recomputes:
        after = _last(learned, core, before, num_steps)
    else:
        after, pullback = jax.vjp(
            lambda learned, state: _last(learned, core, state, num_steps), learned, before
        )
    residual = _residual(core, before, after)
    made = made + 1
    is_settled = is_settled | ((residual <= rule.tolerance) & (rule.tolerance > 0))
    terms = jnp.where(is_settled, rule.terms, jnp.minimum(made, rule.terms))
    kept = (learned, leaves, before, num_steps, terms, pullback)
    return (after, residual, made), kept


def _backward(rule: _Rule, kept: Any, cotangents: tuple[jax.Array, ...]) -> tuple[Any, ...]:
    learned, leaves, before, num_steps, terms, pullback = kept
    core, gradient = jax.tree.unflatten(rule.structure, leaves), cotangents[0]
    if pullback is None:
        # Else the compiler would take the values of the forward pass and keep them.
        before, gradient = jax.lax.optimization_barrier((before, gradient))
        _, pullback = jax.vjp(
            lambda learned, state: _last(learned, core, state, num_steps), learned, before
        )
    with jax.named_scope("sum_terms"):
        gradient = _sum_terms(rule, core, pullback, gradient, terms)
    return pullback(gradient)[0], None, None, None


def _sum_terms(
    rule: _Rule, core: Pass, pullback: Any, gradient: jax.Array, terms: Int[Array, "B"]
) -> jax.Array:
    """v + J^T v + (J^T)^2 v + ...

    Args:
      rule: how far.
      core: for which tokens are padding.
      pullback: of the last iteration.
      gradient: v.
      terms: the most of each row.
    """

    def is_open(number: jax.Array, term: jax.Array, total: jax.Array) -> Bool[Array, "B"]:
        """Rows whose sum goes on after `number` terms, of which `term` is the last."""
        if not rule.tolerance:
            return number < terms
        return (number < terms) & (_length(core, term) > rule.tolerance * _length(core, total))

    def add(carry: _Summed) -> _Summed:
        number, term, total = carry
        is_added = is_open(number, term, total)[:, None, None]
        term = jnp.where(is_added, pullback(term)[1], 0)  # It stays 0, as rows do not mix.
        return number + 1, term, total + term.astype(jnp.float32)

    carry = (jnp.ones((), terms.dtype), gradient, gradient.astype(jnp.float32))
    if rule.tolerance:
        carry = jax.lax.while_loop(lambda carry: jnp.any(is_open(*carry)), add, carry)
    else:
        carry = jax.lax.fori_loop(1, rule.terms, lambda _, carry: add(carry), carry)
    return carry[2].astype(gradient.dtype)


_settle.defvjp(_forward, _backward)


# ------------------------------------------------------------------------------
# Either gradient.

# Collection that training by the implicit gradient sows its metrics into, means over rows.
SETTLING = "settling"


def recur_as_configured(
    core: Pass,
    state: Float[Array, "B T D"],
    num_steps: Int[Array, "*draws"],
    backprop_depth: int,
    see_previous: Callable[[Float[Array, "B T D"]], object] | None,
    sow: Callable[[str, str, Any], object],
) -> Float[Array, "B T D"]:
    """The core's last state, with gradients as `recurrence.gradient` says if there are any.

    Args:
      core: what the iterations are given.
      state: the state to begin with.
      num_steps: as of `recur`.
      backprop_depth: as of `recur`; terms of the implicit gradient. 0 for inference.
      see_previous: as of `recur`; of truncated backpropagation only.
      sow: takes collection, name and value.
    """
    config = core.core.config
    recurrence = config.recurrence
    if not backprop_depth or recurrence.gradient == "truncated":
        return recur(
            core,
            state,
            num_steps,
            backprop_depth=backprop_depth,
            unroll=recurrence.unroll,
            trains_state=recurrence.trains_state,
            # All of it, but early in a ramp that raises the depth too.
            kept_every=math.gcd(recurrence.kept_every, backprop_depth),
            see_previous=see_previous,
        )
    settled = settle(
        core,
        state,
        num_steps,
        terms=backprop_depth,
        tolerance=recurrence.implicit_tolerance,
        recomputes=config.remat != "none",
    )
    sow(SETTLING, "implicit_residual", jnp.mean(settled.residual))
    iterations = jnp.mean(settled.iterations.astype(jnp.float32))
    sow(SETTLING, "implicit_iterations", iterations)
    return settled.state
