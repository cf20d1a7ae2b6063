"""What a row gives is what `Generator` gives for its text alone, whatever shares the batch."""

import dataclasses
import functools
import random

import jax
import jax.monitoring
import numpy as np
import pytest
from driven_batcher import Got, drive
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding
from tiny_generator import generator
from tiny_model import PLAIN, PROMPTS, TINY, all_logits, make, tiny

from megatransformer_jax.config.option import UserError
from megatransformer_jax.config.sampling import CacheConfig, DepthConfig, SamplingConfig
from megatransformer_jax.generation.continuous.batcher import Batcher
from megatransformer_jax.generation.continuous.lanes import BatchShape, RowText, StepLimits

DIAGONAL = tiny(
    recurrence={"adapter": "diagonal", "state_init": "normal"},
    attention={"window": 5, "num_kv_heads": 2},
    value_embedding={"layers": (0, 1), "gate_channels": 4},
)
# As Ouro: nothing is injected, the state begins as the prelude's output, iterations differ.
LOOPED = tiny(
    prelude_layers=0,
    coda_layers=0,
    core_layers=2,
    recurrence={
        "adapter": "none",
        "state_init": "none",
        "backprop_depth": 8,
        "loop_embedding": True,
        "loop_scale": True,
        "loop_lora_rank": 2,
        "hyper_connections": 2,
    },
    exit_gate={"enabled": True},
)
CRITERIA = {
    "fixed": None,
    "latent_diff": (0.15, 0.6),
    "kl": (0.005, 0.1),
    "learned_gate": (0.001, 0.05),
}
SHAPE = BatchShape(4, 64, 8, chunk=4, short_chunks=(3,), criteria=("latent_diff", "kl"), num_top=2)
# Ends texts that draw it; the second never comes.
END_IDS = (11, 30)


@functools.cache
def batcher(config, shape=None):
    if shape is None:
        shape = SHAPE
        if config != TINY:  # Which compile less.
            criteria = "learned_gate" if config.exit_gate.enabled else "latent_diff"
            shape = dataclasses.replace(SHAPE, criteria=(criteria,))
    return Batcher(*make(config), None, shape)


def some_texts(count, kinds, seed=0):
    """Texts of random prompts, depths, thresholds, settings and lengths.

    Args:
      count: how many.
      kinds: criterion, whether tokens are drawn, whether states go on; each in turn.
    """
    chance = random.Random(seed)
    texts = []
    for number in range(count):
        criterion, is_drawn, is_warm = kinds[number % len(kinds)]
        limits = CRITERIA[criterion]
        sampling = SamplingConfig(
            temperature=chance.choice((0.7, 1.0, 1.6)),
            top_k=chance.choice((3, 20)),
            top_p=chance.choice((0.6, 0.95)),
            repetition_penalty=1.3,
        )
        texts.append(
            RowText(
                [1, *(chance.randrange(3, 30) for _ in range(chance.randrange(11)))],
                chance.randrange(1, 9),
                depth=chance.randrange(3, 9),
                min_depth=1 if limits is None else chance.randrange(1, 4),
                criterion=criterion,
                threshold=0.0 if limits is None else chance.uniform(*limits),
                warm_start=is_warm,
                is_drawn=is_drawn,
                sampling=sampling,
                seed=chance.randrange(9),
                end_ids=END_IDS,
            )
        )
    return texts


def alone(config, text, cache=None, num_samples=1):
    """What `Generator` gives for the text, as one of several."""
    depth = DepthConfig()
    if config.is_recurrent:
        depth = DepthConfig(
            depth=text.depth,
            min_depth=text.min_depth,
            exit_criterion=text.criterion,
            exit_threshold=None if text.criterion == "fixed" else text.threshold,
            warm_start=text.warm_start,
        )
    sampling = text.sampling
    if not text.is_drawn:
        sampling = SamplingConfig(repetition_penalty=sampling.repetition_penalty)
    one = generator(
        config,
        tokenizer=None,
        end_ids=END_IDS,
        strategy="sample" if text.is_drawn else "greedy",
        sampling=sampling,
        depth=depth,
        cache=CacheConfig(capacity=64) if cache is None else cache,
        seed=text.seed,
        max_new_tokens=text.max_new_tokens,
        num_samples=num_samples,
    )
    return one.generate([text.ids])[text.sample]


def assert_equal(got, wanted):
    assert got.token_ids == list(wanted.token_ids)
    assert got.depths == list(wanted.depths)
    assert got.finish_reason == wanted.finish_reason
    assert got.score == pytest.approx(wanted.score, abs=1e-4)


