"""Scores of generated texts against references, and of likelihoods per byte and word.

BLEU (Papineni et al., 2002) and chrF (Popovic, 2015) are sacrebleu's, ROUGE (Lin, 2004) is
rouge-score's, each with its defaults, so that numbers compare with published ones. Both libraries
are in the extra 'eval' and are imported when a score is asked for.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from megatransformer_jax.config.option import UserError
from megatransformer_jax.data.tokenizer import Tokenizer
from megatransformer_jax.evaluation.report import new_figure
from megatransformer_jax.extras import import_extra
from megatransformer_jax.storage import write_json
from megatransformer_jax.types import Batch

# ------------------------------------------------------------------------------
# BLEU, chrF, ROUGE, exact match.

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
      exact_match: 0 to 1, share of texts that equal a reference but for whitespace at both ends.
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


def named_scores(
    names: Sequence[str], predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Only those scores of `TextScores` that have one of the names; see `score_texts`."""
    rouge: dict[str, float] = {}
    if any(name.startswith("rouge") for name in names):
        rouge = rouge_f1(predictions, references)
        rouge["rouge_l"] = rouge["rougeL"]
    others = {"bleu": bleu, "chrf": chrf, "exact_match": exact_match}
    return {
        name: rouge[name] if name in rouge else others[name](predictions, references)
        for name in names
    }


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU of the corpus, 0 to 100; arguments and errors as of `score_texts`."""
    sacrebleu = import_extra("sacrebleu", "eval", "scores of texts")
    streams = _reference_streams(predictions, references)
    return float(sacrebleu.corpus_bleu(list(predictions), streams).score)


def chrf(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """chrF of the corpus, 0 to 100; arguments and errors as of `score_texts`."""
    sacrebleu = import_extra("sacrebleu", "eval", "scores of texts")
    streams = _reference_streams(predictions, references)
    return float(sacrebleu.corpus_chrf(list(predictions), streams).score)


def rouge_f1(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Mean F1 by `ROUGE_KINDS`, 0 to 1; of several references the best one counts.

    Arguments and errors as of `score_texts`.
    """
    scorer = import_extra("rouge_score.rouge_scorer", "eval", "scores of texts").RougeScorer(
        list(ROUGE_KINDS)
    )
    _check(predictions, references)
    scores = [
        scorer.score_multi(list(targets), text)
        for text, targets in zip(predictions, references, strict=True)
    ]
    return {kind: sum(score[kind].fmeasure for score in scores) / len(scores) for kind in scores[0]}


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of predictions that equal a reference; whitespace at both ends does not count.

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


# ------------------------------------------------------------------------------
# How much text a set of batches predicts, for scores that do not depend on the tokenizer.
#
# A loss per token compares only between models with the same tokenizer. Per byte or per word of the
# text it compares between all:
#
#     bits per byte   = nats / (ln 2 * bytes)
#     word perplexity = exp(nats / words)
#
# where nats is the sum of the loss over all predicted tokens, also those that end documents.


@dataclasses.dataclass(frozen=True)
class TextSize:
    """Size of a text.

    Attributes:
      bytes: in UTF-8.
      words: runs of characters between spaces.
    """

    bytes: int
    words: int

    def bits_per_byte(self, nats: float) -> float:
        """From the sum of the loss over the text; NaN without text."""
        return nats / (math.log(2) * self.bytes) if self.bytes else math.nan

    def word_perplexity(self, nats: float) -> float:
        """From the sum of the loss over the text; NaN without words."""
        if not self.words:
            return math.nan
        return math.exp(nats / self.words) if nats / self.words < 700 else math.inf


def predicted_text_size(batches: Iterable[Batch], tokenizer: Tokenizer) -> TextSize:
    """Size of the text that the counting tokens of batches stand for.

    A document that was split goes on in the next segment, whose first token is not the start token;
    such parts are put together again, so that no word is counted twice.

    Args:
      batches: of packed or padded text, in the order of the pipeline.
      tokenizer: that made the tokens.
    """
    num_bytes = num_words = 0
    for document in _documents(batches, tokenizer.bos_id):
        text = tokenizer.decode(document)
        num_bytes += len(text.encode("utf-8"))
        num_words += len(text.split())
    return TextSize(num_bytes, num_words)


