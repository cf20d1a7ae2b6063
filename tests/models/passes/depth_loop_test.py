"""What a token reads when tokens leave at different depths and share slots.

Everything is compared with `cached_reference`, which takes each sequence alone.
"""

import functools

import jax
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
from cached_reference import ReferenceSequence

from megatransformer_jax.config.recurrence import ExitGateConfig
from megatransformer_jax.ops.positions import alibi_slopes

# No outer layers: what iterations read is in the core alone, and programs stay small.
CORE_ONLY = tiny(
    prelude_layers=0,
    coda_layers=0,
    attention={"num_kv_heads": 2, "window": 7},
    positions={"scheme": "alibi"},
    value_embedding={"layers": (1,), "gate_channels": 5},
)
WHOLE = tiny(
    positions={"scheme": "alibi"},
    attention={"num_kv_heads": 1},
    value_embedding={"layers": (0, 2, 3), "gate_channels": 16},
)
# Passes of three columns: several tokens or one, padded on either side, or none at all.
PASSES = ("xxx x.. xx. ..x xxx", "..x .xx xxx ... x..")
SHARED_SLOTS = [
    (1, "modulo", "latest"),
    *((2, sharing, reads) for sharing in ("modulo", "last") for reads in ("latest", "skip")),
    *(
        (3, sharing, reads)
        for sharing in ("modulo", "anchor", "last")
        for reads in ("latest", "skip")
    ),
]


@functools.cache
def made(config):
    return make(config)


def reference(config, tokens, sizes, settings, **options):
    """Logits and steps of one sequence alone, in passes of these sizes.

    `settings` are what the reference's passes are told: one dictionary for all or one for each.
    """
    _, params = made(config)
    slopes = alibi_slopes(config.attention.num_heads)
    sequence = ReferenceSequence(config, jax.tree.map(np.asarray, params), slopes, **options)
    if isinstance(settings, dict):
        settings = [settings] * len(sizes)
    logits, steps, start = [], [], 0
    for size, setting in zip(sizes, settings, strict=True):
        new_logits, new_steps = sequence.run(tokens[start : start + size], **setting)
        logits, steps, start = logits + new_logits, steps + new_steps, start + size
        if sequence.values:  # Rounding decides nothing.
            distance = np.abs(np.asarray(sequence.values) / setting["threshold"] - 1)
            assert distance.min() > 1e-3
    return np.asarray(logits), np.asarray(steps)


