"""The data of a run: sources, tokenizer, packing, pipeline and augmentation of the text."""

import dataclasses

from megatransformer_jax.config.media_data import (
    AUDIO_TASKS,
    AudioSourceConfig,
    ImageSourceConfig,
    MediaDataConfig,
)
from megatransformer_jax.config.option import (
    MAX_SEED,
    ConfigError,
    check_options,
    option,
    require_defaults,
    require_function_name,
    rule,
    section,
)
from megatransformer_jax.storage import BUCKETS, check_served

# ------------------------------------------------------------------------------
# Random changes of the training texts.


@dataclasses.dataclass(frozen=True)
class AugmentationConfig:
    """Changes of the documents of the training split, redrawn each epoch from data.seed.

    Validation and the training of a tokenizer see the documents as they are.
    """

    token_dropout: float = option(
        0.0,
        "Probability that an input token is replaced by the padding token. It is still a target. "
        "0: off.",
        minimum=0,
        below=1,
    )
    synonyms_file: str | None = option(
        None, "UTF-8 file of lines 'word<TAB>synonym,synonym'. Goes with synonym_rate."
    )
    synonym_rate: float = option(
        0.0,
        "Probability that a word listed in synonyms_file is replaced by one of its synonyms.",
        minimum=0,
        maximum=1,
    )
    back_translation: str | None = option(
        None,
        "A function 'package.module:name' of your own from (text, seed) to another text that says "
        "the same; no translation model is built in. "
        "Goes with back_translation_rate.",
    )
    back_translation_rate: float = option(
        0.0, "Share of documents that are passed to the function.", minimum=0, maximum=1
    )

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def changes_text(self) -> bool:
        """Whether documents change before they are tokenised."""
        return self.synonyms_file is not None or self.back_translation is not None

    @rule("synonyms_file", "synonym_rate")
    def _synonyms_need_file_and_rate(self) -> None:
        """Both given, or neither."""
        self._both("synonyms_file", "synonym_rate")

    @rule("back_translation", "back_translation_rate")
    def _back_translation_needs_function_and_rate(self) -> None:
        """Both given, or neither."""
        self._both("back_translation", "back_translation_rate")

    @rule("back_translation")
    def _function_has_module_and_name(self) -> None:
        """Written 'package.module:name'."""
        require_function_name(self, "back_translation")

    def _both(self, what: str, rate: str) -> None:
        given = getattr(self, what) is not None
        if given != (getattr(self, rate) > 0):
            fix = f"set {rate} above 0" if given else f"give {what}"
            raise ConfigError(
                rate,
                f"{getattr(self, rate)!r} does not go with {what}={getattr(self, what)!r}; {fix}, "
                "or leave both out.",
            )


# ------------------------------------------------------------------------------
# Sources, tokenizer and pipeline.

# Options of augmentation that change texts before they are tokenised.
TEXT_CHANGES = ("synonyms_file", "synonym_rate", "back_translation", "back_translation_rate")

FILE_SOURCES = ("text", "jsonl", "parquet", "arrayrecord")
# Those whose files may be in a bucket. The reader of ArrayRecord knows files of this machine alone.
BUCKET_SOURCES = ("text", "jsonl", "parquet")
_COPY = (
    f"only {', '.join(BUCKET_SOURCES)} are read from buckets. Copy the files to this machine, or "
    "mount the bucket (gcsfuse, s3fs-fuse), and name them here"
)
SOURCES = ("embedded_text", *FILE_SOURCES, "tfds", "tokens", "reasoning", "media")
# Special tokens and 256 bytes take 260.
MIN_TRAINED_PIECES = 300
# The tasks whose problems are about a set of things.
TASKS_OF_SYMBOLS = ("hop", "pointers", "permutation")
# Largest lengths of tasks whose rows have the same cells at every length.
PUZZLE_LENGTHS = {"sudoku": 24, "maze": 20}
REASONING_TASKS = ("parity", "addition", "hop", "pointers", "permutation", "mano", *PUZZLE_LENGTHS)


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Turns text into token ids. Reasoning tasks bring their own vocabulary, so with them the
    section must stay at its defaults."""

    kind: str = option(
        "sentencepiece",
        "sentencepiece: trained on the training split at the start of a run, or loaded. "
        "bytes: the 256 byte values after the special tokens.",
        choices=("sentencepiece", "bytes"),
    )
    vocab_size: int | None = option(
        None,
        "Pieces of a tokenizer that the run trains (sentencepiece only). Default (None): "
        "model.vocab_size.",
        minimum=MIN_TRAINED_PIECES,
    )
    model_type: str = option(
        "bpe", "SentencePiece algorithm used for training.", choices=("bpe", "unigram")
    )
    model_file: str | None = option(
        None, "A SentencePiece .model file to load instead of training one."
    )
    character_coverage: float = option(
        0.9995,
        "Share of characters that get their own piece; the rest fall back to bytes.",
        above=0,
        maximum=1,
    )
    max_training_bytes: int = option(
        50_000_000, "Text used to train the tokenizer, taken from the start.", minimum=1
    )

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def is_trained(self) -> bool:
        """Whether the run trains a tokenizer itself."""
        return self.kind == "sentencepiece" and self.model_file is None

    def with_vocab_size(self, model_vocab_size: int) -> "TokenizerConfig":
        """The same with vocab_size=None replaced by the model's, if a tokenizer is trained."""
        if self.is_trained and self.vocab_size is None:
            return dataclasses.replace(self, vocab_size=model_vocab_size)
        return self

    @rule("vocab_size", "model_type", "character_coverage", "max_training_bytes")
    def _training_options_need_training(self) -> None:
        """Only for a tokenizer that the run trains: kind='sentencepiece', model_file=None."""
        if not self.is_trained:
            require_defaults(
                self,
                ("vocab_size", "model_type", "character_coverage", "max_training_bytes"),
                "because the run trains no tokenizer",
                "set kind='sentencepiece' and model_file=None",
            )

    @rule("model_file")
    def _model_file_needs_sentencepiece(self) -> None:
        """Only with kind='sentencepiece'."""
        if self.kind != "sentencepiece":
            require_defaults(
                self, ("model_file",), f"with kind={self.kind!r}", "set kind='sentencepiece'"
            )


