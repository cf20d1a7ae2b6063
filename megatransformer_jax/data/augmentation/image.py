"""Random changes of an image: geometry, then colour."""

import numpy as np
from scipy import ndimage

from megatransformer_jax.config.media_data import ImageAugmentationConfig


def augment_image(
    pixels: np.ndarray, options: ImageAugmentationConfig, rng: np.random.Generator
) -> np.ndarray:
    """The image changed as `options` says; the same for the same state of `rng`.

    Places that come into sight at the edge continue it. Each option has draws of its own, so that
    turning one on leaves what the others do.

    Args:
      pixels: float32 [height, width, C] in [-1, 1].
      options: how much.
      rng: of this row; makes the same number of draws whatever the options.

    Returns:
      float32 [height, width, C] in [-1, 1].
    """
    flip, zoom, rotation, crop, *shares = rng.random(4 + 2 + 2 + 3)
    matrix, offset = _geometry(
        pixels.shape[:2], options, 2 * zoom - 1, 2 * rotation - 1, crop, shares[:2], shares[2:4]
    )
    if flip < options.flip_rate:
        pixels = pixels[:, ::-1]
    if not (np.array_equal(matrix, np.eye(2)) and not offset.any()):
        channels = [
            ndimage.affine_transform(pixels[..., c], matrix, offset, order=1, mode="nearest")
            for c in range(pixels.shape[-1])
        ]
        pixels = np.stack(channels, axis=-1)
    brightness, contrast, saturation = 2 * np.array(shares[4:]) - 1
    if options.max_saturation and pixels.shape[-1] == 3:
        grey = pixels.mean(axis=-1, keepdims=True)
        pixels = grey + (pixels - grey) * (1 + options.max_saturation * saturation)
    if options.max_contrast:
        mean = pixels.mean()
        pixels = mean + (pixels - mean) * (1 + options.max_contrast * contrast)
    pixels = pixels + options.max_brightness * brightness
    return np.clip(pixels, -1, 1).astype(np.float32)


def _geometry(
    size: tuple[int, ...],
    options: ImageAugmentationConfig,
    zoom: float,
    rotation: float,
    crop: float,
    shift: list[float],
    corner: list[float],
) -> tuple[np.ndarray, np.ndarray]:
    """Matrix and offset from places of the new image to those of the old one, in pixels.

    Shares `crop`, `shift` and `corner` are in [0, 1], `zoom` and `rotation` in [-1, 1].
    """
    extent = np.array(size)
    middle = (extent - 1) / 2
    angle = np.deg2rad(options.max_rotation_deg * rotation)
    kept = 1 - (1 - options.min_crop) * crop
    scale = kept * (1 + options.max_zoom) ** zoom
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = scale * turn
    moved = (2 * np.array(shift) - 1) * options.max_shift * extent
    moved += (np.array(corner) - 0.5) * (1 - kept) * extent
    return matrix, middle + moved - matrix @ middle
