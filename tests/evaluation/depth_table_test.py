import io
import json
import math

import matplotlib.image
import pytest
from rich.console import Console

from megatransformer_jax.config.loop import EvaluationConfig
from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.evaluation.depth_table import (
    evaluated_depths,
    make_table,
    write_depth_table,
)
from megatransformer_jax.evaluation.text_metrics import TextSize
from megatransformer_jax.evaluation.validation import PROBLEM_SCORES, TEXT_SCORES, Scores

SCORES = [Scores(d, 3.0 / d, math.exp(3.0 / d), 0.1 * d, 0.05 * d, 99) for d in (1, 2, 4, 8)]


def printed(scores, trained_depth, names=PROBLEM_SCORES) -> str:
    output = io.StringIO()
    table = make_table(scores, trained_depth, names)
    Console(file=output, width=100).print(table)
    return output.getvalue()


def test_table_has_a_row_per_depth_and_marks_the_trained_one():
    text = printed(SCORES, 4)
    rows = [line for line in text.splitlines() if "│" in line]
    assert len(rows) == 4
    assert "4 *" in rows[2] and "0.7500" in rows[2] and "0.2000" in rows[2]
    assert sum("*" in row for row in rows) == 1
    assert "mean depth in training (4)" in text
    # No note on a star that no row has.
    assert "*" not in printed(SCORES[:2], 4)


def test_text_has_no_exact_answers():
    assert "exact answers" in printed(SCORES, 4)
    assert "exact answers" not in printed(SCORES, 4, TEXT_SCORES)


def test_model_without_core_has_one_row_without_a_depth():
    config = RunConfig(model=ModelConfig(core_layers=0))
    assert evaluated_depths(config) == (None,)
    text = printed([Scores(None, 1.0, 2.7, 0.5, 0.5, 9)], None)
    assert "*" not in text and "│     - │" in text


def test_recurrent_model_has_the_configured_depths():
    config = RunConfig(evaluation=EvaluationConfig(final_depths=(1, 3)))
    assert evaluated_depths(config) == (1, 3)


@pytest.mark.parametrize("names", [TEXT_SCORES, PROBLEM_SCORES])
def test_json_and_plot_are_written(tmp_path, names):
    json_path, png_path = write_depth_table(tmp_path, SCORES, 4, names)
    content = json.loads(json_path.read_text())
    assert content["trained_depth"] == 4
    assert [row["depth"] for row in content["rows"]] == [1, 2, 4, 8]
    assert content["rows"][1]["loss"] == 1.5
    image = matplotlib.image.imread(png_path)
    assert image.shape[1] > 800 and image.min() < 0.5  # Something is drawn.


def test_json_stays_valid_when_a_model_diverged(tmp_path):
    scores = [
        Scores(1, math.nan, math.nan, 0.0, 0.0, 9),
        Scores(2, math.inf, math.inf, 0.0, 0.0, 9),
    ]
    path, _ = write_depth_table(tmp_path, scores, 2, TEXT_SCORES)
    rows = json.loads(path.read_text(), parse_constant=pytest.fail)["rows"]
    assert rows[0]["loss"] is None and rows[1]["loss"] is None


def test_a_single_row_can_be_plotted(tmp_path):
    scores = [Scores(None, 1.0, 2.7, 0.5, 0.5, 9)]
    _, png_path = write_depth_table(tmp_path, scores, None, TEXT_SCORES)
    assert png_path.stat().st_size > 1000


def test_the_size_of_the_text_adds_columns(tmp_path):
    size = TextSize(bytes=33, words=11)
    output = io.StringIO()
    table = make_table(SCORES, 4, TEXT_SCORES, text_size=size)
    Console(file=output, width=120).print(table)
    bits = 3.0 / 4 * 99 / math.log(2) / 33
    per_word = math.exp(3.0 / 4 * 99 / 11)
    row = output.getvalue().splitlines()[6]
    assert "4 *" in row and f"{bits:.4f}" in row and f"{per_word:.2f}" in row
    assert "bits per byte" not in printed(SCORES, 4)
    path, _ = write_depth_table(tmp_path, SCORES, 4, TEXT_SCORES, text_size=size)
    rows = json.loads(path.read_text())["rows"]
    assert rows[2]["bits_per_byte"] == pytest.approx(bits)
    assert rows[2]["word_perplexity"] == pytest.approx(per_word)
    path, _ = write_depth_table(tmp_path, SCORES, 4, TEXT_SCORES)
    assert "bits_per_byte" not in json.loads(path.read_text())["rows"][2]