@dataclasses.dataclass(frozen=True)
class ReasoningConfig:
    """Generated problems from easy to hard; used when data.source is 'reasoning'."""

    task: str = option(
        "parity",
        "parity: prefix sums modulo 2. addition: multi-digit sums. hop: k-fold function "
        "composition (p-hop). pointers: the place after each hop along a cycle. permutation: "
        "running product in the symmetric group. mano: modular arithmetic in prefix notation. "
        "sudoku, maze: puzzles of 6 x 6 and 9 x 9 cells, which need "
        "model.attention.is_causal=False.",
        choices=REASONING_TASKS,
    )
    min_length: int = option(
        1,
        "Shortest training problem: bits, digits, hops, factors, operations, blank cells, or rooms "
        "to pass.",
        minimum=1,
    )
    max_length: int = option(16, "Longest training problem.", minimum=1)
    eval_min_length: int = option(
        17, "Shortest held-out problem; longer than max_length tests extrapolation.", minimum=1
    )
    eval_max_length: int = option(32, "Longest held-out problem.", minimum=1)
    num_train: int = option(
        1_000_000, "Training problems; each is a function of (seed, index).", minimum=1
    )
    num_eval: int = option(512, "Held-out problems, drawn from a separate seed.", minimum=1)
    num_symbols: int = option(
        5,
        "permutation: degree of the group (5 is S5). hop, pointers: size of the set.",
        minimum=2,
        maximum=16,
    )
    modulus: int = option(
        23, "mano: residues are 0 to modulus - 1, each one token.", minimum=2, maximum=36
    )

    def __post_init__(self) -> None:
        check_options(self)

    @rule("min_length", "eval_min_length")
    def _shortest_is_not_longer_than_longest(self) -> None:
        """At most max_length, eval_max_length."""
        for low, high in (("min_length", "max_length"), ("eval_min_length", "eval_max_length")):
            if getattr(self, low) > getattr(self, high):
                raise ConfigError(
                    low, f"{getattr(self, low)} exceeds {high}={getattr(self, high)}; lower it."
                )

    @rule("max_length", "eval_max_length")
    def _puzzles_have_a_largest_length(self) -> None:
        """At most 24 for sudoku, 20 for maze."""
        largest = PUZZLE_LENGTHS.get(self.task)
        if largest is None:
            return
        for name in ("max_length", "eval_max_length"):
            if getattr(self, name) > largest:
                raise ConfigError(
                    name,
                    f"{getattr(self, name)} is more than puzzles of task={self.task!r} allow; use "
                    f"at most {largest}.",
                )

    @rule("num_symbols")
    def _number_of_symbols_goes_with_task(self) -> None:
        """At most 5 for permutation (the vocabulary has num_symbols! elements); 5 for parity,
        addition, mano, sudoku and maze, which have none."""
        if self.task == "permutation" and self.num_symbols > 5:
            raise ConfigError(
                "num_symbols",
                f"{self.num_symbols} gives a vocabulary of {self.num_symbols}! elements; "
                "task='permutation' allows at most 5.",
            )
        if self.task not in TASKS_OF_SYMBOLS and self.num_symbols != 5:
            raise ConfigError(
                "num_symbols",
                f"{self.num_symbols} would be ignored by task={self.task!r}; leave it at 5.",
            )

    @rule("modulus")
    def _modulus_is_for_mano(self) -> None:
        """Keep the default unless task='mano'."""
        if self.task != "mano" and self.modulus != 23:
            raise ConfigError(
                "modulus", f"{self.modulus} would be ignored by task={self.task!r}; leave it at 23."
            )


