"""Data with images and sound: tasks, sources, slots, and augmentation."""

import dataclasses
import math
from typing import Any

from megatransformer_jax.config.media_tasks import (
    AUDIO_TASKS,
    FILLS_ROW,
    IMAGE_TASKS,
    ROW_TASKS,
)
from megatransformer_jax.config.option import (
    ConfigError,
    check_options,
    option,
    require_defaults,
    rule,
    section,
)
from megatransformer_jax.storage import check_served

# ------------------------------------------------------------------------------
# Random changes of training images and clips.


@dataclasses.dataclass(frozen=True)
class ImageAugmentationConfig:
    """Changes of the images of the training split, redrawn for each row from data.seed.

    Images that the model reads are changed. Validation sees them as they are.
    """

    flip_rate: float = option(
        0.0, "Probability that an image is mirrored, left to right.", minimum=0, maximum=1
    )
    max_shift: float = option(
        0.0,
        "Largest shift along each side, as a share of that side; the edge is continued.",
        minimum=0,
        maximum=0.5,
    )
    max_rotation_deg: float = option(
        0.0, "Largest rotation either way, in degrees.", minimum=0, maximum=180
    )
    max_zoom: float = option(
        0.0, "Largest relative change of size: 0.1 is 1/1.1 to 1.1.", minimum=0, maximum=1
    )
    min_crop: float = option(
        1.0,
        "Smallest share of each side that a random crop keeps, which then fills the image. 1: off.",
        above=0,
        maximum=1,
    )
    max_brightness: float = option(
        0.0, "Largest change of all pixels, which are in [-1, 1].", minimum=0, maximum=1
    )
    max_contrast: float = option(
        0.0, "Largest relative change of the distance from the mean.", minimum=0, below=1
    )
    max_saturation: float = option(
        0.0, "Largest relative change of the distance from grey (RGB only).", minimum=0, maximum=1
    )
    targets: bool = option(
        False, "Also augments the images that the model learns to draw. It then draws such images."
    )

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def changes_images(self) -> bool:
        """Whether any image changes."""
        return any(
            getattr(self, field.name) != field.default
            for field in dataclasses.fields(self)
            if field.name != "targets"
        )

    @rule("targets")
    def _targets_need_changes(self) -> None:
        """True only with another option that changes images."""
        if self.targets and not self.changes_images:
            raise ConfigError(
                "targets",
                "True would be ignored, because no image is changed; set another option of this "
                "section, or leave it False.",
            )


@dataclasses.dataclass(frozen=True)
class AudioAugmentationConfig:
    """Changes of the clips that the model transcribes in training, redrawn for each row.

    Clips that the model learns to make, and those of validation, stay as they are.
    """

    max_speed: float = option(
        0.0,
        "Largest relative change of speed, and of pitch with it: 0.1 is 1/1.1 to 1.1. A clip is "
        "never slowed beyond model.audio.max_frames.",
        minimum=0,
        maximum=1,
    )
    max_gain_db: float = option(
        0.0, "Largest change of loudness either way, in dB; clipped at full scale.", minimum=0
    )
    noise_rate: float = option(0.0, "Probability that white noise is added.", minimum=0, maximum=1)
    min_snr_db: float = option(10.0, "Loudest noise: signal to noise ratio, in dB.")
    max_snr_db: float = option(30.0, "Softest noise: signal to noise ratio, in dB.")
    time_masks: int = option(
        0, "SpecAugment (arXiv 1904.08779): stretches of frames set to the mean.", minimum=0
    )
    max_time_mask: float = option(
        0.1, "Longest stretch, as a share of the clip.", above=0, maximum=1
    )
    frequency_masks: int = option(0, "SpecAugment: bands of mel bins set to the mean.", minimum=0)
    max_frequency_mask: int = option(10, "Widest band, in mel bins.", minimum=1)

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def changes_waveforms(self) -> bool:
        """Whether waveforms change before their spectrograms are made."""
        return bool(self.max_speed or self.max_gain_db or self.noise_rate)

    @property
    def changes_clips(self) -> bool:
        """Whether any clip changes."""
        return self.changes_waveforms or bool(self.time_masks or self.frequency_masks)

    @rule("min_snr_db", "max_snr_db")
    def _noise_range_is_one(self) -> None:
        """min_snr_db at most max_snr_db; both keep their defaults with noise_rate=0."""
        if self.min_snr_db > self.max_snr_db:
            raise ConfigError(
                "min_snr_db",
                f"{self.min_snr_db} exceeds max_snr_db={self.max_snr_db}; lower it.",
            )
        self._only_with("noise_rate", "min_snr_db", "max_snr_db")

    @rule("max_time_mask", "max_frequency_mask")
    def _widths_need_masks(self) -> None:
        """Keep the default without time_masks or frequency_masks."""
        self._only_with("time_masks", "max_time_mask")
        self._only_with("frequency_masks", "max_frequency_mask")

    def _only_with(self, switch: str, *names: str) -> None:
        for name in names:
            value, default = getattr(self, name), self.__dataclass_fields__[name].default
            if not getattr(self, switch) and value != default:
                raise ConfigError(
                    name,
                    f"{value!r} would be ignored with {switch}=0; set {switch}, or leave it at "
                    f"{default!r}.",
                )


