"""Generation with images and sound on the command line: reads files, shows and writes results."""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import logging
from PIL import Image, UnidentifiedImageError

from megatransformer_jax.cli.flags import Parsed
from megatransformer_jax.cli.generate_options import GenerateOptions, Prompts
from megatransformer_jax.cli.screen import Stopwatch
from megatransformer_jax.config.audio import MelConfig
from megatransformer_jax.config.generation import GenerationConfig, MediaGenerationConfig
from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.data.media.images import ImageFitter
from megatransformer_jax.data.media.records import AudioPart, ImagePart, MediaFormats
from megatransformer_jax.data.media.sounds import WaveformFitter
from megatransformer_jax.data.media_tokenizer import MARKERS, MediaTokenizer
from megatransformer_jax.data.mel import griffin_lim
from megatransformer_jax.data.sources.record import BadRecord
from megatransformer_jax.evaluation.media.table import Tile, contact_sheet, pixels_of
from megatransformer_jax.extras import import_extra
from megatransformer_jax.generation.media_generator import MediaGenerator
from megatransformer_jax.generation.media_prompt import (
    GeneratedImage,
    MediaCompletion,
    MediaPrompt,
    encode_media_prompt,
    most_places,
    prompt_of_text,
    room_for_text,
    sequence_length,
)
from megatransformer_jax.generation.request import out_of_memory_is_bad_input
from megatransformer_jax.runs.load import LoadedModel
from megatransformer_jax.runs.tasks.load_medium import load_vocoder
from megatransformer_jax.runs.workdir import make_folder

RESULTS, SHEET = "results.jsonl", "contact_sheet.png"
# (normalised mel [F, M]) -> waveform of F * hop samples
ToWaveform = Callable[[np.ndarray], np.ndarray]


def wants_media(parsed: Parsed, prompts: Prompts) -> bool:
    """Whether the command has to do with media: by its options, or a marker in a prompt."""
    has_markers = any(
        marker in text for text in prompts if isinstance(text, str) for marker in MARKERS
    )
    has_options = parsed.generation.media != MediaGenerationConfig()
    return parsed.options.names_media or has_options or has_markers


def generate_with_media(loaded: LoadedModel, parsed: Parsed, prompts: Prompts) -> None:
    """Continues the prompts, shows the texts and writes the media.

    Raises:
      UserError: if the model has no media, or a prompt, a file or an option cannot be used.
    """
    options, tokenizer = parsed.options, loaded.tokenizer
    if not isinstance(tokenizer, MediaTokenizer) or not loaded.config.has_media:
        raise UserError(
            f"{loaded.description} reads and makes text alone; leave out the options of images and "
            f"sound and the markers {', '.join(MARKERS)}, or use a model with media."
        )
    if options.interactive or options.prompt_ids:
        name = "interactive" if options.interactive else "prompt_ids"
        raise ConfigError(name, "is for text alone; leave out the options of media.")
    formats = MediaFormats.of_model(loaded.config)
    given = media_prompts(options, prompts, tokenizer, formats)
    check_media_have_a_folder(options, given)
    config = parsed.generation
    if "max_new_tokens" not in parsed.given:
        config = _fitted(config, given, tokenizer, formats, loaded)
    folder = None if options.output is None else make_folder("output", options.output)
    mel = loaded.config.audio.mel
    to_waveform = make_to_waveform(options.vocoder, mel, config.seed)
    generator = MediaGenerator(loaded.model, loaded.params, tokenizer, config, loaded.trained_depth)
    with Stopwatch() as stopwatch:
        stopwatch.start()
        with out_of_memory_is_bad_input():
            completions = generator.generate(given)
        seconds, compile_seconds = stopwatch.seconds(), stopwatch.compile_seconds()
    if folder is None:
        shown = [_without_files(completion) for completion in completions]
    else:
        shown = write_completions(folder, completions, config.num_samples, mel, to_waveform)
    for number, (completion, text) in enumerate(zip(completions, shown, strict=True)):
        if len(completions) > 1:
            prompt, sample = divmod(number, config.num_samples)
            print(f"--- prompt {prompt + 1}, text {sample + 1}: {completion.finish_reason}")
        print(prompt_text(completion.prompt) + text)
    print(_summary(completions, seconds, compile_seconds), file=sys.stderr)
    if folder is not None:
        print(f"files are in {folder}", file=sys.stderr)


