"""Exit criteria: Huginn's values, and what must hold for any state and any output."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatransformer_jax.checkpoints.folders import load_folder
from megatransformer_jax.config import sampling as generation_depth
from megatransformer_jax.config.option import UserError
from megatransformer_jax.models.core import RecurrentCore
from megatransformer_jax.models.exit_criteria import (
    EXIT_CRITERIA,
    MIN_P,
    Observation,
    exit_criterion,
    one_of,
)
from megatransformer_jax.models.megatransformer import MegaTransformer, build_model
from megatransformer_jax.nn.context import LayerContext
from megatransformer_jax.ops.masks import AttentionMask
from megatransformer_jax.ops.positions import rotary_table
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy

BATCH, LENGTH, WIDTH, VOCAB = 2, 3, 8, 11
LATENT = ("latent_diff", "cosine")
DISTRIBUTION = ("entropy_diff", "kl", "minp_kl")
CONFIDENCE = ("entropy", "top1", "margin")
OUTPUT = (*DISTRIBUTION, "argmax_stability", *CONFIDENCE)
UNTRAINED = ("fixed", *LATENT, *OUTPUT)
NAMES = (*UNTRAINED, "learned_gate")
# The same compiled functions for all examples.
MEASURE = {name: jax.jit(EXIT_CRITERIA[name].measure) for name in NAMES}


def observation(seed=0, scale=3.0):
    latent_key, logits_key = jax.random.split(jax.random.key(seed))
    latent = jax.random.normal(latent_key, (BATCH, LENGTH, WIDTH))
    logits = scale * jax.random.normal(logits_key, (BATCH, LENGTH, VOCAB))
    return Observation(latent, logits, jnp.mean(logits, axis=-1))


def values(name, *observations):
    """The value after each observation, from a zero first state."""
    memory = exit_criterion(name).init(jnp.zeros((BATCH, LENGTH, WIDTH)), VOCAB)
    out = []
    for seen in observations:
        value, memory = MEASURE[name](memory, seen)
        out.append(np.asarray(value))
    return out


def settled(name, value):
    criterion = exit_criterion(name)
    return np.asarray(criterion.is_settled(jnp.asarray(value), criterion.default_threshold))


def changed(seen, **fields):
    return dataclasses.replace(seen, **fields)


# Huginn's values


def iterated(model: MegaTransformer, tokens, state, num_steps):
    """Every criterion's value after each iteration: {name: [iterations, B, T]}."""
    config = model.config
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    rotary = rotary_table(positions, config.head_dim(config.width), config.positions.rotary_base)
    context = LayerContext(AttentionMask(is_causal=True), rotary)
    core = RecurrentCore(config, model.policy, Sharder(), "cpu", parent=None)
    params = model.variables["params"]["core"]
    injected = model.prelude(model.embedding(tokens, positions, True), context)
    prepared = core.apply({"params": params}, injected, method="prepare")
    criteria = {name: EXIT_CRITERIA[name] for name in UNTRAINED}
    memories = {n: c.init(state, config.vocab_size) for n, c in criteria.items()}

    def iterate(carry, _):
        state, memories = carry
        state = core.apply({"params": params}, state, prepared, context)
        output = model.final_norm(model.coda(model.final_norm(state), context))
        seen = Observation(state, model.embedding.logits(output))
        measured = {n: c.measure(memories[n], seen) for n, c in criteria.items()}
        memories = {name: memory for name, (_, memory) in measured.items()}
        return (state, memories), {name: value for name, (value, _) in measured.items()}

    return jax.lax.scan(iterate, (state, memories), length=num_steps)[1]


@pytest.fixture(scope="module")
def reference(huginn_fixture):
    expected = np.load(huginn_fixture / "expected.npz")
    config, params = load_folder(huginn_fixture)
    model = build_model(config, DTypePolicy(), Sharder(), "cpu")
    tokens = jnp.asarray(expected["input_ids"], jnp.int32)
    state = jnp.asarray(expected["initial_state"])
    run = jax.jit(lambda params: model.apply(params, tokens, state, 16, method=iterated))
    return jax.device_get(run({"params": params})), expected


@pytest.mark.parametrize("name", (*LATENT, *DISTRIBUTION, "argmax_stability"))
def test_values_are_huginns(reference, name):
    ours, expected = reference
    theirs = expected[f"exit_values_{name.replace('_', '-')}"]
    # Huginn averages over positions what needs no logits, and reads the rest at the last one.
    reduced = ours[name].mean(-1) if name in LATENT else ours[name][..., -1]
    np.testing.assert_allclose(reduced, theirs, rtol=1e-5, atol=2e-5)


