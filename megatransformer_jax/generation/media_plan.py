"""Static sizes of a request with media."""

import dataclasses
from collections.abc import Sequence

from megatransformer_jax.config.generation import GenerationConfig
from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.generation.cache_plan import CachePlan, plan_cache, round_columns
from megatransformer_jax.generation.media_prompt import EncodedPrompt
from megatransformer_jax.generation.media_slots import most_places, places_of
from megatransformer_jax.models.megatransformer import MegaTransformer


@dataclasses.dataclass(frozen=True)
class MediaPlan:
    """Sizes that all rows share.

    Attributes:
      cache: of the key/value cache, for text and media.
      num_prompt_tokens: text of prompts is padded to it.
      num_tokens: text of prompts and of what is generated.
      prompt_slots: of images and of clips in prompts.
      slots: the same with those that are made.
    """

    cache: CachePlan
    num_prompt_tokens: int
    num_tokens: int
    prompt_slots: tuple[int, int]
    slots: tuple[int, int]


def plan_media(
    model: MegaTransformer,
    config: GenerationConfig,
    trained_depth: int | None,
    prompts: Sequence[EncodedPrompt],
) -> MediaPlan:
    """The sizes for prompts and all that may follow.

    Args:
      model: the model.
      config: of the generation; its depth is a number.
      trained_depth: mean iterations in training.
      prompts: of one batch.

    Raises:
      UserError: if that is more than the cache or the model takes.
    """
    places = most_places(model.config)
    lengths = [sequence_length(model.config, prompt) for prompt in prompts]
    _check_room(model.config, config, max(lengths), places)
    max_media = config.media.max_media
    # Rows write in turns at worst: each round of text costs all rows its longest.
    new_rows = (max_media + 1) * config.max_new_tokens + max_media * (1 + places)
    cache = plan_cache(
        model.config,
        config,
        trained_depth,
        longest_prompt=max(lengths),
        new_rows=new_rows,
        platform=model.platform,
    )
    num_prompt_tokens = round_columns(max(len(prompt.ids) for prompt in prompts))
    # A slot at least, since encoders take no empty batches.
    images = max(1, *(len(prompt.images) for prompt in prompts))
    clips = max(1, *(len(prompt.mels) for prompt in prompts))
    return MediaPlan(
        cache,
        num_prompt_tokens,
        # The closing token of a medium at the very end is one more.
        num_prompt_tokens + config.max_new_tokens + 1,
        (images, clips),
        (images + max_media, clips + max_media),
    )


def sequence_length(config: ModelConfig, prompt: EncodedPrompt) -> int:
    """Places of a prompt with its media."""
    return len(prompt.ids) + places_of(config, len(prompt.images), prompt.mels)


def room_for_text(config: ModelConfig, length: int, max_media: int) -> int:
    """New tokens that fit in the model behind a prompt of `length` places and with new media."""
    return config.max_length - length - max_media * most_places(config)


def _check_room(
    config: ModelConfig, generation: GenerationConfig, length: int, places: int
) -> None:
    max_media, max_new = generation.media.max_media, generation.max_new_tokens
    room = room_for_text(config, length, max_media)
    if max_new <= room:
        return
    total = length + max_media * places + max_new
    problem = (
        f"{max_new} new tokens after {length} of the longest prompt with its media, and up to "
        f"max_media={max_media} of up to {places} places, make {total}, more than the model's "
        f"max_length={config.max_length}"
    )
    if room >= 1:
        raise ConfigError("max_new_tokens", f"{problem}; set it to {room} or less.")
    raise UserError(f"{problem}; shorten the prompt or lower max_media.")
