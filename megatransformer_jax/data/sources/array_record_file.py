"""ArrayRecord files: one record per document, UTF-8 text and nothing else."""

import grain
from array_record.python import array_record_module

from megatransformer_jax.config.option import UserError
from megatransformer_jax.data.sources.record import BadRecord, decoded


class ArrayRecordFile:
    """The records of an ArrayRecord file (Riegeli chunks with an index for random access).

    Raises:
      UserError: if the file is no ArrayRecord file.
    """

    def __init__(self, path: str):
        self._path = path
        try:
            # grain's source reads the number of records without a check of the file.
            array_record_module.ArrayRecordReader(path).close()
            self._records = grain.sources.ArrayRecordDataSource(path)
        except (ValueError, RuntimeError, OSError) as error:
            raise UserError(
                f"{path}: not a readable ArrayRecord file ({error}). Write it anew with "
                "array_record, or set data.source to the format it has."
            ) from error

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> str | BadRecord:
        where = f"{self._path}, record {index}"
        try:
            raw = self._records[index]
        except (RuntimeError, ValueError, OSError) as error:
            return BadRecord(where, f"its chunk cannot be read ({error}). Write the file anew.")
        return decoded(raw, where)
