"""Runs side by side: table, plot, errors."""

import json

import pytest

from megatransformer_jax.cli.commands import main as command
from megatransformer_jax.config.option import UserError
from megatransformer_jax.evaluation.depth_table import markdown_table, read_curve


@pytest.fixture
def runs(tmp_path):
    for name, depths, values in (("one", (1, 4), (0.0, 0.5)), ("two", (1, 2, 4), (0.1, 0.2, None))):
        rows = [
            {"depth": d, "exact_accuracy": v, "loss": 2.0 / d, "accuracy": 0.9}
            for d, v in zip(depths, values, strict=True)
        ]
        (tmp_path / name).mkdir()
        content = {"trained_depth": 4, "rows": rows}
        (tmp_path / name / "depth_table.json").write_text(json.dumps(content))
    return tmp_path


def test_table_has_a_row_per_depth_and_a_star_at_the_trained_mean(runs):
    curves = [read_curve(runs / name, "exact_accuracy") for name in ("one", "two")]
    assert markdown_table(curves).splitlines() == [
        "| depth | one | two |",
        "|---:|---:|---:|",
        "| 1 | 0.000 | 0.100 |",
        "| 2 | - | 0.200 |",
        "| 4 | 0.500\\* | nan\\* |",
    ]


def test_command_writes_a_plot(runs, capsys):
    output = runs / "plot.png"
    command(
        "compare", [str(runs / "one"), str(runs / "two"), "--metric=loss", f"--output={output}"]
    )
    assert output.read_bytes().startswith(b"\x89PNG")
    assert "| 4 | 0.500\\* | 0.500\\* |" in capsys.readouterr().out


def test_text_is_compared_by_loss_and_reasoning_by_exact_answers(runs, capsys):
    def say(name, said):
        path = runs / name / "depth_table.json"
        content = json.loads(path.read_text())
        content = {key: content[key] for key in ("trained_depth", "rows")}
        path.write_text(json.dumps({**content, **said}))

    problems, text = {"shown": ["loss", "exact_accuracy"]}, {"shown": ["loss", "accuracy"]}
    # As version 0.1 wrote it.
    old_problems, old_text = {"is_reasoning": True}, {"is_reasoning": False}

    words = [str(runs / "one"), str(runs / "two"), f"--output={runs / 'plot.svg'}"]
    for said, metric in (
        ((problems, old_problems), "exact-answer accuracy"),
        ((problems, text), "validation loss"),
        ((old_text, old_problems), "validation loss"),
        (({}, {}), "validation loss"),
    ):
        say("one", said[0])
        say("two", said[1])
        command("compare", words)
        assert capsys.readouterr().out.startswith(metric)


def test_a_plot_of_unknown_format_is_refused(runs, capsys):
    with pytest.raises(SystemExit) as stopped:
        command("compare", [str(runs / "one"), f"--output={runs / 'x.foo'}"])
    assert stopped.value.code == 2
    assert "'.foo' is not a format of plots; end the name in one of" in capsys.readouterr().err


def test_unfinished_runs_and_unknown_metrics_are_named(runs, capsys):
    with pytest.raises(UserError, match="unknown metric 'bleu'"):
        read_curve(runs / "one", "bleu")
    with pytest.raises(SystemExit) as stopped:
        command("compare", [str(runs / "three")])
    assert stopped.value.code == 2
    assert "has finished" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command("compare", [str(runs / "one"), f"--output={runs / 'no_folder' / 'plot.png'}"])
    assert "does not exist" in capsys.readouterr().err
