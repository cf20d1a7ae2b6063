"""Reads files of sound, and finds those that are cut off."""

import os
import pathlib
import struct
import typing

import numpy as np
import soundfile

# Tags of WAV formats whose blocks are one sample of every channel; others pack many into a block.
ONE_SAMPLE_BLOCKS = (0x0001, 0x0003, 0x0006, 0x0007, 0xFFFE)
# A chunk's size in RF64, where another chunk has it; elsewhere it means that it is not known.
NO_SIZE = 0xFFFFFFFF
# libsndfile's count for a FLAC file that does not say how many samples it has.
NO_COUNT = 2**63 - 1
BLOCK_SAMPLES = 1024
_CUT_OFF = "Copy it again from where it is whole, or delete the record."


def read_sound(path: str) -> tuple[np.ndarray, int]:
    """All samples, float32 [samples] or [samples, channels], and their number per second.

    Raises:
      ValueError: if the file cannot be read, or ends before the samples that its header promises;
        the message says how to mend it.
    """
    promised = None
    try:
        with soundfile.SoundFile(path) as file:
            promised, rate_hz = file.frames, file.samplerate
            if promised == NO_COUNT:
                raise ValueError(
                    "its header does not say how many samples it has, so that a missing end would "
                    "not be seen. Write the file anew, for example with `flac` from a WAV file."
                )
            if file.format in ("WAV", "WAVEX", "RF64"):
                _check_wav(path)
            samples = file.read(dtype="float32")
    except (OSError, soundfile.SoundFileError) as error:
        found = _num_readable(path) if promised else 0
        if promised is None or found == promised:
            raise ValueError(
                f"cannot be read as sound ({error}). Mend the file, or delete the record."
            ) from error
        raise ValueError(
            f"its header promises {promised} samples, but only about {found} can be read "
            f"({error}). {_CUT_OFF}"
        ) from error
    if len(samples) < promised:
        raise ValueError(
            f"its header promises {promised} samples, but the file has {len(samples)}. {_CUT_OFF}"
        )
    return samples, rate_hz


def _num_readable(path: str) -> int:
    """Samples before the place where decoding fails, in whole blocks."""
    count = 0
    try:
        with soundfile.SoundFile(path) as file:
            while block := len(file.read(BLOCK_SAMPLES)):
                count += block
    except (OSError, soundfile.SoundFileError):
        pass  # The end that is asked for.
    return count


def _check_wav(path: str) -> None:
    """libsndfile reads what is there of a WAV file, and says nothing of what is not.

    Raises:
      ValueError: if the file ends before the samples that its header promises.
    """
    with pathlib.Path(path).open("rb") as file:
        promised, start, block, tag = _wav_header(file)
    found = os.path.getsize(path) - start
    if promised > found:
        unit = "samples" if tag in ONE_SAMPLE_BLOCKS else "blocks"
        raise ValueError(
            f"its header promises {promised // block} {unit}, but the file has {found // block}. "
            f"{_CUT_OFF}"
        )


def _wav_header(file: typing.BinaryIO) -> tuple[int, int, int, int]:
    """Bytes of sound that are promised (0: it is not said), where they start, bytes of a block of
    samples, and the tag of the format."""
    riff = file.read(12)[:4]
    order = ">" if riff == b"RIFX" else "<"
    long_size, block, tag = 0, 1, 0
    while len(head := file.read(8)) == 8:
        name, size = head[:4], struct.unpack(f"{order}I", head[4:])[0]
        if name == b"data":
            promised = size if size != NO_SIZE else long_size
            return promised, file.tell(), max(block, 1), tag
        content = file.read(size + size % 2)
        if name == b"ds64" and len(content) >= 16:
            long_size = struct.unpack("<Q", content[8:16])[0]
        if name == b"fmt " and len(content) >= 14:
            tag = struct.unpack(f"{order}H", content[:2])[0]
            block = struct.unpack(f"{order}H", content[12:14])[0]
    return 0, file.tell(), block, tag
