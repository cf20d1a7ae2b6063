"""Files of sound that end before their samples do."""

import pathlib
import re
import struct

import numpy as np
import pytest
import soundfile

from megatransformer_jax.data.media.sounds import read_sound

SOUND = np.sin(np.arange(9000, dtype=np.float32) ** 1.1 / 20) / 2


@pytest.mark.parametrize(
    ("options", "promised", "found"),
    [
        ({"subtype": "PCM_16"}, "9000 samples", r"\d{4}"),
        ({"subtype": "FLOAT"}, "9000 samples", r"\d{4}"),
        ({"format": "RF64"}, "9000 samples", r"\d{4}"),
        ({"endian": "BIG"}, "9000 samples", r"\d{4}"),
        ({"subtype": "MS_ADPCM"}, r"\d+ blocks", r"\d+"),
        ({"format": "FLAC"}, "9000 samples", r"about \d{4}"),
    ],
)
def test_a_file_that_is_cut_off_is_no_sound(
    options: dict[str, str], promised: str, found: str, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, SOUND, 8000, **options)
    samples, rate_hz = read_sound(str(path))
    assert samples.dtype == np.float32 and rate_hz == 8000
    np.testing.assert_allclose(samples[:9000], SOUND, atol=0.06)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(ValueError, match=f"its header promises {promised}, but .*{found}") as error:
        read_sound(str(path))
    assert "Copy it again" in str(error.value)
    # What libsndfile alone makes of most of them.
    if options.get("format") != "FLAC":
        assert 0 < len(soundfile.read(path)[0]) < 9000


def test_a_wav_that_lacks_its_last_sample_is_no_sound(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, SOUND, 8000)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match="promises 9000 samples, but the file has 8999"):
        read_sound(str(path))


def test_a_wav_of_unknown_length_is_read_to_its_end(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, SOUND, 8000)
    raw = path.read_bytes()
    place = raw.index(b"data") + 4
    path.write_bytes(raw[:place] + struct.pack("<I", 0xFFFFFFFF) + raw[place + 4 :])
    assert len(read_sound(str(path))[0]) == 9000


def test_a_flac_of_unknown_length_is_no_sound(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.flac"
    soundfile.write(path, SOUND, 8000)
    raw = bytearray(path.read_bytes())
    # The count is the last 36 bits before the checksum, at bytes 21 to 25.
    raw[21] &= 0xF0
    raw[22:26] = bytes(4)
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="does not say how many samples"):
        read_sound(str(path))


def test_what_is_no_sound_is_named(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(b"RIFF nothing")
    with pytest.raises(ValueError, match=re.escape("cannot be read as sound (")):
        read_sound(str(path))
