"""Generation of images and sound between the words."""

import dataclasses

from megatransformer_jax.config.option import MAX_COUNT, check_options, option


@dataclasses.dataclass(frozen=True)
class MediaGenerationConfig:
    """Images and sound that a model makes. For models with parts for them."""

    max_media: int = option(
        1,
        "Images and clips that are made per text, at most; each opening token asks for one.",
        minimum=1,
        maximum=MAX_COUNT,
    )
    guidance_scale: float | None = option(
        None,
        "Guidance of the decoders: 1 follows the text, above 1 exaggerates it. None: as the "
        "model's config says.",
        minimum=0,
    )
    sampler_steps: int | None = option(
        None,
        "Steps of the decoders' samplers. None: as the model's config says.",
        minimum=1,
        maximum=MAX_COUNT,
    )

    def __post_init__(self) -> None:
        check_options(self)