@dataclasses.dataclass(frozen=True)
class LoaderConfig:
    """How batches are made, whatever is in them. Everything random in it follows from `seed`."""

    validation_fraction: float = option(
        0.05, "Share of records held out when there is no validation source.", above=0, below=1
    )
    on_bad_record: str = option(
        "error",
        "A record that cannot be used (corrupt line, missing field, not text): error names it; "
        "skip counts it and shows the count and the first one.",
        choices=("error", "skip"),
    )
    batch_size: int = option(8, "Sequences per optimiser step over all processes (B).", minimum=1)
    shuffle: bool = option(True, "Visits training records in a new random order each epoch.")
    seed: int = option(
        0, "Seed of order, splits and generated problems.", minimum=0, maximum=MAX_SEED
    )
    num_workers: int = option(
        0, "Worker processes that read and tokenise; 0: in the training process.", minimum=0
    )
    prefetch_batches: int = option(2, "Batches made ahead of the step that uses them.", minimum=0)

    def __post_init__(self) -> None:
        check_options(self)


@dataclasses.dataclass(frozen=True)
class DataConfig(LoaderConfig):
    """Where batches come from. Everything random in it follows from `seed`."""

    source: str = option(
        "embedded_text",
        "embedded_text: the documents of pydoc_data.topics, in every CPython. text, jsonl, "
        "parquet, arrayrecord: files. tfds: a prepared TFDS data set. tokens: rows that "
        "`megatransformer prepare` has written. reasoning: generated. "
        "media: text with images and sound.",
        choices=SOURCES,
    )
    files: tuple[str, ...] = option(
        (),
        "Training files or glob patterns (file sources). With source='tokens': folders that "
        "`megatransformer prepare` has written.",
    )
    mixture: tuple[float, ...] = option(
        (),
        "Weight of each of `files` in the training batches, such as 0.7,0.3 (source='tokens'). "
        "Default (empty): all rows of all folders are visited once per epoch.",
        above=0,
    )
    validation_files: tuple[str, ...] = option(
        (),
        "Validation files. Default (empty): validation_fraction of the training records is held "
        "out.",
    )
    text_field: str = option(
        "text", "Name of the record field with the text (jsonl, parquet, tfds)."
    )
    tfds_name: str | None = option(None, "TFDS name, for example 'lm1b' or 'my_set:1.0.0'.")
    tfds_split: str = option("train", "TFDS split to train on.")
    tfds_validation_split: str | None = option(
        None, "TFDS split to validate on. Default (None): validation_fraction is held out."
    )
    tfds_data_dir: str | None = option(
        None, "Where TFDS finds prepared sets. Default (None): its default."
    )
    sequence_length: int = option(256, "Tokens per sequence (T).", minimum=1)
    packing: str = option(
        "pack",
        "pack: documents fill a row, split where they must, kept apart by segment ids. "
        "pad: one document per row, cut at sequence_length. bucket: the same, but documents of "
        "similar length share a batch, whose rows are only as long as they need.",
        choices=("pack", "pad", "bucket"),
    )
    bucket_lengths: tuple[int, ...] = option(
        (),
        "Lengths of rows with packing='bucket', each compiled once. Default (empty): "
        "sequence_length halved up to three times, while it is even.",
        minimum=1,
    )
    tokenizer: TokenizerConfig = section(TokenizerConfig, "Tokenizer.")
    reasoning: ReasoningConfig = section(ReasoningConfig, "Generated problems.")
    augmentation: AugmentationConfig = section(AugmentationConfig, "Changes of training texts.")
    media: MediaDataConfig = section(MediaDataConfig, "Images and sound.")

    @property
    def task(self) -> str:
        """What is learned from it: 'text', 'reasoning' or 'media'."""
        return {"reasoning": "reasoning", "media": "media"}.get(self.source, "text")

    @property
    def batch_shapes(self) -> tuple[tuple[int, int], ...]:
        """Rows and length, [B, T], of every kind of batch, from the shortest rows to the longest.

        Shorter rows come in a multiple of batch_size that keeps the tokens of a batch at most the
        same. So whatever divides batch_size divides the rows of every batch.
        """
        longest = self.sequence_length
        lengths: tuple[int, ...] = (longest,)
        if self.packing == "bucket":
            lengths = self.bucket_lengths or _halved(longest)
        return tuple((self.batch_size * (longest // length), length) for length in lengths)

    @rule("files")
    def _file_sources_need_files(self) -> None:
        """Given when source is text, jsonl, parquet, arrayrecord or tokens."""
        if self.source in (*FILE_SOURCES, "tokens") and not self.files:
            raise ConfigError(
                "files", f"is empty, but source={self.source!r} reads files; name some."
            )

    @rule("files", "validation_files", "tfds_data_dir")
    def _files_are_served(self) -> None:
        """Of this machine, or with source text, jsonl or parquet at gs:// or s3://."""
        served = BUCKETS if self.source in BUCKET_SOURCES else ()
        for name in ("files", "validation_files"):
            for pattern in getattr(self, name):
                check_served(name, pattern, served, _COPY)
        if self.tfds_data_dir is not None:
            check_served("tfds_data_dir", self.tfds_data_dir, (), _COPY)

    @rule("tfds_name")
    def _tfds_needs_a_name(self) -> None:
        """Given when source='tfds'."""
        if self.source == "tfds" and self.tfds_name is None:
            raise ConfigError(
                "tfds_name", "is None, but source='tfds' needs a data set; give its name."
            )

    @rule("files")
    def _files_need_a_file_source(self) -> None:
        """Only with source text, jsonl, parquet, arrayrecord or tokens."""
        self._only_for((*FILE_SOURCES, "tokens"), "files")

    @rule("validation_files")
    def _validation_files_need_a_file_source(self) -> None:
        """Only with source text, jsonl, parquet or arrayrecord; prepared folders have their own
        validation rows."""
        self._only_for(FILE_SOURCES, "validation_files")

    @rule("mixture")
    def _mixture_has_a_weight_per_folder(self) -> None:
        """Only with source tokens; as many as `files`, which are two or more, each once."""
        self._only_for(("tokens",), "mixture")
        if self.mixture and not 1 < len(self.files) == len(self.mixture):
            raise ConfigError(
                "mixture",
                f"{self.mixture!r} are {len(self.mixture)} weights, and files names "
                f"{len(self.files)} folders; give one weight per folder, of two or more.",
            )
        if self.source == "tokens" and len(set(self.files)) < len(self.files):
            raise ConfigError("files", f"{self.files!r} names a folder twice; keep one of them.")

    @rule("packing")
    def _prepared_rows_have_one_length(self) -> None:
        """'pack' or 'pad' with source='tokens', as `megatransformer prepare` has packed."""
        if self.source == "tokens" and self.packing == "bucket":
            raise ConfigError(
                "packing", "'bucket' does not go with source='tokens'; use 'pack' or 'pad'."
            )

    @rule("validation_fraction")
    def _prepared_rows_are_held_out_already(self) -> None:
        """Keep the default with source='tokens', where `megatransformer prepare` has held out."""
        self._not_for("tokens", "validation_fraction")

    @rule("augmentation.synonyms_file", "augmentation.back_translation")
    def _prepared_texts_stay_as_they_are(self) -> None:
        """Not with source='tokens', whose texts are tokenised already."""
        if self.source == "tokens":
            reason = "with source='tokens', whose texts are tokenised already"
            try:
                require_defaults(self.augmentation, TEXT_CHANGES, reason, "choose another source")
            except ConfigError as error:
                raise error.below("augmentation") from None

    @rule("tfds_name", "tfds_split", "tfds_validation_split", "tfds_data_dir")
    def _tfds_options_need_tfds(self) -> None:
        """Only with source='tfds'."""
        names = ("tfds_name", "tfds_split", "tfds_validation_split", "tfds_data_dir")
        self._only_for(("tfds",), *names)

    @rule("text_field")
    def _text_field_needs_records_with_fields(self) -> None:
        """Only with source jsonl, parquet or tfds."""
        self._only_for(("jsonl", "parquet", "tfds"), "text_field")

    @rule("on_bad_record")
    def _bad_records_need_records_of_others(self) -> None:
        """Only for files, TFDS and media: our own text and problems have no bad records."""
        self._only_for((*FILE_SOURCES, "tfds", "media"), "on_bad_record")

    @rule("reasoning")
    def _reasoning_options_need_reasoning(self) -> None:
        """Keep the default unless source='reasoning'."""
        self._only_for(("reasoning",), "reasoning")

    @rule("tokenizer", "packing", "augmentation")
    def _reasoning_brings_its_own(self) -> None:
        """Keep the default with source='reasoning', because reasoning problems define their own
        vocabulary and fill one row each."""
        self._not_for("reasoning", "tokenizer", "packing", "augmentation")

    @rule("media")
    def _media_section_needs_its_source(self) -> None:
        """Keep the default unless source='media'."""
        self._only_for(("media",), "media")

    @rule("packing")
    def _media_samples_fill_a_row_each(self) -> None:
        """Keep the default with source='media', which has one sample per row."""
        self._not_for("media", "packing")

    @rule("augmentation.synonyms_file", "augmentation.back_translation")
    def _transcripts_keep_their_words(self) -> None:
        """With source='media', only with a task besides 'speak' and 'transcribe'. A transcript is
        not put into other words, because it says what can be heard."""
        if self.source == "media" and set(self.media.task_weights) <= set(AUDIO_TASKS):
            try:
                require_defaults(
                    self.augmentation,
                    TEXT_CHANGES,
                    f"with data.media.tasks={self.media.tasks!r}, whose texts are transcripts",
                    "add a task such as 'caption=1' or 'text=1'",
                )
            except ConfigError as error:
                raise error.below("augmentation") from None

    @rule("tokenizer.kind")
    def _media_need_a_tokenizer(self) -> None:
        """With source='media' 'bytes', or a tokenizer.model_file: captions are too few to train
        one on."""
        if self.source == "media" and self.tokenizer.is_trained:
            raise ConfigError(
                "tokenizer.kind",
                "'sentencepiece' without model_file trains a tokenizer, for which source='media' "
                "has too little text; set it to 'bytes', or give tokenizer.model_file.",
            )

    @rule("bucket_lengths")
    def _bucket_lengths_need_buckets(self) -> None:
        """Only with packing='bucket'."""
        if self.packing != "bucket":
            require_defaults(
                self, ("bucket_lengths",), f"with packing={self.packing!r}", "set packing='bucket'"
            )

    @rule("bucket_lengths")
    def _bucket_lengths_increase(self) -> None:
        """Increasing; the last one is sequence_length."""
        lengths = list(self.bucket_lengths)
        if lengths and (lengths != sorted(set(lengths)) or lengths[-1] != self.sequence_length):
            raise ConfigError(
                "bucket_lengths",
                f"{self.bucket_lengths!r} must increase and end in sequence_length="
                f"{self.sequence_length}; sort it and add that, or lower or raise sequence_length.",
            )

    @rule("validation_fraction")
    def _fraction_needs_a_split_to_make(self) -> None:
        """Only without validation_files and tfds_validation_split, and not for reasoning."""
        if self.validation_files or self.tfds_validation_split or self.source == "reasoning":
            require_defaults(
                self,
                ("validation_fraction",),
                "because there is a validation source",
                "remove validation_files or tfds_validation_split",
            )

    def _not_for(self, source: str, *names: str) -> None:
        if self.source == source:
            require_defaults(self, names, f"with source={source!r}", "choose another source")

    def _only_for(self, sources: tuple[str, ...], *names: str) -> None:
        if self.source not in sources:
            require_defaults(
                self,
                names,
                f"with source={self.source!r}",
                f"set source to {' or '.join(map(repr, sources))}",
            )


def _halved(longest: int) -> tuple[int, ...]:
    """Each length is half of the next, so that less than half of a row is padding; few programs."""
    lengths = [longest]
    while len(lengths) < 4 and lengths[0] % 2 == 0:
        lengths.insert(0, lengths[0] // 2)
    return tuple(lengths)


# ------------------------------------------------------------------------------
# Media without text, for runs that train a vocoder or an autoencoder.


@dataclasses.dataclass(frozen=True)
class ClipsConfig:
    """The medium of a vocoder."""

    audio: AudioSourceConfig = section(AudioSourceConfig, "Source of sound.")

    def __post_init__(self) -> None:
        check_options(self)


@dataclasses.dataclass(frozen=True)
class ClipDataConfig(LoaderConfig):
    """Where the batches of a vocoder come from."""

    media: ClipsConfig = section(ClipsConfig, "Sound.")


@dataclasses.dataclass(frozen=True)
class PicturesConfig:
    """The medium of an image autoencoder."""

    images: ImageSourceConfig = section(ImageSourceConfig, "Source of images.")

    def __post_init__(self) -> None:
        check_options(self)


@dataclasses.dataclass(frozen=True)
class PictureDataConfig(LoaderConfig):
    """Where the batches of an image autoencoder come from."""

    media: PicturesConfig = section(PicturesConfig, "Images.")
