"""Gives texts to a `Batcher` as its rows become free, and collects what comes."""

import dataclasses
import random

from megatransformer_jax.generation.continuous.lanes import StepLimits
from megatransformer_jax.generation.endings import END_OF_TEXT, EXHAUSTED, FINISH_REASONS


@dataclasses.dataclass
class Got:
    """What came of one text, as `Completion` has it."""

    token_ids: list[int] = dataclasses.field(default_factory=list)
    depths: list[int] = dataclasses.field(default_factory=list)
    score: float = 0.0
    finish_reason: str = "running"

    def take(self, events, row) -> bool:
        """Takes what a turn did to the row; True at the end of its text."""
        if not events.is_done[row]:
            return False
        reason = int(events.reason[row])
        self.finish_reason = FINISH_REASONS[reason]
        if reason != EXHAUSTED:
            self.score += float(events.log_prob[row])
        if reason not in (END_OF_TEXT, EXHAUSTED):
            self.token_ids.append(int(events.token[row]))
            self.depths.append(int(events.depth[row]))
        return reason != 0


def drive(batcher, texts, *, min_waiting=1, order=None, arrival=None, max_ticks=64):
    """What comes of each text.

    Args:
      batcher: with free rows.
      texts: in the order of what is returned.
      min_waiting: of every advance.
      order: in which texts are placed. None: their own.
      arrival: a seed; rows are then filled, chunks of prompts read, in parts and together too, and
        several turns taken in a launch, at random. None: as soon as there is a free row, at once,
        one by one.
      max_ticks: of every advance.
    """
    chance = random.Random(arrival)
    waits = lambda: arrival is not None and chance.random() < 0.5  # noqa: E731
    queue, got = list(range(len(texts)) if order is None else order), [Got() for _ in texts]
    free, reading, running = list(range(batcher.shape.rows)), {}, {}
    while queue or reading or running:
        while queue and free and not waits():
            row, text = free.pop(0), queue.pop(0)
            batcher.place(row, texts[text])
            reading[row] = text
        if batcher.begun_sizes and waits():
            begin_some(batcher, {row: texts[text] for row, text in reading.items()}, chance)
        for row in list(reading):
            while row in reading and not waits():
                may_be_short = texts[reading[row]].depth <= batcher.shape.num_slots
                size = chance.choice(batcher.shape.chunks) if may_be_short and waits() else None
                begun = batcher.begun(row)
                is_part = begun is not None or size == batcher.part_size is not None
                if batcher.prefill(row, size, 1 if is_part and waits() else None):
                    running[row] = reading.pop(row)
        turns = batcher.shape.turns if waits() else 1
        limits = StepLimits(min_waiting, max_ticks, turns, len(running))
        for events in batcher.step(limits).fetch():
            # A prompt of one token is read as soon as it is placed.
            for row, text in [*reading.items(), *running.items()]:
                if got[text].take(events, row):
                    reading.pop(row, None), running.pop(row, None)
                    free.append(row)
    return got


def begin_some(batcher, texts, chance):
    """Begins prompts of which nothing has been read together, if that may be."""
    size = chance.choice(batcher.begun_sizes)
    fresh = [
        row
        for row, text in texts.items()
        if batcher.num_unread(row) == len(text.ids) - 1 > 0
        and batcher.begun(row) is None
        and text.depth <= batcher.shape.num_slots
    ]
    if fresh:
        batcher.begin(fresh[: batcher.most_begun], size)
