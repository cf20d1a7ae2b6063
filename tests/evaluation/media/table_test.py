import numpy as np
import pytest

from megatransformer_jax.config.audio import MelConfig
from megatransformer_jax.evaluation.diagnostics.figures import to_image
from megatransformer_jax.evaluation.media.table import Tile, contact_sheet, draw_mels, pixels_of


def test_pixels_are_the_whole_range():
    image = np.array([-1.0, 0.0, 1.0, 1.7], np.float32)
    assert pixels_of(image).tolist() == [0, 128, 255, 255]
    with pytest.raises(ValueError, match="not finite"):
        pixels_of(np.array([np.nan]))


def test_a_sheet_shows_every_tile_and_its_caption():
    red = np.stack([np.ones((8, 8)), -np.ones((8, 8)), -np.ones((8, 8))], -1)
    grey = np.zeros((8, 8, 1))
    sheet = contact_sheet([Tile(red), Tile(grey), Tile(red), Tile(grey), Tile(red)], columns=3)
    assert sheet.dtype == np.uint8 and sheet.shape[-1] == 3
    half = sheet.shape[0] // 2
    for row, count in ((sheet[:half], 2), (sheet[half:], 1)):
        shares = (row == (255, 0, 0)).all(-1).any(0)
        # Runs of columns with red pixels are pictures.
        assert np.sum(np.diff(shares.astype(int)) == 1) == count
    captioned = contact_sheet([Tile(grey, "costs $3 \x00 and much more than that")])
    assert (captioned != contact_sheet([Tile(grey)])).any()
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([])


def test_spectrograms_have_an_axis_in_seconds():
    config = MelConfig(sample_rate_hz=8000, num_mels=8, hop_samples=200)
    mels = [("made", np.zeros((20, 8))), ("real", np.full((40, 8), np.nan))]
    figure = draw_mels(mels, config)
    made, real = figure.axes[:2]
    assert [axes.get_title() for axes in (made, real)] == ["made", "real"]
    assert made.images[0].get_extent() == [0, 0.5, 0, 8]
    assert made.get_xlim() == real.get_xlim() == (0, 1.0)
    assert to_image(figure).ndim == 3