# ------------------------------------------------------------------------------
# Tasks, sources and slots.

ESPEAK_SOURCES = ("spoken_digits", "speech")
TFDS_OPTIONS = ("tfds_name", "tfds_split", "tfds_validation_split", "tfds_data_dir")


def wrong_size_option() -> Any:
    """What becomes of images that do not have the model's size."""
    return option(
        "error",
        "An image of another size or number of channels than the model's: error; resize: made to "
        "fit, its middle kept, which is counted and logged.",
        choices=("error", "resize"),
    )


@dataclasses.dataclass(frozen=True)
class ImageSourceConfig:
    """Where images and their captions come from."""

    source: str = option(
        "digits",
        "digits: scikit-learn's 1797 handwritten digits, 8x8, grey. photographs: crops of its two "
        "photographs. image_folder: your own files. tfds: a prepared TFDS data set.",
        choices=("digits", "photographs", "image_folder", "tfds"),
    )
    folder: str | None = option(
        None,
        "image_folder: a folder with captions.jsonl, lines of "
        '{"image": file, "caption": text}, or with images each next to a .txt of its name.',
    )
    tfds_name: str | None = option(None, "TFDS name, for example 'coco_captions'.")
    tfds_split: str = option("train", "TFDS split to train on.")
    tfds_validation_split: str | None = option(
        None, "TFDS split to validate on. Default (None): data.validation_fraction is held out."
    )
    tfds_data_dir: str | None = option(
        None, "Where TFDS finds prepared sets. Default (None): its default."
    )
    image_field: str = option("image", "tfds: feature with the image.")
    caption_field: str = option(
        "captions/text", "tfds: feature with the caption or captions; / goes into nested features."
    )
    caption_style: str = option(
        "varied",
        "digits: what a drawing is asked for with. simple: 'three'. varied: also 'a handwritten "
        "three', 'the number 3' and the like. The caption to predict is always the simple one.",
        choices=("simple", "varied"),
    )
    num_crops: int = option(2000, "photographs: number of crops, each a record.", minimum=2)
    on_wrong_size: str = wrong_size_option()

    def __post_init__(self) -> None:
        check_options(self)

    @rule("folder")
    def _folder_goes_with_its_source(self) -> None:
        """Given with source='image_folder', and only then."""
        check_folder(self, "image_folder")

    @rule(*TFDS_OPTIONS, "image_field", "caption_field")
    def _tfds_options_need_tfds(self) -> None:
        """Only with source='tfds', which needs tfds_name."""
        check_tfds(self, ("image_field", "caption_field"))

    @rule("caption_style", "num_crops")
    def _own_options_need_their_source(self) -> None:
        """Keep the default unless the source uses it (digits or photographs)."""
        check_only_for(self, ("digits",), "caption_style")
        check_only_for(self, ("photographs",), "num_crops")


@dataclasses.dataclass(frozen=True)
class ImageDataConfig(ImageSourceConfig):
    """Where images and their captions come from."""

    augmentation: ImageAugmentationConfig = section(
        ImageAugmentationConfig, "Changes of training images."
    )


