"""Passes with a cache against full recomputation, and against Huginn's own numbers."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cached_passes import (
    empty_cache,
    in_passes,
    layout,
    make,
    rule,
    some_tokens,
    spread,
    step,
    tiny,
)

from megatransformer_jax.checkpoints.folders import load_folder
from megatransformer_jax.config.layers import RotaryScalingConfig
from megatransformer_jax.config.recurrence import RecurrenceConfig
from megatransformer_jax.models.megatransformer import build_model
from megatransformer_jax.models.passes.cached import NewTokens, cached_forward
from megatransformer_jax.nn.kv_cache import drop_rows, take_sequences
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy

DEPTH = 3
# Every value of every option that a cache could get wrong is in at least one of these.
CONFIGS = {
    "yarn_grouped_sandwich": tiny(
        positions={"scaling": RotaryScalingConfig("yarn", 4.0, 16)},
        attention={"num_kv_heads": 2, "qk_norm": True, "qk_norm_span": "width"},
        norm={"placement": "sandwich"},
    ),
    "interleaved_multi_query_post_windows": tiny(
        positions={"rotary_convention": "interleaved"},
        attention={"num_kv_heads": 1, "window": 5, "core_windows": (3,), "coda_windows": (0,)},
        norm={"placement": "post"},
    ),
    "alibi_window_peri_layernorm": tiny(
        positions={"scheme": "alibi"},
        attention={"window": 3},
        norm={"placement": "peri", "kind": "layernorm", "bias": True},
    ),
    "learned_softcap_bias_qk_norm": tiny(
        positions={"scheme": "learned"},
        attention={"logit_softcap": 2.0, "qk_bias": True, "qk_norm": True, "qkv_bias": True},
    ),
    "sinusoidal_core_width": tiny(
        positions={"scheme": "sinusoidal"},
        recurrence={
            "core_width": 8,
            "injection_norm": True,
            "loop_embedding": True,
            "loop_scale": True,
            "loop_lora_rank": 2,
            "hyper_connections": 2,
            "loop_iterations": 2,
        },
        value_embedding={"layers": (0, 2, 3), "gate_channels": 3},
    ),
    "no_positions_diagonal": tiny(
        positions={"scheme": "none"},
        recurrence={"adapter": "diagonal", "iteration_norm": True, "readout_matrix": True},
    ),
    "plain": tiny(core_layers=0, prelude_layers=2, recurrence=RecurrenceConfig()),
    "state_alone": tiny(
        prelude_layers=0,
        coda_layers=0,
        positions={"scheme": "alibi"},
        recurrence={
            "adapter": "none",
            "state_init": "none",
            "backprop_depth": 3,
            "head_norm": False,
        },
    ),
}
# Passes: a prompt, then chunks of 3; whole, padded on the left, on the right and on both sides.
LAYOUT = layout(
    "xxxxxx xxx x.. xxx",
    "..xxxx .xx ..x xxx",
    "xx.... xx. .x. ...",
    ".xxx.. xxx xxx xx.",
)
SIZES = [6, 3, 3, 3]


@functools.partial(jax.jit, static_argnames="model")
def recompute(model, params, tokens):
    """Logits without a cache. Causal, so what follows a row's last token does not matter."""
    return model.apply({"params": params}, tokens, num_steps=DEPTH).logits


@functools.cache
def made(name):
    return make(CONFIGS[name])


@pytest.mark.parametrize("name", CONFIGS)
def test_passes_with_a_cache_equal_full_recomputation(name):
    model, params = made(name)
    tokens, lengths = some_tokens(4, 15), LAYOUT.sum(axis=1)
    wanted = recompute(model, params, tokens)
    logits, steps, cache = in_passes(
        model,
        params,
        spread(tokens, LAYOUT),
        LAYOUT,
        empty_cache(model.config, 4, num_slots=DEPTH),
        rule(DEPTH),
        SIZES,
        begins=True,
    )
    for row, length in enumerate(lengths):
        got = logits[row][LAYOUT[row]]
        np.testing.assert_allclose(got, wanted[row, :length], atol=2e-5, rtol=2e-5)
    depth = DEPTH if model.config.is_recurrent else 0
    np.testing.assert_array_equal(steps, np.where(LAYOUT, depth, 0))
    assert cache.length == sum(SIZES)
    np.testing.assert_array_equal(cache.next_position, lengths)
    np.testing.assert_array_equal(cache.num_steps[:, :15], steps)
    places = np.where(LAYOUT, np.cumsum(LAYOUT, axis=1) - 1, -1)
    np.testing.assert_array_equal(cache.positions[:, :15], places)
    assert np.all(cache.positions[:, 15:] == -1)


