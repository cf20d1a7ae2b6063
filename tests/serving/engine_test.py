"""The engine on a batch without a model: who gets which events, and who is refused."""

import dataclasses
import random
import threading
import time

import pytest
from engine_readers import SECONDS, Reader
from fake_batcher import ALPHABET, BYTES, FakeBatcher, alone, fake_config, fake_lm

from megatransformer_jax.config.generation import GenerationConfig
from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.serving.engine import Engine
from megatransformer_jax.serving.requests import (
    Busy,
    Failed,
    Finished,
    Job,
    NewToken,
    NotServing,
    PromptRead,
)
from megatransformer_jax.serving.texts import to_row_text

LM = fake_lm()


def job(prompt="once upon", stop=(), **options):
    ids = (1, *BYTES.encode(prompt)) if isinstance(prompt, str) else prompt
    own = {field.name for field in dataclasses.fields(Job)}
    of_job = {name: options.pop(name) for name in list(options) if name in own}
    options = {"max_new_tokens": 6, "strategy": "greedy", **options}
    return Job(ids, GenerationConfig.of(stop=stop, **options), **of_job)


def endless(**options):
    return job(max_new_tokens=900, ends=False, **options)


@pytest.fixture
def start(request):
    """Makes a running engine; `start.batcher` is its batch."""

    def make(lm=LM, batch=None, **options):
        def make_batcher(lm, shape):
            make.batcher = FakeBatcher(lm, shape, **(batch or {}))
            return make.batcher

        engine = Engine(lm, fake_config(**options), make_batcher)
        request.addfinalizer(engine.close)
        engine.start()
        engine.wait_until_ready(SECONDS)
        return engine

    return make


def expected(jobs, engine, lm=LM):
    return [alone(to_row_text(item, lm, engine.shape)) for item in jobs]


def random_jobs(count, seed=0, **of_job):
    rng, jobs = random.Random(seed), []
    for number in range(count):
        ids = (1, *rng.choices(ALPHABET, k=rng.choice([0, 1, 9, 40, 90])))
        if number % 4 == 1:  # One that begins like the one before.
            ids = (*jobs[-1].ids, *rng.choices(ALPHABET, k=20))
        jobs.append(
            job(
                ids,
                strategy="sample",
                seed=number % 5,
                depth=rng.choice([4, 8, 32]),
                exit_criterion=rng.choice(["fixed", "kl"]),
                max_new_tokens=rng.randint(1, 30),
                **of_job,
            )
        )
    return jobs


