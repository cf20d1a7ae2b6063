"""Texts that come and go in one batch, each with its own depth, criterion and settings.

One row, one text. A batch advances by iterations of the core, not by tokens: a row whose token has
iterated enough waits for the next `turn`, which gives it a token and starts the next one, while
the other rows stay in the middle of theirs. What a row gives does not depend on the others.

    batcher = Batcher(model, params, tokenizer, BatchShape(rows=8, capacity=1024, num_slots=8))
    batcher.compile()                      # afterwards nothing compiles
    batcher.place(0, RowText(ids=(1, 5, 9), max_new_tokens=16, depth=8))
    while not batcher.prefill(0):          # chunk by chunk
        pass
    events = batcher.turn()                # admits row 0: its last prompt token begins
    while ...:
        # Rows that wait get a token each, up to four times before the host is asked.
        events = batcher.step(StepLimits(min_waiting=1, max_ticks=64, turns=4, num_running=1))
        turns = events.fetch()             # waits for the device
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from megatransformer_jax.config.option import UserError
from megatransformer_jax.data.tokenizer import Tokenizer
from megatransformer_jax.generation.continuous import programs, reading
from megatransformer_jax.generation.continuous.durations import Durations, measure
from megatransformer_jax.generation.continuous.images import (
    PlacedImages,
    PromptPlaces,
    prompt_places,
)
from megatransformer_jax.generation.continuous.lanes import (
    BatchShape,
    DeviceEvents,
    PromptScores,
    RowText,
    StepLimits,
    row_settings,
)
from megatransformer_jax.generation.placement import for_rows, replicate
from megatransformer_jax.generation.processors.processor import allowed_tokens
from megatransformer_jax.models.megatransformer import MegaTransformer

# Prompts that are begun at once, at most.
_MOST_BEGUN = 8
# Which arguments behind the model and the shape are donated.
DONATED = {
    "place": (0,),
    "copy": (0,),
    "release": (0,),
    "prefill": (1,),
    "begin": (1,),
    "part": (),
    "part_on": (4,),
    "rest": (1,),
    "place_image": (1,),
    "prefill_placed": (1,),
    "score": (1,),
    "advance": (1,),
    "turn": (2,),
    "step": (2,),
    "empty_batch": (),
}


_GIVES_NO_BATCH = ("advance", "empty_batch", "place_image", "part", "part_on")


@dataclasses.dataclass(frozen=True)
class _Flat:
    """A tree as its leaves: to take it apart and together takes longer than to start a program."""

    leaves: Sequence[Any]
    tree: Any

    @classmethod
    def of(cls, tree: Any) -> "_Flat":
        """A tree, taken apart."""
        return cls(*jax.tree.flatten(tree))

    def whole(self) -> Any:
        """The tree."""
        return jax.tree.unflatten(self.tree, self.leaves)


@dataclasses.dataclass(frozen=True)
class _Begun:
    """A chunk of a prompt that has been read in part.

    Attributes:
      size: tokens of the chunk.
      iterations: that have been done.
      read: on the device.
    """

    size: int
    iterations: int
    read: Any


class Batcher:
    """Compiles the programs of a batch and owns its arrays on the device. For one thread.

    No method but `wait` waits for the device; `DeviceEvents.fetch` and `PromptScores.fetch` do.

    Args:
      model: the model, on a mesh or not.
      params: its parameters, laid out as the model's sharder says.
      tokenizer: whose tokens may be drawn. None: all.
      shape: what is compiled.

    Attributes:
      shape: what is compiled.

    Raises:
      UserError: if the shape does not fit the model.
    """

    def __init__(
        self, model: MegaTransformer, params: Any, tokenizer: Tokenizer | None, shape: BatchShape
    ):
        _check(model, shape)
        self.shape = shape
        self._model = model
        self._params = _Flat.of(params)
        self._programs: dict[str, Any] = {}
        self._sharder = for_rows(model, shape.rows).sharder
        self._tokenizer = tokenizer
        size = model.config.vocab_size
        is_allowed = jnp.ones(size, bool)
        if tokenizer is not None:
            is_allowed = allowed_tokens(tokenizer, size).is_allowed
        self._is_allowed = replicate(self._sharder, is_allowed)
        self._batch = _Flat.of(self._run("empty_batch", params))
        self._capacity = self.batch.cache.capacity
        # Of each row: the places of its prompt, and how many of them have been read.
        self._lengths = [1] * shape.rows
        self._num_read = [0] * shape.rows
        self._depths = [1] * shape.rows
        # Prompts with images, by row, until they have been read.
        self._placed: dict[int, PlacedImages] = {}
        self._begun: dict[int, _Begun] = {}

    def compile(self, progress: Callable[[str], object] = lambda name: None) -> None:
        """Compiles every program but `advance`; each is otherwise compiled when first needed.

        Args:
          progress: is told each program's name when its turn comes.
        """
        settings = self._host(row_settings(RowText((0,), 1), self.shape, 1))
        prompt = self._prompt([])
        row = self._number(0)
        arguments: dict[str, tuple[Any, ...]] = {
            "place": (self._batch, row, settings, prompt, row),
            "copy": (self._batch, row, row, row),
            "score": (self._params, self._batch, row),
            "turn": (self._params, self._is_allowed, self._batch),
            "step": (self._params, self._is_allowed, self._batch, self._limits(StepLimits(1, 1))),
            "release": (self._batch, self._mask(())),
        }
        for size in self.shape.chunks:
            progress(f"prefill {size}")
            self._executable("prefill", (self._params, self._batch, row), size)
        for size in self.begun_sizes:
            progress(f"begin {size}")
            self._executable("begin", (self._params, self._batch, self._rows(())), size)
        self._compile_parts(progress)
        if self.shape.with_images:
            placed = self._no_images(PromptPlaces(np.zeros(0, np.int32), np.zeros(0, bool), ()))
            pixels = self._host(np.zeros(self._model.config.image.shape, np.float32))
            arguments["place_image"] = (self._params, placed, pixels, row)
            arguments["prefill_placed"] = (self._params, self._batch, row, placed)
        for name, given in arguments.items():
            progress(name)
            self._executable(name, given)

    def _compile_parts(self, progress: Callable[[str], object]) -> None:
        size = self.part_size
        if size is None:
            return
        row, given = self._number(0), (self._params, self._batch, self._number(0))
        progress("part")
        # Of a row that holds nothing, so that nothing is iterated.
        begun = self._run("part", *given, row, static=(size,))
        progress("part_on")
        self._executable("part_on", (*given, row, begun), size)
        progress("rest")
        self._executable("rest", (*given, begun), size)

    def place(self, row: int, text: RowText) -> None:
        """Puts a text into a row, whatever was there. Nothing is computed of its prompt yet.

        Raises:
          UserError: if the text does not fit the batch's shape.
        """
        places = None
        if text.images:
            places = self._places(text)
        num_places = len(text.ids) if places is None else len(places.ids)
        if not len(text.ids) or text.max_new_tokens < 1:
            raise UserError("a text needs a token to continue, and room for a new one.")
        if num_places + text.max_new_tokens > self.shape.capacity:
            raise UserError(
                f"a prompt of {num_places} tokens and {text.max_new_tokens} new ones are more "
                f"than the batch's capacity of {self.shape.capacity}; shorten either."
            )
        settings = self._host(row_settings(text, self.shape, num_places))
        length = self._number(len(text.ids))
        self._change(
            "place", self._batch, self._number(row), settings, self._prompt(text.ids), length
        )
        self._lengths[row], self._num_read[row], self._depths[row] = num_places, 0, text.depth
        self._placed.pop(row, None)
        self._begun.pop(row, None)
        if places is not None:
            placed = self._no_images(places)
            for image, start in zip(text.images, places.starts, strict=True):
                pixels, at = self._host(np.asarray(image, np.float32)), self._number(start)
                placed = self._run("place_image", self._params, placed, pixels, at)
            self._placed[row] = placed

    def copy(self, source: int, row: int, num_tokens: int) -> None:
        """Gives a row the first cached tokens of another (or of the text that it held before).

        After `place`, before the row's first `prefill`. Both texts must begin with the same
        tokens, and the source must have that many in its cache: those of its prompt that have been
        read, and its new ones but for the last. What they are depends on depth, min_depth,
        criterion and threshold, so these must be the same; and on seed and prompt_number where
        `recurrence.state_init` draws (new tokens then on sample too).

        Args:
          source: the other row.
          row: the new one, or the same.
          num_tokens: less than the prompt's tokens, as the last enters by `turn`.
        """
        assert 0 <= num_tokens < self._lengths[row]
        numbers = (self._number(number) for number in (source, row, num_tokens))
        self._change("copy", self._batch, *numbers)
        self._num_read[row] = num_tokens

    def prefill(self, row: int, size: int | None = None, iterations: int | None = None) -> bool:
        """Reads one chunk of the row's prompt; True once only its last token is left.

        That one enters by the next `turn`. True at once for a prompt of one token. How a prompt is
        cut makes no difference, unless iterations share slots: then it is read in whole chunks.

        Args:
          row: which.
          size: tokens of the chunk, one of `shape.chunks`. None: a whole one. Prompts with images
            are read in whole chunks. Without meaning while one is begun.
          iterations: does no more of them, and the next call goes on with them; for chunks of
            `part_size`. None: does all that are left.
        """
        begun = self._begun.pop(row, None)
        size = self.shape.chunk if size is None or row in self._placed else size
        if self.num_unread(row):
            given = (self._params, self._batch, self._number(row))
            done = 0
            if begun is not None:
                size, done = begun.size, begun.iterations
            if iterations is not None and done + iterations < self._depths[row]:
                self._begun[row] = self._read_part(given, size, done + iterations, begun)
                return False
            if row in self._placed:
                self._change("prefill_placed", *given, self._placed[row])
            elif begun is not None:
                self._change("rest", *given, begun.read, static=(size,))
            else:
                self._change("prefill", *given, static=(size,))
            self._count_read(row, size)
        if not self.num_unread(row):
            self._placed.pop(row, None)
        return not self.num_unread(row)

    @property
    def part_size(self) -> int | None:
        """Tokens of the chunks that may be cut between iterations. None: there is none."""
        return self.shape.part_size if self.has_core else None

    @property
    def most_begun(self) -> int:
        """How many prompts `begin` takes at once."""
        return min(self.shape.rows, _MOST_BEGUN)

    @property
    def begun_sizes(self) -> tuple[int, ...]:
        """How many tokens of each prompt `begin` may read; empty for a batch of one row."""
        return self.shape.chunks[:-1] if self.shape.rows > 1 else ()

    def begin(self, rows: Sequence[int], size: int) -> None:
        """Reads the first chunk of several prompts at once, which is faster than one by one.

        Args:
          rows: at most `most_begun`; nothing of their prompts has been read, and they have no
            images.
          size: tokens of each, one of `begun_sizes`.
        """
        assert size in self.begun_sizes and len(rows) <= self.most_begun
        assert all(
            self._num_read[row] == 0 and row not in (*self._placed, *self._begun) for row in rows
        )
        self._change("begin", self._params, self._batch, self._rows(rows), static=(size,))
        for row in rows:
            self._count_read(row, size)

    def _read_part(
        self, given: tuple[Any, ...], size: int, end: int, before: _Begun | None
    ) -> _Begun:
        assert size == self.part_size
        if before is None:
            read = self._run("part", *given, self._number(end), static=(size,))
        else:
            read = self._run("part_on", *given, self._number(end), before.read, static=(size,))
        return _Begun(size, end, read)

    def begun(self, row: int) -> tuple[int, int] | None:
        """Size and iterations so far of the row's chunk that has been read in part, if any has."""
        begun = self._begun.get(row)
        return None if begun is None else (begun.size, begun.iterations)

    def score(self, row: int) -> tuple[PromptScores | None, bool]:
        """As `prefill`, and the log-probabilities of the tokens behind those that are read.

        All chunks of a prompt together give those of all tokens but the first. Rows that were
        copied have none, and prompts with images cannot be scored.

        Returns:
          They, None if there was nothing to read; and what `prefill` returns.
        """
        if not self.num_unread(row):
            return None, True
        assert row not in self._placed
        number = self._number(row)
        scores = self._change("score", self._params, self._batch, number)
        self._count_read(row, self.shape.chunk)
        return scores, not self.num_unread(row)

    def num_unread(self, row: int) -> int:
        """Places of the row's prompt that `prefill` still has to read."""
        return self._lengths[row] - 1 - self._num_read[row]

    def advance(self, min_waiting: int, max_ticks: int) -> None:
        """Iterates the core until so many running rows wait for a turn, at most `max_ticks` times.

        Does nothing if no row is on its way, or the model has no core.
        """
        if not self.has_core:
            return
        limits = (self._number(min_waiting), self._number(max_ticks))
        batch = self.batch
        lanes = self._run("advance", self._params, batch.lanes, batch.cache, *limits)
        self._batch = _Flat.of(programs.Batch(lanes, batch.cache))

    def step(self, limits: StepLimits) -> DeviceEvents:
        """`advance` and then `turn`, in one program, and again as far as the limits allow.

        Several turns in one launch take less of the host's time. The price is that their tokens
        come together, and that nothing else happens between them; so there are no more of them once
        a text has ended.
        """
        assert limits.turns <= self.shape.turns
        given = (self._params, self._is_allowed, self._batch, self._limits(limits))
        events: DeviceEvents = self._change("step", *given)
        return events

    def turn(self) -> DeviceEvents:
        """Gives each row that waits a token and starts the next; admits rows whose prompt is read.

        A row that ends is neither running nor free: its cached rows stay until another `place`.
        """
        events: DeviceEvents
        events = self._change("turn", self._params, self._is_allowed, self._batch)
        return events

    def release(self, rows: Sequence[int]) -> None:
        """Stops rows, wherever they are. Their cached rows stay until another `place`."""
        self._change("release", self._batch, self._mask(rows))

    def wait(self) -> None:
        """Waits until the device has done everything that it was told so far."""
        jax.block_until_ready(self._batch.leaves)

    def durations(self, repeats: int = 8) -> Durations:
        """Measures what things take now; drops what rows hold, so call it before any text comes.

        Args:
          repeats: of which the shortest counts.
        """
        return measure(self, repeats)

    def cache_bytes(self) -> int:
        """Bytes of keys and values, over all devices."""
        cache = self.batch.cache
        entries = jax.tree.leaves((cache.prelude, cache.core, cache.coda))
        return sum(array.nbytes for array in entries)

    def memory(self, program: str) -> Any:
        """XLA's account of what a compiled program takes, see `jax.stages.Compiled`."""
        return self._programs[program].memory_analysis()

    @property
    def batch(self) -> programs.Batch:
        """All that changes, as it is on the device."""
        batch: programs.Batch = self._batch.whole()
        return batch

    # --------------------------------------------------------------------------

    @property
    def has_core(self) -> bool:
        """Whether the model iterates."""
        return self._model.config.is_recurrent

    def _count_read(self, row: int, size: int) -> None:
        self._num_read[row] += min(size, self._capacity, self.num_unread(row))

    def _run(self, name: str, *arguments: Any, static: tuple[int, ...] = ()) -> Any:
        leaves: list[Any] = []
        for argument in arguments:
            is_flat = isinstance(argument, _Flat)
            leaves += argument.leaves if is_flat else jax.tree.leaves(argument)
        return self._executable(name, arguments, *static)(*leaves)

    def _change(self, name: str, *arguments: Any, static: tuple[int, ...] = ()) -> Any:
        """Runs a program that makes a batch, which is the batch now; what else it makes."""
        leaves, other = self._run(name, *arguments, static=static)
        self._batch = _Flat(leaves, self._batch.tree)
        return other

    def _executable(self, name: str, arguments: tuple[Any, ...], *static: int) -> Any:
        # A program's arguments always have the same shapes.
        key = " ".join((name, *map(str, static)))
        if key not in self._programs:
            whole = tuple(
                argument.whole() if isinstance(argument, _Flat) else argument
                for argument in arguments
            )
            leaves, tree = jax.tree.flatten(whole)
            signatures = tuple(map(_signature, leaves))
            fixed = (self._model, self.shape, *static)
            self._programs[key] = _compiled(name, fixed, tree, signatures)
        return self._programs[key]

    def _number(self, number: int) -> Any:
        return self._host(np.int32(number))

    def _limits(self, limits: StepLimits) -> Any:
        return self._host(limits.packed())

    def _prompt(self, ids: Sequence[int]) -> Any:
        prompt = np.zeros(self._capacity, np.int32)
        prompt[: len(ids)] = ids
        return self._host(prompt)

    def _places(self, text: RowText) -> PromptPlaces:
        if not self.shape.with_images:
            raise UserError("this batch is for text alone (with_images=False); send no images.")
        return prompt_places(self._model.config, self._tokenizer, text.ids, text.images)

    def _no_images(self, places: PromptPlaces) -> PlacedImages:
        """A prompt's places, padded, before the vectors of its images are there."""
        mask = np.zeros(self._capacity, bool)
        mask[: len(places.ids)] = places.is_image
        width, dtype = self._model.config.width, self._model.policy.compute
        # On the device from the first, as what comes of them is, for which a program is compiled.
        vectors = jnp.zeros((self._capacity, width), dtype)
        placed = PlacedImages(
            jnp.asarray(self._prompt(places.ids.tolist())), jnp.asarray(mask), vectors
        )
        return replicate(self._sharder, placed)

    def _mask(self, rows: Sequence[int]) -> Any:
        mask = np.zeros(self.shape.rows, bool)
        mask[list(rows)] = True
        return self._host(mask)

    def _rows(self, rows: Sequence[int]) -> Any:
        padded = np.full(self.most_begun, -1, np.int32)
        padded[: len(rows)] = rows
        return self._host(padded)

    def _host(self, tree: Any) -> Any:
        """Numbers of the host on every device of a mesh."""
        return replicate(self._sharder, tree)