def test_every_criterion_of_the_reference_is_compared(reference):
    prefix = "exit_values_"
    theirs = {n.removeprefix(prefix) for n in reference[1].files if n.startswith(prefix)}
    assert {name.replace("-", "_") for name in theirs} == set(UNTRAINED) - {"fixed", *CONFIDENCE}


# Values by their definition


def test_latent_values_by_hand():
    seen = observation()
    first = changed(seen, latent=jnp.broadcast_to(jnp.array([3.0, 4.0] + [0.0] * 6), (2, 3, 8)))
    second = changed(seen, latent=jnp.broadcast_to(jnp.array([6.0, 8.0] + [0.0] * 6), (2, 3, 8)))
    third = changed(seen, latent=-second.latent)
    _, doubled, turned = values("latent_diff", first, second, third)
    np.testing.assert_allclose(doubled, 0.5, rtol=1e-6)
    np.testing.assert_allclose(turned, 2.0, rtol=1e-6)
    _, doubled, turned = values("cosine", first, second, third)
    np.testing.assert_allclose(doubled, 0.0, atol=1e-12)
    np.testing.assert_allclose(turned, 2.0, rtol=1e-6)


@pytest.mark.parametrize("name", DISTRIBUTION)
def test_distribution_values_equal_float64_formulas(name):
    seen = [observation(seed) for seed in (1, 2)]
    probs = [np.exp(np.asarray(one.logits, np.float64)) for one in seen]
    probs = [p / p.sum(-1, keepdims=True) for p in probs]
    if name == "entropy_diff":
        entropies = [-(p * np.log(p)).sum(-1) for p in probs]
        expected = [np.abs(entropies[0] - 100), np.abs(entropies[1] - entropies[0])]
    else:
        if name == "minp_kl":
            probs = [np.where(p < MIN_P * p.max(-1, keepdims=True), 1 / VOCAB, p) for p in probs]
            probs = [p / p.sum(-1, keepdims=True) for p in probs]
        chain = [np.full(probs[0].shape, 1 / VOCAB), *probs]
        pairs = itertools.pairwise(chain)
        expected = [(p * np.log(p / q)).sum(-1) for p, q in pairs]
    for ours, theirs in zip(values(name, *seen), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_confidence_equals_float64_formulas():
    seen = observation(1)
    probs = np.exp(np.asarray(seen.logits, np.float64))
    probs /= probs.sum(-1, keepdims=True)
    second, first = np.moveaxis(np.sort(probs, axis=-1)[..., -2:], -1, 0)
    expected = {
        "entropy": -(probs * np.log(probs)).sum(-1),
        "top1": 1 - first,
        "margin": 1 - (first - second),
    }
    for name in CONFIDENCE:
        # What was before does not matter.
        for value in (values(name, seen)[0], values(name, observation(2), seen)[1]):
            np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6)


def test_a_model_that_cannot_decide_is_not_sure_and_one_that_knows_is():
    seen = observation()
    level = changed(seen, logits=jnp.zeros_like(seen.logits))
    sure = changed(seen, logits=jnp.zeros_like(seen.logits).at[..., 3].set(50.0))
    wanted = {"entropy": np.log(VOCAB), "top1": 1 - 1 / VOCAB, "margin": 1.0}
    for name in CONFIDENCE:
        np.testing.assert_allclose(values(name, level)[0], wanted[name], rtol=1e-6)
        assert settled(name, values(name, sure)[0]).all()


def test_argmax_stability_counts_and_starts_again():
    one, other = (
        Observation(
            jnp.zeros((BATCH, LENGTH, WIDTH)), jnp.broadcast_to(row, (BATCH, LENGTH, VOCAB))
        )
        for row in jnp.eye(VOCAB)[:2]
    )
    counted = values("argmax_stability", one, one, one, other, other)
    assert [value[0, 0] for value in counted] == [0, 1, 2, 0, 1]
    criterion = exit_criterion("argmax_stability")
    reached = [bool(criterion.is_settled(jnp.asarray(v), 2.0).all()) for v in counted]
    assert reached == [False, False, True, False, False]


