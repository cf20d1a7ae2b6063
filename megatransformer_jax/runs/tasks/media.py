"""Runs on text with images and sound: scores by task and medium, samples next to what is real."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from megatransformer_jax import streams
from megatransformer_jax.config.audio import MelConfig
from megatransformer_jax.config.option import MAX_SEED
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.data.media.rows import task_names
from megatransformer_jax.data.mel import griffin_lim
from megatransformer_jax.data.tokenizer import Tokenizer
from megatransformer_jax.evaluation.diagnostics.figures import to_image
from megatransformer_jax.evaluation.media.making import (
    Answered,
    Made,
    make_answering_step,
    make_making_step,
)
from megatransformer_jax.evaluation.media.table import Tile, contact_sheet, draw_mels, pixels_of
from megatransformer_jax.evaluation.media.validation import (
    MediaValidationSet,
    make_media_eval_step,
)
from megatransformer_jax.evaluation.validation import depth_argument
from megatransformer_jax.models.megatransformer import MegaTransformer
from megatransformer_jax.runs.build import trained_depth
from megatransformer_jax.runs.tasks.transformer import TransformerTask
from megatransformer_jax.training.loop import Hook
from megatransformer_jax.training.media_hook import MediaSampleHook, MediaSamples
from megatransformer_jax.training.writers import MultiWriter
from megatransformer_jax.types import Batch


class MediaTask(TransformerTask):
    """A `Task`: to predict text, and to make the images and the sound in it."""

    def scores(self, params: Any) -> dict[str, float]:
        """See `Task`; of text by task, and of each decoder."""
        return self._media_validation_set.score(params, trained_depth(self.config)).metrics()

    @functools.cached_property
    def _media_validation_set(self) -> MediaValidationSet:
        names = task_names(self.config.data)
        eval_step = make_media_eval_step(self.model, self.validation_key, len(names))
        return MediaValidationSet(self.validation_set.batches, jax.jit(eval_step), names)

    def make_sampler(self) -> Callable[[Any, int], MediaSamples | None]:
        """See `TransformerTask`."""
        batch = self.validation_set.batches[0]
        return make_media_sampler(self.config, self.model, self.tokenizer, batch)

    def sample_hook(self, make_samples: Callable[[Any, int], Any], writer: MultiWriter) -> Hook:
        """See `TransformerTask`."""
        every_steps = self.config.samples.every_steps
        return MediaSampleHook(every_steps, make_samples, writer, self.folder("samples"))


# ------------------------------------------------------------------------------
# Samples.

MAX_COLUMNS = 8


def make_media_sampler(
    config: RunConfig, model: MegaTransformer, tokenizer: Tokenizer, batch: Batch
) -> Callable[[Any, int], MediaSamples | None]:
    """A function from (params, step) to samples, for all processes of a run to call together.

    Images and clips are made from the texts of held-out rows, captions and transcripts to their
    media. Sound becomes audible by Griffin and Lim's method, whatever vocoder there is.

    Args:
      config: `samples.num_media` of each kind are made.
      model: of the run.
      tokenizer: of the run.
      batch: of the validation set, on the mesh.

    Returns:
      The function; None comes of all processes but the primary one.
    """
    depth = trained_depth(config) if config.samples.depth is None else config.samples.depth
    key = jax.random.fold_in(jax.random.key(config.train.seed), streams.MEDIA_SAMPLES)
    make = make_making_step(model, key, config.samples.num_media)
    answer = make_answering_step(model, key, config.samples.num_media)

    def sample(params: Any, step: int) -> MediaSamples | None:
        num_steps = depth_argument(depth)
        draw_key = jax.device_put(jax.random.fold_in(key, step))
        made = jax.device_get(make(params, batch, num_steps, draw_key))
        answered = jax.device_get(answer(params, batch, num_steps))
        if jax.process_index():
            return None
        seed = (config.train.seed + step) % (MAX_SEED + 1)
        return present(made, answered, tokenizer, config.model.audio.mel, seed)

    return sample


def present(
    made: dict[str, Made],
    answered: dict[str, Answered],
    tokenizer: Tokenizer,
    mel: MelConfig,
    seed: int,
) -> MediaSamples:
    """Files, figures and texts of what the model made and said; only of rows that there are.

    Names: drawn_<n>, spoken_<n> for media with their prompt as a text; drawn, captioned for contact
    sheets, mels_<n> for spectrograms; captioned_<n>, transcribed_<n> for texts.
    """
    images: dict[str, np.ndarray] = {}
    clips: dict[str, np.ndarray] = {}
    texts: dict[str, str] = {}
    if "image" in made:
        _present_drawings(made["image"], tokenizer, images, texts)
    if "image" in answered:
        _present_captions(answered["image"], tokenizer, images, texts)
    if "audio" in made:
        _present_speech(made["audio"], tokenizer, mel, seed, images, clips, texts)
    if "audio" in answered:
        for index, (said, right) in _answers(answered["audio"], tokenizer):
            texts[f"transcribed_{index}"] = _verdict(said, right)
    return MediaSamples(images, clips, texts, mel.sample_rate_hz if clips else None)


def _present_drawings(
    made: Made, tokenizer: Tokenizer, images: dict[str, np.ndarray], texts: dict[str, str]
) -> None:
    """The sheet has drawings above the real images of the same rows."""
    drawings, real = [], []
    for index in np.flatnonzero(made.exists).tolist():
        prompt = _prompt(made, index, tokenizer)
        images[f"drawn_{index}"] = pixels_of(made.media[index])
        texts[f"drawn_{index}"] = prompt
        drawings.append(Tile(made.media[index], prompt))
        real.append(Tile(made.real[index], "real"))
    columns = min(MAX_COLUMNS, len(drawings))
    tiles: list[Tile] = []
    for start in range(0, len(drawings), MAX_COLUMNS):
        block = slice(start, start + columns)
        blank = [Tile(-np.ones_like(made.real[0]))] * (columns - len(drawings[block]))
        tiles += [*drawings[block], *blank, *real[block], *blank]
    if tiles:
        images["drawn"] = contact_sheet(tiles, columns)


def _present_captions(
    answered: Answered,
    tokenizer: Tokenizer,
    images: dict[str, np.ndarray],
    texts: dict[str, str],
) -> None:
    tiles = []
    for index, (said, right) in _answers(answered, tokenizer):
        texts[f"captioned_{index}"] = _verdict(said, right)
        tiles.append(Tile(answered.media[index], said if said == right else f"{said} ({right})"))
    if tiles:
        images["captioned"] = contact_sheet(tiles, min(MAX_COLUMNS, len(tiles)))


def _present_speech(
    made: Made,
    tokenizer: Tokenizer,
    mel: MelConfig,
    seed: int,
    images: dict[str, np.ndarray],
    clips: dict[str, np.ndarray],
    texts: dict[str, str],
) -> None:
    assert made.lengths is not None and made.real_lengths is not None  # Clips have both.
    for index in np.flatnonzero(made.exists).tolist():
        prompt = _prompt(made, index, tokenizer)
        own = made.media[index][: made.lengths[index]]
        real = made.real[index][: made.real_lengths[index]]
        clips[f"spoken_{index}"] = griffin_lim(own, mel, seed=seed)
        texts[f"spoken_{index}"] = prompt
        figure = draw_mels([(f"made: {prompt}", own), ("real", real)], mel)
        images[f"mels_{index}"] = to_image(figure)


def _prompt(made: Made, index: int, tokenizer: Tokenizer) -> str:
    """The row's text up to its last medium."""
    last = int(np.flatnonzero(made.follows[index])[-1])
    return _text(made.tokens[index][: last + 1], tokenizer)


def _answers(answered: Answered, tokenizer: Tokenizer) -> list[tuple[int, tuple[str, str]]]:
    """Number, answer of the model and right answer of each row that there is."""
    found = []
    for index in np.flatnonzero(answered.exists).tolist():
        places = answered.is_answer[index]
        counts = places & (answered.loss_mask[index] > 0)
        said, right = answered.answer[index][places], answered.targets[index][counts]
        found.append((index, (_text(said, tokenizer), _text(right, tokenizer))))
    return found


def _text(ids: np.ndarray, tokenizer: Tokenizer) -> str:
    """Text before the end token, without ids that the tokenizer does not have."""
    ends = np.flatnonzero(ids == tokenizer.eos_id)
    kept = ids[: ends[0]] if len(ends) else ids
    return tokenizer.decode([int(token) for token in kept if token < tokenizer.vocab_size])


def _verdict(said: str, right: str) -> str:
    return f"{said} [right]" if said == right else f"{said} [wrong: {right}]"
