"""Scores a model with images and sound at each depth, on held-out data and on what it makes."""

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from matplotlib.image import imsave
from rich.progress import Progress
from rich.table import Table

from megatransformer_jax.config.generation import GenerationConfig, MediaGenerationConfig
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.config.sampling import DepthConfig
from megatransformer_jax.config.scoring import MEDIA_OPTIONS, SOUND_OPTIONS, ScoringConfig
from megatransformer_jax.data.media.build import audio_source_name, build_audio_source
from megatransformer_jax.data.media.images import WORDS
from megatransformer_jax.data.media.rows import task_names
from megatransformer_jax.data.media_tokenizer import MediaTokenizer
from megatransformer_jax.data.mel import fill_hops, griffin_lim, normalized_mel
from megatransformer_jax.data.sources.record import BadRecord
from megatransformer_jax.evaluation.media.features import CustomFeatures
from megatransformer_jax.evaluation.media.judges import (
    DrawnReferee,
    DrawnScores,
    Recognition,
    SpokenDigitReferee,
    labelled_clips,
    labelled_images,
)
from megatransformer_jax.evaluation.media.making import answers, rows_to_answer
from megatransformer_jax.evaluation.media.sound_scores import (
    ResynthesisScores,
    TranscriptErrors,
    resynthesis_scores,
    transcript_errors,
)
from megatransformer_jax.evaluation.media.table import (
    MediaRow,
    Tile,
    contact_sheet,
    make_class_table,
    make_media_table,
    make_resynthesis_table,
    write_media_scores,
)
from megatransformer_jax.evaluation.media.validation import (
    MediaScores,
    make_media_eval_step,
    mean_media_scores,
)
from megatransformer_jax.evaluation.report import Report
from megatransformer_jax.evaluation.validation import depth_argument
from megatransformer_jax.generation.media_prompt import MediaPrompt
from megatransformer_jax.generation.request import GeneratedClip, GeneratedImage, GeneratedMedium
from megatransformer_jax.runs.load import LoadedModel
from megatransformer_jax.runs.tasks.load_medium import load_vocoder
from megatransformer_jax.types import AUDIO, Batch

DEFAULT_MEDIA_PER_CLASS = 20
DEFAULT_CLIPS = 8
# Speaking a thousand words takes longer than all else; half of them are enough for the judge.
_CLIPS_APART = 2


def evaluate_media(
    loaded: LoadedModel,
    options: ScoringConfig,
    batches: Sequence[Batch],
    depths: Sequence[int | None],
    state_key: jax.Array,
    progress: Progress,
) -> Report:
    """Losses and answers on held-out media, and how well digits are made, at each depth.

    The report writes media_scores.json, and drawn_digits.png if digits are drawn.

    Args:
      loaded: a model with media, of a run.
      options: what is made, and how.
      batches: the validation split, on the host.
      depths: iterations of the core; None: the model has none.
      state_key: of the first states of the core in validation.
      progress: shows how far it is.
    """
    run = loaded.run_config
    assert run is not None  # It says that there are media.
    subject = MediaMeasures(options, loaded, run, batches, state_key)
    resynthesis = score_resynthesis(options, loaded, run)
    rows = []
    with progress:
        bar = progress.add_task("scoring", total=len(depths) * len(subject.measures))
        for depth in depths:
            found = {}
            for name, measure in subject.measures.items():
                found[name] = measure(depth)
                progress.advance(bar)
            rows.append(MediaRow(**found))
    mean = loaded.trained_depth
    shown = next((row for row in rows if row.validation.depth == mean), rows[-1])

    def write(folder: pathlib.Path) -> list[pathlib.Path]:
        paths = [write_media_scores(folder, rows, mean, resynthesis)]
        if shown.drawn is not None:
            is_digits = shown.drawn.recognition is not None
            paths.append(folder / ("drawn_digits.png" if is_digits else "drawn.png"))
            imsave(paths[-1], subject.contact_sheet(shown.validation.depth))
        return paths

    return Report(
        [dataclasses.asdict(row) for row in rows],
        list(_tables(rows, shown, mean, resynthesis)),
        write,
    )


