"""How large a cache a request needs; sizes are rounded so that most requests compile nothing."""

import dataclasses

from megatransformer_jax.config.generation import GenerationConfig
from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.nn.kv_cache import rows_to_blocks

# A full cache has a multiple of this many slots per core layer.
SLOT_MULTIPLE = 8
# Prompts are padded to a power of two from here on, and above MAX_DOUBLED to a multiple of it.
MIN_COLUMNS = 16
MAX_DOUBLED = 256


@dataclasses.dataclass(frozen=True)
class CachePlan:
    """Static sizes of one request.

    Attributes:
      num_columns: what prompts are padded to.
      capacity: rows of the cache, and tokens of a history.
      num_slots: slots of each core layer.
    """

    num_columns: int
    capacity: int
    num_slots: int


def plan_cache(
    model: ModelConfig,
    config: GenerationConfig,
    trained_depth: int | None,
    longest_prompt: int,
    new_rows: int,
    platform: str,
) -> CachePlan:
    """The sizes for prompts of up to `longest_prompt` tokens.

    Args:
      model: the model.
      config: of the generation; its depth is a number.
      trained_depth: mean iterations in training.
      longest_prompt: tokens, the start token included.
      new_rows: rows that the new tokens may take: max_new_tokens, or more if some are rejected.
      platform: of the devices.

    Raises:
      UserError: if prompt and new tokens exceed the cache or the model.
    """
    _check_length(model, config, longest_prompt)
    columns, rows = round_columns(longest_prompt), config.cache.capacity
    if rows is None:
        rows = columns + new_rows
    elif longest_prompt + new_rows > rows:
        raise ConfigError(
            "cache.capacity",
            f"{rows} is less than the {longest_prompt} tokens of the longest prompt and {new_rows} "
            f"rows for new ones; raise it to {longest_prompt + new_rows}, or lower max_new_tokens.",
        )
    capacity = rows_to_blocks(rows, platform)
    columns = min(columns, capacity - new_rows)
    return CachePlan(columns, capacity, _num_slots(config, trained_depth))


def _num_slots(config: GenerationConfig, trained_depth: int | None) -> int:
    if config.cache.slots is not None:
        return config.cache.slots
    deepest = max(config.depth.depth or 1, trained_depth or 1)
    return -(-deepest // SLOT_MULTIPLE) * SLOT_MULTIPLE


def round_columns(longest: int) -> int:
    """What prompts of up to `longest` tokens are padded to."""
    if longest > MAX_DOUBLED:
        return -(-longest // MAX_DOUBLED) * MAX_DOUBLED
    return max(MIN_COLUMNS, 1 << (longest - 1).bit_length())


def _check_length(model: ModelConfig, config: GenerationConfig, longest_prompt: int) -> None:
    total = longest_prompt + config.max_new_tokens
    if total > model.max_length:
        raise UserError(
            f"the longest prompt has {longest_prompt} tokens (the start token included); with "
            f"max_new_tokens={config.max_new_tokens} that is more than the model's "
            f"max_length={model.max_length}. Shorten it or lower max_new_tokens."
        )
