"""What may be written as an image or as sound; the checks are the same for all back ends."""

from typing import Any

import numpy as np


def image_batch(name: str, images: Any) -> np.ndarray:
    """Images as [N, H, W, C], of uint8 or of floats in [0, 1].

    Args:
      name: what they are written as, for messages.
      images: [H, W, C] or [N, H, W, C].

    Raises:
      ValueError: if the shape, the type or the values are not those of images.
    """
    array = np.asarray(images)
    batch = array[None] if array.ndim == 3 else array
    if batch.ndim != 4 or batch.shape[-1] not in (1, 3):
        raise ValueError(
            f"{name}: images of shape {array.shape}; they must be [H, W, C] or [N, H, W, C] with 1 "
            "channel, grey, or 3, RGB"
        )
    if batch.dtype != np.uint8:
        _check_floats(name, batch, "images", 0.0, 1.0, "map images in [-1, 1] by (x + 1) / 2")
    return batch


def audio_batch(name: str, clips: Any) -> np.ndarray:
    """Sound as [N, T, C], floats in [-1, 1].

    Args:
      name: what it is written as, for messages.
      clips: [N, T, C] with 1 channel or 2.

    Raises:
      ValueError: if the shape, the type or the values are not those of sound.
    """
    batch = np.asarray(clips)
    if batch.ndim != 3 or batch.shape[-1] not in (1, 2) or not batch.shape[1]:
        raise ValueError(
            f"{name}: sound of shape {batch.shape}; it must be [N, T, C] with at least one sample "
            "and 1 or 2 channels"
        )
    _check_floats(name, batch, "sound", -1.0, 1.0, "divide it by its largest absolute value")
    return batch


def _check_floats(
    name: str, array: np.ndarray, what: str, low: float, high: float, fix: str
) -> None:
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{name}: {what} of type {array.dtype}; make it floating-point")
    # Comparisons with NaN are False, so that it fails as well.
    if array.size and not (array.min() >= low and array.max() <= high):
        raise ValueError(
            f"{name}: {what} with values from {array.min():.4g} to {array.max():.4g}; they must be "
            f"in [{low:g}, {high:g}]; {fix}"
        )
