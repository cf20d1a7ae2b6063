"""Which rates train, from the losses of their runs."""

import importlib
import math
import pathlib
from typing import Any

import pytest


@pytest.fixture
def rates(repository: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(repository)
    return importlib.import_module("benchmarks.learning_rates")


def runs(rates: Any, losses: dict[float, float | None], recipe: str = "a") -> list[Any]:
    return [rates.Row(recipe, rate, 0, 9, loss, 1.0) for rate, loss in losses.items()]


def test_the_range_is_that_of_neighbours_of_the_best(rates: Any) -> None:
    # 0.01 would be good enough, but a worse rate lies between.
    losses = {0.04: 3.0, 0.01: 3.05, 0.02: 3.2, 0.08: 3.09, 0.16: None}
    assert rates.training_range(runs(rates, losses), 0.1) == (0.04, 0.08, False)
    assert rates.training_range(runs(rates, losses), 0.3) == (0.01, 0.08, True)
    assert rates.training_range(runs(rates, losses), 0.01) == (0.04, 0.04, False)


def test_without_any_loss_that_is_said(rates: Any) -> None:
    with pytest.raises(rates.UserError, match="a: no rate trains"):
        rates.training_range(runs(rates, {0.1: None}), 0.1)


def test_tables_show_failures_and_open_ends(rates: Any) -> None:
    rows = runs(rates, {0.1: 2.0, 0.2: None}) + runs(rates, {0.1: 2.5, 0.2: 2.0, 0.4: 2.7}, "b")
    text = rates.tables(rows, 0.1)
    assert "| 0.1 | 2.000 | 2.500 |" in text and "| 0.4 |  | 2.700 |" in text
    assert "| 0.2 | failed at step 9 | 2.000 |" in text
    assert "| a | 0 | 0.1 to 0.1 | >= 1 |" in text
    assert "| b | 0 | 0.2 to 0.2 | 1 |" in text
    assert math.isfinite(rates.training_range(rows[:2], 0.1)[1])
