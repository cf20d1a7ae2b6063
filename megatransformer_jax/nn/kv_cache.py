"""The key/value cache: static shapes, read during a forward pass, written once after it.

Every layer of prelude and coda has one entry. A layer of the core has one per *slot*; which slot an
iteration uses is `slot_for(iteration)`. With as many slots as iterations (full) every iteration has
its own; with fewer (a budget of R) iterations share them.

A pass over T new tokens reads the cache as it was, and its own keys and values as they come. They
are kept apart (`models.passes.depth_loop`) and enter the cache together when the pass has ended. So
no loop inside a pass carries the cache, and `length` moves once per pass: DESIGN decision 3.

Rows, not columns of a prompt: a pass takes T rows of every sequence, padding included. `positions`
says what a row holds: the place of its token in its own sequence, or -1 for padding and for rows
not used yet. Causality, windows, ALiBi and padding are all decided by positions, so it does not
matter on which side a batch is padded, nor whether rejected tokens left gaps. Places of images and
sound have rows and positions as tokens have; only the text's prelude does not see them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.sharding.rules import Sharder

SHARINGS = ("modulo", "anchor", "last")
EXITED_READS = ("latest", "skip")
# Rows that attention reads at a time; a capacity is a multiple of it. Few rows waste little on CPU,
# where a turn of a loop is cheap; accelerators want larger products.
BLOCK_ROWS = {"cpu": 64, "gpu": 256, "tpu": 256}
# Numbers of the last axis that are stored and multiplied together, full or not.
LANES = {"cpu": 1, "gpu": 1, "tpu": 128}


@struct.dataclass
class KVCache:
    """What the model remembers of the tokens so far.

    Entries are layers, or layers of slots: entry = slot * layers + layer. In each, a row has a key
    and a value per head, which stand side by side as a pair, see `pair_width`.

    Attributes:
      prelude: [layers, B, K, S, P].
      core: [slots * layers, B, K, S, P]; None without a core.
      coda: [layers, B, K, S, P].
      positions: place of each row's token in its sequence; -1 for padding and unused rows.
      num_steps: iterations that each row's token took; 0 for padding and unused rows.
      next_position: where each sequence goes on = tokens it has so far.
      length: rows in use, the same for all sequences.
      num_slots: R.
      sharing: how iterations share slots, see `slot_for`.
      exited_reads: what a deeper reader gets of a token that took fewer iterations: 'latest', its
        last key and value; 'skip', nothing.
      block_rows: rows that attention reads at a time; 0: all.
      lanes: see `CachedRows`.
      is_medium: rows that hold places of images or sound; None if there can be none.
      sequence: of a view, the one sequence that a batch of one reads. None: all, as usual.
    """

    prelude: Float[Array, "E B K S P"]
    core: Float[Array, "E2 B K S P2"] | None
    coda: Float[Array, "E3 B K S P"]
    positions: Int[Array, "B S"]
    num_steps: Int[Array, "B S"]
    next_position: Int[Array, "B"]
    length: Int[Array, ""]
    num_slots: int = struct.field(pytree_node=False)
    sharing: str = struct.field(pytree_node=False)
    exited_reads: str = struct.field(pytree_node=False)
    block_rows: int = struct.field(pytree_node=False)
    lanes: int = struct.field(pytree_node=False, default=1)
    is_medium: Bool[Array, "B S"] | None = None
    sequence: Int[Array, ""] | None = None

    @property
    def capacity(self) -> int:
        """Rows that fit (S)."""
        return self.positions.shape[1]


def slot_for(iteration: Any, num_slots: int, sharing: str) -> Any:
    """The slot that an iteration (0, 1, ...) writes and reads; all are taken in order first.

    Of one iteration or of several, int32 [...].

    modulo: iteration mod R, as Huginn. last: the first R - 1 iterations have slots of their own and
    all later ones share the last. anchor: the first half of the slots belongs to the first
    iterations, the later ones rotate over the rest.

    Raises:
      ValueError: unknown sharing.
    """
    match sharing:
        case "modulo":
            return iteration % num_slots
        case "last":
            return jnp.minimum(iteration, num_slots - 1)
        case "anchor":
            anchors = num_slots // 2
            rotating = anchors + (iteration - anchors) % (num_slots - anchors)
            return jnp.where(iteration < anchors, iteration, rotating)
    raise ValueError(f"slot sharing is {sharing!r}; choose one of {SHARINGS}.")


def rows_to_blocks(rows: int, platform: str) -> int:
    """The capacity, a whole number of blocks, that holds `rows` rows."""
    block = BLOCK_ROWS[platform]
    return -(-rows // block) * block


def pair_width(head_width: int, platform: str) -> int:
    """Numbers of a row's key and value side by side (P): each stands at the beginning of a half.

    A whole number of lanes. A TPU stores arrays with fewer by another axis, or leaves the others
    empty. By another axis it cannot write single rows, so each call of a program would copy the
    whole cache twice. Keys and values of heads of 64 fill 128 lanes together; apart they would
    leave half of the cache empty.
    """
    lanes = LANES[platform]
    return -(-2 * head_width // lanes) * lanes


# Pairs of new tokens for the prelude, the core (None without one) and the coda: [E, B, K, T, P].
NewPairs = tuple[jax.Array, jax.Array | None, jax.Array]


@dataclasses.dataclass(frozen=True)
class CacheShape:
    """What decides how a cache is laid out, besides the model. Hashable, so static in jit.

    Attributes:
      batch_size: sequences (B).
      capacity: rows per sequence; rounded up to whole blocks.
      num_slots: R; the number of iterations for a full cache.
      dtype: of keys and values; the model's compute type.
      platform: of the devices: 'cpu', 'gpu' or 'tpu'.
      sharing: how iterations share slots, one of `SHARINGS`, see `slot_for`.
      exited_reads: what a deeper reader gets of tokens that exited, one of `EXITED_READS`.
      with_media: images and sound can be put between the tokens.
      kv_heads: if devices fill heads up (`Sharder.num_heads`). None: those of the model.

    Raises:
      UserError: capacity, slots or a name that cannot be used.
    """

    batch_size: int
    capacity: int
    num_slots: int
    dtype: jnp.dtype
    platform: str
    sharing: str = "modulo"
    exited_reads: str = "latest"
    with_media: bool = False
    kv_heads: int | None = None

    def __post_init__(self) -> None:
        for name, number, what in (
            ("capacity is", self.capacity, "it must be at least 1 row."),
            ("slots are", self.num_slots, "there must be at least 1."),
        ):
            if number < 1:
                raise UserError(f"cache {name} {number}; {what}")
        for name, value, known in (
            ("slot sharing", self.sharing, SHARINGS),
            ("exited_reads", self.exited_reads, EXITED_READS),
            ("platform", self.platform, tuple(BLOCK_ROWS)),
        ):
            if value not in known:
                raise UserError(f"{name} is {value!r}; choose one of {known}.")

    @property
    def rows(self) -> int:
        """Rows per sequence: the capacity in whole blocks."""
        return rows_to_blocks(self.capacity, self.platform)


def check_can_continue(config: ModelConfig) -> None:
    """Checks that what is kept of a token does not change with every later one.

    Raises:
      ConfigError: if the model sees whole rows.
    """
    if not config.attention.is_causal:
        raise ConfigError(
            "model.attention.is_causal",
            "is False, so the model answers whole rows and cannot go on from a prompt: generation, "
            "serving and exported programs need a causal one. Score it with megatransformer "
            "evaluate (mt.evaluate), or call lm([...]).",
        )


def init_cache(config: ModelConfig, shape: CacheShape) -> KVCache:
    """An empty cache for the model of this config.

    Raises:
      ConfigError: as `check_can_continue`.
    """
    check_can_continue(config)
    batch_size, rows, num_slots = shape.batch_size, shape.rows, shape.num_slots

    def entries(count: int, width: int) -> jax.Array:
        pair = pair_width(config.head_dim(width), shape.platform)
        dims = (count, batch_size, shape.kv_heads or config.attention.kv_heads, rows, pair)
        return jnp.zeros(dims, shape.dtype)

    core = None
    if config.is_recurrent:
        core = entries(num_slots * config.core_layers, config.core_width)
    return KVCache(
        prelude=entries(config.prelude_layers, config.width),
        core=core,
        coda=entries(config.coda_layers, config.width),
        positions=jnp.full((batch_size, rows), -1, jnp.int32),
        num_steps=jnp.zeros((batch_size, rows), jnp.int32),
        next_position=jnp.zeros((batch_size,), jnp.int32),
        length=jnp.int32(0),
        num_slots=num_slots,
        sharing=shape.sharing,
        exited_reads=shape.exited_reads,
        block_rows=BLOCK_ROWS[shape.platform],
        lanes=LANES[shape.platform],
        is_medium=jnp.zeros((batch_size, rows), bool) if shape.with_media else None,
    )


def write_rows(
    cache: KVCache,
    rows: NewPairs,
    positions: Int[Array, "B T"],
    num_steps: Int[Array, "B T"],
    is_medium: Bool[Array, "B T"] | None = None,
) -> KVCache:
    """The cache after a pass: its T rows stand at `length`, and `length` has moved by T.

    The caller has checked that they fit: inside a compiled loop nothing can be raised.

    Args:
      cache: before.
      rows: of the T tokens.
      positions: of the new rows; -1 for padding.
      num_steps: iterations of the new rows.
      is_medium: which of them are of media; None: none.
    """

    def put(old: jax.Array | None, new: jax.Array | None) -> jax.Array | None:
        if old is None or new is None:
            return None
        at = (0, 0, 0, cache.length, 0)
        return jax.lax.dynamic_update_slice(old, new.astype(old.dtype), at)

    def put_ints(old: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(old, new, (0, cache.length))

    all_media = cache.is_medium
    if all_media is not None:
        new = jnp.zeros(positions.shape, bool) if is_medium is None else is_medium
        all_media = put_ints(all_media, new)
    prelude, core, coda = rows
    written: Any = cache.replace(  # type: ignore[attr-defined]
        prelude=put(cache.prelude, prelude),
        core=put(cache.core, core),
        coda=put(cache.coda, coda),
        positions=put_ints(cache.positions, positions),
        num_steps=put_ints(cache.num_steps, num_steps),
        next_position=cache.next_position + jnp.sum(positions >= 0, axis=1, dtype=jnp.int32),
        length=cache.length + positions.shape[1],
        is_medium=all_media,
    )
    return written


def visible_positions(
    cache: KVCache, slot: Int[Array, ""] | Int[Array, "B"] | int
) -> Int[Array, "B S"]:
    """Positions of the rows that a reader of this core slot may see; -1 for the others.

    The slot is one for all sequences, or one for each.
    """
    if cache.exited_reads == "latest":
        return cache.positions
    return jnp.where(cache.num_steps > jnp.asarray(slot)[..., None], cache.positions, -1)


def take_sequences(cache: KVCache, sequences: Int[Array, "B2"]) -> KVCache:
    """The cache of these sequences, in this order; for beams."""
    return _map_sequences(
        cache, lambda array, axis: array[:, sequences] if axis else array[sequences]
    )


def repeat_sequences(cache: KVCache, count: int) -> KVCache:
    """The cache of each sequence `count` times, next to each other."""
    return _map_sequences(cache, lambda array, axis: jnp.repeat(array, count, axis))


def constrain_cache(sharder: Sharder, cache: KVCache) -> KVCache:
    """Asks the compiler to cut sequences as `batch` and heads as `kv_heads`."""

    def constrain(array: jax.Array, axis: int) -> jax.Array:
        if axis:
            return sharder.constrain(array, None, "batch", "kv_heads", None, None)
        return sharder.constrain(array, "batch", *(None,) * (array.ndim - 1))

    return _map_sequences(cache, constrain)


def drop_rows(cache: KVCache, is_kept: Bool[Array, "B T"]) -> KVCache:
    """Forgets tokens of the last pass that are not kept (rejected drafts), and frees what it can.

    `length` goes back to the last row that any sequence keeps. A sequence that keeps fewer has a
    gap there, which its positions hide; it costs capacity only.

    Args:
      cache: after a pass of T rows.
      is_kept: which of them stay; in each sequence a first part of them.
    """
    num_rows = is_kept.shape[1]
    start = cache.length - num_rows
    last = jax.lax.dynamic_slice(cache.positions, (0, start), is_kept.shape)

    def clear(array: jax.Array, empty: int) -> jax.Array:
        rows = jax.lax.dynamic_slice(array, (0, start), is_kept.shape)
        rows = jnp.where(is_kept, rows, empty)
        return jax.lax.dynamic_update_slice(array, rows, (0, start))

    dropped = jnp.sum((last >= 0) & ~is_kept, axis=1, dtype=jnp.int32)
    used = jnp.max(jnp.where(is_kept, jnp.arange(1, num_rows + 1), 0))
    kept: Any = cache.replace(  # type: ignore[attr-defined]
        positions=clear(cache.positions, -1),
        num_steps=clear(cache.num_steps, 0),
        next_position=cache.next_position - dropped,
        length=start + used,
    )
    return kept


def _map_sequences(cache: KVCache, change: Callable[[jax.Array, int], jax.Array]) -> KVCache:
    """The cache with every array that has an axis of sequences changed; `change` is told which."""

    def change_entries(entries: jax.Array | None) -> jax.Array | None:
        return None if entries is None else change(entries, 1)

    changed: Any = cache.replace(  # type: ignore[attr-defined]
        prelude=change_entries(cache.prelude),
        core=change_entries(cache.core),
        coda=change_entries(cache.coda),
        positions=change(cache.positions, 0),
        num_steps=change(cache.num_steps, 0),
        next_position=change(cache.next_position, 0),
        is_medium=None if cache.is_medium is None else change(cache.is_medium, 0),
    )
    return changed
