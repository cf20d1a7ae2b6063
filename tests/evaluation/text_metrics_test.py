"""Scores of texts equal the libraries' own, and a hand-made BLEU."""

import collections
import math
import sys

import pytest
import sacrebleu
from rouge_score import rouge_scorer

from megatransformer_jax.config.option import UserError
from megatransformer_jax.evaluation.text_metrics import (
    bleu,
    chrf,
    exact_match,
    rouge_f1,
    score_texts,
)

PREDICTIONS = ["the cat sat on the mat", "it is raining, again", "yes"]
REFERENCES = [
    ["the cat sat on a mat", "a cat was sitting on the mat today"],
    ["it rains again"],
    ["no", "yes ", "perhaps"],
]


def ngrams(words, n):
    return collections.Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def bleu_by_hand(prediction, reference):
    """Geometric mean of the clipped precisions of 1 to 4 words, times the penalty for brevity."""
    log_precisions = []
    for n in range(1, 5):
        found, wanted = ngrams(prediction, n), ngrams(reference, n)
        hits = sum(min(count, wanted[gram]) for gram, count in found.items())
        log_precisions.append(math.log(hits / found.total()))
    brevity = min(1.0, math.exp(1 - len(reference) / len(prediction)))
    return 100 * brevity * math.exp(sum(log_precisions) / 4)


@pytest.mark.parametrize(
    "target", ["the cat sat on a mat", "the cat sat on a mat as it rained today"]
)
def test_bleu_equals_the_formula(target):
    text = "the cat sat on the mat the cat"
    wanted = bleu_by_hand(text.split(), target.split())
    assert 0 < wanted < 100
    assert bleu([text], [[target]]) == pytest.approx(wanted)


def f_score(precision, recall, beta):
    return (1 + beta**2) * precision * recall / (beta**2 * precision + recall)


def test_chrf_equals_the_formula():
    """Popovic (2015): F2 of the mean precision and recall of 1 to 6 characters, without spaces."""
    text, target = "the cat sat on the mat", "a cat is sitting on that mat"
    found, wanted = ([*words.replace(" ", "")] for words in (text, target))
    pairs = [(ngrams(found, n), ngrams(wanted, n)) for n in range(1, 7)]
    hits = [(one & other).total() for one, other in pairs]
    precision = sum(hit / one.total() for hit, (one, _) in zip(hits, pairs, strict=True)) / 6
    recall = sum(hit / other.total() for hit, (_, other) in zip(hits, pairs, strict=True)) / 6
    assert 0.2 < precision < 0.8
    assert chrf([text], [[target]]) == pytest.approx(100 * f_score(precision, recall, 2))


def longest_common(one, other):
    """Length of the longest common subsequence, by its recurrence."""
    if not one or not other:
        return 0
    if one[-1] == other[-1]:
        return 1 + longest_common(one[:-1], other[:-1])
    return max(longest_common(one[:-1], other), longest_common(one, other[:-1]))


def test_rouge_equals_the_formula():
    """Lin (2004): F1 of common words, of common pairs, and of the longest common subsequence."""
    text, target = "the mat sat on the cat", "a cat is sitting on the old mat"
    one, other = text.split(), target.split()
    wanted = []
    for n in (1, 2):
        hits = (ngrams(one, n) & ngrams(other, n)).total()
        wanted.append(f_score(hits / (len(one) - n + 1), hits / (len(other) - n + 1), 1))
    common = longest_common(one, other)
    wanted.append(f_score(common / len(one), common / len(other), 1))
    assert len(set(wanted)) == 3
    scores = score_texts([text], [[target]])
    assert (scores.rouge1, scores.rouge2, scores.rouge_l) == pytest.approx(tuple(wanted))


def test_scores_equal_the_libraries():
    # sacrebleu takes the n-th references of all texts together.
    streams = [
        [REFERENCES[0][0], REFERENCES[1][0], REFERENCES[2][0]],
        [REFERENCES[0][1], None, REFERENCES[2][1]],
        [None, None, REFERENCES[2][2]],
    ]
    scores = score_texts(PREDICTIONS, REFERENCES)
    assert scores.bleu == sacrebleu.corpus_bleu(PREDICTIONS, streams).score
    assert scores.chrf == sacrebleu.corpus_chrf(PREDICTIONS, streams).score
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
    for name, kind in (("rouge1", "rouge1"), ("rouge2", "rouge2"), ("rouge_l", "rougeL")):
        best = [
            max(scorer.score(target, text)[kind].fmeasure for target in targets)
            for text, targets in zip(PREDICTIONS, REFERENCES, strict=True)
        ]
        assert getattr(scores, name) == pytest.approx(sum(best) / 3)
    assert scores.exact_match == pytest.approx(1 / 3)
    assert scores.texts == 3
    # More than one reference counts.
    first = [targets[:1] for targets in REFERENCES]
    assert bleu(PREDICTIONS, first) == sacrebleu.corpus_bleu(PREDICTIONS, streams[:1]).score
    assert bleu(PREDICTIONS, first) < scores.bleu


def test_perfect_texts():
    texts = [targets[0] for targets in REFERENCES[:2]]
    scores = score_texts(texts, REFERENCES[:2])
    assert scores.bleu == pytest.approx(100)
    assert scores.chrf == pytest.approx(100)
    assert (scores.rouge1, scores.rouge2, scores.rouge_l, scores.exact_match) == (1, 1, 1, 1)


@pytest.mark.parametrize("metric", [bleu, chrf, rouge_f1, exact_match, score_texts])
@pytest.mark.parametrize(
    ("predictions", "references", "problem"),
    [
        ([], [], "no text"),
        (["a"], [["a"], ["b"]], "1 predictions do not go with 2"),
        (["a"], [[]], "text 1 has the references"),
        (["a"], ["a"], "text 1 has the references"),
    ],
)
def test_wrong_input(metric, predictions, references, problem):
    with pytest.raises(UserError, match=problem):
        metric(predictions, references)


def test_a_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(UserError, match=r"sacrebleu.*\[eval\]"):
        bleu(["a"], [["a"]])
