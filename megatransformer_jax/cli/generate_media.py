"""Generation with images and sound on the command line: reads files, shows and writes results."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import logging
from PIL import Image, UnidentifiedImageError

from megatransformer_jax.cli.flags import Parsed
from megatransformer_jax.cli.generate_options import GenerateOptions, Prompts
from megatransformer_jax.config.audio import MelConfig
from megatransformer_jax.config.generation import GenerationConfig
from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.data.media.images import ImageFitter
from megatransformer_jax.data.media.records import AudioPart, ImagePart, MediaFormats
from megatransformer_jax.data.media.sounds import WaveformFitter
from megatransformer_jax.data.media_tokenizer import MediaTokenizer
from megatransformer_jax.data.mel import griffin_lim
from megatransformer_jax.data.sources.record import BadRecord
from megatransformer_jax.evaluation.media.table import Tile, contact_sheet, pixels_of
from megatransformer_jax.extras import import_extra
from megatransformer_jax.generation.media_prompt import (
    MediaPrompt,
    encode_media_prompt,
    media_tokenizer,
    most_places,
    prompt_of_text,
    room_for_text,
    sequence_length,
)
from megatransformer_jax.generation.request import Completion, GeneratedImage
from megatransformer_jax.runs.load import LoadedModel
from megatransformer_jax.runs.tasks.load_medium import load_vocoder
from megatransformer_jax.runs.workdir import make_folder

RESULTS, SHEET = "results.jsonl", "contact_sheet.png"
# (normalised mel [F, M]) -> waveform of F * hop samples
ToWaveform = Callable[[np.ndarray], np.ndarray]


class MediaFiles:
    """The images and sound of a command: those of its files, and those that are made.

    Args:
      loaded: the model.
      parsed: the command line.

    Raises:
      UserError: if the model has no media, or a file or an option cannot be used.
    """

    def __init__(self, loaded: LoadedModel, parsed: Parsed):
        options = parsed.options
        self._loaded = loaded
        self._parsed = parsed
        self._tokenizer = media_tokenizer(loaded.config, loaded.tokenizer, loaded.description)
        if options.prompt_ids:
            raise ConfigError("prompt_ids", "is for text alone; leave out the options of media.")
        self._formats = MediaFormats.of_model(loaded.config)
        self._given = read_media(options, self._formats)
        self._folder: pathlib.Path | None = None
        self._to_waveform: ToWaveform | None = None

    def prompt(self, text: str, name: str = "prompt") -> MediaPrompt:
        """A text with the files in their places."""
        return prompt_of_text(text, self._given, self._tokenizer, name)

    def prompts(self, texts: Prompts) -> list[MediaPrompt]:
        """What the command asks to continue; none if it is interactive.

        Args:
          texts: none if there are files alone.

        Raises:
          UserError: if markers and files do not fit each other, or what is made has no folder.
        """
        options = self._parsed.options
        if options.interactive:
            return []
        ending = "<|IMAGE|>" if options.draw else "<|VOICE|>" if options.speak else ""
        prompts = [
            self.prompt(text + ending, f"prompt {number}")
            for number, text in enumerate([str(text) for text in texts] or [""], 1)
        ]
        opened = [prompt.opens for prompt in prompts if prompt.opens is not None]
        if opened and options.output is None:
            raise ConfigError(
                "prompt" if options.prompts_file is None else "prompts_file",
                f"a prompt that ends with {opened[0]} needs a folder for the result; give "
                "--output=FOLDER.",
            )
        return prompts

    def fitted(self, prompts: Sequence[MediaPrompt]) -> Parsed:
        """The command line with as many new tokens as usual, or as fit in the model if those are
        fewer and it does not say; and the folder for results is made.

        Raises:
          UserError: if none fits, or the folder or the vocoder cannot be used.
        """
        parsed, options, mel = self._parsed, self._parsed.options, self._loaded.config.audio.mel
        config = parsed.generation
        if options.interactive and config.most_media:
            # A session keeps the text as context, so what it shows is text.
            if config.media.max_media:
                raise ConfigError("max_media", "is for prompts, not for --interactive; leave it 0.")
            given = {**parsed.given, "max_media": 0}
            return dataclasses.replace(parsed, given=given)
        if prompts and "max_new_tokens" not in parsed.given:
            config = _fitted(config, prompts, self._tokenizer, self._formats, self._loaded)
            parsed = dataclasses.replace(parsed, generation=config)
        if options.output is not None:
            self._folder = make_folder("output", options.output)
            self._to_waveform = make_to_waveform(options.vocoder, mel, config.seed)
        return parsed

    def write(self, completions: Sequence[Completion]) -> list[list[str]]:
        """Writes what was made; per completion the names of files where its media are.

        Raises:
          UserError: see `write_completions`.
        """
        assert self._folder is not None and self._to_waveform is not None  # By `fitted`.
        mel, count = self._loaded.config.audio.mel, self._parsed.generation.num_samples
        return write_completions(self._folder, completions, count, mel, self._to_waveform)


def make_to_waveform(vocoder: str | None, mel: MelConfig, seed: int) -> ToWaveform:
    """From a mel spectrogram to sound: by a trained vocoder, or by Griffin and Lim's method.

    Raises:
      UserError: if the folder has no vocoder, or one for other spectrograms.
    """
    if vocoder is None:

        def approximate(spectrogram: np.ndarray) -> np.ndarray:
            logging.log_first_n(
                logging.INFO,
                "Griffin and Lim's method makes the sound; a trained vocoder is better, see "
                "--vocoder.",
                1,
            )
            return griffin_lim(spectrogram, mel, seed=seed)

        return approximate
    loaded = load_vocoder(vocoder, mel)

    def convert(spectrogram: np.ndarray) -> np.ndarray:
        lengths = np.array([len(spectrogram)], np.int32)
        waveform: np.ndarray = np.asarray(loaded(spectrogram[None], lengths))[0]
        return waveform

    return convert


def _fitted(
    config: GenerationConfig,
    prompts: Sequence[MediaPrompt],
    tokenizer: MediaTokenizer,
    formats: MediaFormats,
    loaded: LoadedModel,
) -> GenerationConfig:
    """As many new tokens as usual, or as fit in the model if those are fewer.

    Raises:
      UserError: if none fits.
    """
    encoded = [encode_media_prompt(prompt, tokenizer, formats) for prompt in prompts]
    longest = max(sequence_length(loaded.config, prompt) for prompt in encoded)
    room = room_for_text(loaded.config, longest, config.most_media)
    if room < 1:
        fit = longest + room - 1
        raise UserError(
            f"the longest prompt takes {longest} places with its media, but {max(fit, 0)} fit in "
            f"the model: its max_length={loaded.config.max_length} is also for a new token and up "
            f"to max_media={config.most_media} of up to {most_places(loaded.config)} places; "
            + (f"shorten the prompt by {longest - fit}." if fit > 1 else "lower --max_media.")
        )
    if room >= config.max_new_tokens:
        return config
    logging.info("max_new_tokens=%d, as more do not fit in the model.", room)
    return dataclasses.replace(config, max_new_tokens=room)


# ------------------------------------------------------------------------------
# Prompts: reads the files and puts media in place.

# What data of a run is told to do, and what the command calls it.
_CONVERT = (
    "set data.media.images.on_wrong_size='resize'",
    "set data.media.audio.on_wrong_audio='convert'",
)


def read_media(options: GenerateOptions, formats: MediaFormats) -> list[ImagePart | AudioPart]:
    """What the files of a command hold.

    Raises:
      UserError: if a file cannot be read or has another format than the model's, or the model has
        no such media.
    """
    for name, files, config in (
        ("image", options.image, formats.image),
        ("audio", options.audio, formats.audio),
    ):
        if files and not config.enabled:
            raise UserError(
                f"--{name}: the model takes none (model.{name}.enabled=False); leave it out."
            )
    images = read_images(options.image, formats, converts=options.convert)
    clips = read_clips(options.audio, formats, converts=options.convert) if options.audio else []
    return [*images, *clips]


def read_images(names: Sequence[str], formats: MediaFormats, *, converts: bool) -> list[ImagePart]:
    """Images of files.

    Raises:
      UserError: naming the file.
    """
    fitter = ImageFitter(formats.image, "resize" if converts else "error")
    parts = []
    for name in names:
        try:
            with Image.open(_file(name)) as image:
                image.load()
                pixels = fitter.fit(image, name)
        # What Pillow raises for files that are cut off or no image.
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(
                f"--image={name}: cannot be read as an image ({_reason(error)}); name a file with "
                "one, such as PNG or JPEG."
            ) from error
        if isinstance(pixels, BadRecord):
            raise UserError(f"--image={name}: {_as_option(pixels.problem)}")
        parts.append(ImagePart(pixels))
    return parts


def read_clips(names: Sequence[str], formats: MediaFormats, *, converts: bool) -> list[AudioPart]:
    """Clips of files, as speech unless their places say otherwise.

    Raises:
      UserError: naming the file.
    """
    rate_hz = formats.audio.mel.sample_rate_hz
    fitter = WaveformFitter(rate_hz, "convert" if converts else "error")
    parts = []
    soundfile = _soundfile()
    for name in names:
        try:
            samples, own_rate_hz = soundfile.read(_file(name), dtype="float32")
        except (OSError, soundfile.SoundFileError) as error:
            raise UserError(
                f"--audio={name}: cannot be read as sound ({_reason(error)}); name a file with "
                "some, such as WAV or FLAC."
            ) from error
        waveform = fitter.fit(samples, own_rate_hz, name)
        if isinstance(waveform, BadRecord):
            raise UserError(f"--audio={name}: {_as_option(waveform.problem)}")
        parts.append(AudioPart(waveform, rate_hz))
    return parts


def _file(name: str) -> pathlib.Path:
    """The file. libsndfile does not say why it cannot open one.

    Raises:
      OSError: if there is none, or it is a folder.
    """
    path = pathlib.Path(name).expanduser()
    path.open("rb").close()
    return path


def _reason(error: Exception) -> str:
    """Without the name, which the message begins with."""
    if isinstance(error, UnidentifiedImageError):
        return "no known format"
    if isinstance(error, _soundfile().LibsndfileError):
        return str(error.error_string).rstrip(".")
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _soundfile() -> Any:
    return import_extra("soundfile", "media", "files of sound")


def _as_option(problem: str) -> str:
    for words in _CONVERT:
        problem = problem.replace(words, "give --convert")
    return problem


# ------------------------------------------------------------------------------
# Results: files in a folder.


def write_completions(
    folder: pathlib.Path,
    completions: Sequence[Completion],
    num_samples: int,
    mel: MelConfig,
    to_waveform: ToWaveform,
) -> list[list[str]]:
    """A PNG file per image, a WAV file per clip, a contact sheet if there are images, and a line of
    results.jsonl per completion. Files of the same names are replaced.

    Args:
      folder: that is there.
      completions: `num_samples` per prompt, next to each other.
      num_samples: see above.
      mel: of the clips.
      to_waveform: makes sound of spectrograms.

    Returns:
      Per completion the names of its files, in brackets.

    Raises:
      UserError: if a file cannot be written, or an image has values that are not finite.
    """
    records, shown, tiles = [], [], []
    try:
        for index, completion in enumerate(completions):
            parts = _write_parts(folder, f"{index:03d}", completion, mel, to_waveform)
            records.append(
                {
                    "prompt": str(completion.prompt),
                    "sample": index % num_samples,
                    "parts": parts,
                    "token_ids": list(completion.token_ids),
                    "score": completion.score,
                    "finish_reason": completion.finish_reason,
                }
            )
            files = [part.get("image") or part.get("audio") for part in parts]
            shown.append([f"[{file}]" for file in files if file])
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


def _write_parts(
    folder: pathlib.Path,
    name: str,
    completion: Completion,
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
            _soundfile().write(folder / file, waveform, mel.sample_rate_hz)
            seconds = len(waveform) / mel.sample_rate_hz
            parts.append({"audio": file, "seconds": seconds, "is_voice": part.is_voice})
    return parts


def _tiles(completion: Completion) -> list[Tile]:
    """Given images with what was said of them, and drawn ones with what asked for them."""
    given = [
        Tile(part.pixels, completion.text)
        for part in completion.prompt.parts
        if isinstance(part, ImagePart)
    ]
    asked = "".join(part for part in completion.prompt.parts if isinstance(part, str))
    return [*given, *(Tile(pixels, asked) for pixels in completion.images)]
