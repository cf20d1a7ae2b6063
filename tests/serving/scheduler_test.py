"""The scheduler against a simulated batch: throughput, waiting times, shares and starvation."""

import numpy as np
import pytest

from megatransformer_jax.serving.scheduler import (
    Costs,
    Launch,
    Policy,
    Reading,
    Row,
    Scheduler,
    candidates,
    choose_min_waiting,
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
    scheduler = Scheduler(Policy(num_rows, min_waiting))
    depth = [draw(rng, row) for row in range(num_rows)]
    left, made, time = list(depth), np.zeros(num_rows, int), 0.0
    while made.sum() < 100 * num_rows:
        launch = scheduler.next_launch(dict.fromkeys(range(num_rows), 32), 0, [])
        ticks = min(sorted(left)[launch.min_waiting - 1], 64)
        left = [rest - ticks for rest in left]
        time += ticks + turn_cost
        scheduler.see_launch(ticks, 0, 1e-3 * (ticks + turn_cost))
        for row in range(num_rows):
            is_done = left[row] <= 0
            got = depth[row] if is_done else None
            if is_done:
                made[row] += 1
                left[row] = depth[row] = draw(rng, row)
            scheduler.see_row(row, depth[row] - left[row], got)
    return made.sum() / time, time / made[0]


@pytest.mark.parametrize("num_rows", [8, 32])
@pytest.mark.parametrize("turn_cost", [1.25, 2.85])
@pytest.mark.parametrize(
    ("kind", "least"),
    [("mixed", 1.5), ("text", 0.95), ("uniform", 0.99), ("geometric", 1.3), ("one shallow", 0.95)],
)
def test_the_choice_is_no_worse_than_token_level_and_better_for_mixed_depths(
    kind, least, turn_cost, num_rows
):
    rate, _ = served(kind, num_rows, turn_cost)
    token_level, _ = served(kind, num_rows, turn_cost, min_waiting=num_rows)
    assert rate >= least * token_level


@pytest.mark.parametrize("kind", ["mixed", "one shallow"])
def test_a_shallow_text_does_not_wait_for_deep_ones(kind):
    _, waiting = served(kind, 8, 1.25)
    _, token_level = served(kind, 8, 1.25, min_waiting=8)
    assert waiting <= 0.4 * token_level


def test_a_fixed_number_is_kept():
    scheduler = Scheduler(Policy(8, min_waiting=3))
    assert scheduler.next_launch({row: 4 for row in range(8)}, 0, []).min_waiting == 3
    assert scheduler.next_launch({row: 4 for row in range(2)}, 0, []).min_waiting == 2
    # A text that enters needs a turn as much as one that waits.
    assert scheduler.next_launch({row: 4 for row in range(8)}, 2, []).min_waiting == 1
    assert scheduler.next_launch({row: 4 for row in range(8)}, 5, []) == Launch(None, 0, True)


def test_the_simulation_counts_tokens_as_a_loop_does():
    rows = [Row((4, 2)), Row((8,), iteration=3), Row((3,))]
    rate, slowdown = simulate(rows, [1, 2, 3], 1.5, 64)
    for place, number in enumerate([1, 2, 3]):
        depth = [4.0, 8.0, 3.0]
        left, count, time = [4.0, 5.0, 3.0], [0, 0, 0], 0.0
        for _ in range(10_000):
            if time >= 6 * (8 + 1.5):
                break
            ticks = sorted(left)[number - 1]
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
        expected = np.mean([time / made[row] / alone[row] for row in range(3)])
        assert slowdown[place] == pytest.approx(expected)


def test_candidates_are_numbers_of_rows():
    assert candidates(1) == [1]
    assert candidates(8) == [1, 2, 3, 4, 6, 8]
    assert candidates(32) == [1, 2, 3, 4, 8, 16, 24, 32]


def test_a_choice_that_is_as_good_is_kept():
    rows = [Row((8,))] * 4
    assert choose_min_waiting(rows, 1.5, 64) == 4
    assert choose_min_waiting(rows, 1.5, 64, present=2) == 2


def test_prompts_get_their_share_of_the_time_while_texts_are_continued():
    scheduler = Scheduler(Policy(8, max_prefill_share=0.25))
    reading, running, num_chunks, decoding = [Reading("long", 10**6)], {1: 8}, 0, 0.0
    for _ in range(400):
        chunks = scheduler.next_launch(running, 0, reading).chunk == "long"
        num_chunks += chunks
        decoding += 8 + 1.5
        scheduler.see_launch(8, int(chunks), 1e-3 * (8 + 1.5 + 20 * chunks))
    assert 20 * num_chunks / (20 * num_chunks + decoding) == pytest.approx(0.25, abs=0.02)


def test_prompts_have_all_of_the_time_while_no_text_is_continued():
    scheduler = Scheduler(Policy(8, max_prefill_share=0.01))
    for _ in range(10):
        assert scheduler.next_launch({}, 0, [Reading("a", 5)]) == Launch("a", 0, False)


def test_short_prompts_overtake_a_long_one_only_so_often():
    scheduler = Scheduler(Policy(8, max_bypasses=5))
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


def test_costs_are_found_from_launches_of_several_lengths():
    costs, rng = Costs(), np.random.default_rng(0)
    for _ in range(300):
        ticks, chunks = int(rng.integers(1, 32)), int(rng.integers(0, 2))
        seconds = 2e-3 * (ticks + 4.0 + 13.0 * chunks) * rng.uniform(0.95, 1.05)
        costs.observe(ticks, chunks, seconds * (50 if rng.random() < 0.02 else 1))
    assert costs.turn == pytest.approx(4.0, rel=0.25)
    assert costs.chunk == pytest.approx(13.0, rel=0.25)


def test_launches_that_are_all_alike_leave_the_ratios_as_they_were():
    costs = Costs()
    for _ in range(500):
        costs.observe(8, 0, 0.01)
    assert costs.turn == pytest.approx(1.5, rel=0.2)
    assert costs.chunk == pytest.approx(8.0, rel=0.2)
    costs.observe(8, 0, 0.0)
    costs.observe(8, 0, float("nan"))
    assert costs.turn == pytest.approx(1.5, rel=0.2)
