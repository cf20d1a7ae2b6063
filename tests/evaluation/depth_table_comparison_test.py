"""Runs side by side: table, plot, errors."""

import json

import pytest

from megatransformer_jax.cli.commands import main as command
from megatransformer_jax.config.option import UserError
from megatransformer_jax.evaluation.depth_table import (
    markdown_table,
    parse_groups,
    plot_curves,
    read_curve,
)


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
    curves = [read_curve([runs / name], "exact_accuracy") for name in ("one", "two")]
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
        read_curve([runs / "one"], "bleu")
    with pytest.raises(SystemExit) as stopped:
        command("compare", [str(runs / "three")])
    assert stopped.value.code == 2
    assert "has finished" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command("compare", [str(runs / "one"), f"--output={runs / 'no_folder' / 'plot.png'}"])
    assert "does not exist" in capsys.readouterr().err


def write_run(folder, values, trained_depth):
    """A finished run whose accuracy by depth, or without one, is given."""
    rows = [{"depth": depth, "exact_accuracy": value} for depth, value in values.items()]
    folder.mkdir()
    content = {"trained_depth": trained_depth, "shown": ["exact_accuracy"], "rows": rows}
    (folder / "depth_table.json").write_text(json.dumps(content))


@pytest.fixture
def seeds(tmp_path):
    write_run(tmp_path / "first", {1: 0.1, 4: 0.5}, 4)
    write_run(tmp_path / "second", {1: 0.2, 4: 0.9}, 4)
    write_run(tmp_path / "third", {1: 0.6, 4: 1.0}, 4)
    write_run(tmp_path / "plain", {None: 0.3}, None)
    write_run(tmp_path / "once", {1: 0.25}, 1)
    return tmp_path


def test_runs_of_several_seeds_are_one_curve_with_its_range(seeds, capsys, monkeypatch):
    monkeypatch.chdir(seeds)
    command("compare", ["looped=first,second,third", "plain", "single=once", "--output=plot.png"])
    printed = capsys.readouterr().out
    assert printed.splitlines()[2:7] == [
        "| depth | looped | plain | single |",
        "|---:|---:|---:|---:|",
        "| - | - | 0.300 | - |",
        "| 1 | 0.300 (0.100 to 0.600) | - | 0.250\\* |",
        "| 4 | 0.800\\* (0.500 to 1.000) | - | - |",
    ]


def test_the_plot_has_a_band_for_seeds_and_a_level_line_for_one_depth(seeds):
    folders = [seeds / name for name in ("first", "second", "third")]
    curves = [
        read_curve(folders, "exact_accuracy", "looped"),
        read_curve([seeds / "plain"], "exact_accuracy"),
    ]
    (axes,) = plot_curves(curves, "exact_accuracy").axes
    looped, plain, trained = axes.get_lines()
    assert looped.get_ydata().tolist() == pytest.approx([0.3, 0.8])
    assert (plain.get_xdata().tolist(), plain.get_ydata().tolist()) == ([1, 4], [0.3, 0.3])
    assert trained.get_xdata() == [4, 4]
    (band,) = axes.collections
    low, high = band.get_datalim(axes.transData).get_points()
    assert (low.tolist(), high.tolist()) == ([1, 0.1], [4, 1.0])
    with pytest.raises(UserError, match="none of these runs was judged at two depths"):
        plot_curves(curves[1:], "exact_accuracy")


def test_the_names_of_many_curves_stand_next_to_the_plot(seeds):
    few = [read_curve([seeds / "first"], "exact_accuracy", str(number)) for number in range(4)]
    for curves, within in ((few, 1), ([*few, few[0]], 0)):
        figure = plot_curves(curves, "exact_accuracy")
        assert (len(figure.legends), figure.axes[0].get_legend() is not None) == (
            1 - within,
            within,
        )


def test_a_group_has_runs_that_were_judged_alike(seeds):
    with pytest.raises(UserError, match=r"once was trained at depth 1 and judged at \(1,\), but"):
        read_curve([seeds / "first", seeds / "once"], "exact_accuracy")


@pytest.mark.parametrize("word", ["=runs/a", "seeds=", "seeds=,"])
def test_a_group_without_a_name_or_a_run_is_refused(word):
    with pytest.raises(UserError, match="write LABEL=FOLDER,FOLDER"):
        parse_groups([word])


def test_a_folder_with_an_equals_sign_is_a_folder():
    assert parse_groups(["runs/lr=0.1", "./lr=0.1"]) == [
        (None, ("runs/lr=0.1",)),
        (None, ("./lr=0.1",)),
    ]
