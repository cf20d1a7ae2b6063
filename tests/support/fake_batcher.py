"""A batch without a model: what it writes follows from the text alone, and misuse is an error.

`Engine(lm, config, FakeBatcher)` makes texts with it. `alone` says what a text must become.
"""

import dataclasses
import threading
import time
import types
import zlib

import numpy as np

from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.recurrence import RecurrenceConfig
from megatransformer_jax.config.serving import ServingConfig
from megatransformer_jax.data.tokenizer import BytesTokenizer
from megatransformer_jax.generation.continuous.durations import Durations
from megatransformer_jax.generation.continuous.lanes import Events, PromptScores
from megatransformer_jax.generation.endings import END_OF_TEXT, LENGTH, RUNNING

# Letters and a space, so that texts can be read.
BYTES = BytesTokenizer()
ALPHABET = BYTES.encode("abcdefghijklmnopqrstuvwxyz ")
# About one token of so many ends a text, if any may.
_TOKENS_PER_END = 50
TRAINED_DEPTH = 4


def fake_lm(tokenizer=BYTES, **changes):
    """What the engine needs to know of a model; there are no parameters."""
    recurrence = RecurrenceConfig(mean_steps=TRAINED_DEPTH, state_init="zero")
    options = {"vocab_size": 259, "max_length": 4096, "recurrence": recurrence, **changes}
    config = ModelConfig(**options)
    depth = TRAINED_DEPTH if config.is_recurrent else None
    return types.SimpleNamespace(
        config=config, tokenizer=tokenizer, trained_depth=depth, module=None, params=None
    )


def fake_config(**changes):
    """Settled options of a small server, as `served.settle` would give them."""
    options = {
        "name": "fake",
        "rows": 4,
        "capacity": 1024,
        "chunk": 16,
        "criteria": ("fixed", "latent_diff", "kl"),
        "cache_slots": 32,
        "max_depth": 64,
    }
    return ServingConfig(**{**options, **changes})


def _number(text, ids):
    """A number that follows from the tokens so far, and from the seed where tokens are drawn."""
    key = (text.seed, text.sample, text.sampling.temperature) if text.is_drawn else ()
    return zlib.crc32(repr((key, list(map(int, ids)))).encode())


def _depth(text, ids):
    if text.criterion == "fixed":
        return text.depth
    return text.min_depth + _number(text, ids) // 7 % (text.depth - text.min_depth + 1)


def _next(text, ids):
    """The token after `ids`, its log-probability and why the text ends with it."""
    number, num_new = _number(text, ids), len(ids) - len(text.ids)
    if text.end_ids and num_new >= text.min_new_tokens and number % _TOKENS_PER_END == 0:
        return text.end_ids[0], _log_prob(number), END_OF_TEXT
    token = ALPHABET[number % len(ALPHABET)]
    if text.logit_bias:
        best = max(text.logit_bias, key=text.logit_bias.__getitem__)
        token = best if text.logit_bias[best] >= 100 else token
    return token, _log_prob(number), LENGTH if num_new + 1 >= text.max_new_tokens else RUNNING


def _log_prob(number):
    return -(1 + number % 1000) / 500


def alone(text):
    """(tokens, depths, reason) of a row's text, an end token included."""
    ids, depths, reason = list(text.ids), [], RUNNING
    while reason == RUNNING:
        depths.append(_depth(text, ids))
        token, _, reason = _next(text, ids)
        ids.append(token)
    return ids[len(text.ids) :], depths, reason


@dataclasses.dataclass
class _Row:
    text: object
    num_read: int = 0
    is_entering: bool = False
    is_running: bool = False
    iteration: int = 0
    begun: tuple[int, int] | None = None
    ids: list = dataclasses.field(default_factory=list)
    num_cached: int = 0


