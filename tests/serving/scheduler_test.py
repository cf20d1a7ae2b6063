"""The scheduler against a simulated batch: throughput, waiting times, shares and starvation."""

import numpy as np
import pytest

from megatransformer_jax.serving.scheduler import (
    Choice,
    Costs,
    Launch,
    Policy,
    Reading,
    Row,
    Scheduler,
    candidates,
    choose,
    simulate,
)

DEPTHS = {
    "mixed": lambda rng, row: (4, 4, 8, 32)[row % 4],
    "text": lambda rng, row: int(np.clip(round(rng.normal(6.9, 1.7)), 1, 32)),
    "uniform": lambda rng, row: 8,
    "geometric": lambda rng, row: int(min(1 + rng.geometric(1 / 7), 32)),
    "one shallow": lambda rng, row: 4 if row == 0 else 32,
}


def served(kind, num_rows, turn_cost, min_waiting=None):
    """(tokens per iteration's time, mean time between tokens of row 0): all rows always busy."""
    rng, draw = np.random.default_rng(0), DEPTHS[kind]
    scheduler = Scheduler(Policy(num_rows, min_waiting), Costs(turn_cost))
    depth = [draw(rng, row) for row in range(num_rows)]
    left, made, time = list(depth), np.zeros(num_rows, int), 0.0
    while made.sum() < 100 * num_rows:
        launch = scheduler.next_launch(dict.fromkeys(range(num_rows), 32), 0, [])
        ticks = min(sorted(left)[launch.min_waiting - 1], launch.max_ticks)
        left = [rest - ticks for rest in left]
        time += ticks + turn_cost
        scheduler.see_turn(ticks)
        for row in range(num_rows):
            is_done = left[row] <= 0
            got = depth[row] if is_done else None
            if is_done:
                made[row] += 1
                left[row] = depth[row] = draw(rng, row)
            scheduler.see_row(row, depth[row] - left[row], got)
    return made.sum() / time, time / made[0]


@pytest.mark.parametrize("num_rows", [8, 32])
@pytest.mark.parametrize("turn_cost", [1.25, 5.0])
@pytest.mark.parametrize(
    ("kind", "least"),
    [("mixed", 1.5), ("text", 0.95), ("uniform", 0.99), ("geometric", 1.2), ("one shallow", 0.95)],
)
def test_the_choice_is_no_worse_than_token_level_and_better_for_mixed_depths(
    kind, least, turn_cost, num_rows
):
    rate, _ = served(kind, num_rows, turn_cost)
    token_level, _ = served(kind, num_rows, turn_cost, min_waiting=num_rows)
    assert rate >= least * token_level


@pytest.mark.parametrize("turn_cost", [1.25, 2.85, 5.0])
@pytest.mark.parametrize("kind", ["mixed", "one shallow"])
def test_a_shallow_text_does_not_wait_for_deep_ones(kind, turn_cost):
    _, waiting = served(kind, 8, turn_cost)
    _, token_level = served(kind, 8, turn_cost, min_waiting=8)
    assert waiting <= 0.4 * token_level


def test_a_fixed_number_is_kept():
    scheduler = Scheduler(Policy(8, min_waiting=3), Costs())
    assert scheduler.next_launch({row: 4 for row in range(8)}, 0, []).min_waiting == 3
    assert scheduler.next_launch({row: 4 for row in range(2)}, 0, []).min_waiting == 2
    # A text that enters needs a turn as much as one that waits.
    assert scheduler.next_launch({row: 4 for row in range(8)}, 2, []).min_waiting == 1
    # But not for that alone, unless it would wait for longer than two turns take.
    launch = scheduler.next_launch({row: 4 for row in range(8)}, 5, [])
    assert launch == Launch(None, 0, 1, 3, True)


def test_the_simulation_counts_tokens_as_a_loop_does():
    rows = [Row((4, 2)), Row((8,), iteration=3), Row((3,))]
    choices = [Choice(1, 64), Choice(2, 64), Choice(3, 64), Choice(3, 3)]
    rate, slowdown = simulate(rows, choices, 1.5)
    for place, choice in enumerate(choices):
        depth = [4.0, 8.0, 3.0]
        left, count, time = [4.0, 5.0, 3.0], [0, 0, 0], 0.0
        for _ in range(10_000):
            if time >= 6 * (8 + 1.5):
                break
            ticks = min(sorted(left)[choice.min_waiting - 1], choice.max_ticks)
            time += ticks + 1.5
            for row in range(3):
                left[row] -= ticks
                if left[row] <= 0:
                    count[row] += 1
                    depth[row] = rows[row].depths[count[row] % len(rows[row].depths)]
                    left[row] = depth[row]
        made = [count[row] + 1 - left[row] / depth[row] for row in range(3)]
        made[1] -= 3 / 8
        assert rate[place] == pytest.approx(sum(made) / time)
        alone = [3 + 1.5, 8 + 1.5, 3 + 1.5]
        expected = max([time / made[row] / alone[row] for row in range(3)])
        assert slowdown[place] == pytest.approx(expected)