# Each compiles a generator.
OF_LINEAR = (("fixed", False, False), ("latent_diff", True, True), ("kl", True, False))
DRAWN = (("latent_diff", True, False),)


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        (TINY, OF_LINEAR),
        (DIAGONAL, DRAWN),
        (LOOPED, (("learned_gate", True, False),)),
        (PLAIN, (("fixed", True, False),)),
    ],
    ids=["linear", "diagonal", "looped", "plain"],
)
def test_rows_equal_texts_alone(config, kinds):
    texts = some_texts(24, kinds)
    got = drive(batcher(config), texts, arrival=1)
    for text, one in zip(texts, got, strict=True):
        assert_equal(one, alone(config, text))
    depths = {depth for one in got for depth in one.depths}
    assert len(depths) > 3 if config.is_recurrent else depths == {0}


def as_tuples(got):
    return [(one.token_ids, one.depths, one.finish_reason) for one in got]


def test_neither_company_nor_order_change_a_text():
    texts = some_texts(9, OF_LINEAR, seed=3)
    wanted = as_tuples(drive(batcher(TINY), texts))
    assert len({len(ids) for ids, _, _ in wanted}) > 2
    for min_waiting, order, ticks in (
        (2, range(8, -1, -1), 64),
        (4, [4, 0, 8, 1, 7, 2, 6, 3, 5], 2),
    ):
        got = drive(
            batcher(TINY), texts, min_waiting=min_waiting, order=list(order), max_ticks=ticks
        )
        assert as_tuples(got) == wanted
    assert as_tuples(drive(batcher(TINY), texts[4:5])) == wanted[4:5]


def test_nothing_compiles_once_everything_is_compiled():
    made, compiled = batcher(TINY), []
    made.compile()

    def listen(event, seconds, **details):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(details)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        drive(made, some_texts(20, OF_LINEAR, seed=4), arrival=2)
        made.place(0, some_texts(1, OF_LINEAR)[0])
        made.place(1, RowText([1, 4, 5, 6], 2))
        made.copy(0, 1, 2)
        made.score(1)
        made.release([0, 1])
        made.turn().fetch()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled


@pytest.mark.parametrize(
    ("slots", "sharing", "reads"),
    [(1, "modulo", "latest"), (3, "anchor", "skip")],
)
def test_fewer_slots_than_iterations(slots, sharing, reads):
    """A generator cuts prompts as a batch does."""
    config = tiny(prelude_layers=0, coda_layers=0, positions={"scheme": "alibi"})
    shape = BatchShape(
        3, 64, slots, chunk=4, criteria=("latent_diff",), sharing=sharing, exited_reads=reads
    )
    cache = CacheConfig(
        capacity=64, slots=slots, sharing=sharing, exited_reads=reads, prefill_chunk=4
    )
    texts = some_texts(8, DRAWN, seed=5)
    got = drive(batcher(config, shape), texts, min_waiting=2)
    assert any(depth > slots for one in got for depth in one.depths)
    for text, one in zip(texts, got, strict=True):
        assert_equal(one, alone(config, text, cache))


def test_copied_rows_are_those_that_would_be_read():
    """For the samples of a prompt, a prompt that begins alike, and in the row of the one before.

    First states are drawn, those of prompts by the key of the prompt.
    """
    made = batcher(DIAGONAL)
    first = dataclasses.replace(some_texts(1, DRAWN, seed=6)[0], ids=[1, 9, 4, 20, 7, 8, 3])
    first = dataclasses.replace(first, end_ids=(30,), max_new_tokens=6)
    second = dataclasses.replace(first, sample=1)
    other = dataclasses.replace(first, ids=[*first.ids[:5], 6, 6, 5])
    made.place(0, first)
    while not made.prefill(0):
        pass
    for row, text, count in ((1, second, 6), (2, other, 5)):
        made.place(row, text)
        made.copy(0, row, count)
        assert made.num_unread(row) == len(text.ids) - 1 - count
        while not made.prefill(row):
            pass
    got = run_rows(made, {0: first, 1: second, 2: other})
    assert_equal(got[0], alone(DIAGONAL, first))
    assert_equal(got[1], alone(DIAGONAL, second, num_samples=2))
    assert_equal(got[2], alone(DIAGONAL, other))
    after = dataclasses.replace(first, ids=[*first.ids[:6], 25])
    made.place(0, after)
    made.copy(0, 0, 6)
    assert_equal(run_rows(made, {0: after})[0], alone(DIAGONAL, after))


def run_rows(made, texts):
    """What comes of rows whose prompts have been read."""
    got, running = {row: Got() for row in texts}, set(texts)
    while running:
        made.advance(1, 64)
        (events,) = made.turn().fetch()
        running -= {row for row in list(running) if got[row].take(events, row)}
    return got


def test_scores_of_prompts():
    made = batcher(TINY)
    prompt = list(PROMPTS[2])
    made.place(1, RowText(prompt, 3, depth=3))
    is_read, parts = False, []
    while not is_read:
        scores, is_read = made.score(1)
        parts.append(scores.fetch())
    assert made.score(1) == (None, True)
    logits = all_logits(*make(TINY), prompt, 3)
    wanted = np.asarray(jax.nn.log_softmax(logits))
    log_probs = np.concatenate([part.log_probs for part in parts])
    np.testing.assert_allclose(log_probs, wanted[np.arange(len(prompt) - 1), prompt[1:]], atol=1e-5)
    top = np.concatenate([part.top_ids for part in parts])
    np.testing.assert_array_equal(top, np.argsort(-wanted[:-1])[:, :2])
    made.release([1])