def _signature(leaf: Any) -> jax.ShapeDtypeStruct:
    # Sharding, and the order of axes in memory.
    place = cast(Any, leaf).format if isinstance(leaf, jax.Array) else None
    return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=place)


def program_of(name: str) -> Callable[..., Any]:
    """The function that a program is compiled from."""
    found: Callable[..., Any] = getattr(reading if hasattr(reading, name) else programs, name)
    return found


@functools.lru_cache(maxsize=64)
def _compiled(
    name: str, static: tuple[Any, ...], tree: Any, leaves: tuple[jax.ShapeDtypeStruct, ...]
) -> Any:
    """A program for arguments of these shapes. Batchers of the same model and shape share it."""
    function = functools.partial(program_of(name), *static)
    sizes = [argument.num_leaves for argument in tree.children()]
    ends = list(itertools.accumulate(sizes))
    donated = [
        leaf for place in DONATED[name] for leaf in range(ends[place] - sizes[place], ends[place])
    ]

    def program(*given: Any) -> Any:
        made = function(*jax.tree.unflatten(tree, given))
        if name in _GIVES_NO_BATCH:
            return made
        batch, other = made if isinstance(made, tuple) else (made, None)
        return jax.tree.leaves(batch), other

    return jax.jit(program, donate_argnums=tuple(donated)).lower(*leaves).compile()


def _check(model: MegaTransformer, shape: BatchShape) -> None:
    config = model.config
    if shape.with_images and not config.image.enabled:
        raise UserError("a batch with_images is for models that read images; leave it out.")
    if shape.capacity > config.max_length:
        raise UserError(
            f"the batch's capacity of {shape.capacity} tokens exceeds the model's max_length="
            f"{config.max_length}; lower it."
        )
    if "learned_gate" in shape.criteria and not config.exit_gate.enabled:
        raise UserError(
            "exit criterion 'learned_gate' reads an exit gate, and the model has none "
            "(model.exit_gate.enabled); leave it out of the batch's criteria."
        )