def _documents(batches: Iterable[Batch], bos_id: int) -> Iterable[Sequence[int]]:
    document: list[int] = []
    for first, targets in _segments(batches):
        if first == bos_id and document:
            yield document
            document = []
        document.extend(targets)
    if document:
        yield document


def _segments(batches: Iterable[Batch]) -> Iterable[tuple[int, list[int]]]:
    """First token and counting targets of every segment."""
    for batch in batches:
        rows = (batch.tokens, batch.targets, batch.loss_mask, batch.segment_ids)
        for tokens, targets, loss_mask, segments in zip(*map(np.asarray, rows), strict=True):
            for segment in range(1, int(segments.max(initial=0)) + 1):
                is_here = segments == segment
                if is_here.any():
                    counts = is_here & (loss_mask > 0)
                    yield int(tokens[is_here][0]), targets[counts].tolist()


# ------------------------------------------------------------------------------
# Scores of generated texts as a function of depth: table, JSON and plot.

# Heading, field and digits of each score.
_COLUMNS = (
    ("BLEU", "bleu", 2),
    ("chrF", "chrf", 2),
    ("ROUGE-1", "rouge1", 4),
    ("ROUGE-2", "rouge2", 4),
    ("ROUGE-L", "rouge_l", 4),
    ("exact match", "exact_match", 4),
)

# By depth; None where the depth is not known or there is none.
ScoresByDepth = Mapping[int | None, TextScores]


def make_text_table(scores: ScoresByDepth, trained_depth: int | None) -> Table:
    """A table with one row per depth; the trained mean is marked with a star."""
    table = Table(title=f"Scores of {next(iter(scores.values())).texts} texts")
    table.add_column("depth", justify="right")
    for heading, _, _ in _COLUMNS:
        table.add_column(heading, justify="right")
    for depth, row in scores.items():
        star = " *" if depth is not None and depth == trained_depth else ""
        cells = [f"{getattr(row, field):.{digits}f}" for _, field, digits in _COLUMNS]
        table.add_row("-" if depth is None else f"{depth}{star}", *cells)
    if trained_depth is not None and trained_depth in scores:
        table.caption = f"* mean depth in training ({trained_depth})"
    return table


def write_text_scores(
    directory: pathlib.Path, scores: ScoresByDepth, trained_depth: int | None
) -> Sequence[pathlib.Path]:
    """Writes text_scores.json, and text_scores.png if there are several depths.

    Args:
      directory: an existing folder.
      scores: of the same texts by depth.
      trained_depth: mean depth in training, None if there is none.

    Returns:
      The paths of the files.
    """
    json_path = directory / "text_scores.json"
    content = {"trained_depth": trained_depth, "rows": text_rows(scores)}
    write_json(json_path, content)
    if len(scores) < 2:
        return [json_path]
    png_path = directory / "text_scores.png"
    plot_text_scores(scores, trained_depth).savefig(png_path, dpi=120)
    return [json_path, png_path]


def text_rows(scores: ScoresByDepth) -> list[dict[str, Any]]:
    """The scores as plain values, one dictionary per depth."""
    return [{"depth": depth, **dataclasses.asdict(row)} for depth, row in scores.items()]


def plot_text_scores(scores: ScoresByDepth, trained_depth: int | None) -> Figure:
    """All scores over depth, on a logarithmic axis."""
    figure = new_figure(9.0, 3.6)
    depths = [1 if depth is None else depth for depth in scores]
    panels = (("0 to 100", _COLUMNS[:2]), ("0 to 1", _COLUMNS[2:]))
    for axes, (label, columns) in zip(figure.subplots(1, 2), panels, strict=True):
        for heading, field, _ in columns:
            values = [getattr(row, field) for row in scores.values()]
            axes.plot(depths, values, marker="o", label=heading)
        axes.set_xscale("log", base=2)
        axes.set_xticks(depths, [str(depth) for depth in depths])
        axes.minorticks_off()
        axes.set_xlabel("depth (iterations of the core)")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if trained_depth is not None:
            axes.axvline(trained_depth, color="gray", linestyle="--", label="trained mean")
        axes.legend()
    return figure
