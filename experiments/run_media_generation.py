"""One command of `experiments.generate` whose prompts or results have images or sound."""

import dataclasses
import sys
from collections.abc import Sequence

import numpy as np
from absl import logging

from experiments.generate_flags import Command, CommandOptions
from experiments.load_model import LoadedModel
from experiments.load_vocoder import load_vocoder
from experiments.media_output import ToWaveform, make_folder, prompt_text, write_completions
from experiments.media_prompts import media_prompts
from experiments.out_of_memory import out_of_memory_is_bad_input
from experiments.prompts import Prompts
from experiments.stopwatch import Stopwatch
from megatransformer_jax.config.audio import MelConfig
from megatransformer_jax.config.generation import GenerationConfig, MediaGenerationConfig
from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.data.media.records import MediaFormats
from megatransformer_jax.data.media_tokenizer import MARKERS, MediaTokenizer
from megatransformer_jax.data.mel import griffin_lim
from megatransformer_jax.generation.media_generator import MediaGenerator
from megatransformer_jax.generation.media_prompt import (
    MediaCompletion,
    MediaPrompt,
    encode_media_prompt,
    most_places,
    room_for_text,
    sequence_length,
)


def wants_media(command: Command, prompts: Prompts) -> bool:
    """Whether the command has to do with media: by its options, or a marker in a prompt."""
    has_markers = any(
        marker in text for text in prompts if isinstance(text, str) for marker in MARKERS
    )
    has_options = command.config.media != MediaGenerationConfig()
    return command.options.names_media or has_options or has_markers


def generate_with_media(loaded: LoadedModel, command: Command, prompts: Prompts) -> None:
    """Continues the prompts, shows the texts and writes the media.

    Raises:
      UserError: if the model has no media, or a prompt, a file or an option cannot be used.
    """
    options, tokenizer = command.options, loaded.tokenizer
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
    config = command.config
    if "max_new_tokens" not in command.given:
        config = _fitted(config, given, tokenizer, formats, loaded)
    folder = None if options.output is None else make_folder(options.output)
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


def check_media_have_a_folder(options: CommandOptions, prompts: Sequence[MediaPrompt]) -> None:
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
