"""How many generated media an independent judge recognises as what they were to show."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from megatransformer_jax.config.option import UserError


@dataclasses.dataclass(frozen=True)
class ClassCount:
    """Of one class: media that were to show it, and those in which the judge sees it.

    Attributes:
      mistaken_for: name of the class that the judge sees most often instead; None if in none.
    """

    name: str
    media: int
    recognised: int
    mistaken_for: str | None


@dataclasses.dataclass(frozen=True)
class Recognition:
    """What a judge makes of a set of media.

    Attributes:
      share: recognised media, 0 to 1.
      media: how many.
      judge_accuracy: of the judge on real held-out media, which bounds what `share` can tell.
      judge_media: how many these were.
      by_class: one row for each class that was asked for.
    """

    share: float
    media: int
    judge_accuracy: float
    judge_media: int
    by_class: tuple[ClassCount, ...]


def recognition(
    wanted: Int[np.ndarray, "N"],
    seen: Int[np.ndarray, "N"],
    names: Sequence[str],
    judge_accuracy: float,
    judge_media: int,
) -> Recognition:
    """Compares what media were to show with what the judge sees.

    Args:
      wanted: class of each medium.
      seen: class that the judge gives it.
      names: of the classes.
      judge_accuracy: see `Recognition`.
      judge_media: the same.

    Raises:
      UserError: if there is no medium.
    """
    if not len(wanted):
        raise UserError("there is no medium to judge; generate at least one.")
    rows = [_class_count(int(label), wanted, seen, names) for label in np.unique(wanted)]
    return Recognition(
        share=float(np.mean(wanted == seen)),
        media=len(wanted),
        judge_accuracy=judge_accuracy,
        judge_media=judge_media,
        by_class=tuple(rows),
    )


def _class_count(
    label: int, wanted: np.ndarray, seen: np.ndarray, names: Sequence[str]
) -> ClassCount:
    of_class = seen[wanted == label]
    wrong = of_class[of_class != label]
    mistaken_for = names[int(np.bincount(wrong).argmax())] if len(wrong) else None
    return ClassCount(names[label], len(of_class), int(np.sum(of_class == label)), mistaken_for)