class FakeBatcher:
    """See `Batcher`.

    Args:
      lm: any.
      shape: of the batch.
      seconds_per_tick: what an iteration takes; a turn and a chunk take as long as two.
      chunk_ticks: what `durations` says of an iteration of a chunk.
      fail_at_turn: number of the turn that raises. None: none does.

    Attributes:
      is_compiled: whether `compile` has been called.
      num_turns: turns so far.
      num_steps: launches of `step` or `turn` so far.
      num_chunks: chunks of prompts that have been read.
      num_parts: launches that read a part of one.
      num_begun: prompts that were begun with others.
      copies: (source, row, tokens) of each copy.
    """

    def __init__(self, lm, shape, seconds_per_tick=0.0, fail_at_turn=None, chunk_ticks=0.0):
        self.shape = shape
        self.is_compiled = False
        self.num_turns = self.num_steps = 0
        self.num_chunks = self.num_parts = self.num_begun = 0
        self._chunk_ticks = chunk_ticks
        self.copies = []
        self._seconds_per_tick = seconds_per_tick
        self._fail_at_turn = fail_at_turn
        self._rows = [None] * shape.rows
        self._cached = [()] * shape.rows  # Of the text before, for copies onto the same row.
        self._ticks = 0
        self._thread = threading.current_thread()

    def compile(self, progress=lambda name: None):
        progress("nothing")
        self.is_compiled = True

    def place(self, row, text):
        self._check()
        old = self._rows[row]
        assert old is None or not (old.is_running or old.is_entering), f"row {row} is in use"
        assert len(text.ids) + text.max_new_tokens <= self.shape.capacity
        self._cached[row] = () if old is None else tuple(old.ids[: old.num_cached])
        self._rows[row] = _Row(text, ids=list(text.ids))
        self._rows[row].is_entering = len(text.ids) == 1

    def copy(self, source, row, num_tokens):
        self._check()
        new, old = self._rows[row], self._rows[source]
        assert 0 < num_tokens < len(new.text.ids) and new.num_read == 0
        cached = self._cached[row] if source == row else old.ids[: old.num_cached]
        assert list(cached[:num_tokens]) == list(new.text.ids[:num_tokens]), "another beginning"
        self.copies.append((source, row, num_tokens))
        self._read(new, num_tokens)

    def num_unread(self, row):
        held = self._rows[row]
        return len(held.text.ids) - 1 - held.num_read

    def prefill(self, row, size=None, iterations=None):
        self._check()
        held = self._rows[row]
        size, done = held.begun or (size or self.shape.chunk, 0)
        held.begun = None
        if held.is_entering:
            return True
        if iterations is not None and done + iterations < held.text.depth:
            assert size == self.part_size and iterations > 0
            self.num_parts += 1
            self._wait(iterations / held.text.depth)
            held.begun = size, done + iterations
            return False
        self.num_chunks += 1
        self._wait(2)
        self._read(held, size)
        return held.is_entering

    most_begun = 3

    @property
    def part_size(self):
        return self.shape.part_size

    @property
    def begun_sizes(self):
        return self.shape.chunks[:-1]

    def begin(self, rows, size):
        self._check()
        assert size in self.begun_sizes and 2 <= len(rows) <= self.most_begun
        self.num_begun += len(rows)
        for row in rows:
            assert self._rows[row].num_read == 0 and self._rows[row].begun is None
            self._read(self._rows[row], size)

    def begun(self, row):
        return self._rows[row].begun

    def score(self, row):
        held, first = self._rows[row], self._rows[row].num_read + 1
        is_read = self.prefill(row)
        ends = range(first, held.num_read + 1)
        numbers = [_number(held.text, held.text.ids[:end]) for end in ends]
        tops = [self._top(ALPHABET[0], number) for number in numbers]
        if not numbers:
            return None, is_read
        scores = PromptScores(
            len(numbers),
            np.asarray([_log_prob(number) for number in numbers], np.float32),
            np.asarray([ids for ids, _ in tops], np.int32),
            np.asarray([values for _, values in tops], np.float32),
        )
        return scores, is_read

    def _read(self, held, num_tokens):
        held.num_read = held.num_cached = min(held.num_read + num_tokens, len(held.text.ids) - 1)
        held.is_entering = held.num_read == len(held.text.ids) - 1

    def advance(self, min_waiting, max_ticks):
        self._check()
        assert min_waiting >= 1 and max_ticks >= 1
        running = [row for row in self._rows if row is not None and row.is_running]
        for _ in range(max_ticks):
            waiting = [row for row in running if self._is_waiting(row)]
            if len(waiting) >= min_waiting or len(waiting) == len(running):
                break
            for row in running:
                row.iteration += not self._is_waiting(row)
            self._ticks += 1
            self._wait(1)

    def step(self, limits):
        assert 1 <= limits.turns <= self.shape.turns
        turns = []
        self.num_steps += 1
        while not turns or self._num_running() >= limits.num_running:
            self.advance(limits.min_waiting, limits.max_ticks)
            turns.append(self._turn())
            if len(turns) == limits.turns:
                break
        return types.SimpleNamespace(fetch=lambda: turns)

    def _num_running(self):
        return sum(row is not None and row.is_running for row in self._rows)

    def _is_waiting(self, row):
        return row.iteration >= _depth(row.text, row.ids)

    def turn(self):
        self.num_steps += 1
        events = self._turn()
        return types.SimpleNamespace(fetch=lambda: [events])

    def _turn(self):
        self._check()
        self._wait(2)
        if self.num_turns == self._fail_at_turn:
            raise RuntimeError("the device is gone")
        self.num_turns += 1
        size, num_top = self.shape.rows, self.shape.num_top
        names = [field.name for field in dataclasses.fields(Events)]
        events = {name: np.zeros(size, np.int32) for name in names}
        events |= {"log_prob": np.zeros(size, np.float32), "ticks": np.int32(self._ticks)}
        for name in ("is_done", "is_running"):
            events[name] = np.zeros(size, bool)
        events["top_ids"] = np.zeros((size, num_top), np.int32)
        events["top_log_probs"] = np.zeros((size, num_top), np.float32)
        for number, row in enumerate(self._rows):
            if row is None:
                continue
            if row.is_running and self._is_waiting(row):
                self._give(events, number, row)
            elif row.is_entering:
                row.is_entering, row.is_running = False, True
            events["iteration"][number] = row.iteration
            events["is_running"][number] = row.is_running
        return Events(**events)

    def _give(self, events, number, row):
        token, log_prob, reason = _next(row.text, row.ids)
        events["is_done"][number], events["token"][number] = True, token
        events["depth"][number], events["reason"][number] = _depth(row.text, row.ids), reason
        events["log_prob"][number] = log_prob
        ids, values = self._top(token, _number(row.text, row.ids))
        events["top_ids"][number], events["top_log_probs"][number] = ids, values
        row.num_cached = len(row.ids)
        row.ids.append(token)
        row.iteration, row.is_running = 0, reason == RUNNING

    def _top(self, token, number):
        others = [other for other in range(self.shape.num_top + 1) if other != token]
        ids = [token, *others][: self.shape.num_top]
        return ids, [_log_prob(number) - place for place in range(len(ids))]

    def release(self, rows):
        self._check()
        for row in rows:
            held = self._rows[row]
            held.is_running = held.is_entering = False

    def wait(self):
        self._check()

    def durations(self):
        self._check()
        return Durations(
            tick=1.0,
            turn=2.0,
            chunks=dict.fromkeys(self.shape.chunks, (2.0, *[self._chunk_ticks] * 2)),
            begun=dict.fromkeys(self.begun_sizes, (2.5, self._chunk_ticks)),
        )

    def cache_bytes(self):
        return 0

    def _check(self):
        assert self.is_compiled
        assert threading.current_thread() is self._thread, "the device has one owner"

    def _wait(self, num_ticks):
        if self._seconds_per_tick:
            time.sleep(num_ticks * self._seconds_per_tick)
