"""Programs that read prompts into a batch's cache, for `programs`, whose table goes on here.

| program        | does                                                    | keys and values   |
|----------------|---------------------------------------------------------|-------------------|
| prefill        | the next tokens of one row's prompt, but never its last | written, in place |
| begin          | the first tokens of several rows' prompts at once       | written, in place |
| part           | the first iterations of such a chunk                    | only read         |
| part_on        | some more of them                                       | only read         |
| rest           | the last of them, after which it has been read          | written, in place |
| score          | prefill, and log-probabilities of the tokens behind     | written, in place |
| place_image    | an image among a prompt's vectors                       | not touched       |
| prefill_placed | prefill of a prompt with images                         | written, in place |
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from megatransformer_jax.generation.continuous.images import PlacedImages, embed_image
from megatransformer_jax.generation.continuous.lanes import BatchShape, PromptScores, RowSettings
from megatransformer_jax.generation.continuous.programs import Batch, changed, constrained
from megatransformer_jax.generation.placement import for_rows
from megatransformer_jax.generation.token_choice import top_log_probs
from megatransformer_jax.models.exit_criteria import DepthRule
from megatransformer_jax.models.megatransformer import MegaTransformer, gather_weights
from megatransformer_jax.models.passes.cached import (
    Inserted,
    NewTokens,
    PartRead,
    TokensRead,
    apply_head,
    read_part,
    read_rest,
    read_tokens,
)
from megatransformer_jax.models.passes.depth_loop import known_after
from megatransformer_jax.nn.cache_sequences import (
    NewRows,
    view_sequence,
    with_positions,
    write_sequence,
)
from megatransformer_jax.nn.kv_cache import NewPairs


def prefill(
    model: MegaTransformer,
    shape: BatchShape,
    size: int,
    params: Any,
    batch: Batch,
    row: Int[Array, ""],
) -> Batch:
    """Reads up to `size` tokens of a row's prompt behind those that are cached."""
    chunk = _open_chunk(model, shape, params, batch, row, size=size)
    return _write_chunk(model, shape, batch, row, chunk, chunk.read_by(read_tokens))


def begin(
    model: MegaTransformer,
    shape: BatchShape,
    size: int,
    params: Any,
    batch: Batch,
    rows: Int[Array, "G"],
) -> Batch:
    """Reads up to `size` tokens of some prompts of which nothing has been read.

    As nothing is cached of them they see each their own tokens only.

    Args:
      model: the model.
      shape: of the batch.
      size: tokens of each prompt, at most.
      params: of the model.
      batch: before.
      rows: whose prompts; those below 0 come last and stand for none.
    """
    lanes, cache = batch.lanes, batch.cache
    some = for_rows(model, rows.shape[0])
    size, at = min(size, cache.capacity), jnp.maximum(rows, 0)
    settings = jax.tree.map(lambda all: all[at], lanes.settings)
    places = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), (rows.shape[0], size))
    is_token = (places < settings.num_places[:, None] - 1) & (rows >= 0)[:, None]
    ids = lanes.history.tokens[at, :size]
    new = NewTokens(ids, is_token, state_keys=settings.prompt_keys(), is_first=True)
    read = read_tokens(
        some, gather_weights(some, params), new, cache, _rule(shape, settings), places
    )
    # Written after everything was read.
    start = known_after(jnp.int32(0), read.hidden)
    counts = jnp.sum(is_token, axis=1, dtype=jnp.int32)

    def write(number: jax.Array, batch: Batch) -> Batch:
        take = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=number, slice_size=1, axis=1
        )
        own = jax.tree.map(take, read.rows), read.num_steps[number]
        return _write_rows(model, shape, batch, rows[number], _Span(start, counts[number]), own)

    written: Batch = jax.lax.fori_loop(0, jnp.sum(rows >= 0), write, batch)
    return constrained(for_rows(model, shape.rows), written.lanes, written.cache)


def part(
    model: MegaTransformer,
    shape: BatchShape,
    size: int,
    params: Any,
    batch: Batch,
    row: Int[Array, ""],
    end: Int[Array, ""],
) -> PartRead:
    """The first iterations of what `prefill` reads, so that others need not wait for all of them.

    Between the parts of a chunk nobody writes its row. There must be a core.

    Args:
      model: the model.
      shape: of the batch.
      size: tokens of the chunk.
      params: of the model.
      batch: the present one.
      row: whose prompt it is.
      end: iterations that are to be done.
    """
    chunk = _open_chunk(model, shape, params, batch, row, size=size)
    part: PartRead = chunk.read_by(read_part, end)
    return part


def part_on(
    model: MegaTransformer,
    shape: BatchShape,
    size: int,
    params: Any,
    batch: Batch,
    row: Int[Array, ""],
    end: Int[Array, ""],
    before: PartRead,
) -> PartRead:
    """Some more iterations behind those of the part before, which is donated; else as `part`."""
    chunk = _open_chunk(model, shape, params, batch, row, size=size)
    after: PartRead = chunk.read_by(read_part, end, before)
    return after


def rest(
    model: MegaTransformer,
    shape: BatchShape,
    size: int,
    params: Any,
    batch: Batch,
    row: Int[Array, ""],
    before: PartRead,
) -> Batch:
    """The last iterations of a chunk, after which it has been read, as `prefill` does at once."""
    chunk = _open_chunk(model, shape, params, batch, row, size=size)
    return _write_chunk(model, shape, batch, row, chunk, chunk.read_by(read_rest, before))


def place_image(
    model: MegaTransformer,
    shape: BatchShape,
    params: Any,
    placed: PlacedImages,
    pixels: Float[Array, "height width C"],
    start: Int[Array, ""],
) -> PlacedImages:
    """The vectors of one more image of a prompt, from place `start` on."""
    one = for_rows(model, 1)
    return changed(placed, vectors=embed_image(one, params, placed.vectors, pixels, start))


