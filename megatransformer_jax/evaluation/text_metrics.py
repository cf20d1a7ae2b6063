"""Scores of generated texts against references: BLEU, chrF, ROUGE and exact match.

BLEU (Papineni et al., 2002) and chrF (Popovic, 2015) are sacrebleu's, ROUGE (Lin, 2004) is
rouge-score's, each with its defaults, so that numbers compare with published ones. Both libraries
are in the extra 'eval' and are imported when a score is asked for.
"""

import dataclasses
import importlib
from collections.abc import Sequence
from typing import Any

from megatransformer_jax.config.option import UserError

ROUGE_KINDS = ("rouge1", "rouge2", "rougeL")


@dataclasses.dataclass(frozen=True)
class TextScores:
    """Scores of a corpus; higher is better.

    Attributes:
      bleu: 0 to 100, of the whole corpus (sacrebleu: tokenizer 13a, cased, exponential smoothing).
      chrf: 0 to 100, of the whole corpus (sacrebleu: characters up to 6, no words, beta 2).
      rouge1: 0 to 1, mean over texts of the F1 of single words; without stemming.
      rouge2: the same of pairs of words.
      rouge_l: the same of the longest common subsequence.
      exact_match: 0 to 1, share of texts that equal a reference but for blanks at both ends.
      texts: how many.
    """

    bleu: float
    chrf: float
    rouge1: float
    rouge2: float
    rouge_l: float
    exact_match: float
    texts: int


def score_texts(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> TextScores:
    """All scores of a corpus.

    Args:
      predictions: one text each.
      references: of each prediction one or more right texts.

    Raises:
      UserError: if there is no text, their numbers differ, one has no reference, or a library is
        not installed.
    """
    rouge = rouge_f1(predictions, references)
    return TextScores(
        bleu=bleu(predictions, references),
        chrf=chrf(predictions, references),
        rouge1=rouge["rouge1"],
        rouge2=rouge["rouge2"],
        rouge_l=rouge["rougeL"],
        exact_match=exact_match(predictions, references),
        texts=len(predictions),
    )


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU of the corpus, 0 to 100; arguments and errors as of `score_texts`."""
    sacrebleu = _import("sacrebleu")
    streams = _reference_streams(predictions, references)
    return float(sacrebleu.corpus_bleu(list(predictions), streams).score)


def chrf(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """chrF of the corpus, 0 to 100; arguments and errors as of `score_texts`."""
    sacrebleu = _import("sacrebleu")
    streams = _reference_streams(predictions, references)
    return float(sacrebleu.corpus_chrf(list(predictions), streams).score)


def rouge_f1(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Mean F1 by `ROUGE_KINDS`, 0 to 1; of several references the best one counts.

    Arguments and errors as of `score_texts`.
    """
    scorer = _import("rouge_score.rouge_scorer").RougeScorer(list(ROUGE_KINDS))
    _check(predictions, references)
    scores = [
        scorer.score_multi(list(targets), text)
        for text, targets in zip(predictions, references, strict=True)
    ]
    return {kind: sum(score[kind].fmeasure for score in scores) / len(scores) for kind in scores[0]}


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of predictions that equal a reference; blanks at both ends do not count.

    Arguments and errors as of `score_texts`.
    """
    _check(predictions, references)
    hits = [
        text.strip() in {target.strip() for target in targets}
        for text, targets in zip(predictions, references, strict=True)
    ]
    return sum(hits) / len(hits)


def _reference_streams(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> list[list[str | None]]:
    """sacrebleu's form: the n-th references of all texts together, None where there are fewer."""
    _check(predictions, references)
    most = max(map(len, references))
    return [
        [targets[index] if index < len(targets) else None for targets in references]
        for index in range(most)
    ]


def _check(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not predictions:
        raise UserError("there is no text to score; give at least one.")
    if len(predictions) != len(references):
        raise UserError(
            f"{len(predictions)} predictions do not go with {len(references)} references; give one "
            "prediction for each, in the same order."
        )
    for number, targets in enumerate(references, start=1):
        if isinstance(targets, str) or not targets:
            raise UserError(
                f"text {number} has the references {targets!r}; give a list of one or more texts."
            )


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"scores of texts need the library {name.partition('.')[0]}; install the extra 'eval': "
            "pip install 'megatransformer_jax[eval]'."
        ) from error
