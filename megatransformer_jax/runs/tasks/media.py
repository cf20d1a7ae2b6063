"""Runs on text with images and sound: scores by task and medium, samples next to what is real."""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from megatransformer_jax.config.audio import MelConfig
from megatransformer_jax.config.generation import GenerationConfig
from megatransformer_jax.config.option import MAX_SEED
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.config.sampling import DepthConfig
from megatransformer_jax.data.media.rows import task_names
from megatransformer_jax.data.mel import griffin_lim
from megatransformer_jax.data.tokenizer import Tokenizer
from megatransformer_jax.evaluation.diagnostics.figures import to_image
from megatransformer_jax.evaluation.media.making import (
    Question,
    answers,
    rows_to_answer,
    rows_to_make,
)
from megatransformer_jax.evaluation.media.table import Tile, contact_sheet, draw_mels, pixels_of
from megatransformer_jax.evaluation.media.validation import (
    MediaValidationSet,
    make_media_eval_step,
)
from megatransformer_jax.generation.generator import Generator
from megatransformer_jax.generation.placement import fetch
from megatransformer_jax.generation.request import GeneratedClip, GeneratedImage, GeneratedMedium
from megatransformer_jax.models.megatransformer import MegaTransformer
from megatransformer_jax.runs.build import trained_depth
from megatransformer_jax.runs.tasks.transformer import TransformerTask
from megatransformer_jax.training.loop import Hook
from megatransformer_jax.training.media_hook import MediaSampleHook, MediaSamples
from megatransformer_jax.training.writers import MultiWriter
from megatransformer_jax.types import AUDIO, IMAGE, Batch


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
    trained = trained_depth(config)
    depth = trained if config.samples.depth is None else config.samples.depth
    kinds = {"image": IMAGE, "audio": AUDIO}
    # Every process has the whole batch, as all must make the same calls.
    batches = [fetch(model.sharder, batch)]

    def first(rows: Callable[..., Iterator[Question]]) -> dict[str, list[Question]]:
        count = config.samples.num_media
        return {
            name: list(itertools.islice(rows(batches, kind, tokenizer), count))
            for name, kind in kinds.items()
        }

    asking, asked = first(rows_to_make), first(rows_to_answer)

    def sample(params: Any, step: int) -> MediaSamples | None:
        seed = (config.train.seed + step) % (MAX_SEED + 1)

        def generator(generation: GenerationConfig) -> Generator:
            return Generator(model, params, tokenizer, generation, trained)

        making = generator(GenerationConfig(seed=seed, depth=DepthConfig(depth=depth)))
        made = {
            name: list(zip(own, making.make([one.prompt for one in own]), strict=True))
            for name, own in asking.items()
            if own
        }
        # Both kinds together, so that there is one program.
        questions = [question for own in asked.values() for question in own]
        length = batches[0].tokens.shape[1]
        said = (
            answers(generator, config.model, questions, depth, row_length=length)
            if questions
            else []
        )
        if jax.process_index():
            return None
        left = iter(zip(questions, said, strict=True))
        answered = {name: list(itertools.islice(left, len(own))) for name, own in asked.items()}
        return present(made, answered, config.model.audio.mel, seed)

    return sample


Made = Sequence[tuple[Question, GeneratedMedium]]
Answered = Sequence[tuple[Question, str]]


def present(
    made: Mapping[str, Made], answered: Mapping[str, Answered], mel: MelConfig, seed: int
) -> MediaSamples:
    """Files, figures and texts of what the model made and said, by 'image' and 'audio'.

    Names: drawn_<n>, spoken_<n> for media with their prompt as a text; drawn, captioned for contact
    sheets, mels_<n> for spectrograms; captioned_<n>, transcribed_<n> for texts.
    """
    images: dict[str, np.ndarray] = {}
    clips: dict[str, np.ndarray] = {}
    texts: dict[str, str] = {}
    _present_drawings(made.get("image", ()), images, texts)
    _present_captions(answered.get("image", ()), images, texts)
    _present_speech(made.get("audio", ()), mel, seed, images, clips, texts)
    for index, (question, said) in enumerate(answered.get("audio", ())):
        texts[f"transcribed_{index}"] = _verdict(said, question.right)
    return MediaSamples(images, clips, texts, mel.sample_rate_hz if clips else None)


def _present_drawings(made: Made, images: dict[str, np.ndarray], texts: dict[str, str]) -> None:
    """The sheet has drawings above the real images of the same rows."""
    drawings, real = [], []
    for index, (question, medium) in enumerate(made):
        assert isinstance(medium, GeneratedImage)  # As the row asks for.
        images[f"drawn_{index}"] = pixels_of(medium.pixels)
        texts[f"drawn_{index}"] = question.text
        drawings.append(Tile(medium.pixels, question.text))
        real.append(Tile(question.medium, "real"))
    columns = min(MAX_COLUMNS, len(drawings))
    tiles: list[Tile] = []
    for start in range(0, len(drawings), MAX_COLUMNS):
        block = slice(start, start + columns)
        blank = [Tile(-np.ones_like(real[0].image))] * (columns - len(drawings[block]))
        tiles += [*drawings[block], *blank, *real[block], *blank]
    if tiles:
        images["drawn"] = contact_sheet(tiles, columns)


def _present_captions(
    answered: Answered, images: dict[str, np.ndarray], texts: dict[str, str]
) -> None:
    tiles = []
    for index, (question, said) in enumerate(answered):
        right = question.right
        texts[f"captioned_{index}"] = _verdict(said, right)
        tiles.append(Tile(question.medium, said if said == right else f"{said} ({right})"))
    if tiles:
        images["captioned"] = contact_sheet(tiles, min(MAX_COLUMNS, len(tiles)))


def _present_speech(
    made: Made,
    mel: MelConfig,
    seed: int,
    images: dict[str, np.ndarray],
    clips: dict[str, np.ndarray],
    texts: dict[str, str],
) -> None:
    for index, (question, medium) in enumerate(made):
        assert isinstance(medium, GeneratedClip)  # As the row asks for.
        clips[f"spoken_{index}"] = griffin_lim(medium.mel, mel, seed=seed)
        texts[f"spoken_{index}"] = question.text
        pair = [(f"made: {question.text}", medium.mel), ("real", question.medium)]
        images[f"mels_{index}"] = to_image(draw_mels(pair, mel))


def _verdict(said: str, right: str) -> str:
    return f"{said} [right]" if said == right else f"{said} [wrong: {right}]"