def test_candidates_are_numbers_of_rows_and_clocks():
    def numbers(num_rows):
        found = candidates(num_rows, 64)
        assert found[-3:] == [Choice(num_rows, ticks) for ticks in (4, 8, 16)]
        assert {choice.max_ticks for choice in found[:-3]} == {64}
        return [choice.min_waiting for choice in found[:-3]]

    assert numbers(1) == [1]
    assert numbers(8) == [1, 2, 3, 4, 6, 8]
    assert numbers(32) == [1, 2, 3, 4, 8, 16, 24, 32]
    assert candidates(2, 8) == [Choice(1, 8), Choice(2, 8), Choice(2, 4)]


def test_a_choice_that_is_as_good_is_kept():
    rows = [Row((8,))] * 4
    assert choose(rows, 1.5, 64) == Choice(4, 64)
    assert choose(rows, 1.5, 64, present=Choice(2, 64)) == Choice(2, 64)
    # Unless a row would suffer: all wait for the deepest.
    rows = [Row((4,)), *[Row((32,))] * 7]
    assert choose(rows, 5.0, 64, present=Choice(8, 64)) != Choice(8, 64)


def test_prompts_get_their_share_of_the_time_while_texts_are_continued():
    costs = Costs(turn=1.5, chunks={64: (4.0, 2.0, 2.0)})
    scheduler = Scheduler(Policy(8, max_prefill_share=0.25), costs)
    reading, running, num_chunks, decoding = (
        [Reading("long", 10**6, 8, may_be_short=False)],
        {1: 8},
        0,
        0.0,
    )
    for _ in range(400):
        num_chunks += scheduler.next_launch(running, 0, reading).chunk == "long"
        decoding += 8 + 1.5
        scheduler.see_turn(8)
    reading_time = (4 + 8 * 2) * num_chunks
    assert reading_time / (reading_time + decoding) == pytest.approx(0.25, abs=0.02)


def test_prompts_have_all_of_the_time_while_no_text_is_continued():
    scheduler = Scheduler(Policy(8, max_prefill_share=0.01), Costs())
    for _ in range(10):
        assert scheduler.next_launch({}, 0, [Reading("a", 5)]) == Launch("a", 16, 0, 0, False)


@pytest.mark.parametrize(
    ("num_left", "num_running", "whole", "size"),
    [
        (4, 0, 1.2, 4),  # The smallest that is enough.
        (5, 0, 1.2, 16),
        (16, 0, 1.2, 16),
        (17, 0, 1.2, 64),  # Two take longer than a whole one.
        (17, 0, 4.0, 16),
        (1000, 0, 3.3, 64),
        (1000, 8, 0.8, 64),  # 1 + 8 * 0.8 is less than three quarters of a token's time, 2 + 8.
        (1000, 8, 0.9, 16),
    ],
)
def test_chunks_are_short_where_that_reads_as_fast_or_texts_would_wait(
    num_left, num_running, whole, size
):
    costs = Costs(2.0, {4: (1.0, 0.7, 0.7), 16: (1.0, 0.75, 0.75), 64: (1.0, whole, whole)})
    running = {number: 8 for number in range(num_running)}
    launch = lambda *reading: Scheduler(Policy(8), costs).next_launch(running, 0, reading)  # noqa: E731
    assert launch(Reading("a", num_left, 8)).chunk_size == size
    assert launch(Reading("a", num_left, 8, may_be_short=False)).chunk_size == 64
    assert launch().chunk_size == 0


def test_the_briefest_chunk_is_taken_where_all_keep_texts_waiting():
    costs = Costs(2.0, {16: (90.0, 1.0, 1.0), 32: (91.0, 1.0, 1.0), 64: (1.0, 100.0, 100.0)})
    launch = Scheduler(Policy(8), costs).next_launch({1: 8}, 0, [Reading("a", 1000, 8)])
    assert launch.chunk_size == 16