@dataclasses.dataclass(frozen=True)
class AudioSourceConfig:
    """Where clips and their transcripts come from."""

    source: str = option(
        "auto",
        "spoken_digits: words zero to nine by espeak-ng. speech: sentences of the embedded text "
        "by espeak-ng. tones: tones, chirps and chords with captions, generated. audio_folder: "
        "your own files. tfds: a prepared TFDS data set. auto: spoken_digits where espeak-ng "
        "is installed, otherwise tones; the log says which.",
        choices=("auto", "spoken_digits", "speech", "tones", "audio_folder", "tfds"),
    )
    folder: str | None = option(
        None,
        "audio_folder: a folder with transcripts.jsonl, lines of "
        '{"audio": file, "transcript": text}, or with WAV or FLAC files each next to a .txt of '
        "its name.",
    )
    tfds_name: str | None = option(None, "TFDS name, for example 'librispeech'.")
    tfds_split: str = option("train", "TFDS split to train on.")
    tfds_validation_split: str | None = option(
        None, "TFDS split to validate on. Default (None): data.validation_fraction is held out."
    )
    tfds_data_dir: str | None = option(
        None, "Where TFDS finds prepared sets. Default (None): its default."
    )
    audio_field: str = option("speech", "tfds: feature with the samples.")
    transcript_field: str = option("text", "tfds: feature with the transcript or caption.")
    tfds_sample_rate_hz: int | None = option(
        None, "tfds: samples per second, for a set that does not say it itself.", minimum=1
    )
    is_voice: bool = option(
        True, "audio_folder, tfds: clips stand between <|VOICE|> tokens; False: <|AUDIO|>."
    )
    voices: tuple[str, ...] = option(
        (
            "en",
            "en+f2",
            "en+m3",
            "en-us",
            "en-us+f3",
            "en-us+m1",
            "en-gb-scotland",
            "en-gb-scotland+f1",
        ),
        "espeak-ng: voices that speak, with +f1 and the like for variants.",
    )
    rates_wpm: tuple[int, ...] = option(
        (130, 150, 170, 190), "espeak-ng: speeds, in words per minute.", minimum=80, maximum=450
    )
    pitches: tuple[int, ...] = option(
        (35, 50, 65), "espeak-ng: pitches, 50 is the voice's own.", minimum=0, maximum=99
    )
    max_words: int = option(
        8, "speech: most words of a sentence; longer ones are cut up.", minimum=1
    )
    num_tones: int = option(2000, "tones: number of clips, each a record.", minimum=2)
    cache_dir: str | None = option(
        None, "espeak-ng: folder that keeps what has been spoken. Default (None): only in memory."
    )
    on_wrong_audio: str = option(
        "error",
        "audio_folder, tfds: a clip that is not mono or has another rate than the model's: error; "
        "convert: mixed to mono and resampled, which is counted and logged.",
        choices=("error", "convert"),
    )

    def __post_init__(self) -> None:
        check_options(self)

    @rule("folder")
    def _folder_goes_with_its_source(self) -> None:
        """Given with source='audio_folder', and only then."""
        check_folder(self, "audio_folder")

    @rule(*TFDS_OPTIONS, "audio_field", "transcript_field", "tfds_sample_rate_hz")
    def _tfds_options_need_tfds(self) -> None:
        """Only with source='tfds', which needs tfds_name."""
        check_tfds(self, ("audio_field", "transcript_field", "tfds_sample_rate_hz"))

    @rule("voices", "rates_wpm", "pitches")
    def _voices_are_named(self) -> None:
        """No item is empty."""
        for name in ("voices", "rates_wpm", "pitches"):
            if not getattr(self, name):
                raise ConfigError(name, "() leaves nothing to choose from; give at least one.")

    @rule("voices", "rates_wpm", "pitches", "cache_dir", "max_words", "num_tones")
    def _own_options_need_their_source(self) -> None:
        """Keep the default with sources that do not use it."""
        speaking = ("auto", *ESPEAK_SOURCES)
        check_only_for(self, speaking, "voices", "rates_wpm", "pitches", "cache_dir")
        check_only_for(self, ("speech",), "max_words")
        check_only_for(self, ("auto", "tones"), "num_tones")
        if self.cache_dir is not None:
            check_served("cache_dir", self.cache_dir, ())

    @rule("is_voice", "on_wrong_audio")
    def _clips_of_others_are_described(self) -> None:
        """Keep the default unless source is audio_folder or tfds."""
        check_only_for(self, ("audio_folder", "tfds"), "is_voice", "on_wrong_audio")


@dataclasses.dataclass(frozen=True)
class AudioDataConfig(AudioSourceConfig):
    """Where clips and their transcripts come from."""

    augmentation: AudioAugmentationConfig = section(
        AudioAugmentationConfig, "Changes of training clips."
    )


