"""Each change of an image does what it says, and the options do not disturb each other."""

import numpy as np
import pytest

from megatransformer_jax.config.media_data import ImageAugmentationConfig
from megatransformer_jax.data.augmentation.media import augment_image

SIZE = 21


def changed(pixels: np.ndarray, seed: int = 0, **options: float) -> np.ndarray:
    return augment_image(pixels, ImageAugmentationConfig(**options), np.random.default_rng(seed))


def spot(row: int = 10, column: int = 10, radius: float = 2.0) -> np.ndarray:
    """A bright round spot on black, [SIZE, SIZE, 1]."""
    rows, columns = np.mgrid[:SIZE, :SIZE]
    bright = np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / (2 * radius**2))
    return (2 * bright - 1).astype(np.float32)[..., None]


def centre(pixels: np.ndarray) -> np.ndarray:
    """Row and column of the middle of what is bright."""
    weights = pixels[..., 0] + 1
    return np.array([(np.mgrid[:SIZE, :SIZE][axis] * weights).sum() for axis in (0, 1)]) / (
        weights.sum()
    )


COLOURS = np.random.default_rng(1).uniform(-0.6, 0.6, (SIZE, SIZE, 3)).astype(np.float32)


def test_without_options_nothing_changes() -> None:
    np.testing.assert_array_equal(changed(COLOURS), COLOURS)


def test_the_same_draws_give_the_same_image_and_its_values_stay_in_range() -> None:
    options = {"max_shift": 0.2, "max_rotation_deg": 20.0, "max_brightness": 1.0, "min_crop": 0.7}
    one, same, other = (changed(COLOURS, seed, **options) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    for image in (one, other):
        assert image.shape == COLOURS.shape and image.dtype == np.float32
        assert np.abs(image).max() <= 1


def test_flips_mirror_left_and_right_as_often_as_asked() -> None:
    images = [changed(COLOURS, seed, flip_rate=0.3) for seed in range(200)]
    mirrored = [np.array_equal(image, COLOURS[:, ::-1]) for image in images]
    kept = [np.array_equal(image, COLOURS) for image in images]
    assert all(np.logical_xor(mirrored, kept)) and 40 <= sum(mirrored) <= 80


def test_shifts_move_by_at_most_their_share() -> None:
    moves = np.array([centre(changed(spot(), seed, max_shift=0.2)) for seed in range(40)]) - 10
    assert np.abs(moves).max() <= 0.2 * SIZE + 0.1
    assert (moves.min(axis=0) < -2).all() and (moves.max(axis=0) > 2).all()


def test_rotations_turn_about_the_middle() -> None:
    angles = []
    for seed in range(40):
        row, column = centre(changed(spot(10, 15), seed, max_rotation_deg=30.0)) - 10
        assert np.hypot(row, column) == pytest.approx(5, abs=0.3)
        angles.append(np.rad2deg(np.arctan2(row, column)))
    assert max(np.abs(angles)) <= 30.5 and min(angles) < -15 and max(angles) > 15


def test_zoom_changes_the_size_about_the_middle() -> None:
    brightness = (spot() + 1).sum()
    sizes = [(changed(spot(), seed, max_zoom=0.3) + 1).sum() / brightness for seed in range(40)]
    assert min(sizes) >= 1.3**-2 - 0.02 and max(sizes) <= 1.3**2 + 0.02
    assert min(sizes) < 0.75 and max(sizes) > 1.35
    assert centre(changed(spot(), 3, max_zoom=0.3)) == pytest.approx([10, 10], abs=0.05)


def test_crops_show_parts_of_the_image_larger() -> None:
    ramp = np.broadcast_to(
        np.linspace(-1, 1, SIZE, dtype=np.float32)[:, None, None], (SIZE,) * 2 + (1,)
    )
    spans = []
    for seed in range(40):
        cropped = changed(ramp, seed, min_crop=0.5)
        spans.append(cropped.max() - cropped.min())
        assert (np.diff(cropped[..., 0], axis=0) >= -1e-6).all()
    assert min(spans) >= 0.97 and max(spans) <= 2 and min(spans) < 1.3 and max(spans) > 1.7


def test_brightness_moves_all_pixels_by_the_same() -> None:
    moves = []
    for seed in range(30):
        moved = changed(COLOURS, seed, max_brightness=0.3) - COLOURS
        np.testing.assert_allclose(moved, moved[0, 0, 0], atol=1e-6)
        moves.append(moved[0, 0, 0])
    assert max(np.abs(moves)) <= 0.3 and min(moves) < -0.15 and max(moves) > 0.15


def test_contrast_keeps_the_mean_and_saturation_the_grey() -> None:
    image = changed(COLOURS, 5, max_contrast=0.4)
    factor = (image - image.mean()) / (COLOURS - COLOURS.mean())
    assert image.mean() == pytest.approx(COLOURS.mean(), abs=1e-5)
    assert np.ptp(factor) < 1e-2 and 0.6 <= factor.mean() <= 1.4 and factor.mean() != 1
    image = changed(COLOURS, 5, max_saturation=0.4)
    np.testing.assert_allclose(image.mean(axis=-1), COLOURS.mean(axis=-1), atol=1e-5)
    assert np.abs(image - COLOURS).max() > 0.01
    grey = spot()
    np.testing.assert_array_equal(changed(grey, 5, max_saturation=0.4), grey)


def test_one_option_leaves_what_the_others_do() -> None:
    flipped = changed(COLOURS, 7, flip_rate=1.0)
    both = changed(COLOURS, 7, flip_rate=1.0, max_brightness=0.2)
    alone = changed(COLOURS, 7, max_brightness=0.2)
    np.testing.assert_allclose(both - flipped, alone - COLOURS, atol=1e-6)
