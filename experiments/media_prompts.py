"""The prompts of a command with images and sound: reads the files and puts them in place."""

import pathlib
from collections.abc import Sequence

import soundfile
from PIL import Image, UnidentifiedImageError

from experiments.generate_flags import CommandOptions
from experiments.prompts import Prompts
from megatransformer_jax.config.option import UserError
from megatransformer_jax.data.media.images import ImageFitter
from megatransformer_jax.data.media.records import AudioPart, ImagePart, MediaFormats
from megatransformer_jax.data.media.sounds import WaveformFitter
from megatransformer_jax.data.media_tokenizer import MediaTokenizer
from megatransformer_jax.data.sources.record import BadRecord
from megatransformer_jax.generation.media_prompt import MediaPrompt, prompt_of_text

# What data of a run is told to do, and what the command calls it.
_CONVERT = (
    "set data.media.images.on_wrong_size='resize'",
    "set data.media.audio.on_wrong_audio='convert'",
)


def media_prompts(
    options: CommandOptions, prompts: Prompts, tokenizer: MediaTokenizer, formats: MediaFormats
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
    if isinstance(error, soundfile.LibsndfileError):
        return str(error.error_string).rstrip(".")
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _as_option(problem: str) -> str:
    for words in _CONVERT:
        problem = problem.replace(words, "give --convert")
    return problem