@dataclasses.dataclass(frozen=True)
class DocumentsDataConfig:
    """Where documents that mix text with several images and clips come from."""

    folder: str | None = option(
        None,
        "A folder with documents.jsonl. Each line is a list of parts in their order: a text to "
        'learn; {"given": text} for a text that is only read; {"image": file}, {"voice": file} '
        'for speech, {"audio": file} for other sound. With "target": true next to a file the '
        "model learns to make the medium.",
    )
    on_wrong_size: str = wrong_size_option()
    on_wrong_audio: str = option(
        "error",
        "A clip that is not mono or has another rate than the model's: error; convert: mixed to "
        "mono and resampled, which is counted and logged.",
        choices=("error", "convert"),
    )

    def __post_init__(self) -> None:
        check_options(self)

    @rule("folder")
    def _folder_is_here(self) -> None:
        """Of this machine; a bucket must be mounted."""
        if self.folder is not None:
            check_served("folder", self.folder, ())


@dataclasses.dataclass(frozen=True)
class MediaDataConfig:
    """Rows of text with images and sound; used when data.source is 'media'. One sample per row."""

    tasks: tuple[str, ...] = option(
        ("draw=1", "caption=1"),
        "What a row may be, as name=weight; each batch has of each task its share, rounded up or "
        "down. draw: caption, then an image to draw. caption: an "
        "image, then its caption. which: numbered images, the question which one a caption fits, "
        "then its number. fewshot: images, each with its caption behind it. speak: transcript, "
        "then a clip "
        "to make. transcribe: a clip, then its transcript. which_clip: as which, with clips. "
        "read_aloud: an image, then a clip to make that says its caption. documents: text, "
        "images and clips of data.media.documents. text: embedded English text.",
    )
    images_per_row: int = option(
        1,
        "Number of image slots in each row (I). which and fewshot fill all of them, documents as "
        "many as they have images.",
        minimum=1,
    )
    audio_per_row: int = option(
        1,
        "Number of clip slots in each row (A). which_clip fills all of them, documents as many as "
        "they have clips.",
        minimum=1,
    )
    images: ImageDataConfig = section(ImageDataConfig, "Source of images.")
    audio: AudioDataConfig = section(AudioDataConfig, "Source of sound.")
    documents: DocumentsDataConfig = section(DocumentsDataConfig, "Source of documents.")

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def task_weights(self) -> dict[str, float]:
        """Weight of each task that has one above 0, in the order of `tasks`."""
        pairs = (item.partition("=") for item in self.tasks)
        return {name: float(weight) for name, _, weight in pairs if float(weight)}

    def most_rows(self, task: str, batch_size: int) -> int:
        """Most rows of a task that a batch has: its share of them, rounded up."""
        weights = self.task_weights
        share = weights.get(task, 0.0) / sum(weights.values())
        return math.ceil(round(batch_size * share, 6))

    def most_drawn(self, batch_size: int) -> int:
        """Most images of a batch that the model learns to draw."""
        return self._most("drawn", self.images_per_row, batch_size)

    def most_spoken(self, batch_size: int) -> int:
        """Most clips of a batch that the model learns to make."""
        return self._most("spoken", self.audio_per_row, batch_size)

    def _most(self, kind: str, slots: int, batch_size: int) -> int:
        counts = {name: getattr(ROW_TASKS[name], kind) for name in self.task_weights}
        return sum(
            self.most_rows(name, batch_size) * (slots if count == FILLS_ROW else count)
            for name, count in counts.items()
        )

    @property
    def has_images(self) -> bool:
        """Whether a task uses the source of images."""
        return any(name in self.task_weights for name in IMAGE_TASKS)

    @property
    def has_audio(self) -> bool:
        """Whether a task uses the source of sound."""
        return any(name in self.task_weights for name in AUDIO_TASKS)

    @property
    def has_documents(self) -> bool:
        """Whether rows may be documents, which may have media of both kinds."""
        return "documents" in self.task_weights

    @property
    def fills_slots(self) -> bool:
        """Whether every row has a medium in each of its slots, by the tasks; bad records aside."""
        tasks = [ROW_TASKS[name] for name in self.task_weights]

        def are_filled(kind: str, slots: int) -> bool:
            counts = {getattr(task, kind) for task in tasks}
            return counts <= {FILLS_ROW, slots} or counts == {0}

        return (
            (self.has_images or self.has_audio)
            and not self.has_documents
            and are_filled("images", self.images_per_row)
            and are_filled("clips", self.audio_per_row)
        )

    @rule("tasks")
    def _tasks_have_names_and_weights(self) -> None:
        """Each name=weight, each name once, no weight below 0, one above."""
        names = [_task_of(item) for item in self.tasks]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError("tasks", f"names {name!r} twice; keep one of them.")
        if not self.task_weights:
            raise ConfigError(
                "tasks", f"{self.tasks!r} has no weight above 0; give for example 'draw=1'."
            )

    @rule("images", "audio", "images_per_row", "audio_per_row")
    def _sources_need_tasks(self) -> None:
        """Keep the default unless a task uses images or sound."""
        for name, is_used, tasks in (
            ("images", self.has_images, IMAGE_TASKS),
            ("audio", self.has_audio, AUDIO_TASKS),
        ):
            options = (name,) if self.has_documents else (name, f"{name}_per_row")
            but = " but 'documents', which has its own" if self.has_documents else ""
            if not is_used:
                require_defaults(
                    self,
                    options,
                    f"because no task uses {name}{but}",
                    f"add {' or '.join(map(repr, tasks))} to tasks",
                )

    @rule("images_per_row", "audio_per_row")
    def _slots_have_tasks_that_fill_them(self) -> None:
        """Above 1 only with a task that takes several: images which, fewshot or documents; clips
        which_clip or documents. which, fewshot and which_clip need it."""
        for name, kind in (("images_per_row", "images"), ("audio_per_row", "clips")):
            slots = getattr(self, name)
            filling = [task for task, row in ROW_TASKS.items() if getattr(row, kind) == FILLS_ROW]
            used = [task for task in filling if task in self.task_weights]
            if slots > 1 and not used:
                raise ConfigError(
                    name,
                    f"{slots}, but the rows of {', '.join(self.task_weights)} have one place each; "
                    f"set it to 1, or add {' or '.join(map(repr, filling))} to tasks.",
                )
            several = [task for task in used if task != "documents"]
            if slots == 1 and several:
                raise ConfigError(
                    name, f"1, but {several[0]!r} needs at least 2; raise it, or leave that out."
                )

    @rule("documents")
    def _documents_have_a_folder(self) -> None:
        """A folder with the task documents, and the defaults without."""
        if not self.has_documents:
            require_defaults(
                self,
                ("documents",),
                "because no task uses documents",
                "add 'documents' to tasks",
            )
        elif self.documents.folder is None:
            raise ConfigError(
                "documents.folder", "is None, but the task 'documents' reads a folder; name one."
            )


