"""The fit of `benchmarks.scaling_law` finds the exponent that a law was made with; a grid runs."""

import importlib
import itertools
import pathlib
import re
import sys
from typing import Any

import numpy as np
import pytest

LAYER = 12


@pytest.fixture(scope="module")
def loop_value(repository: pathlib.Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(repository)
        return importlib.import_module("benchmarks.loop_value")


def runs_of_a_law(loop_value: Any, phi: float, noise: float = 0.0, num_budgets: int = 2) -> Any:
    """Runs of models of 1 + 4 + 1 layers, whose losses are those of the law."""
    rng, outcomes = np.random.default_rng(0), []
    budgets = (400_000, 1_600_000, 6_400_000)[:num_budgets]
    for loops, width, tokens in itertools.product((1, 2, 4), (32, 64, 128), budgets):
        layer = LAYER * width**2
        once, iterated = 2 * layer, 4 * layer // loops
        loss = 1.2 + 30 * (once + loops**phi * iterated) ** -0.3 + 60 * tokens**-0.4
        loss += noise * rng.normal()
        outcomes.append(loop_value.Outcome(loops, tokens, once, iterated, loss))
    return outcomes


@pytest.mark.parametrize("phi", [0.0, 0.46, 1.0])
def test_the_exponent_of_a_law_is_found(loop_value: Any, phi: float) -> None:
    fit = loop_value.fit_law(runs_of_a_law(loop_value, phi, num_budgets=3), resamples=50)
    assert abs(fit.phi - phi) < 0.03
    assert abs(fit.alpha - 0.3) < 0.03
    assert fit.residual < 2e-3
    low, high = fit.interval
    assert phi - 0.05 < low <= high < phi + 0.05
    floors = [1.2 + 60 * tokens**-0.4 for tokens in fit.floors]
    np.testing.assert_allclose(list(fit.floors.values()), floors, atol=0.03)
    constant, _, beta = fit.data
    assert abs(constant - 1.2) < 0.1
    assert abs(beta - 0.4) < 0.1


def test_the_interval_grows_with_noise_and_covers_the_exponent(loop_value: Any) -> None:
    fits = [
        loop_value.fit_law(runs_of_a_law(loop_value, 0.46, noise), resamples=200)
        for noise in (0.001, 0.01)
    ]
    widths = [high - low for low, high in (fit.interval for fit in fits)]
    assert widths[1] > 2 * widths[0] > 0
    for fit in fits:
        # The values that are tried are 0.02 apart.
        assert fit.interval[0] - 0.02 < 0.46 < fit.interval[1] + 0.02
        assert fit.data is None


def test_the_squared_errors_are_those_of_least_squares(loop_value: Any) -> None:
    outcomes = runs_of_a_law(loop_value, 0.5, noise=0.05)
    loss = np.array([one.loss for one in outcomes])
    budgets = np.array([one.tokens for one in outcomes])
    groups = (budgets[:, None] == np.unique(budgets)).astype(float)
    weights = np.random.default_rng(1).integers(0, 3, (1, len(loss))).astype(float)
    law = importlib.import_module("benchmarks.scaling_law")
    powers = law._powers(outcomes)
    errors = law._squared_errors(powers, loss, groups, weights)
    for place in ((0, 0), (75, 40), (150, 80)):
        design = np.column_stack([powers[place], groups])
        root = np.sqrt(weights[0])
        numbers = np.linalg.lstsq(design * root[:, None], loss * root, rcond=None)[0]
        wanted = np.sum(weights[0] * (design @ numbers - loss) ** 2)
        np.testing.assert_allclose(errors[0][place], wanted, rtol=1e-6)


def command(loop_value: Any, monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["loop_value", *map(str, words)])
    loop_value.main()


def test_a_run_is_trained_and_scored(loop_value: Any) -> None:
    recipe = loop_value.Recipe("linear", "pre", 1, 2, (1, 2, 0), 0.01, 8, 8, ())
    line = loop_value.train(recipe, loop_value.Cell(loops=2, width=32, tokens=128, seed=0))
    layer = 2 * 32 + 4 * 32**2 + 3 * 32 * 88
    # A layer of the prelude, the final norm and the streams' weights; another layer and W.
    assert line["once"] == layer + 32 + 2 * (2 + 4 + 2)
    assert line["iterated"] == layer + 2 * 32**2
    assert 4 < line["loss"] < 7


def test_a_grid_is_trained_once_and_shared(
    loop_value: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: pathlib.Path,
) -> None:
    """Two recipes share the runs without a loop."""

    def train(recipe: Any, cell: Any) -> dict[str, Any]:
        (outcome,) = (
            one
            for one in runs_of_a_law(loop_value, 0.4 + 0.1 * recipe.hyper_connections)
            if (one.loops, one.tokens) == (cell.loops, cell.tokens)
            and one.once == 2 * LAYER * cell.width**2
        )
        return {name: getattr(outcome, name) for name in ("once", "iterated", "loss")} | {
            "seconds": 1.0
        }

    monkeypatch.setattr(loop_value, "train", train)
    grid = ("--widths", 32, 64, 128, "--tokens", 400_000, "--resamples", 5)
    grid = (*grid, "--runs", tmp_path / "runs.jsonl")
    results = [tmp_path / "linear.json", tmp_path / "streams.json"]
    hyper = ("--adapter", "none", "--hyper-connections", 2)
    command(loop_value, monkeypatch, *grid, "--json", results[0])
    command(loop_value, monkeypatch, *grid, *hyper, "--json", results[1])
    shown = capsys.readouterr().out
    assert re.search(r"\nadapter linear: phi = 0.4\d, 95% interval", shown)
    assert re.search(r"\nadapter none, 2 streams: phi = 0.6\d, 95% interval", shown)
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert len(lines) == 9 + 6
    # Everything is there, so nothing is trained again.
    monkeypatch.setattr(loop_value, "train", None)
    command(loop_value, monkeypatch, *grid, *hyper)
    capsys.readouterr()
    figure = tmp_path / "figure.png"
    command(loop_value, monkeypatch, "--compare", *results, "--figure", figure)
    assert "| adapter none, 2 streams | 0.6" in capsys.readouterr().out
    assert figure.stat().st_size > 5000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--widths", "32"), "--widths: the law needs two different ones or more"),
        (("--loops", "1", "3"), "--layers: 4 layers of the core cannot be cut for 3 loops"),
        (("--set", "model.widht=3"), "--set model.widht=3: write OPTION=VALUE"),
        (("--figure", "a.png"), "--figure: draws what is compared"),
        (("--hyper-connections", "1"), "hyper_connections: 1 stream is the plain loop"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    loop_value: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: pathlib.Path,
    words: tuple[str, ...],
    message: str,
) -> None:
    with pytest.raises(SystemExit, match=re.escape(message)):
        command(loop_value, monkeypatch, *words, "--runs", tmp_path / "runs.jsonl")


def test_a_file_of_something_else_is_refused(
    loop_value: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "runs.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit, match=r"line 1 of .* is not a run of this benchmark"):
        command(loop_value, monkeypatch, "--runs", tmp_path / "runs.jsonl")