def _tables(
    rows: Sequence[MediaRow],
    shown: MediaRow,
    trained_depth: int | None,
    resynthesis: ResynthesisScores | None,
) -> Iterator[Table]:
    yield make_media_table(rows, trained_depth)
    at = "" if shown.validation.depth is None else f" at depth {shown.validation.depth}"
    if shown.drawn is not None and shown.drawn.recognition is not None:
        yield make_class_table(f"Drawn digits{at}", shown.drawn.recognition)
    if shown.spoken is not None:
        yield make_class_table(f"Spoken digits{at}", shown.spoken)
    if resynthesis is not None:
        yield make_resynthesis_table(resynthesis)


# ------------------------------------------------------------------------------
# What can be measured.


class MediaMeasures:
    """A model and what can be measured of it.

    Attributes:
      measures: from a depth to a score, by the name of `MediaRow`'s field.
    """

    def __init__(
        self,
        options: ScoringConfig,
        loaded: LoadedModel,
        run: RunConfig,
        batches: Sequence[Batch],
        state_key: jax.Array,
    ):
        assert isinstance(loaded.tokenizer, MediaTokenizer)  # As `load_model` makes it.
        self._loaded = loaded
        self._tokenizer: MediaTokenizer = loaded.tokenizer
        self._run = run
        self._batches = batches
        self._options = options
        self._tasks = task_names(run.data)
        self._eval_step = jax.jit(make_media_eval_step(loaded.model, state_key, len(self._tasks)))
        self._made: dict[int | None, np.ndarray] = {}
        self.measures: dict[str, Callable[[int | None], Any]] = {"validation": self._validation}
        if "transcribe" in self._tasks:
            self.measures["transcripts"] = self._transcripts
        count = options.media_per_class
        self._per_class = DEFAULT_MEDIA_PER_CLASS if count is None else count
        tasks = self._tasks if self._per_class else ()
        draws = "draw" in tasks and self._prepare_drawing(options)
        speaks = "speak" in tasks and self._prepare_speaking(options)
        if not draws:
            ignored = ("image_features",) if speaks else MEDIA_OPTIONS
            options.reject_media(
                f"{loaded.description} makes no {'images' if speaks else 'media'} that could be "
                "judged",
                ignored,
            )

    def _prepare_drawing(self, options: ScoringConfig) -> bool:
        source, image = self._run.data.media.images.source, self._loaded.config.image
        name = options.image_features
        extract = None if name is None else CustomFeatures(name)
        if source != "digits" and extract is None:
            logging.info(
                "images of the source %r have no judge, so none are drawn; image_features scores "
                "them.",
                source,
            )
            return False
        training = labelled_images(self._run.data, image, "train")
        held_out = labelled_images(self._run.data, image, "validation")
        self._drawn_referee = DrawnReferee(training, held_out, extract)
        self._drawn_labels: np.ndarray | None = None
        if training.labels is None:
            turns = itertools.cycle(prompts[0] for prompts in held_out.prompts.values())
            self._draw_prompts = list(itertools.islice(turns, len(WORDS) * self._per_class))
        else:
            self._drawn_labels, self._draw_prompts = _prompts(training.prompts, self._per_class)
        self.measures["drawn"] = self._drawn
        return True

    def _prepare_speaking(self, options: ScoringConfig) -> bool:
        source, audio = audio_source_name(self._run.data), self._loaded.config.audio
        if source != "spoken_digits":
            logging.info("clips of the source %r have no judge, so none are made.", source)
            return False
        training = labelled_clips(self._run.data, audio.mel, "train", every=_CLIPS_APART)
        held_out = labelled_clips(self._run.data, audio.mel, "validation")
        self._spoken_referee = SpokenDigitReferee(training, held_out)
        self._spoken_labels, self._speak_prompts = _prompts(
            {digit: (word,) for digit, word in enumerate(WORDS)}, self._per_class
        )
        self.measures["spoken"] = self._spoken
        return True

    def contact_sheet(self, depth: int | None) -> np.ndarray:
        """What was drawn at a depth, one row per prompt's turn."""
        images = self._made[depth]
        tiles = [Tile(*pair) for pair in zip(images, self._draw_prompts, strict=True)]
        classes = WORDS if self._drawn_labels is None else np.unique(self._drawn_labels)
        return contact_sheet(tiles, columns=len(classes))

    def _validation(self, depth: int | None) -> MediaScores:
        num_steps, device = depth_argument(depth), jax.local_devices()[0]
        sums = [
            jax.device_get(
                self._eval_step(self._loaded.weights, jax.device_put(batch, device), num_steps)
            )
            for batch in self._batches
        ]
        return mean_media_scores(depth, sums, self._tasks)

    def _transcripts(self, depth: int | None) -> TranscriptErrors | None:
        task = self._tasks.index("transcribe")
        questions = list(rows_to_answer(self._batches, AUDIO, self._tokenizer, task))
        if not questions:
            return None
        batch_size, row_length = self._batches[0].tokens.shape
        found = answers(
            self._loaded.generator,
            self._loaded.config,
            questions,
            depth,
            row_length=row_length,
            batch_size=batch_size,
        )
        return transcript_errors(found, [question.right for question in questions])

    def _drawn(self, depth: int | None) -> DrawnScores:
        made = self._make(self._draw_prompts, "<|IMAGE|>", depth)
        images = np.stack([one.pixels for one in made if isinstance(one, GeneratedImage)])
        self._made[depth] = images
        return self._drawn_referee.score(images, self._drawn_labels)

    def _spoken(self, depth: int | None) -> Recognition:
        made = self._make(self._speak_prompts, "<|VOICE|>", depth)
        own = [one.mel for one in made if isinstance(one, GeneratedClip)]
        audio = self._loaded.config.audio
        mels = np.zeros((len(own), audio.max_frames, audio.mel.num_mels), np.float32)
        for row, mel in enumerate(own):
            mels[row, : len(mel)] = mel
        return self._spoken_referee.score(mels, np.array(list(map(len, own))), self._spoken_labels)

    def _make(self, prompts: Sequence[str], opens: str, depth: int | None) -> list[GeneratedMedium]:
        options, seed = self._options, self._options.seed
        config = GenerationConfig(
            seed=self._run.train.seed if seed is None else seed,
            batch_size=min(len(prompts), len(self._batches[0].tokens)),
            depth=DepthConfig(depth=depth),
            media=MediaGenerationConfig(
                guidance_scale=options.guidance_scale, sampler_steps=options.sampler_steps
            ),
        )
        given = [MediaPrompt((prompt,), opens) for prompt in prompts]
        return self._loaded.generator(config).make(given)


