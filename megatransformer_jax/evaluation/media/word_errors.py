"""Errors of transcripts: word error rate and character error rate, by jiwer."""

import dataclasses
from collections.abc import Sequence

from megatransformer_jax.config.option import UserError
from megatransformer_jax.evaluation.media.extra_library import import_for_scores


@dataclasses.dataclass(frozen=True)
class TranscriptErrors:
    """Errors of a set of transcripts; 0 is best, and more than 1 is possible.

    Attributes:
      word_error_rate: (substitutions + deletions + insertions) / words of the references, over the
        whole set (the mean of clips' rates is another number).
      character_error_rate: the same of characters, blanks included.
      exact: share of transcripts without an error.
      transcripts: how many.
    """

    word_error_rate: float
    character_error_rate: float
    exact: float
    transcripts: int


def transcript_errors(predictions: Sequence[str], references: Sequence[str]) -> TranscriptErrors:
    """Compares transcripts as they are: case and punctuation count; blanks at both ends and
    repeated ones do not.

    Args:
      predictions: one transcript per clip; may be empty.
      references: the right one of each clip.

    Raises:
      UserError: if there is none, their numbers differ, a reference has no word, or jiwer is not
        installed.
    """
    if not references or len(predictions) != len(references):
        raise UserError(
            f"{len(predictions)} transcripts do not go with {len(references)} references; give one "
            "for each, and at least one."
        )
    found, wanted = (
        [" ".join(text.split()) for text in texts]
        for texts in (
            predictions,
            references,
        )
    )
    for number, text in enumerate(wanted, start=1):
        if not text:
            raise UserError(f"reference {number} has no word; leave its clip out.")
    library = import_for_scores("jiwer", "the word error rate")
    return TranscriptErrors(
        word_error_rate=float(library.wer(wanted, found)),
        character_error_rate=float(library.cer(wanted, found)),
        exact=sum(map(str.__eq__, found, wanted)) / len(wanted),
        transcripts=len(wanted),
    )