def test_the_learned_gate_is_the_probability_of_being_there_yet():
    seen = [observation(seed) for seed in (1, 2, 3)]
    stop = [1 / (1 + np.exp(-np.asarray(one.gate, np.float64))) for one in seen]
    expected = np.cumprod([1 - one for one in stop], axis=0)
    for ours, theirs in zip(values("learned_gate", *seen), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
        np.testing.assert_array_equal(settled("learned_gate", ours), theirs < 0.5)
    without = changed(seen[0], gate=None)
    criterion = exit_criterion("learned_gate")
    with pytest.raises(ValueError, match="has no exit gate"):
        criterion.measure(criterion.init(without.latent, VOCAB), without)


# What holds for any state and output

seeds = st.integers(0, 2**20)
scales = st.floats(0.01, 50)


@settings(max_examples=20, deadline=None)
@given(seed=seeds, scale=scales)
def test_standing_still_is_zero_and_settles(seed, scale):
    seen = observation(seed, scale)
    for name in (*LATENT, *DISTRIBUTION):
        _, again = values(name, seen, seen)
        assert (again == 0).all(), name
        assert settled(name, again).all(), name
    assert settled("argmax_stability", values("argmax_stability", *[seen] * 6)[-1]).all()


@settings(max_examples=20, deadline=None)
@given(seed=seeds, scale=scales)
def test_divergences_and_distances_are_not_negative(seed, scale):
    pair = observation(seed, scale), observation(seed + 1, scale)
    close = changed(pair[0], logits=pair[0].logits + 1e-4, latent=pair[0].latent * (1 + 1e-6))
    for name in (*LATENT, *DISTRIBUTION, *CONFIDENCE):
        for value in values(name, *pair, pair[0], close):
            assert (value >= 0).all(), name


@settings(max_examples=20, deadline=None)
@given(seed=seeds, scale=scales, shift=st.integers(-100, 100))
def test_a_constant_on_all_logits_changes_nothing(seed, scale, shift):
    pair = [observation(one, scale) for one in (seed, seed + 1)]
    # So that adding a whole number does not round.
    pair = [changed(seen, logits=jnp.round(seen.logits * 256) / 256) for seen in pair]
    shifted = [changed(seen, logits=seen.logits + shift) for seen in pair]
    for name in (*DISTRIBUTION, *CONFIDENCE):
        for ours, theirs in zip(values(name, *pair), values(name, *shifted), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", NAMES)
def test_a_token_does_not_depend_on_the_others(name):
    first, second = observation(1), observation(2)
    other = observation(3)
    # All tokens but (1, 2) get other states and outputs.
    mixed = [
        jax.tree.map(lambda kept, new: new.at[1, 2].set(kept[1, 2]), seen, other)
        for seen in (first, second)
    ]
    for alone, among in zip(values(name, first, second), values(name, *mixed), strict=True):
        assert alone[1, 2] == among[1, 2]


def test_near_convergence_kl_is_exact_enough_for_small_thresholds():
    # A vocabulary of the size at which the rounding of log-probabilities reaches 1e-6.
    keys = jax.random.split(jax.random.key(0), 2)
    logits = jax.random.normal(keys[0], (1, 4, 65536))
    moved = logits + 1e-3 * jax.random.normal(keys[1], logits.shape)
    exact = [np.asarray(one, np.float64) for one in (logits, moved)]
    exact = [one - np.log(np.exp(one).sum(-1, keepdims=True)) for one in exact]
    expected = (np.exp(exact[0]) * (exact[0] - exact[1])).sum(-1)
    criterion = exit_criterion("kl")
    latent = jnp.zeros((1, 4, 1))
    _, memory = criterion.measure(criterion.init(latent, 65536), Observation(latent, logits))
    value, _ = criterion.measure(memory, Observation(latent, moved))
    np.testing.assert_allclose(value, expected, atol=1e-7)


# Inputs without a meaning


@pytest.mark.parametrize("name", OUTPUT)
def test_banned_tokens_make_no_nan(name):
    seen, banned = observation(1), observation(2)
    banned = changed(banned, logits=banned.logits.at[..., 4:].set(-jnp.inf))
    kept = changed(banned, logits=banned.logits.at[..., :4].multiply(1.5))
    measured = values(name, seen, banned, banned, kept, seen)
    assert not np.isnan(measured).any()
    assert np.isfinite(measured[2:4]).all()
    if name in DISTRIBUTION:
        assert (measured[2] == 0).all()
    if name == "kl":
        assert np.isposinf(measured[1]).all()  # What was possible became impossible.
        assert np.isfinite(measured[4]).all()


def test_kl_of_a_banned_token_that_was_already_as_good_as_impossible_is_finite():
    far = observation().logits.at[..., 0].set(-500.0)
    banned = far.at[..., 0].set(-jnp.inf)
    latent = observation().latent
    _, value = values("kl", Observation(latent, far), Observation(latent, banned))
    assert (value == 0).all()


@pytest.mark.parametrize(
    ("name", "appears", "vanishes"), [("latent_diff", 1, np.inf), ("cosine", 1, 1)]
)
def test_zero_states_have_values(name, appears, vanishes):
    some = observation()
    zero = changed(some, latent=jnp.zeros_like(some.latent))
    still, up, down = values(name, zero, some, zero)
    assert (still == 0).all()
    np.testing.assert_allclose(up, appears, rtol=1e-6)
    np.testing.assert_allclose(down, vanishes, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_diverged_model_never_settles(name, bad):
    seen = jax.tree.map(lambda leaf: jnp.full_like(leaf, bad), observation())
    for value in values(name, *[seen] * 7):
        assert not settled(name, value).any()


@pytest.mark.parametrize("name", LATENT)
def test_states_too_large_to_square_do_not_count_as_zero(name):
    first, second = observation(1), observation(2)
    huge = [changed(seen, latent=seen.latent * 1e30) for seen in (first, second)]
    assert not settled(name, values(name, *huge)[1]).any()


def test_no_distribution_at_all_never_settles():
    seen = observation()
    empty = changed(seen, logits=jnp.full_like(seen.logits, -jnp.inf))
    for name in OUTPUT:
        for value in values(name, *[empty] * 7):
            assert not settled(name, value).any(), name


def test_an_argmax_after_none_was_not_kept():
    seen = observation()
    first = changed(seen, logits=jnp.zeros_like(seen.logits).at[..., 0].set(1.0))
    for bad in (jnp.nan, -jnp.inf):
        none = changed(seen, logits=jnp.full_like(seen.logits, bad))
        counted = values("argmax_stability", first, first, none, first, first)
        assert [value[0, 0] for value in counted] == [0, 1, 0, 0, 1]


@pytest.mark.parametrize("name", sorted({*UNTRAINED} - {*CONFIDENCE}))
def test_the_first_iteration_settles_no_token_that_moved(name):
    assert not settled(name, values(name, observation())[0]).any()


def test_fixed_ignores_every_threshold():
    value = values("fixed", observation())[0]
    for threshold in (0.0, 1e30, np.inf):
        assert not exit_criterion("fixed").is_settled(jnp.asarray(value), float(threshold)).any()


# Interface


def test_thresholds_may_differ_by_row():
    value = jnp.array([[0.1, 0.3, 0.5], [0.1, 0.3, 0.5]])
    thresholds = jnp.array([0.2, 0.4])
    below = exit_criterion("kl").is_settled(value, thresholds)
    np.testing.assert_array_equal(below, [[True, False, False], [True, True, False]])
    reached = exit_criterion("argmax_stability").is_settled(value, thresholds)
    np.testing.assert_array_equal(reached, [[False, True, True], [False, False, True]])


@functools.partial(jax.jit, static_argnames="name")
def steps_until_settled(name, state, head, threshold):
    """A core that halves the way to a point, iterated until every token has settled."""
    criterion = exit_criterion(name)

    def go_on(carry):
        step, _, _, done, _ = carry
        return (step < 20) & ~jnp.all(done)

    def iterate(carry):
        step, state, memory, done, steps = carry
        state = 0.5 * state + 0.5
        logits = state @ head if criterion.needs_logits else None
        gate = state[..., 0] - 3.0 if criterion.needs_gate else None
        value, memory = criterion.measure(memory, Observation(state, logits, gate))
        steps = jnp.where(done, steps, step + 1)
        return step + 1, state, memory, done | criterion.is_settled(value, threshold), steps

    done = jnp.zeros(state.shape[:2], bool)
    memory = criterion.init(state, head.shape[1])
    first = jnp.int32(0), state, memory, done, jnp.zeros(done.shape, jnp.int32)
    return jax.lax.while_loop(go_on, iterate, first)[-1]


@pytest.mark.parametrize("name", NAMES)
def test_carried_by_a_loop_and_not_recompiled_for_a_threshold(name):
    first = observation(4)
    head = jax.random.normal(jax.random.key(9), (WIDTH, VOCAB))
    default = exit_criterion(name).default_threshold
    steps_until_settled.clear_cache()
    steps = [
        np.asarray(steps_until_settled(name, first.latent, head, jnp.float32(factor * default)))
        for factor in (1.0, 3.0)
    ]
    assert steps_until_settled._cache_size() == 1
    if name == "fixed":
        assert (np.stack(steps) == 20).all()
        return
    assert (steps[0] < 20).all()
    # A stricter count of kept argmaxes takes longer, a looser bound less.
    longer, shorter = steps[::-1] if name == "argmax_stability" else steps
    assert (longer >= shorter).all() and (longer > shorter).any()


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_per_token_and_keeps_its_types(name):
    criterion = exit_criterion(name)
    seen = observation()
    # bfloat16, as activations are on accelerators; values stay float32.
    seen = changed(seen, latent=seen.latent.astype(jnp.bfloat16))
    memory = criterion.init(jnp.zeros_like(seen.latent), VOCAB)
    value, after = criterion.measure(memory, seen)
    assert value.shape == (BATCH, LENGTH) and value.dtype == jnp.float32
    assert jax.tree.structure(memory) == jax.tree.structure(after)
    for before, now in zip(jax.tree.leaves(memory), jax.tree.leaves(after), strict=True):
        assert before.shape[:2] == (BATCH, LENGTH)
        assert (before.shape, before.dtype) == (now.shape, now.dtype)


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_needed_by_those_that_say_so(name):
    criterion = exit_criterion(name)
    without = changed(observation(), logits=None)
    memory = criterion.init(without.latent, VOCAB)
    assert criterion.needs_logits == (name in OUTPUT)
    assert criterion.needs_gate == (name == "learned_gate")
    if criterion.needs_logits:
        with pytest.raises(ValueError, match="has no logits"):
            criterion.measure(memory, without)
    else:
        criterion.measure(memory, without)


def test_the_configuration_offers_every_criterion():
    assert tuple(EXIT_CRITERIA) == generation_depth.EXIT_CRITERIA == NAMES


def test_unknown_names_list_the_known():
    with pytest.raises(UserError, match=r"'entropi'; choose one of fixed, latent_diff, .*kl") as e:
        exit_criterion("entropi")
    assert all(name in str(e.value) for name in NAMES)


def test_one_of_is_the_criterion_that_is_chosen():
    names = ("latent_diff", "argmax_stability", "kl")
    rng = np.random.default_rng(0)
    states = jnp.asarray(rng.normal(size=(4, 2, 3, 5)), jnp.float32)
    logits = jnp.asarray(rng.normal(size=(4, 2, 3, 7)), jnp.float32)
    for code, name in enumerate(names):
        choice, alone = one_of(names, jnp.int32(code)), exit_criterion(name)
        assert choice.needs_logits and bool(choice.reads_logits) == alone.needs_logits
        memory, own = (each.init(states[0], 7) for each in (choice, alone))
        for state, scores in zip(states[1:], logits[1:], strict=True):
            observation = Observation(state, scores)
            value, memory = choice.measure(memory, observation)
            wanted, own = alone.measure(own, observation)
            np.testing.assert_array_equal(value, wanted)
            for threshold in (0.3, 1.0):
                np.testing.assert_array_equal(
                    choice.is_settled(value, threshold), alone.is_settled(wanted, threshold)
                )


def test_rows_choose_among_criteria_for_themselves():
    names = ("fixed", "latent_diff", "kl")
    rng = np.random.default_rng(1)
    states = jnp.asarray(rng.normal(size=(3, 3, 2, 5)), jnp.float32)
    logits = jnp.asarray(rng.normal(size=(3, 3, 2, 7)), jnp.float32)
    code, threshold = jnp.asarray([2, 0, 1]), jnp.float32([0.5, 9.0, 1.5])
    choice = one_of(names, code)
    memory = choice.init(states[0], 7)
    own = [exit_criterion(names[index]).init(states[0], 7) for index in code]
    for state, scores in zip(states[1:], logits[1:], strict=True):
        observation = Observation(state, scores)
        value, memory = choice.measure(memory, observation)
        settled = choice.is_settled(value, threshold)
        for row, index in enumerate(code):
            alone = exit_criterion(names[index])
            wanted, own[row] = alone.measure(own[row], observation)
            np.testing.assert_array_equal(value[row], wanted[row])
            np.testing.assert_array_equal(settled[row], alone.is_settled(wanted, threshold)[row])
    assert bool(choice.reads_logits)
    assert not bool(one_of(names, jnp.asarray([0, 1, 1])).reads_logits)