@pytest.mark.parametrize("is_streamed", [True, False])
def test_texts_that_share_a_batch_are_what_each_is_alone(start, is_streamed):
    engine, jobs = start(), random_jobs(60, is_streamed=is_streamed)
    readers = []
    for number in range(0, len(jobs), 3):
        readers.append(Reader(3))
        engine.submit(jobs[number : number + 3], readers[-1])
    for reader in readers:
        reader.wait()
    for number, (tokens, depths, reason) in enumerate(expected(jobs, engine)):
        reader, place = readers[number // 3], number % 3
        assert reader.tokens(place) == tokens
        events = reader.events[place]
        assert isinstance(events[0], PromptRead) and isinstance(events[-1], Finished)
        made = [event.depth for event in events if isinstance(event, NewToken)]
        assert made == depths[: len(made)]
        assert reader.reason(place) == {1: "end_of_text", 3: "length"}[reason]
        assert reader.text(place) == BYTES.decode(tokens)
    assert start.batcher.copies
    # Tokens come together only where nobody streams.
    assert (start.batcher.num_steps < start.batcher.num_turns) == (not is_streamed)
    assert engine.num_open == 0 and {slot["state"] for slot in engine.slots()} == {"free"}


def test_siblings_read_their_prompt_once(start):
    engine = start(prefix_reuse=False)
    jobs = [job("x" * 100, strategy="sample", sample=number) for number in range(3)]
    reader = Reader(3)
    engine.submit(jobs, reader)
    reader.wait()
    assert start.batcher.num_chunks == -(-100 // 16)
    assert [copy[2] for copy in start.batcher.copies] == [100, 100]
    assert [reader.tokens(number) for number in range(3)] == [
        tokens for tokens, _, _ in expected(jobs, engine)
    ]
    assert [reader.events[number][0].num_reused for number in range(3)] == [0, 100, 100]


@pytest.mark.parametrize("reuses", [True, False])
def test_a_prompt_that_begins_like_a_finished_text_reads_the_rest(start, reuses):
    engine = start(prefix_reuse=reuses)
    first = Reader()
    engine.submit([job("x" * 40, max_new_tokens=20, ends=False)], first)
    first.wait()
    chunks = start.batcher.num_chunks
    ids = (1, *BYTES.encode("x" * 40), *first.tokens(), *BYTES.encode("and then"))
    second = Reader()
    engine.submit([job(ids)], second)
    second.wait()
    assert second.events[0][0].num_reused == (60 if reuses else 0)
    assert start.batcher.num_chunks - chunks == (1 if reuses else 5)
    assert second.tokens() == expected([job(ids)], engine)[0][0]


def test_prompts_that_share_slots_are_copied_as_they_would_be_cut(start):
    engine = start(cache_slots=8)
    for depth, num_reused in ((8, 60), (9, 32)):
        first, second = Reader(), Reader()
        text = chr(ord("a") + depth) * 40
        engine.submit([job(text, max_new_tokens=20, ends=False, depth=depth)], first)
        first.wait()
        ids = (1, *BYTES.encode(text), *first.tokens(), *BYTES.encode("and then"))
        engine.submit([job(ids, depth=depth)], second)
        assert second.wait().events[0][0].num_reused == num_reused


def test_a_sibling_goes_on_when_the_one_that_reads_is_cancelled(start):
    engine = start(batch={"seconds_per_tick": 1e-3})
    first, second = Reader(), Reader()
    ticket = engine.submit([job("y" * 600)], first)
    engine.submit([job("y" * 600, max_new_tokens=3)], second)
    while engine.slots()[0]["state"] == "free" or engine.slots()[0]["read_tokens"] < 64:
        time.sleep(1e-3)
    ticket.cancel()
    assert first.wait().reason() == "cancelled"
    assert second.wait().tokens() == expected([job("y" * 600, max_new_tokens=3)], engine)[0][0]
    assert 0 < second.events[0][0].num_reused < 600


def test_a_cancelled_text_frees_its_row(start):
    engine = start(rows=2, batch={"seconds_per_tick": 1e-4})
    readers = [Reader() for _ in range(4)]
    tickets = [engine.submit([endless()], reader) for reader in readers]
    after = Reader()
    engine.submit([job("after")], after)
    for ticket in tickets:
        ticket.cancel()
    assert [reader.wait().reason() for reader in readers] == ["cancelled"] * 4
    assert after.wait().tokens() == expected([job("after")], engine)[0][0]
    assert engine.num_open == 0
    # Events after the end of a text go to nobody.
    counts = [len(reader.events[0]) for reader in readers]
    engine.run(lambda: None).result(SECONDS)
    assert [len(reader.events[0]) for reader in readers] == counts


def test_a_late_text_ends_with_what_it_has(start):
    engine = start(rows=1, batch={"seconds_per_tick": 1e-3})
    running, waiting = Reader(), Reader()
    engine.submit([endless()], running, deadline=time.monotonic() + 0.2)
    engine.submit([endless()], waiting, deadline=time.monotonic() + 0.05)
    assert waiting.wait().reason() == "deadline" and waiting.tokens() == []
    assert running.wait().reason() == "deadline"
    tokens = running.tokens()
    assert tokens and tokens == expected([endless()], engine)[0][0][: len(tokens)]


def test_a_stop_text_is_found_across_tokens_and_cut(start):
    engine = start()
    whole = BYTES.decode(expected([endless()], engine)[0][0])
    stop = whole[20:23]
    first = whole.index(stop)
    reader = Reader()
    engine.submit([endless(stop=(stop, "0"))], reader)
    assert reader.wait().reason() == "stop"
    assert reader.text() == whole[:first]
    assert len(reader.tokens()) == first + len(stop)


def test_prompts_are_scored(start):
    engine = start()
    reader = Reader(2)
    scored = job("z" * 40, scores_prompt=True, num_top=3)
    only = job("z" * 40, scores_prompt=True, only_scores=True, max_new_tokens=1)
    engine.submit([scored, only], reader)
    reader.wait()
    for number in (0, 1):
        scores = reader.events[number][0].scores
        assert [score.token for score in scores] == list(scored.ids)
        assert scores[0].log_prob is None and all(score.log_prob < 0 for score in scores[1:])
    assert len(reader.events[0][0].scores[5].top) == 3
    assert reader.tokens(0) == expected([scored], engine)[0][0]
    assert reader.reason(1) == "length" and reader.tokens(1) == []


def test_a_full_queue_is_busy(start):
    engine = start(rows=1, queue=2, batch={"seconds_per_tick": 1e-4})
    readers = [Reader() for _ in range(3)]
    tickets = [engine.submit([endless()], reader) for reader in readers]
    with pytest.raises(Busy, match="3 texts are open and at most 3") as refused:
        engine.submit([job()], Reader())
    assert 1 <= refused.value.retry_after <= 60
    with pytest.raises(UserError, match="4 texts at once"):
        engine.submit([job()] * 4, Reader())
    for ticket in tickets:
        ticket.cancel()
    for reader in readers:
        reader.wait()
    reader = Reader()
    engine.submit([job()], reader)
    assert reader.wait().reason() in ("length", "end_of_text")


def test_jobs_that_cannot_be_made_are_refused(start):
    engine = start()
    for wrong, message in (
        (job(exit_criterion="cosine"), "not compiled into this batch"),
        (job(depth=4, gate_readout="weighted"), "needs a model with an exit gate"),
        (job(strategy="beam"), "choose greedy or sample"),
        (job(banned_words=("x",)), "banned_words"),
        (job(cache_slots=2, depth=4), "slots"),
        (job((1, 400)), "400 is not an id; they are 0 to 258"),
        (job(()), "the prompt is empty"),
        (job("x" * 1020), "1021 tokens; with 6 new ones that is more than the 1024"),
        (job(stop_ids=(5, 6, 7, 8)), "5 tokens would end the text; at most 4"),
        (job(logit_bias=dict.fromkeys(range(33), 1.0)), "at most 32"),
        (job(num_top=21), "21 exceeds 20"),
    ):
        with pytest.raises(UserError, match=message):
            engine.submit([wrong], Reader())
    with pytest.raises(UserError, match="there is no job"):
        engine.submit([], Reader())
    without = start(lm=fake_lm(tokenizer=None))
    with pytest.raises(ConfigError, match="stop: texts need a tokenizer"):
        without.submit([job(stop=("x",))], Reader())
    reader = Reader()
    without.submit([job()], reader)
    assert len(reader.wait().tokens()) == 6 and reader.text() == ""


def test_a_failing_device_kills_the_engine_and_tells_everyone(start):
    engine = start(rows=1, batch={"fail_at_turn": 20})
    readers = [Reader(), Reader()]
    for reader in readers:
        engine.submit([endless()], reader)
    for reader in readers:
        last = reader.wait().events[0][-1]
        assert isinstance(last, Failed) and "log says why" in last.message
    engine.close()
    assert engine.state == "dead" and "the device is gone" in str(engine.failure)
    with pytest.raises(NotServing, match="stopped") as refused:
        engine.submit([job()], Reader())
    assert refused.value.state == "dead"
    with pytest.raises(NotServing):
        engine.run(lambda: 1).result(SECONDS)
    assert {slot["state"] for slot in engine.slots()} == {"free"}
    assert b'request_failed_total{model_name="fake"} 2.0' in engine.metrics.text()


def test_a_text_that_the_batch_refuses_fails_alone(start):
    engine = start()
    place = start.batcher.place

    def refuses(row, text):
        if text.seed == 7:
            raise UserError("not this one")
        place(row, text)

    start.batcher.place = refuses
    reader = Reader(3)
    engine.submit([job(seed=seed) for seed in (6, 7, 8)], reader)
    reader.wait()
    assert reader.events[1] == [Failed("not this one")]
    assert reader.reason(0) == reader.reason(2) == "length"
    assert engine.drain(SECONDS)


def test_a_model_that_cannot_be_compiled_is_dead():
    def fails(lm, shape):
        raise RuntimeError("no room")

    engine = Engine(LM, fake_config(), fails)
    assert engine.state == "loading"
    with pytest.raises(NotServing, match="being loaded"):
        engine.submit([job()], Reader())
    with pytest.raises(NotServing, match="being loaded"):
        engine.run(lambda: 1).result(SECONDS)
    engine.start()
    with pytest.raises(NotServing, match="stopped"):
        engine.wait_until_ready(SECONDS)
    assert engine.state == "dead" and not engine.drain(1)


def test_draining_finishes_what_is_open_and_takes_nothing(start):
    engine = start(rows=1)
    readers = [Reader() for _ in range(5)]
    for reader in readers:
        engine.submit([job(max_new_tokens=20)], reader)
    assert engine.drain(SECONDS) and engine.state == "draining"
    assert [len(reader.wait().tokens()) > 0 for reader in readers] == [True] * 5
    with pytest.raises(NotServing, match="shutting down"):
        engine.submit([job()], Reader())


def test_what_does_not_end_in_time_is_told(start):
    engine = start(batch={"seconds_per_tick": 1e-3})
    reader = Reader()
    engine.submit([endless()], reader)
    assert not engine.drain(0.05)
    engine.close()
    assert isinstance(reader.wait().events[0][-1], Failed)


def test_functions_run_on_the_engines_thread_between_launches(start):
    engine = start()
    assert engine.run(lambda: threading.current_thread().name).result(SECONDS) == "engine"
    with pytest.raises(ZeroDivisionError):
        engine.run(lambda: 1 / 0).result(SECONDS)
    reader = Reader()
    engine.submit([job()], reader)
    assert reader.wait().reason() == "length"


def test_a_reader_that_raises_is_cancelled_and_others_go_on(start):
    def broken(number, event):
        raise ValueError("nobody listens")

    engine = start()
    engine.submit([endless()], broken)
    reader = Reader()
    engine.submit([job()], reader)
    assert reader.wait().reason() == "length"
    assert engine.drain(SECONDS)


def test_slots_tell_what_rows_do(start):
    engine = start(batch={"seconds_per_tick": 1e-3})
    reader = Reader()
    ticket = engine.submit([endless(depth=32)], reader, request_id="mine")
    while not (slot := engine.slots()[0]).get("tokens"):
        time.sleep(1e-3)
    assert slot["state"] == "running" and slot["request"] == "mine" and slot["depth"] == 32
    assert slot["last_depth"] == 32 and slot["prompt_tokens"] == slot["read_tokens"] + 1 == 10
    ticket.cancel()
    reader.wait()


def test_tokens_come_one_by_one_while_anybody_streams(start):
    engine = start(batch={"seconds_per_tick": 1e-4})
    alone, beside, streamed = Reader(), Reader(), Reader()
    engine.submit([job(max_new_tokens=40, ends=False, is_streamed=False)], alone)
    alone.wait()
    steps, turns = start.batcher.num_steps, start.batcher.num_turns
    assert steps == pytest.approx(40 / 4, abs=3) and turns == pytest.approx(40, abs=3)
    engine.submit([job(max_new_tokens=40, ends=False)], streamed)
    engine.submit([job(max_new_tokens=20, ends=False, is_streamed=False)], beside)
    streamed.wait(), beside.wait()
    assert start.batcher.num_steps - steps == start.batcher.num_turns - turns


def test_short_prompts_are_begun_together(start):
    engine = start()
    jobs = [job(text) for text in ("once", "upon", "a time", "there", "was")]
    reader = Reader(len(jobs))
    engine.submit(jobs, reader)
    reader.wait()
    assert start.batcher.num_begun >= 3
    wanted = [tokens for tokens, _, _ in expected(jobs, engine)]
    assert [reader.tokens(number) for number in range(len(jobs))] == wanted


def test_a_prompt_that_would_keep_texts_waiting_is_read_in_parts(start):
    # Both chunks take longer than a token of a text that runs.
    engine = start(chunk=64, short_chunks=(16,), batch={"chunk_ticks": 3.0})
    running, reader = Reader(), Reader()
    ticket = engine.submit([endless(depth=4)], running)
    while not running.events[0]:
        time.sleep(0.001)
    engine.submit([job("x" * 40, depth=32)], reader)
    reader.wait()
    assert start.batcher.num_parts > 0
    ticket.cancel()
    assert reader.tokens() == expected([job("x" * 40, depth=32)], engine)[0][0]


@pytest.mark.parametrize("is_streamed", [True, False])
def test_metrics_add_up_to_what_readers_got(start, is_streamed):
    engine, jobs = start(), random_jobs(20, seed=1, is_streamed=is_streamed)
    reader = Reader(len(jobs))
    engine.submit(jobs, reader)
    reader.wait()
    assert engine.drain(SECONDS)
    values = {}
    for line in engine.metrics.text().decode().splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            values[name.replace('model_name="fake"', "").removeprefix("megatransformer:")] = value
    found = {name: float(value) for name, value in values.items()}
    alike = expected(jobs, engine)
    assert found["generation_tokens_total{}"] == sum(len(tokens) for tokens, _, _ in alike)
    assert found["core_iterations_total{}"] == sum(sum(depths) for _, depths, _ in alike)
    assert found["prompt_tokens_total{}"] == sum(len(item.ids) for item in jobs)
    assert found["time_to_first_token_seconds_count{}"] == len(jobs)
    ended = sum(number for name, number in found.items() if "request_success_total" in name)
    assert ended == len(jobs) and found["request_aborted_total{}"] == 0
    assert found["num_requests_running{}"] == found["num_requests_waiting{}"] == 0
    assert found["compilations_total{}"] == 0
    assert found["ticks_total{}"] > 0 and found["rows_per_turn_sum{}"] == sum(
        len(tokens) for tokens, _, _ in alike
    )


def test_settled_options_make_the_batch():
    shape = Engine(LM, fake_config(rows=3, max_logprobs=7)).shape
    assert (shape.rows, shape.capacity, shape.num_slots, shape.num_top) == (3, 1024, 32, 7)
    assert dataclasses.astuple(shape)[3:7] == (4, 16, (8, 16), ("fixed", "latent_diff", "kl"))
