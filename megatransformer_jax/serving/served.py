"""What is served: facts about the model that requests are checked against, and whether it fits.

`settle` fills in what `ServingConfig` leaves to the model, and checks the memory of the cache
before anything is compiled.
"""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

from megatransformer_jax.config.calibration import Calibration
from megatransformer_jax.config.generation import GenerationConfig, for_model
from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.config.sampling import CacheConfig, slots_of_any_depth
from megatransformer_jax.config.serving import (
    CRITERIA,
    DEFAULT_CAPACITY,
    DEPTH_FACTOR,
    ServingConfig,
)
from megatransformer_jax.data.media.records import MediaFormats
from megatransformer_jax.data.media_tokenizer import MediaTokenizer
from megatransformer_jax.data.tokenizer import Tokenizer
from megatransformer_jax.generation.endings import end_ids_of
from megatransformer_jax.generation.placement import for_rows
from megatransformer_jax.model import Model
from megatransformer_jax.models.cost.memory import cache_bytes_per_token
from megatransformer_jax.models.megatransformer import MegaTransformer
from megatransformer_jax.nn.kv_cache import rows_to_blocks
from megatransformer_jax.serving.errors import RequestError

# Of the memory that is free, as much may be the cache: programs need some as well.
MEMORY_SHARE = 0.9
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """What requests and answers need to know of a model.

    Attributes:
      name: in requests and answers.
      tokenizer: None: prompts and answers are ids.
      vocab_size: ids that prompts may have are below this.
      capacity: tokens of a text, prompt included, at most.
      trained_depth: mean iterations in training. None: no core.
      has_exit_gate: whether it learned when to stop.
      makes_media: whether it has parts for images or sound; texts alone are served.
      num_parameters: numbers in it.
      formats: what images look like that it reads. None: it reads text alone.
      created: when it was loaded, in seconds since 1970.
      calibration: what exit_threshold=auto stands for.
    """

    name: str
    tokenizer: Tokenizer | None
    vocab_size: int
    capacity: int
    trained_depth: int | None
    has_exit_gate: bool = False
    makes_media: bool = False
    num_parameters: int = 0
    formats: MediaFormats | None = None
    created: int = 0
    calibration: Calibration | None = None

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a text."""
        return tuple(end_ids_of(self.tokenizer))

    @property
    def has_lens(self) -> bool:
        """Whether /lens can show iterations: of a core that reads text alone."""
        return self.trained_depth is not None and not self.makes_media

    @property
    def image_places(self) -> int:
        """Places of a text that an image takes, besides the tokens around it."""
        return 0 if self.formats is None else self.formats.image.num_tokens

    def require_tokenizer(self, param: str) -> Tokenizer:
        """The tokenizer.

        Raises:
          RequestError: about the field `param`, if there is none.
        """
        if self.tokenizer is None:
            raise RequestError(
                f"{param}: this model has no tokenizer, so no text; use token ids.",
                param=param,
                code="no_tokenizer",
            )
        return self.tokenizer

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; empty without a tokenizer."""
        return "" if self.tokenizer is None else self.tokenizer.decode(ids)

    def token_bytes(self, token: int) -> bytes:
        """What a token adds to the text, in UTF-8; a piece may be a part of a character."""
        if self.tokenizer is None:
            return b""
        try:
            return self.tokenizer.piece_bytes(token)
        except UserError:  # A decoder whose single pieces are not known.
            return self.tokenizer.decode([token]).encode()

    def token_text(self, token: int) -> str:
        r"""A token as a text of its own, different from that of every other token.

        Bytes that are not a whole character are written 'bytes:\xe2\x82', and tokens that add
        nothing to the text 'token_id:2'.
        """
        piece = self.token_bytes(token)
        if not piece:
            return f"token_id:{token}"
        try:
            return piece.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def served_model(lm: Model, config: ServingConfig, created: int) -> ServedModel:
    """The facts of a model; `config` is settled."""
    assert config.capacity is not None and config.name is not None
    tokenizer = lm.tokenizer
    # Markers of media are not text, and a model may have more rows than its tokenizer has ids.
    of_text = tokenizer.base if isinstance(tokenizer, MediaTokenizer) else tokenizer
    size = lm.config.vocab_size
    return ServedModel(
        name=config.name,
        tokenizer=tokenizer,
        vocab_size=size if of_text is None else min(size, of_text.vocab_size),
        capacity=min(config.capacity, lm.config.max_length),
        trained_depth=lm.trained_depth,
        has_exit_gate=lm.config.exit_gate.enabled,
        makes_media=isinstance(tokenizer, MediaTokenizer),
        num_parameters=lm.num_parameters,
        formats=MediaFormats.of_model(lm.config) if reads_images(lm) else None,
        created=created,
        calibration=lm.calibration,
    )


def reads_images(lm: Any) -> bool:
    """Whether prompts may have images."""
    return lm.config.image.enabled and isinstance(lm.tokenizer, MediaTokenizer)