def assert_rows_equal(got, is_token, row, wanted):
    logits, steps, _ = got
    where = np.asarray(is_token[row])
    np.testing.assert_array_equal(steps[row][where], wanted[1])
    np.testing.assert_array_equal(steps[row][~where], 0)
    np.testing.assert_allclose(logits[row][where], wanted[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("num_slots", "sharing", "reads"), SHARED_SLOTS)
def test_shared_slots_equal_the_reference_of_each_sequence_alone(num_slots, sharing, reads):
    """Fewer slots than iterations, next to a sequence with other depths, threshold and padding."""
    model, params = made(CORE_ONLY)
    tokens, is_token = some_tokens(2, 10), layout(*PASSES)
    depths, thresholds, min_depths = [6, 7], [0.75, 0.9], [1, 4]
    leave = rule(depths, "latent_diff", thresholds, min_depths)
    cache = empty_cache(CORE_ONLY, 2, num_slots=num_slots, sharing=sharing, exited_reads=reads)
    got = in_passes(model, params, spread(tokens, is_token), is_token, cache, leave, [3] * 5)
    all_steps = set()
    for row in range(2):
        wanted = reference(
            CORE_ONLY,
            tokens[row],
            [part.count("x") for part in PASSES[row].split()],
            {
                "depth": depths[row],
                "criterion": "latent_diff",
                "threshold": thresholds[row],
                "min_depth": min_depths[row],
            },
            num_slots=num_slots,
            sharing=sharing,
            reads=reads,
        )
        assert_rows_equal(got, is_token, row, wanted)
        all_steps |= set(wanted[1].tolist())
    assert len(all_steps) >= 4  # Otherwise nothing was tested.
    assert np.min(wanted[1]) == 4  # No earlier in this row.


@pytest.mark.parametrize("reads", ["latest", "skip"])
def test_with_a_slot_per_iteration_all_ways_to_cut_passes_agree(reads):
    """One pass, chunks, and one token at a time, as the reference takes them."""
    model, params = made(CORE_ONLY)
    tokens = some_tokens(2, 9, seed=1)
    whole, single = layout("x" * 9, "x" * 9), layout("x.." * 9, "..x" * 9)
    setting = {"depth": 7, "criterion": "latent_diff", "threshold": 0.55}
    wanted = [
        reference(CORE_ONLY, tokens[row], [1] * 9, setting, num_slots=7, reads=reads)
        for row in range(2)
    ]
    assert len(set(np.concatenate([steps for _, steps in wanted]).tolist())) >= 4
    for is_token, sizes in ((whole, [9]), (whole, [3] * 3), (single, [3] * 9)):
        cache = empty_cache(CORE_ONLY, 2, num_slots=7, exited_reads=reads)
        got = in_passes(
            model,
            params,
            spread(tokens, is_token),
            is_token,
            cache,
            rule(**setting),
            sizes,
            begins=sizes == [9],
        )
        for row in range(2):
            assert_rows_equal(got, is_token, row, wanted[row])


def test_a_criterion_of_logits_sees_the_coda_over_the_cache():
    model, params = made(WHOLE)
    tokens, is_token = some_tokens(2, 10), layout(*PASSES)
    setting = {"depth": 6, "criterion": "kl", "threshold": 0.5}
    cache = empty_cache(WHOLE, 2, num_slots=4)
    got = in_passes(
        model, params, spread(tokens, is_token), is_token, cache, rule(**setting), [3] * 5
    )
    all_steps = set()
    for row in range(2):
        sizes = [part.count("x") for part in PASSES[row].split()]
        wanted = reference(WHOLE, tokens[row], sizes, setting, num_slots=4)
        assert_rows_equal(got, is_token, row, wanted)
        all_steps |= set(wanted[1].tolist())
    assert len(all_steps) >= 3


def test_fixed_depth_per_sequence():
    model, params = made(CORE_ONLY)
    tokens, is_token = some_tokens(2, 10), layout(*PASSES)
    cache = empty_cache(CORE_ONLY, 2, num_slots=3, sharing="anchor")
    got = in_passes(model, params, spread(tokens, is_token), is_token, cache, rule([2, 5]), [3] * 5)
    for row, depth in enumerate((2, 5)):
        sizes = [part.count("x") for part in PASSES[row].split()]
        wanted = reference(
            CORE_ONLY, tokens[row], sizes, {"depth": depth}, num_slots=3, sharing="anchor"
        )
        assert_rows_equal(got, is_token, row, wanted)


@pytest.mark.parametrize("reads", ["latest", "skip"])
def test_depth_may_change_between_passes(reads):
    """A deeper pass reads tokens of a shallower one, without any criterion."""
    model, params = made(CORE_ONLY)
    tokens, depths = some_tokens(1, 9), [2, 4, 1]
    cache = empty_cache(CORE_ONLY, 1, num_slots=4, exited_reads=reads)
    everything = np.ones((1, 9), bool)
    logits = []
    for start, depth in zip((0, 3, 6), depths, strict=True):
        columns = slice(start, start + 3)
        out = step(model, params, tokens[:, columns], everything[:, columns], cache, rule(depth))
        cache = out.cache
        logits.append(out.logits)
        assert np.all(out.num_steps == depth)
    settings = [{"depth": depth} for depth in depths]
    wanted, _ = reference(CORE_ONLY, tokens[0], [3] * 3, settings, num_slots=4, reads=reads)
    np.testing.assert_allclose(np.concatenate(logits, 1)[0], wanted, atol=1e-4, rtol=1e-4)
    assert cache.num_steps[0, :10].tolist() == [2, 2, 2, 4, 4, 4, 1, 1, 1, 0]


def test_a_learned_gate_ends_tokens_where_its_exits_add_up():
    """Texts of one token: what the gate says of the states at fixed depths tells where to leave."""
    config = tiny(prelude_layers=0, coda_layers=0, exit_gate=ExitGateConfig(enabled=True))
    model, params = made(config)
    weight = 2 * params["exit_gate"]["weight"]
    params = {**params, "exit_gate": {**params["exit_gate"], "weight": weight}}
    tokens, depth = some_tokens(8, 1), 9
    is_token, cache = np.ones(tokens.shape, bool), empty_cache(config, 8, num_slots=depth)
    run = functools.partial(step, model, params, tokens, is_token, cache)
    states = [run(rule(count)).state for count in range(1, depth + 1)]
    gates = [model.apply({"params": params}, state, method="run_gate") for state in states]
    survival = np.cumprod([1 / (1 + np.exp(np.asarray(gate))) for gate in gates], axis=0)
    for threshold in (0.5, 0.2):
        out = run(rule(depth, "learned_gate", threshold))
        is_settled = survival < threshold
        is_settled[-1] = True
        wanted = 1 + np.argmax(is_settled, axis=0)
        assert len(np.unique(wanted)) >= 3
        np.testing.assert_array_equal(out.num_steps, wanted)
        for row, count in enumerate(wanted[:, 0]):
            np.testing.assert_allclose(out.state[row], states[count - 1][row], atol=1e-5)


def test_a_learned_gate_needs_a_model_that_has_one():
    model, params = made(CORE_ONLY)
    cache = empty_cache(CORE_ONLY, 1, num_slots=2)
    leave = rule(2, "learned_gate")
    with pytest.raises(ValueError, match="no exit gate"):
        step(model, params, some_tokens(1, 1), np.ones((1, 1), bool), cache, leave)
