"""Any prepared TFDS data set, by `tfds.data_source`: random access without TensorFlow."""

import typing

from megatransformer_jax.config.data import DataConfig
from megatransformer_jax.config.option import UserError
from megatransformer_jax.data.sources.record import BadRecord, text_of
from megatransformer_jax.extras import import_extra


class TfdsText:
    """One text feature of a TFDS split."""

    def __init__(self, records: typing.Sequence[dict], name: str, field: str):
        self._records = records
        self._name = name
        self._field = field

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> str | BadRecord:
        record = self._records[index]
        return text_of(record[self._field], self._field, f"{self._name}, record {index}")


def build_tfds(config: DataConfig, split: str) -> TfdsText:
    """The split `split` of `config.tfds_name`.

    Raises:
      UserError: see `open_tfds`, or if the set has no such text feature.
    """
    records, features, name = open_tfds(
        config.tfds_name, config.tfds_data_dir, split, "data.source"
    )
    if config.text_field not in features:
        raise UserError(
            f"{name}: no feature {config.text_field!r}; its features: "
            f"{', '.join(map(repr, features))}. Name one with data.text_field."
        )
    return TfdsText(records, name, config.text_field)


def open_tfds(
    set_name: str | None, data_dir: str | None, split: str, option: str
) -> tuple[typing.Sequence[dict], typing.Any, str]:
    """Records and features of a split, and its name for messages.

    Args:
      set_name: of the data set, with its version if need be.
      data_dir: where prepared sets are; None: TFDS's default.
      split: as TFDS writes it.
      option: which asked for TFDS, for messages.

    Raises:
      UserError: if tensorflow-datasets is not installed, the set is unknown or not prepared in a
        random-access format, or has no such split.
    """
    tfds = import_extra("tensorflow_datasets", "tfds", f"{option}='tfds'")
    name = f"{set_name}[{split}]"
    try:
        builder = tfds.builder(set_name, data_dir=data_dir)
        features = builder.info.features
        records = builder.as_data_source(split=split)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{name}: TFDS needs {error.name} for this set, which is not installed. Install it, "
            "or convert the set into files."
        ) from error
    except Exception as error:
        # TFDS raises many classes: registration, file format, missing files, bad split names.
        reason = _reason(error)
        raise UserError(
            f"{name}: TFDS cannot read it ({type(error).__name__}: {reason}). It must be prepared "
            f"beforehand in data_dir={data_dir!r} with file_format='array_record'; "
            f"`tfds build {set_name} --file_format=array_record` does that."
        ) from error
    return records, features, name


def _reason(error: Exception) -> str:
    """The first line of a long message, or what is wrong where that only announces a list."""
    first = (str(error).strip() or repr(error)).splitlines()[0]
    if "could not find data" in first.lower() or "root causes" in first.lower():
        return "no prepared data there"
    return first.rstrip(":")