def test_compute_in_bfloat16():
    config = CONFIGS["yarn_grouped_sandwich"]
    model, params = make(config, policy=DTypePolicy(compute=jnp.dtype(jnp.bfloat16)))
    tokens = some_tokens(2, 6)
    wanted = recompute(model, params, tokens)
    cache = empty_cache(config, 2, num_slots=DEPTH, dtype=jnp.bfloat16)
    everything = jnp.ones(tokens.shape, bool)
    logits, _, cache = in_passes(model, params, tokens, everything, cache, rule(DEPTH), [3, 3])
    assert cache.core.dtype == jnp.bfloat16
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, wanted, atol=0.05 * np.abs(wanted).max())


def test_last_logits_are_those_of_each_sequences_last_token():
    model, params = made("state_alone")
    is_token, tokens = LAYOUT[:, 9:12], some_tokens(4, 3)
    arguments = empty_cache(model.config, 4, num_slots=DEPTH), rule(DEPTH)
    every = step(model, params, tokens, is_token, *arguments).logits
    last_only = jax.jit(functools.partial(cached_forward, model, last_logits_only=True))
    last = last_only(params, NewTokens(tokens, is_token), *arguments).logits
    assert last.shape == (4, 1, model.config.vocab_size)
    for row, column in enumerate((0, 2, 1, 2)):
        np.testing.assert_allclose(last[row, 0], every[row, column], atol=1e-6)


