"""The engine's work between two launches: rows, queue and device. For one thread, without locks.

Each `step` hands the device the next launch before it reads what the one before has made, so that
the device never waits. Hence a text that ends leaves its row idle for one launch.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from absl import logging

from megatransformer_jax.config.option import UserError
from megatransformer_jax.generation.continuous.lanes import (
    DeviceEvents,
    Events,
    PromptScores,
    StepLimits,
)
from megatransformer_jax.models.exit_criteria import exit_criterion
from megatransformer_jax.serving.metrics import Metrics
from megatransformer_jax.serving.prefixes import Found, Prefixes
from megatransformer_jax.serving.requests import (
    Deliver,
    Event,
    Failed,
    Finished,
    PromptRead,
    Scored,
)
from megatransformer_jax.serving.scheduler import Launch, Reading, Scheduler
from megatransformer_jax.serving.texts import Text


class Ticket:
    """Jobs that were handed in together.

    Attributes:
      request_id: what the caller calls it, for people.
      deliver: takes the events.
      deadline: moment at which its texts end.
      texts: one per job.
      is_cancelled: whether they are to end now.
    """

    def __init__(
        self,
        request_id: str,
        texts: Iterable[Text],
        deliver: Deliver,
        deadline: float,
        wake: Callable[[], None],
    ):
        self.request_id = request_id
        self.texts = tuple(texts)
        self.deliver = deliver
        self.deadline = deadline
        self.is_cancelled = False
        self._wake = wake

    def cancel(self) -> None:
        """Ends its texts at the next launch, each with `Finished('cancelled')`; from any thread."""
        self.is_cancelled = True
        self._wake()


@dataclasses.dataclass(frozen=True)
class Item:
    """A text with its ticket, and its number there."""

    ticket: Ticket
    number: int

    @property
    def text(self) -> Text:
        """The text."""
        return self.ticket.texts[self.number]


@dataclasses.dataclass(frozen=True)
class _Launch:
    """What the device was told to do and has not been asked about."""

    events: DeviceEvents
    items: dict[int, Item]  # That run, by row.
    min_waiting: int


class Launches:
    """Rows of a batch and the texts that wait for one.

    Args:
      batcher: on the device.
      scheduler: decides what is next.
      prefixes: what rows hold.
      metrics: are told what happens.
      at_end: called for each text that has ended.
      copies_only_siblings: whether cached prompts are copied only between texts of one ticket.
      copies_only_prompts: whether what a text generated is never copied.
      num_slots: of the cache, for each core layer. None: there is no core.
    """

    def __init__(
        self,
        batcher: Any,
        scheduler: Scheduler,
        prefixes: Prefixes,
        metrics: Metrics,
        at_end: Callable[[], None],
        *,
        copies_only_siblings: bool,
        copies_only_prompts: bool,
        num_slots: int | None,
    ):
        self._batcher = batcher
        self._scheduler = scheduler
        self._prefixes = prefixes
        self._metrics = metrics
        self._at_end = at_end
        self._copies_only_siblings = copies_only_siblings
        self._copies_only_prompts = copies_only_prompts
        self._num_slots = num_slots
        num_rows = scheduler.policy.rows
        self.rows: list[Item | None] = [None] * num_rows
        self._free_since = [0.0] * num_rows
        self._tickets: list[Ticket] = []
        self._queue: collections.deque[Item] = collections.deque()
        # Rows that wait for cached tokens of another: which row, and how many tokens.
        self._follows: dict[int, tuple[int, int]] = {}
        self._in_flight: _Launch | None = None
        self._num_ticks: int | None = None  # Of the batch, when the last launch was over.

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._tickets or self._in_flight)

    def add(self, ticket: Ticket) -> None:
        """Puts a ticket's texts at the end of the queue."""
        self._tickets.append(ticket)
        self._queue.extend(Item(ticket, number) for number in range(len(ticket.texts)))

    def step(self) -> None:
        """One launch, and what the one before has made."""
        self._end_unwanted()
        while self._queue and None in self.rows:
            self._place(self._queue.popleft())
        self._copy_prefixes()
        launch = self._launch()
        before, self._in_flight = self._in_flight, launch
        if before is not None:
            self._read(before)
        held = [item.text for item in self.rows if item is not None]
        num_tokens = sum(text.num_read + len(text.new_ids) for text in held)
        self._metrics.see_rows(len(held), len(self._queue), num_tokens)

    def fail(self, message: str) -> None:
        """Tells all open texts that nothing more will come."""
        for ticket in self._tickets:
            for number, text in enumerate(ticket.texts):
                if not text.is_over:
                    self._fail(Item(ticket, number), message)
        self._tickets.clear()
        self._queue.clear()
        self.rows[:] = [None] * len(self.rows)
        self._metrics.see_rows(0, 0, 0)

    # --------------------------------------------------------------------------
    # Texts come and go.

    def _end_unwanted(self) -> None:
        """Ends what was cancelled, or is late."""
        now = time.monotonic()
        for ticket in list(self._tickets):
            if ticket.is_cancelled or ticket.deadline <= now:
                reason = "cancelled" if ticket.is_cancelled else "deadline"
                for number, text in enumerate(ticket.texts):
                    if not text.is_over:
                        self._send(Item(ticket, number), [text.finish(reason)])
        if any(item.text.is_over for item in self._queue):
            self._queue = collections.deque(item for item in self._queue if not item.text.is_over)

    def _place(self, item: Item) -> None:
        """Gives a text a free row, and finds out what it need not read itself."""
        text, now = item.text, time.monotonic()
        free = [row for row, held in enumerate(self.rows) if held is None]
        free.sort(key=lambda row: self._free_since[row])
        found = self._find_prefix(item)
        row = free[0]
        if found is not None and found.row in free:
            if found.is_most:
                row = found.row
            elif row == found.row:  # Of use to others; the next text may begin like it too.
                row = free[-1]
        try:
            self._batcher.place(row, text.row_text)
        except UserError as error:  # One text that the batch cannot take is no reason to die.
            self._fail(item, str(error))
            self._leave(item)
            return
        self._prefixes.place(row, text.job.ids, text.rule)
        self.rows[row] = item
        text.row, text.placed = row, now
        self._metrics.see_placed(text.arrived)
        if found is not None:
            self._follows[row] = (found.row, found.num_tokens)
            if found.row in free:  # Before another text comes there.
                self._copy(row, found.num_tokens)

    def _find_prefix(self, item: Item) -> Found | None:
        text, only = item.text, None
        if text.job.scores_prompt:
            return None  # Scores come of reading.
        if self._copies_only_siblings:
            only = {
                row
                for row, held in enumerate(self.rows)
                if held is not None and held.ticket is item.ticket
            }
        shares = self._shares_slots(text)
        # Prompts are read without the criteria that need logits.
        criterion = exit_criterion(text.row_text.criterion)
        found = self._prefixes.find(
            text.job.ids,
            text.rule,
            only=only,
            of_prompts=self._copies_only_prompts or criterion.needs_logits or shares,
            multiple=self._prefixes.chunk if shares else 1,
        )
        # A start token or two that all prompts share are read faster than they are copied.
        least = min(self._batcher.shape.chunks[0], text.num_to_read)
        return found if found is not None and found.num_tokens >= least else None

    def _shares_slots(self, text: Text) -> bool:
        """Whether what is cached depends on how a text was cut: iterations share slots."""
        return self._num_slots is not None and text.row_text.depth > self._num_slots

    def _copy_prefixes(self) -> None:
        """Copies what texts wait for, once it is there."""
        for row, (source, num_tokens) in list(self._follows.items()):
            held = self.rows[source]
            assert held is not None  # Else it would have let them go.
            if held.text.num_read >= num_tokens:
                self._copy(row, num_tokens)

    def _copy(self, row: int, num_tokens: int) -> None:
        source, _ = self._follows.pop(row)
        item = self.rows[row]
        assert item is not None
        if num_tokens:
            self._batcher.copy(source, row, num_tokens)
        item.text.num_read = item.text.num_reused = num_tokens

    def _send(self, item: Item, events: Iterable[Event]) -> None:
        """Delivers events of a text; with the last of them it leaves its row."""
        for event in events:
            if isinstance(event, Finished):
                self._metrics.see_end(event.reason, item.text.arrived)
            self._deliver(item.ticket, item.number, event)
        if item.text.is_over:
            self._leave(item)

    def _fail(self, item: Item, message: str) -> None:
        item.text.is_over = True
        self._metrics.see_failure()
        self._deliver(item.ticket, item.number, Failed(message))

    def _deliver(self, ticket: Ticket, number: int, event: Event) -> None:
        try:
            ticket.deliver(number, event)
        except Exception:
            # A reader that fails is no reason for others to suffer.
            logging.exception("An event of request %s could not be delivered.", ticket.request_id)
            ticket.is_cancelled = True

    def _leave(self, item: Item) -> None:
        text, row = item.text, item.text.row
        if row is not None:
            self._follows.pop(row, None)
            self._let_followers_go(row, text.num_read)
            if not text.is_running:
                self._prefixes.cut(row, text.num_read)
            self._batcher.release([row])
            self.rows[row], self._free_since[row] = None, time.monotonic()
            self._scheduler.forget(text.key)
        if all(other.is_over for other in item.ticket.texts):
            self._tickets.remove(item.ticket)
        self._at_end()

    def _let_followers_go(self, source: int, num_read: int) -> None:
        """Gives those who wait for a row's prompt what has been read of it."""
        for row, (other, num_tokens) in list(self._follows.items()):
            if other == source:
                self._copy(row, min(num_tokens, num_read))

    # --------------------------------------------------------------------------
    # Launches.

    def _launch(self) -> _Launch | None:
        """Tells the device what is next. None: nothing, or only a chunk of a prompt."""
        entering = self._end_reading()
        running = [item for item in self.rows if item is not None and item.text.is_running]
        reading = [
            item
            for item in self.rows
            if item is not None and not item.text.is_read and item.text.row not in self._follows
        ]
        reading.sort(key=lambda item: item.text.key)
        launch = self._scheduler.next_launch(
            {item.text.key: item.text.row_text.depth for item in running},
            len(entering),
            [
                Reading(
                    item.text.key,
                    item.text.num_to_read - item.text.num_read,
                    item.text.row_text.depth,
                    item.text.num_read / self._batcher.shape.capacity,
                    self._may_be_short(item.text),
                    self._batcher.begun(item.text.row),
                )
                for item in reading
            ],
            is_streamed=any(item.text.job.is_streamed for item in running),
        )
        if launch.chunk is not None:
            chosen = next(item for item in reading if item.text.key == launch.chunk)
            self._read_chunk(chosen, launch)
        if launch.begun:
            begun = [item for item in reading if item.text.key in launch.begun]
            self._batcher.begin([item.text.row for item in begun], launch.chunk_size)
            for item in begun:
                item.text.num_read = item.text.num_to_read
        is_reading = launch.chunk is not None or bool(launch.begun)
        if is_reading:
            # Those whose prompts have been read now are let in by the turn of this launch.
            entering += self._end_reading()
        if not (launch.is_turn or entering):
            if is_reading:
                self._batcher.wait()  # Else all of a long prompt would stand before who comes next.
            return None
        items = {item.text.row: item for item in (*running, *entering)}
        if launch.min_waiting:
            limits = StepLimits(launch.min_waiting, launch.max_ticks, launch.turns, len(items))
            events = self._batcher.step(limits)
        else:
            events = self._batcher.turn()
        for item in entering:
            item.text.is_running = True
        # `_send` may have taken texts from their rows, so rows are theirs.
        return _Launch(events, items, launch.min_waiting)  # type: ignore[arg-type]

    def _end_reading(self) -> list[Item]:
        """Tells texts that their prompt has been read; those that enter by the next turn."""
        entering = []
        for item in list(self.rows):
            if item is None or item.text.is_running or not item.text.is_read:
                continue
            if item.text.row in self._follows:
                continue
            text = item.text
            events: list[Event] = [PromptRead(tuple(text.scores), text.num_reused)]
            is_first = text.job.sample == 0
            self._metrics.see_prompt(text.num_prompt, text.num_reused, is_first=is_first)
            if text.job.only_scores:
                events.append(text.finish("length"))
            else:
                entering.append(item)
            self._send(item, events)
        return entering

    def _may_be_short(self, text: Text) -> bool:
        return not (self._shares_slots(text) or text.job.scores_prompt or text.job.media)

    def _read_chunk(self, item: Item, launch: Launch) -> None:
        text = item.text
        assert text.row is not None
        if text.job.scores_prompt:
            scores, _ = self._batcher.score(text.row)
            text.scores += _scored(text, scores)
        else:
            self._batcher.prefill(text.row, launch.chunk_size, launch.chunk_iterations)
        text.num_read = text.num_to_read - self._batcher.num_unread(text.row)

    def _read(self, launch: _Launch) -> None:
        """Waits for a launch and tells texts what they got."""
        turns, now = launch.events.fetch(), time.monotonic()
        # Tokens that come together have taken a part of the time each.
        counts = np.sum([events.is_done for events in turns], axis=0)
        moments = {
            row: _moments(item.text.last_token, now, int(counts[row]))
            for row, item in launch.items.items()
        }
        for events in turns:
            ticks = int(events.ticks)
            num_ticks = 0 if self._num_ticks is None else ticks - self._num_ticks
            self._num_ticks = ticks
            self._scheduler.see_turn(num_ticks)
            num_tokens = 0
            for row, item in launch.items.items():
                text = item.text
                if text.is_over:
                    continue  # Ended by us, while the launch was on its way.
                text.iteration = int(events.iteration[row])
                depth = int(events.depth[row]) if events.is_done[row] else None
                self._scheduler.see_row(text.key, text.iteration, depth)
                if depth is not None:
                    num_tokens += 1
                    self._take(item, events, row, next(moments[row]))
            self._metrics.see_turn(num_ticks, num_tokens, launch.min_waiting)

    def _take(self, item: Item, events: Events, row: int, now: float) -> None:
        """Hands on what a turn gave to a row."""
        text = item.text
        scored = Scored(
            int(events.token[row]),
            float(events.log_prob[row]),
            _top(events.top_ids[row], events.top_log_probs[row], text.job.num_top),
        )
        num_before = len(text.new_ids)
        found = text.add(scored, int(events.depth[row]), int(events.reason[row]))
        if len(text.new_ids) > num_before:
            since, is_first = text.last_token or text.arrived, not text.last_token
            most = text.row_text.depth
            self._metrics.see_token(text.depths[-1], most, now - since, is_first=is_first)
            text.last_token = now
            self._prefixes.add(row, scored.token)
        self._send(item, found)


def _moments(last: float | None, now: float, count: int) -> Iterator[float]:
    """When each of some tokens that are there now may have come, by when the one before did."""
    last = last or now
    return (last + (now - last) * number / count for number in range(1, count + 1))


def _scored(text: Text, scores: PromptScores | None) -> list[Scored]:
    """A chunk's scores; the first token of a prompt has none."""
    found = [] if text.scores else [Scored(text.job.ids[0], None)]
    if scores is None:
        return found
    scores, num_top = scores.fetch(), text.job.num_top
    place = len(text.scores) + len(found)
    tokens = text.job.ids[place : place + len(scores.log_probs)]
    for number, token in enumerate(tokens):
        top = _top(scores.top_ids[number], scores.top_log_probs[number], num_top)
        found.append(Scored(token, float(scores.log_probs[number]), top))
    return found


def _top(ids: np.ndarray, log_probs: np.ndarray, count: int) -> tuple[tuple[int, float], ...]:
    pairs = zip(ids[:count].tolist(), log_probs[:count].tolist(), strict=True)
    return tuple(pairs)