def test_likeliest_tokens_come_with_new_ones():
    made = batcher(TINY)
    made.place(3, RowText([1, 5, 9], 1, depth=2, num_top=2))
    made.place(2, RowText([1, 5, 9], 1, depth=2, logit_bias={7: 100.0}))
    made.prefill(3), made.prefill(2)
    made.turn()
    events = made.step(StepLimits(2, 9)).fetch()[0]
    wanted = np.asarray(jax.nn.log_softmax(all_logits(*make(TINY), [1, 5, 9], 2)[-1]))
    assert events.is_done.tolist() == [False, False, True, True]
    assert events.token.tolist()[2:] == [7, int(np.argmax(wanted))]
    np.testing.assert_array_equal(events.top_ids[3], np.argsort(-wanted)[:2])
    np.testing.assert_allclose(events.top_log_probs[3], np.sort(wanted)[::-1][:2], atol=1e-5)
    np.testing.assert_allclose(events.log_prob[2:], wanted[[7, np.argmax(wanted)]], atol=1e-5)


def test_the_cache_is_written_in_place():
    """What programs need besides is less than a hundredth of it."""
    config = tiny(max_length=4096)
    made = Batcher(*make(config), None, BatchShape(2, 4096, 32))
    made.advance(1, 1)
    made.turn()
    made.step(StepLimits(1, 1))
    size = made.cache_bytes()
    assert size == 2 * (1 + 32 + 1) * 2 * 4096 * 16 * 4
    for name in ("advance", "turn", "step"):
        memory = made.memory(name)
        assert memory.temp_size_in_bytes < size / 100
    assert made.memory("turn").alias_size_in_bytes > size


def test_programs_read_weights_in_the_order_in_which_they_lie():
    model, params = make(TINY)
    columns = Format(Layout((1, 0)), SingleDeviceSharding(jax.devices()[0]))
    params = jax.tree.map(lambda x: jax.device_put(x, columns) if x.ndim == 2 else x, params)
    made = Batcher(model, params, None, BatchShape(2, 16, 2))
    made.turn()
    formats, _ = made._programs["turn"].input_formats
    orders = {given.layout.major_to_minor for given in formats if given.layout is not None}
    assert (1, 0) in orders


def test_a_launch_of_several_turns_ends_with_the_first_text():
    """What each turn gives is what it gives in a launch of its own."""
    texts = [RowText([1, 5, 9], 2, depth=2), RowText([4, 2], 3, depth=2)]
    wanted = drive(batcher(TINY), texts)
    made = batcher(TINY)
    for row, text in enumerate(texts):
        made.place(row, text), made.prefill(row)
    made.turn()
    found = [[], []]
    for num_turns in (2, 1):  # The first text ends after two turns; then one row runs.
        launch = made.step(StepLimits(2, 9, 3, 2)).fetch()
        assert len(launch) == num_turns
        for events in launch:
            for row in np.flatnonzero(events.is_done):
                found[row].append(int(events.token[row]))
    assert found == [each.token_ids for each in wanted]
    assert len(made.step(StepLimits(2, 9, 3, 1)).fetch()) == 1  # Nobody runs any more.


def test_what_does_not_fit_is_named():
    made = batcher(TINY)
    with pytest.raises(UserError, match="a prompt of 60 tokens and 5 new ones are more than"):
        made.place(0, RowText([1] * 60, 5))
    with pytest.raises(UserError, match="'cosine' is not compiled in; choose one of fixed"):
        made.place(0, RowText([1], 5, criterion="cosine"))
    with pytest.raises(UserError, match="3 likeliest tokens are more than the 2"):
        made.place(0, RowText([1], 5, num_top=3))
    with pytest.raises(UserError, match="a text needs a token to continue"):
        made.place(0, RowText([], 5))
    with pytest.raises(UserError, match="unknown exit criterion 'kll'"):
        BatchShape(2, 64, 2, criteria=("kll",))
    with pytest.raises(UserError, match="rows of a batch is 0"):
        BatchShape(0, 64, 2)
    with pytest.raises(UserError, match="capacity of 81 tokens exceeds the model's max_length=80"):
        Batcher(*make(TINY), None, BatchShape(2, 81, 2))
    with pytest.raises(UserError, match="'learned_gate' reads an exit gate"):
        Batcher(*make(TINY), None, BatchShape(2, 64, 2, criteria=("learned_gate",)))


def test_durations_are_measured_before_any_text_comes():
    measured = batcher(TINY).durations(repeats=2)
    assert min(measured.tick, measured.turn) > 0
    assert list(measured.chunks) == [3, 4]
    assert all(sum(seconds) > 0 for seconds in measured.chunks.values())
    assert not batcher(TINY).turn().fetch()[0].is_running.any()