def test_random_first_states_do_not_depend_on_chunks():
    config = tiny(recurrence={"state_init": "normal"}, prelude_layers=0, coda_layers=0)
    model, params = make(config)
    tokens = some_tokens(2, 8)
    keys = jax.random.split(jax.random.key(3), 2)

    def run(marks, keys=keys):
        is_token = layout(marks, marks)
        got, _, _ = in_passes(
            model,
            params,
            spread(tokens, is_token),
            is_token,
            empty_cache(config, 2, num_slots=DEPTH),
            rule(DEPTH),
            [4] * (is_token.shape[1] // 4),
            keys=keys,
        )
        return got[:, is_token[0]]

    np.testing.assert_allclose(run("..xx xxx. xxx."), run("xxxx xxxx"), atol=2e-5, rtol=2e-5)
    assert np.abs(run("xxxx xxxx") - run("xxxx xxxx", keys[::-1])).max() > 1e-2
    with pytest.raises(ValueError, match="give a key"):
        run("xxxx xxxx", None)


def test_what_a_request_sets_compiles_once():
    model, params = made("state_alone")
    cache, before = empty_cache(model.config, 2, num_slots=2), step._cache_size()
    for depth, threshold, seed in ((1, 0.5, 0), (3, 0.01, 1), (7, 2.0, 2)):
        leave = rule(depth, "cosine", threshold, min_depth=seed)
        is_token = jnp.asarray([[True], [seed != 1]])
        cache = step(model, params, some_tokens(2, 1, seed), is_token, cache, leave).cache
    assert step._cache_size() == before + 1


def test_decoding_goes_on_after_rejected_drafts_and_a_change_of_beams():
    """Draft at depth 1, take the drafts back, verify at full depth, keep a part: as if each kept
    token had been passed alone."""
    model, params = made("state_alone")
    kept_per_round = [[3, 1, 0, 2], [1, 3, 2, 2], [2, 2, 2, 0]]
    kept = [[], [], [], []]
    cache = empty_cache(model.config, 4, num_slots=DEPTH)
    everything = jnp.ones((4, 3), bool)
    for index, counts in enumerate(kept_per_round):
        tokens = some_tokens(4, 3, seed=index)
        drafted = step(model, params, tokens, everything, cache, rule(1)).cache
        back = drop_rows(drafted, ~everything)
        assert back.length == cache.length
        out = step(model, params, tokens, everything, back, rule(DEPTH))
        cache = drop_rows(out.cache, jnp.arange(3) < jnp.asarray(counts)[:, None])
        for row, count in enumerate(counts):
            kept[row] += tokens[row, :count].tolist()
        if index == 1:  # The third sequence ends, the second goes on twice.
            beams = [1, 0, 1, 3]
            cache = take_sequences(cache, jnp.asarray(beams))
            kept = [list(kept[beam]) for beam in beams]
    assert cache.length == 3 + 3 + 2
    assert cache.next_position.tolist() == [len(row) for row in kept]
    last = some_tokens(4, 3, seed=9)
    got = step(model, params, last, everything, cache, rule(DEPTH)).logits
    alone = np.zeros((4, 15), np.int32)
    for row, tokens in enumerate(kept):
        alone[row, : len(tokens) + 3] = [*tokens, *last[row]]
    wanted = recompute(model, params, jnp.asarray(alone))
    for row, tokens in enumerate(kept):
        after = slice(len(tokens), len(tokens) + 3)
        np.testing.assert_allclose(got[row], wanted[row, after], atol=2e-5, rtol=2e-5)


def test_a_loop_of_passes_works_on_the_cache_in_place():
    """Nothing in the compiled program is as large as the capacity but the cache itself."""
    capacity = 1280
    model, params = made("yarn_grouped_sandwich")
    config = model.config
    cache = empty_cache(config, 1, capacity=capacity, num_slots=DEPTH)
    leaves, tree = jax.tree.flatten(cache)

    @functools.partial(jax.jit, donate_argnums=1)
    def decode(params, leaves, token, count):
        def body(_, carry):
            token, cache = carry
            out = cached_forward(model, params, NewTokens(token, token >= 0), cache, rule(DEPTH))
            return jnp.argmax(out.logits, axis=-1).astype(jnp.int32), out.cache

        carry = token, jax.tree.unflatten(tree, leaves)
        return jax.tree.leaves(jax.lax.fori_loop(0, count, body, carry))

    text = decode.lower(params, leaves, some_tokens(1, 1), 9).compile().as_text()
    operations = re.findall(rf"= f32\[[\d,]*\b{capacity}\b[\d,]*\]\S* ([\w-]+)\(", text)
    arrays = sum(leaf.dtype == jnp.float32 for leaf in leaves)
    assert operations.count("dynamic-update-slice") == arrays
    # What is fused into one instruction is listed on its own, too.
    allowed = {"parameter", "get-tuple-element", "dynamic-update-slice", "fusion"}
    assert set(operations) <= allowed
    assert text.count("may-alias") >= len(leaves)


@pytest.fixture(scope="module")
def huginn(huginn_fixture):
    config, params = load_folder(huginn_fixture)
    config = dataclasses.replace(
        config, recurrence=dataclasses.replace(config.recurrence, state_init="zero")
    )
    model = build_model(config, DTypePolicy(), Sharder(), "cpu")
    expected = np.load(huginn_fixture / "expected.npz")
    return model, jax.tree.map(jnp.asarray, params), expected


def test_greedy_decoding_equals_huginns_recomputation(huginn):
    model, params, expected = huginn
    wanted = jnp.asarray(expected["greedy_r8_zero_state"], jnp.int32)
    prompt = wanted[:, :24]
    cache = empty_cache(model.config, 2, capacity=48, num_slots=8)
    out = step(model, params, prompt, jnp.ones(prompt.shape, bool), cache, rule(8), True)
    tokens = [prompt]
    for _ in range(24):
        tokens.append(jnp.argmax(out.logits[:, -1:], axis=-1).astype(jnp.int32))
        out = step(model, params, tokens[-1], jnp.ones((2, 1), bool), out.cache, rule(8))
    np.testing.assert_array_equal(jnp.concatenate(tokens, axis=1), wanted)


@pytest.mark.parametrize(
    ("case", "size"),
    [("latent-diff_0.2", 1), ("latent-diff_0.05", 1), ("cosine_0.02", 1), ("latent-diff_0.05", 8)],
)
def test_adaptive_depth_equals_huginns(huginn, case, size):
    """Token by token, as Huginn, and in chunks."""
    model, params, expected = huginn
    name, threshold = case.split("_")
    leave = rule(16, name.replace("-", "_"), float(threshold))
    tokens = jnp.asarray(expected["input_ids"][:1], jnp.int32)
    cache = empty_cache(model.config, 1, num_slots=16)
    everything = jnp.ones(tokens.shape, bool)
    sizes = [size] * (24 // size)
    logits, steps, _ = in_passes(model, params, tokens, everything, cache, leave, sizes)
    np.testing.assert_array_equal(steps[0], expected[f"adaptive_{case}_steps"])
    np.testing.assert_allclose(logits, expected[f"adaptive_{case}_logits"], atol=1e-4, rtol=1e-4)