def settle(
    config: ServingConfig,
    lm: Model,
    *,
    default_name: str = "megatransformer",
    free_bytes: int | None = None,
) -> ServingConfig:
    """The same options with a number for each that is left to the model.

    Args:
      config: as the user gave it.
      lm: what is served.
      default_name: of the model, if the options name none; such as that of its folder.
      free_bytes: memory for the cache. None: what the device, or this machine, has free.

    Raises:
      ConfigError: if an option does not fit the model, or the cache does not fit the memory.
    """
    longest, platform = lm.config.max_length, lm.module.platform
    capacity = config.capacity or min(DEFAULT_CAPACITY, longest)
    if capacity > rows_to_blocks(longest, platform):
        raise ConfigError(
            "capacity",
            f"{capacity} tokens are more than the model's max_length={longest}; lower it.",
        )
    if config.max_tokens is not None and config.max_tokens >= capacity:
        raise ConfigError(
            "max_tokens", f"{config.max_tokens} leaves no room for a prompt in {capacity} tokens."
        )
    capacity = rows_to_blocks(capacity, platform)
    settled = dataclasses.replace(config, name=config.name or default_name, capacity=capacity)
    settled = _settle_core(settled, lm)
    if free_bytes is None:
        jax.block_until_ready(lm.weights)  # What they take is not free.
        free_bytes = free_memory(jax.local_devices()[0])
    check_memory(settled, lm, free_bytes)
    return settled


def _settle_core(config: ServingConfig, lm: Model) -> ServingConfig:
    trained = lm.trained_depth
    if trained is None:
        config.check_model_without_core()
        return dataclasses.replace(config, criteria=("fixed",), max_depth=1, cache_slots=1)
    has_gate = lm.config.exit_gate.enabled
    if "learned_gate" in config.criteria and not has_gate:
        try:
            for_model(
                GenerationConfig.of(exit_criterion="learned_gate"), trained, has_exit_gate=has_gate
            )
        except ConfigError as error:
            raise ConfigError("criteria", error.problem) from None
    known = tuple(name for name in CRITERIA if has_gate or name != "learned_gate")
    slots = slots_of_any_depth(config.cache_slots, trained)
    depth = config.max_depth or max(slots, DEPTH_FACTOR * trained)
    if config.cache_slots is None:
        slots = min(slots, depth)
    if depth < trained:
        raise ConfigError(
            "max_depth",
            f"{depth} is below the trained mean depth {trained}, which requests without a depth "
            "have; raise it.",
        )
    return dataclasses.replace(
        config, criteria=config.criteria or known, max_depth=depth, cache_slots=slots
    )


def cache_config(config: ServingConfig) -> CacheConfig:
    """The same cache for `Generator`; `config` is settled."""
    return CacheConfig(
        slots=config.cache_slots,
        sharing=config.cache_sharing,
        exited_reads=config.cache_exited_reads,
    )


def check_memory(config: ServingConfig, lm: Model, free_bytes: int) -> None:
    """Checks that the cache fits, before it is asked for.

    Args:
      config: settled.
      lm: what is served.
      free_bytes: memory of one device that the cache may take.

    Raises:
      ConfigError: if it does not; says how far to lower rows, capacity or slots.
    """
    rows, capacity, slots = config.rows, config.capacity or 0, config.cache_slots or 1

    def needed(rows: int, capacity: int, slots: int) -> int:
        per_token = cache_bytes_per_token(
            lm.config, slots, lm.module.policy.compute, lm.module.platform
        )
        return rows * capacity * per_token // _parts(lm.module, rows)

    total = needed(rows, capacity, slots)
    if total <= free_bytes:
        return
    fits = {
        "rows": (rows, lambda number: needed(number, capacity, slots)),
        "capacity": (capacity, lambda number: needed(rows, number, slots)),
        "cache_slots": (slots, lambda number: needed(rows, capacity, number)),
    }
    fixes = []
    for name, (most, cost) in fits.items():
        largest = _largest(most, cost, free_bytes)
        if largest:
            fixes.append(f"{name} to {largest}")
    raise ConfigError(
        "rows",
        f"the cache of {rows} rows x {capacity} tokens x {slots} slots takes {total / GIB:.1f} "
        f"GiB of each device, and {free_bytes / GIB:.1f} GiB are free for it; lower "
        f"{' or '.join(fixes) or 'rows, capacity and cache_slots'}.",
    )


def _parts(module: MegaTransformer, rows: int) -> int:
    """Devices that the cache is cut over, each with memory of its own."""
    if module.platform == "cpu":  # Its devices share the machine's.
        return 1
    sharder = for_rows(module, rows).sharder
    return sharder.ways("batch") * sharder.ways("kv_heads")


def _largest(most: int, cost: Callable[[int], int], free_bytes: int) -> int:
    """The largest number up to `most` whose cost is free; 0 if there is none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle) <= free_bytes else (low, middle - 1)
    return low


def free_memory(device: Any) -> int:
    """Bytes of a device that a cache may take, once the parameters are there.

    A device that does not tell (a CPU) has the machine's memory that is free.
    """
    statistics = device.memory_stats()
    if statistics and "bytes_limit" in statistics:
        free = statistics["bytes_limit"] - statistics.get("bytes_in_use", 0)
    else:
        free = _free_of_the_machine()
    return int(MEMORY_SHARE * free)


def _free_of_the_machine() -> int:
    with contextlib.suppress(OSError):  # Linux knows what files take that programs may have.
        for line in pathlib.Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