def test_a_chunk_is_read_in_parts_where_even_the_short_ones_keep_texts_waiting():
    costs = Costs(2.0, {8: (2.0, 2.0, 2.0), 16: (3.0, 3.0, 3.0), 64: (4.0, 9.0, 9.0)}, 16)
    scheduler = Scheduler(Policy(8), costs)
    most = 0.75 * (2 + 8)

    def parts(depth, running):
        begun, found = None, []
        while True:
            reading = Reading("a", 1000, depth, begun=begun)
            launch = scheduler.next_launch(running, 0, [reading])
            assert launch.chunk_size == 16 or not running
            scheduler.see_turn(10**6)  # Prompts may take as much again.
            if launch.chunk_iterations is None:
                return found
            found.append(launch.chunk_iterations)
            begun = (16, sum(found))

    assert parts(8, {1: 8}) == [1] * 7
    assert parts(8, {}) == []
    assert parts(32, {1: 8}) == [1] * 31
    assert all(3 + 3 * part <= most for part in parts(32, {1: 8}))
    # One that has been begun is finished at once where nobody waits.
    launch = scheduler.next_launch({}, 0, [Reading("a", 1000, 8, begun=(16, 4))])
    assert (launch.chunk_size, launch.chunk_iterations) == (16, None)


def test_short_prompts_are_read_together_where_that_is_faster():
    chunks = {8: (2.0, 0.5, 2.0), 16: (3.0, 1.0, 2.0), 64: (4.0, 3.0, 9.0)}
    costs = Costs(4.0, chunks, begun={8: (4.0, 0.8), 16: (6.0, 1.5)}, most_begun=4)
    launch = lambda running, *reading: Scheduler(Policy(8), costs).next_launch(running, 0, reading)  # noqa: E731
    short = [Reading(name, 5, 4) for name in "abcde"]
    found = launch({}, *short)
    assert (found.begun, found.chunk_size, found.chunk) == (("a", "b", "c", "d"), 8, None)
    # A long one, one that has been begun, and one that must be read in whole chunks are no part.
    others = [
        Reading("f", 40, 4),
        Reading("g", 5, 4, place=0.1),
        Reading("h", 5, 4, begun=(16, 2)),
        Reading("i", 5, 4, may_be_short=False),
    ]
    assert launch({}, *others, *short[:2], Reading("j", 12, 4)).begun == ("a", "b", "j")
    assert launch({}, *others, short[0]).begun == ()
    assert launch({}, *others, short[0]).chunk == "g"
    # Deep ones would keep the text that runs waiting.
    deep = [Reading(name, 5, 32) for name in "ab"]
    assert launch({}, *deep).begun == ("a", "b")
    assert launch({1: 4}, *deep).begun == ()


def test_a_prompt_that_was_overtaken_too_often_comes_before_those_that_are_read_together():
    costs = Costs(begun={16: (2.0, 0.1)}, most_begun=4)
    scheduler = Scheduler(Policy(8, max_bypasses=3), costs)
    reading = [Reading("long", 100), Reading("a", 5), Reading("b", 5)]
    found = [scheduler.next_launch({}, 0, reading) for _ in range(4)]
    assert [launch.begun for launch in found] == [("a", "b")] * 3 + [()]
    assert found[-1].chunk == "long"


@pytest.mark.parametrize(
    ("others", "turns"),
    [
        ({"is_streamed": False}, 4),
        ({"is_streamed": True}, 1),
        ({"is_streamed": False, "reading": [Reading("a", 9)]}, 1),
        ({"is_streamed": False, "num_admitted": 1}, 1),
    ],
)
def test_a_launch_has_several_turns_where_nobody_waits(others, turns):
    given = {"running": {1: 8, 2: 4}, "num_admitted": 0, "reading": [], **others}
    launch = Scheduler(Policy(8, max_turns=4), Costs()).next_launch(**given)
    assert launch.turns == turns


def test_chunks_become_shorter_as_a_row_fills():
    costs = Costs(2.0, {16: (1.0, 0.5, 1.0), 64: (1.0, 0.6, 3.0)})
    sizes = [
        Scheduler(Policy(8), costs).next_launch({1: 8}, 0, [Reading("a", 100, 8, place)]).chunk_size
        for place in (0.0, 0.05, 0.3, 0.9)
    ]
    assert sizes == [64, 64, 16, 16]


def test_short_prompts_overtake_a_long_one_only_so_often():
    scheduler = Scheduler(Policy(8, max_bypasses=5), Costs())
    chosen = []
    for number in range(60):
        # A new short prompt each time, read by one chunk.
        reading = [Reading("long", 1000), Reading(f"short {number}", 10)]
        chosen.append(scheduler.next_launch({}, 0, reading).chunk)
    assert chosen[:6] == [*(f"short {number}" for number in range(5)), "long"]
    assert "long" in chosen
    # Once it has been overtaken so often it is next until it has been read.
    assert set(chosen[5:]) == {"long"}
    scheduler.forget("long")