def _task_of(item: str) -> str:
    name, _, weight = item.partition("=")
    if name not in ROW_TASKS:
        raise ConfigError("tasks", f"{item!r} names no task; the tasks are {', '.join(ROW_TASKS)}.")
    try:
        is_weight = 0 <= float(weight) < float("inf")
    except ValueError:
        is_weight = False
    if not is_weight:
        raise ConfigError(
            "tasks", f"{item!r} has no weight of 0 or more; write for example '{name}=1'."
        )
    return name


def check_folder(config: ImageSourceConfig | AudioSourceConfig, source: str) -> None:
    """Raises:
    ConfigError: if the folder is missing or would be ignored.
    """
    if config.source == source and config.folder is None:
        raise ConfigError("folder", f"is None, but source={source!r} reads a folder; name one.")
    if config.folder is not None:
        check_served("folder", config.folder, ())
    check_only_for(config, (source,), "folder")


def check_tfds(config: ImageSourceConfig | AudioSourceConfig, names: tuple[str, ...]) -> None:
    """Raises:
    ConfigError: if the name of the set is missing, or an option would be ignored.
    """
    if config.tfds_data_dir is not None:
        check_served("tfds_data_dir", config.tfds_data_dir, ())
    if config.source == "tfds" and config.tfds_name is None:
        raise ConfigError(
            "tfds_name", "is None, but source='tfds' needs a data set; give its name."
        )
    check_only_for(config, ("tfds",), *TFDS_OPTIONS, *names)


def check_only_for(
    config: ImageSourceConfig | AudioSourceConfig, sources: tuple[str, ...], *names: str
) -> None:
    """Raises:
    ConfigError: if an option is set that `config.source` ignores.
    """
    if config.source not in sources:
        require_defaults(
            config,
            names,
            f"with source={config.source!r}",
            f"set source to {' or '.join(map(repr, sources))}",
        )