def prefill_placed(
    model: MegaTransformer,
    shape: BatchShape,
    params: Any,
    batch: Batch,
    row: Int[Array, ""],
    placed: PlacedImages,
) -> Batch:
    """`prefill` of a prompt with images, whose places it reads as it reads tokens."""
    chunk = _open_chunk(model, shape, params, batch, row, placed)
    return _write_chunk(model, shape, batch, row, chunk, chunk.read_by(read_tokens))


def score(
    model: MegaTransformer, shape: BatchShape, params: Any, batch: Batch, row: Int[Array, ""]
) -> tuple[Batch, PromptScores]:
    """`prefill`, and the log-probabilities of the tokens behind those that it reads."""
    start, history = batch.cache.next_position[row], batch.lanes.history
    chunk = _open_chunk(model, shape, params, batch, row)
    read = chunk.read_by(read_tokens)
    batch, count = _write_chunk(model, shape, batch, row, chunk, read), chunk.span.count
    one = for_rows(model, 1)
    logits = apply_head(one, gather_weights(one, params), read.hidden)[0].astype(jnp.float32)
    columns = jnp.minimum(start + 1 + jnp.arange(logits.shape[0]), history.capacity - 1)
    log_probs = jax.nn.log_softmax(logits)
    own = jnp.take_along_axis(log_probs, history.tokens[row][columns][:, None], axis=1)[:, 0]
    wanted = jnp.full(logits.shape[:1], shape.num_top, jnp.int32)
    top_ids, top = top_log_probs(logits, wanted, shape.num_top)
    return batch, PromptScores(count, own, top_ids, top)


@dataclasses.dataclass(frozen=True)
class _Span:
    """Where tokens of a prompt are.

    Attributes:
      start: places before them.
      count: how many they are; the others are padding.
      is_image: places of images among them. None: there are none.
    """

    start: jax.Array
    count: jax.Array
    is_image: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """The next tokens of a row's prompt, and how they are read.

    Attributes:
      arguments: of `read_tokens`.
      span: where they are.
    """

    arguments: tuple[Any, ...]
    span: _Span

    def read_by(self, read: Callable[..., Any], *more: Any) -> Any:
        """What one of the functions that read tokens gives."""
        return read(*self.arguments, *more)


def _open_chunk(
    model: MegaTransformer,
    shape: BatchShape,
    params: Any,
    batch: Batch,
    row: Int[Array, ""],
    placed: PlacedImages | None = None,
    *,
    size: int | None = None,
) -> _Chunk:
    lanes, cache = batch.lanes, batch.cache
    model, one = for_rows(model, shape.rows), for_rows(model, 1)
    settings, history = jax.tree.map(lambda all: all[row][None], lanes.settings), lanes.history
    size = min(size or shape.chunk, cache.capacity)
    start = cache.next_position[row]
    places = start + jnp.arange(size, dtype=jnp.int32)
    is_token = places < settings.num_places[0] - 1
    columns = jnp.minimum(places, history.capacity - 1)
    ids, inserted, is_image = history.tokens[row][columns], None, None
    if placed is not None:
        ids, is_image = placed.ids[columns], placed.is_image[columns] & is_token
        inserted = Inserted(placed.vectors[columns][None], is_image[None])
    new = NewTokens(ids[None], is_token[None], inserted, state_keys=settings.prompt_keys())
    rule = _rule(shape, settings)
    view = view_sequence(cache, row, model.sharder)
    arguments = (one, gather_weights(one, params), new, view, rule, places[None])
    return _Chunk(arguments, _Span(start, jnp.sum(is_token, dtype=jnp.int32), is_image))


def _rule(shape: BatchShape, settings: RowSettings) -> DepthRule:
    """How deep the tokens of prompts go."""
    rules = settings.rules
    criterion = shape.choice.without_logits(rules.code)
    return DepthRule(rules.depth, rules.threshold, rules.min_depth, criterion)


def _write_chunk(
    model: MegaTransformer,
    shape: BatchShape,
    batch: Batch,
    row: Int[Array, ""],
    chunk: _Chunk,
    read: TokensRead,
) -> Batch:
    # Written after everything was read.
    span = dataclasses.replace(chunk.span, start=known_after(chunk.span.start, read.hidden))
    return _write_rows(model, shape, batch, row, span, (read.rows, read.num_steps[0]))


def _write_rows(
    model: MegaTransformer,
    shape: BatchShape,
    batch: Batch,
    row: Int[Array, ""],
    span: _Span,
    new: tuple[NewPairs, Int[Array, "T"]],
) -> Batch:
    """What one sequence has read: pairs, [E, 1, K, T, P], and iterations of its tokens."""
    model, cache, count = for_rows(model, shape.rows), batch.cache, span.count
    (prelude, core, coda), num_steps = new
    depth = batch.lanes.settings.rules.depth[row][None]
    rows = NewRows((prelude, coda), core, depth)
    cache = write_sequence(cache, rows, row, span.start, count, model.sharder)
    places = jnp.arange(num_steps.shape[0], dtype=jnp.int32)
    columns = jnp.where(places < count, span.start + places, cache.capacity)
    steps = cache.num_steps[row].at[columns].set(num_steps, mode="drop")
    cache = changed(cache, num_steps=cache.num_steps.at[row].set(steps))
    if span.is_image is not None:
        is_medium = cache.is_medium[row].at[columns].set(span.is_image, mode="drop")
        cache = changed(cache, is_medium=cache.is_medium.at[row].set(is_medium))
    next_position = cache.next_position.at[row].add(count)
    cache = with_positions(cache, next_position, batch.lanes.is_live)
    return constrained(model, batch.lanes, cache)
