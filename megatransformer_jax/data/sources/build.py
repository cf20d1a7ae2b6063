"""From the configuration to training and validation sources."""

import glob
import os
from collections.abc import Iterator

from megatransformer_jax.config.data import DataConfig
from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.data.sources.files import ArrayRecordFile, JsonlFile, ParquetFile, TextFile
from megatransformer_jax.data.sources.record import (
    BadRecord,
    BadRecordPolicy,
    Concatenated,
    EmbeddedText,
    TextSource,
    hold_out,
)
from megatransformer_jax.data.sources.tfds import build_tfds
from megatransformer_jax.storage import (
    as_path,
    check_reachable,
    file_system,
    forget_listings,
    is_bucket_path,
)


def build_source(config: DataConfig, split: str) -> TextSource:
    """The documents of a split, 'train' or 'validation'. Neither is ever empty.

    Raises:
      UserError: for missing files, patterns without a match, unreadable files, an empty corpus,
        or one that is too small to hold anything out.
    """
    if split not in ("train", "validation"):
        raise ValueError(f"no split {split!r}; there are 'train' and 'validation'")
    if _has_validation_source(config):
        return _not_empty(open_records(config, split), config, split)
    return build_splits(config)[split]


def build_splits(config: DataConfig) -> dict[str, TextSource]:
    """The documents of 'train' and of 'validation'; both share what they are held out of.

    Raises:
      UserError: see build_source.
    """
    if _has_validation_source(config):
        return {split: build_source(config, split) for split in ("train", "validation")}
    everything = _not_empty(open_records(config, "train"), config, "train")
    train, validation = hold_out(everything, config.validation_fraction, config.seed)
    return {"train": train, "validation": validation}


def training_texts(config: DataConfig) -> Iterator[str]:
    """The texts of the training split in their stored order, for training a tokenizer.

    Raises:
      UserError: see build_source.
      BadRecordError: for a bad record, if `on_bad_record` says so.
    """
    policy = BadRecordPolicy(config.on_bad_record)
    source = build_source(config, "train")
    for index in range(len(source)):
        record = source[index]
        if isinstance(record, BadRecord):
            policy.handle(record)
        else:
            yield record


def _has_validation_source(config: DataConfig) -> bool:
    return bool(config.validation_files) or config.tfds_validation_split is not None


def open_records(config: DataConfig, split: str) -> TextSource:
    """All records of the split's own files or TFDS split, before anything is held out.

    Raises:
      UserError: if they cannot be read.
    """
    match config.source:
        case "embedded_text":
            return EmbeddedText()
        case "tfds":
            if split == "train":
                return build_tfds(config, config.tfds_split)
            return build_tfds(config, config.tfds_validation_split or config.tfds_split)
        case "text" | "jsonl" | "parquet" | "arrayrecord":
            paths = source_files(config, split)
            return Concatenated([_open_file(config, path) for path in paths])
        case "tokens":
            raise ConfigError(
                "data.source", "'tokens' has no documents, only rows; name the source of the text."
            )
        case unknown:
            raise ConfigError("data.source", f"{unknown!r} has no documents.")


def source_files(config: DataConfig, split: str) -> list[str]:
    """The files of a split of a file source, in the order in which they are read.

    Raises:
      ConfigError: for a missing file or a pattern without a match.
    """
    option = "files" if split == "train" else "validation_files"
    return _expand(getattr(config, option), f"data.{option}")


def _open_file(config: DataConfig, path: str) -> TextSource:
    match config.source:
        case "text":
            return TextFile(path)
        case "jsonl":
            return JsonlFile(path, config.text_field)
        case "parquet":
            return ParquetFile(path, config.text_field)
        case "arrayrecord":
            return ArrayRecordFile(path)
        case unknown:
            raise ConfigError("data.source", f"{unknown!r} reads no files.")


def _expand(patterns: tuple[str, ...], option: str) -> list[str]:
    """The files that the patterns name, sorted within each pattern, each once."""
    paths: dict[str, None] = {}
    for pattern in patterns:
        if is_bucket_path(pattern):
            paths |= dict.fromkeys(_expand_in_bucket(pattern, option))
            continue
        expanded = os.path.expanduser(pattern)
        # A name that exists is taken as it is, so that file names may contain brackets.
        found = (
            [expanded] if os.path.exists(expanded) else sorted(glob.glob(expanded, recursive=True))
        )
        if not found:
            what = "no file matches it" if glob.has_magic(expanded) else "there is no such file"
            raise ConfigError(
                option, f"{pattern!r}: {what} (looked in {os.getcwd()}). Correct the path."
            )
        for path in found:
            if os.path.isfile(path):
                paths[path] = None
            elif len(found) == 1:
                raise ConfigError(
                    option, f"{pattern!r} is a folder; name the files in it, e.g. {path}/*."
                )
    return list(paths)


def _expand_in_bucket(pattern: str, option: str) -> list[str]:
    """The objects that a pattern names, sorted."""
    path = as_path(option, pattern)
    check_reachable(option, path)
    forget_listings(path)
    objects = file_system(path)
    # A name that exists is taken as it is here, too.
    if objects.isfile(pattern):
        return [pattern]
    found = objects.glob(pattern, detail=True) if glob.has_magic(pattern) else {}
    scheme = pattern.partition("://")[0].lower()
    files = sorted(f"{scheme}://{name}" for name, about in found.items() if about["type"] == "file")
    if not files:
        is_folder = not glob.has_magic(pattern) and objects.isdir(pattern)
        problem = (
            f"is a folder; name the files in it, e.g. {pattern.rstrip('/')}/*."
            if is_folder
            else "nothing in the bucket has this name; correct it."
        )
        raise ConfigError(option, f"{pattern!r}: {problem}")
    return files


def _not_empty(source: TextSource, config: DataConfig, split: str) -> TextSource:
    if len(source) == 0:
        files = config.files if split == "train" else config.validation_files
        raise UserError(
            f"the {split} corpus is empty: {', '.join(files) or config.tfds_name} "
            f"(data.source={config.source!r}) holds no document. Give files with text."
        )
    return source