def check_media_have_a_folder(options: GenerateOptions, prompts: Sequence[MediaPrompt]) -> None:
    """Checks that a medium that a prompt asks for is not thrown away.

    Raises:
      ConfigError: if a prompt ends with an opening marker, and there is no output.
    """
    opened = [prompt.opens for prompt in prompts if prompt.opens is not None]
    if opened and options.output is None:
        raise ConfigError(
            "prompt" if options.prompts_file is None else "prompts_file",
            f"a prompt that ends with {opened[0]} needs a folder for the result; give "
            "--output=FOLDER.",
        )


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
    room = room_for_text(loaded.config, longest, config.media.max_media)
    if room < 1:
        fit = longest + room - 1
        raise UserError(
            f"the longest prompt takes {longest} places with its media, but {max(fit, 0)} fit in "
            f"the model: its max_length={loaded.config.max_length} is also for a new token and up "
            f"to max_media={config.media.max_media} of up to {most_places(loaded.config)} places; "
            + (f"shorten the prompt by {longest - fit}." if fit > 1 else "lower --max_media.")
        )
    if room >= config.max_new_tokens:
        return config
    logging.info("max_new_tokens=%d, as more do not fit in the model.", room)
    return dataclasses.replace(config, max_new_tokens=room)


def _without_files(completion: MediaCompletion) -> str:
    names = {True: "[image]", False: "[sound]"}
    return "".join(
        part if isinstance(part, str) else names[hasattr(part, "pixels")]
        for part in completion.parts
    )


def _summary(completions: Sequence[MediaCompletion], seconds: float, compile_seconds: float) -> str:
    images = sum(len(completion.images) for completion in completions)
    clips = sum(len(completion.mels) for completion in completions)
    tokens = sum(len(completion.token_ids) for completion in completions)
    text = f"{tokens} tokens, {images} images, {clips} clips in {seconds:.2f} s"
    if compile_seconds >= 0.01:
        text += f", compilation took {compile_seconds:.1f} s more"
    return text


# ------------------------------------------------------------------------------
# Prompts: reads the files and puts media in place.

# What data of a run is told to do, and what the command calls it.
_CONVERT = (
    "set data.media.images.on_wrong_size='resize'",
    "set data.media.audio.on_wrong_audio='convert'",
)


def media_prompts(
    options: GenerateOptions, prompts: Prompts, tokenizer: MediaTokenizer, formats: MediaFormats
) -> list[MediaPrompt]:
    """What the command asks to continue.

    Args:
      options: of the command.
      prompts: texts; none if there are files alone.
      tokenizer: of the model.
      formats: of its media.

    Raises:
      UserError: if a file cannot be read or has another format than the model's, the model has no
        such media, or markers and files do not fit each other.
    """
    for name, files, config in (
        ("image", options.image, formats.image),
        ("audio", options.audio, formats.audio),
    ):
        if files and not config.enabled:
            raise UserError(
                f"--{name}: the model takes none (model.{name}.enabled=False); leave it out."
            )
    media: list[ImagePart | AudioPart] = [
        *read_images(options.image, formats, converts=options.convert),
        *read_clips(options.audio, formats, converts=options.convert),
    ]
    ending = "<|IMAGE|>" if options.draw else "<|VOICE|>" if options.speak else ""
    texts = [text for text in prompts if isinstance(text, str)] or [""]
    return [
        prompt_of_text(text + ending, media, tokenizer, name=f"prompt {number + 1}")
        for number, text in enumerate(texts)
    ]


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
            _soundfile().write(folder / file, waveform, mel.sample_rate_hz)
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