def _prompts(of_class: dict[int, tuple[str, ...]], per_class: int) -> tuple[np.ndarray, list[str]]:
    """Labels and prompts in turns of all classes; the prompts of a class take turns too."""
    pairs = [
        (label, texts[turn % len(texts)])
        for turn in range(per_class)
        for label, texts in sorted(of_class.items())
    ]
    labels, prompts = zip(*pairs, strict=True)
    return np.array(labels), list(prompts)


# ------------------------------------------------------------------------------
# Held-out clips made again from their spectrograms, and compared with themselves.


def score_resynthesis(
    options: ScoringConfig, loaded: LoadedModel, run: RunConfig
) -> ResynthesisScores | None:
    """Scores of the first held-out clips; None if the run has no sound, or none are asked for.

    Raises:
      UserError: if the vocoder cannot be used, an option would be ignored, or a library is missing.
    """
    if not run.data.media.has_audio:
        options.reject_media(f"{loaded.description} has no sound", SOUND_OPTIONS)
        return None
    count = options.resynthesized_clips
    count = DEFAULT_CLIPS if count is None else count
    if not count:
        options.reject_media("no clips are made again", ("vocoder",))
        return None
    mel = loaded.config.audio.mel
    source = build_audio_source(run.data, mel, "validation")
    records = (source[number] for number in range(min(count, len(source))))
    waveforms = [
        fill_hops(record.waveform, mel) for record in records if not isinstance(record, BadRecord)
    ]
    mels = [normalized_mel(waveform, mel) for waveform in waveforms]
    if options.vocoder is None:
        method, made = "Griffin-Lim", [griffin_lim(one, mel) for one in mels]
    else:
        method, vocoder = f"the vocoder {options.vocoder}", load_vocoder(options.vocoder, mel)
        made = [vocoder(one[None], np.array([len(one)]))[0] for one in mels]
    return resynthesis_scores(waveforms, made, mel.sample_rate_hz, method)
