"""Writes what a generation with media has made into a folder."""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from megatransformer_jax.config.audio import MelConfig
from megatransformer_jax.config.option import UserError
from megatransformer_jax.data.media.records import ImagePart
from megatransformer_jax.evaluation.media.table import Tile, contact_sheet, pixels_of
from megatransformer_jax.generation.media_prompt import GeneratedImage, MediaCompletion, MediaPrompt

RESULTS, SHEET = "results.jsonl", "contact_sheet.png"
# (normalised mel [F, M]) -> waveform of F * hop samples
ToWaveform = Callable[[np.ndarray], np.ndarray]


def make_folder(name: str) -> pathlib.Path:
    """The folder, made if it is not there.

    Raises:
      UserError: if it cannot be.
    """
    folder = pathlib.Path(name).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--output={name}: cannot be made ({error.strerror}); name another folder."
        ) from error
    return folder


def write_completions(
    folder: pathlib.Path,
    completions: Sequence[MediaCompletion],
    num_samples: int,
    mel: MelConfig,
    to_waveform: ToWaveform,
) -> list[str]:
    """A PNG file per image, a WAV file per clip, a contact sheet if there are images, and a line of
    results.jsonl per completion. Files of the same names are replaced.

    Args:
      folder: that is there.
      completions: `num_samples` per prompt, next to each other.
      num_samples: see above.
      mel: of the clips.
      to_waveform: makes sound of spectrograms.

    Returns:
      Per completion its text, with the names of files where media are.

    Raises:
      UserError: if a file cannot be written, or an image has values that are not finite.
    """
    records, shown, tiles = [], [], []
    try:
        for index, completion in enumerate(completions):
            parts = _write_parts(folder, f"{index:03d}", completion, mel, to_waveform)
            records.append(
                {
                    "prompt": prompt_text(completion.prompt),
                    "sample": index % num_samples,
                    "parts": parts,
                    "token_ids": list(completion.token_ids),
                    "score": completion.score,
                    "finish_reason": completion.finish_reason,
                }
            )
            shown.append("".join(_shown(part) for part in parts))
            tiles += _tiles(completion)
        if tiles:
            Image.fromarray(contact_sheet(tiles)).save(folder / SHEET)
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        (folder / RESULTS).write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output={folder}: cannot be written ({error}).") from error
    except ValueError as error:
        raise UserError(f"nothing can be shown: {error}.") from error
    return shown


def prompt_text(prompt: MediaPrompt) -> str:
    """The prompt with markers in the place of media."""
    texts = []
    for part in prompt.parts:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, ImagePart):
            texts.append("<|IMAGE|><|/IMAGE|>")
        else:
            texts.append("<|VOICE|><|/VOICE|>" if part.is_voice else "<|AUDIO|><|/AUDIO|>")
    return "".join(texts)


def _write_parts(
    folder: pathlib.Path,
    name: str,
    completion: MediaCompletion,
    mel: MelConfig,
    to_waveform: ToWaveform,
) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for number, part in enumerate(completion.parts):
        if isinstance(part, str):
            parts.append({"text": part})
        elif isinstance(part, GeneratedImage):
            file = f"{name}_{number}.png"
            pixels = pixels_of(part.pixels)
            # Pillow takes grey images without an axis of channels.
            grey = pixels.shape[-1] == 1
            Image.fromarray(pixels[..., 0] if grey else pixels).save(folder / file)
            parts.append({"image": file})
        else:
            file = f"{name}_{number}.wav"
            waveform = to_waveform(part.mel)
            soundfile.write(folder / file, waveform, mel.sample_rate_hz)
            seconds = len(waveform) / mel.sample_rate_hz
            parts.append({"audio": file, "seconds": seconds, "is_voice": part.is_voice})
    return parts


def _shown(part: dict[str, Any]) -> str:
    return str(part["text"]) if "text" in part else f"[{part.get('image') or part['audio']}]"


def _tiles(completion: MediaCompletion) -> list[Tile]:
    """Given images with what was said of them, and drawn ones with what asked for them."""
    given = [
        Tile(part.pixels, completion.text)
        for part in completion.prompt.parts
        if isinstance(part, ImagePart)
    ]
    asked = "".join(part for part in completion.prompt.parts if isinstance(part, str))
    return [*given, *(Tile(pixels, asked) for pixels in completion.images)]
