"""Random-access sources of documents."""

from megatransformer_jax.data.sources.build import build_source, training_texts
from megatransformer_jax.data.sources.record import (
    BadRecord,
    BadRecordError,
    BadRecordPolicy,
    TextSource,
)

__all__ = [
    "BadRecord",
    "BadRecordError",
    "BadRecordPolicy",
    "TextSource",
    "build_source",
    "training_texts",
]
