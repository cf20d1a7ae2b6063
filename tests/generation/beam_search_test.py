"""Beam search over a cache against decoding and recomputation that reorder nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import (
    DEPTH,
    PLAIN,
    PROMPTS,
    TINY,
    Pieces,
    depth_rule,
    make,
    recomputed_score,
    tiny,
)

from megatransformer_jax.config.loop import MeshConfig
from megatransformer_jax.config.option import UserError
from megatransformer_jax.generation import beam_search as beam_search_module
from megatransformer_jax.generation.beam_search import Beams, beam_search
from megatransformer_jax.generation.decode_loop import DecodeSettings, decode, start
from megatransformer_jax.generation.endings import (
    END_OF_TEXT,
    LENGTH,
    STOP,
    Ending,
    piece_table,
    stop_strings,
)
from megatransformer_jax.generation.history import history_of_prompts
from megatransformer_jax.generation.placement import for_rows
from megatransformer_jax.generation.prefill import left_padded, prefill
from megatransformer_jax.models.megatransformer import build_model
from megatransformer_jax.models.passes.cached import NewTokens, cached_forward
from megatransformer_jax.nn.kv_cache import CacheShape, init_cache
from megatransformer_jax.sharding.mesh import make_mesh
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy

CAPACITY, COUNT, BEAMS = 32, 8, 3
# No token of many is an end, so that texts of all lengths are among the best.
END_IDS = (4, 9, 14, 19)
CONFIGS = {
    "alibi_window_grouped_two_core_layers_random_state": tiny(
        core_layers=2,
        attention={"num_kv_heads": 2, "window": 6},
        positions={"scheme": "alibi"},
        recurrence={"state_init": "normal"},
    ),
    "plain": PLAIN,
}
ADAPTIVE = depth_rule(8, "latent_diff", 0.25)


def row_keys(prompts):
    """Keys that belong to a prompt, whatever it shares a batch with."""
    return jax.vmap(jax.random.key)(jnp.asarray([PROMPTS.index(prompt) for prompt in prompts]))


def settings(prompts=PROMPTS, rule=None, end_ids=END_IDS, count=COUNT, stops=None, **options):
    # One size of end ids, so that less is compiled; -1 is not a token.
    end_ids = [*end_ids, *[-1] * (len(END_IDS) - len(end_ids))]
    return DecodeSettings(
        depth_rule() if rule is None else rule,
        (),
        Ending(jnp.asarray(end_ids, jnp.int32), jnp.asarray(count, jnp.int32), stops),
        row_keys(prompts),
        **options,
    )


def empty_cache(config, batch_size, **options):
    options = {"num_slots": 8, "dtype": jnp.dtype(jnp.float32), "platform": "cpu"} | options
    return init_cache(config, CacheShape(batch_size, CAPACITY, **options))


def read_prompts(config, given, prompts, **cache_options):
    cache = empty_cache(config, len(prompts), **cache_options)
    history = history_of_prompts(prompts, CAPACITY, pad_id=0)
    prompts = left_padded(history, given.row_keys, 16)
    prefilled = prefill(*make(config), prompts, cache, given.rule)
    return prefilled, history


def search(
    config, given, prompts=PROMPTS, num_return=BEAMS, penalty=1.0, early=False, beams=BEAMS,
    **cache_options,
):  # fmt: skip
    return jax.device_get(
        beam_search(
            *make(config),
            given,
            *read_prompts(config, given, prompts, **cache_options),
            Beams(beams, num_return, penalty, early),
        )
    )


def new_tokens(result, row):
    columns = slice(int(result.history.prompt_lengths[row]), int(result.history.lengths[row]))
    return np.asarray(result.history.tokens)[row, columns].tolist()


def new_steps(result, row):
    first, last = int(result.history.prompt_lengths[row]), int(result.history.lengths[row])
    steps = np.asarray(result.steps)[row]
    assert not steps[:first].any() and not steps[last:].any()
    return steps[first:last].tolist()


@functools.partial(jax.jit, static_argnames="model")
def one_pass(model, params, token, cache, state, rule, keys):
    new = NewTokens(token, jnp.ones((1, 1), bool), state=state, state_keys=keys)
    return cached_forward(model, params, new, cache, rule)


def forced(config, rule, warm_start, prompt, new_ids, **cache_options):
    """Log-probability and steps of a given text, which passes alone, token by token."""
    given = settings([prompt], rule)
    prefilled, _ = read_prompts(config, given, [prompt], **cache_options)
    cache, logits = prefilled.cache, prefilled.logits[0]
    state, steps, log_prob = prefilled.core_state, [int(prefilled.num_steps[0])], 0.0
    for place, token in enumerate(new_ids):
        log_prob += float(jax.nn.log_softmax(logits)[token])
        if place + 1 < len(new_ids):
            token, state = jnp.asarray([[token]], jnp.int32), state if warm_start else None
            out = one_pass(*make(config), token, cache, state, rule, given.row_keys)
            cache, logits, state = out.cache, out.logits[0, 0], out.state
            steps.append(int(out.num_steps[0, 0]))
    return log_prob, steps


def check_places(result, num_return=BEAMS):
    """Texts of a prompt are different and in order."""
    for first in range(0, len(result.scores), num_return):
        rows = range(first, first + num_return)
        assert len({tuple(new_tokens(result, row)) for row in rows}) == num_return
        assert np.all(np.diff(result.scores[first : first + num_return]) <= 0)


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_are_those_of_recomputation_without_a_cache(name):
    config, penalty = CONFIGS[name], 0.7
    is_random = config.is_recurrent and config.recurrence.state_init == "normal"
    result = search(config, settings(), penalty=penalty)
    check_places(result)
    lengths = set()
    for row in range(len(PROMPTS) * BEAMS):
        prompt, text = PROMPTS[row // BEAMS], new_tokens(result, row)
        assert result.history.tokens[row, : len(prompt)].tolist() == prompt
        key = row_keys([prompt])[0] if is_random else None
        wanted = recomputed_score(*make(config), prompt, text, key=key)
        assert result.log_probs[row] == pytest.approx(wanted, abs=1e-4)
        assert result.scores[row] == pytest.approx(wanted / len(text) ** penalty, abs=1e-4)
        assert new_steps(result, row) == [DEPTH if config.is_recurrent else 0] * len(text)
        is_end = text[-1] in END_IDS
        assert result.reasons[row] == (END_OF_TEXT if is_end else LENGTH)
        assert is_end or len(text) == COUNT
        assert not set(text[:-1]) & set(END_IDS)
        lengths.add(len(text))
    assert len(lengths) > 1


@pytest.mark.parametrize(
    ("cache_options", "warm_start"),
    [
        ({"num_slots": 2, "sharing": "last"}, True),
        ({"num_slots": 8, "exited_reads": "skip"}, False),
    ],
    ids=str,
)
def test_every_beam_leaves_on_its_own(cache_options, warm_start):
    """Steps and log-probabilities are those of each text alone."""
    given = settings(rule=ADAPTIVE, warm_start=warm_start)
    result = search(TINY, given, penalty=0.0, **cache_options)
    check_places(result)
    for row in range(len(PROMPTS) * BEAMS):
        prompt, text = PROMPTS[row // BEAMS], new_tokens(result, row)
        log_prob, steps = forced(TINY, ADAPTIVE, warm_start, prompt, text, **cache_options)
        assert result.log_probs[row] == pytest.approx(log_prob, abs=1e-4)
        assert new_steps(result, row) == steps
    assert len(np.unique(result.steps)) > 2


def test_one_beam_is_greedy_decoding():
    given = settings(rule=ADAPTIVE, end_ids=(4, 9))
    prefilled, history = read_prompts(TINY, given, PROMPTS)
    state = start(given, prefilled, history)
    state = decode(*make(TINY), given, state, jnp.int32(COUNT))
    texts = [new_tokens(state, row) for row in range(len(PROMPTS))]
    assert len(set(map(len, texts))) > 1
    for early, penalty in ((False, 2.0), (True, -1.0)):
        found = search(TINY, given, num_return=1, beams=1, early=early, penalty=penalty)
        for row in range(len(PROMPTS)):
            assert new_tokens(found, row) == texts[row]
            assert new_steps(found, row) == new_steps(state, row)
        np.testing.assert_allclose(found.log_probs, state.scores, rtol=1e-5)
        np.testing.assert_array_equal(found.reasons, state.end.reason)


def test_more_beams_find_better_texts():
    """Without end tokens all texts are of one length."""
    given = settings(rule=ADAPTIVE, end_ids=())
    greedy = search(TINY, given, num_return=1, beams=1).scores
    best = search(TINY, given).scores[::BEAMS]
    assert np.all(best >= greedy) and np.any(best > greedy + 1e-3)


def test_prompts_do_not_matter_to_each_other():
    """Depth, length and penalty differ between them."""
    depths, counts = [8, 3, 5], [COUNT, 3, 6]
    penalties, early = jnp.asarray([0.0, 2.0, -1.0]), jnp.asarray([False, True, False])

    def given(rows):
        rule = depth_rule([depths[row] for row in rows], "latent_diff", 0.25)
        count = [counts[row] for row in rows]
        return settings([PROMPTS[row] for row in rows], rule, count=count)

    together = search(TINY, given([0, 1, 2]), penalty=penalties, early=early, num_return=2)
    for row, prompt in enumerate(PROMPTS):
        alone = search(
            TINY, given([row]), [prompt], 2, penalties[row : row + 1], early[row : row + 1]
        )
        for place in range(2):
            assert new_tokens(together, 2 * row + place) == new_tokens(alone, place)
            assert new_steps(together, 2 * row + place) == new_steps(alone, place)
        rows = slice(2 * row, 2 * row + 2)
        np.testing.assert_allclose(together.scores[rows], alone.scores, rtol=1e-5)
        np.testing.assert_array_equal(together.reasons[rows], alone.reasons)


def test_stop_texts_end_a_beam():
    tokenizer, texts = Pieces(), ("b", "\n")
    stops = stop_strings(texts, piece_table(tokenizer, TINY.vocab_size))
    result = search(TINY, settings(end_ids=(2,), stops=stops), penalty=0.0)
    reasons = set()
    for row, reason in enumerate(result.reasons):
        ids = [token for token in new_tokens(result, row) if token < tokenizer.vocab_size]
        has_stop = any(text in tokenizer.decode(ids) for text in texts)
        assert (reason == STOP) == has_stop
        assert not any(text in tokenizer.decode(ids[:-1]) for text in texts)
        wanted = recomputed_score(*make(TINY), PROMPTS[row // BEAMS], new_tokens(result, row))
        assert result.log_probs[row] == pytest.approx(wanted, abs=1e-4)
        reasons.add(int(reason))
    assert STOP in reasons


def test_a_mesh_changes_nothing():
    sharder = Sharder(make_mesh(MeshConfig(data=3, tensor=2), jax.devices()[:6]))
    model, params = build_model(TINY, DTypePolicy(), sharder, "cpu"), make(TINY)[1]
    given = settings(rule=ADAPTIVE)
    wanted = search(TINY, given)
    prefilled, history = read_prompts(TINY, given, PROMPTS)
    result = jax.device_get(
        beam_search(
            for_rows(model, len(PROMPTS) * BEAMS),
            params,
            given,
            prefilled,
            history,
            Beams(BEAMS, BEAMS),
        )
    )
    for row in range(len(PROMPTS) * BEAMS):
        assert new_tokens(result, row) == new_tokens(wanted, row)
        assert new_steps(result, row) == new_steps(wanted, row)
    np.testing.assert_allclose(result.scores, wanted.scores, rtol=1e-4)


def test_other_numbers_compile_nothing():
    compiled, lengths = beam_search_module._search, []
    search(TINY, settings(rule=ADAPTIVE))
    before = compiled._cache_size()
    for depth, count, penalty, early in [(2, 4, 0.0, True), (5, 6, 1.0, False), (1, 8, -1.0, True)]:
        rule = depth_rule(depth, "latent_diff", depth / 50, min_depth=depth - 1)
        given = settings(rule=rule, end_ids=(depth,), count=count)
        result = search(TINY, given, penalty=penalty, early=early)
        lengths.append(int(np.max(result.history.lengths - result.history.prompt_lengths)))
    assert lengths == [4, 6, 8]
    assert compiled._cache_size() == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_return": 4}, "num_return is 4 with num_beams=3"),
        ({"num_return": 0}, "num_return is 0"),
        ({"beams": 0, "num_return": 0}, "num_beams=0"),
        ({"given": settings(count=22)}, "take 33 tokens, and the history holds 32"),
        ({"given": settings(count=0)}, "max_new_tokens is 0"),
        ({"given": settings(is_drawn=True)}, "is_drawn is set"),
    ],
    ids=["many_results", "no_result", "no_beam", "history_full", "no_token", "draws"],
)
def test_what_cannot_be_searched_is_refused(changes, words):
    with pytest.raises(UserError, match=words):
        search(TINY, **({"given": settings()} | changes))


def test_a_cache_without_room_is_refused():
    given = settings(count=60)
    prefilled, _ = read_prompts(TINY, settings(), PROMPTS)
    history = history_of_prompts(PROMPTS, 80, pad_id=0)
    with pytest.raises(UserError, match="take 75 rows of the cache, which has 64"):
        beam_search(*make(TINY), given, prefilled, history, Beams(2, 1))
