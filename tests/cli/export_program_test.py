"""The command: what it writes and prints, and what it refuses."""

import pathlib
from typing import Any

import pytest
from exported_tiny import CONFIG, loaded

from megatransformer_jax.cli import export_program
from megatransformer_jax.cli.commands import main as command


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Any:
    """Runs the command on a tiny model; returns its exit status and its folder."""
    monkeypatch.setattr(export_program, "load_chosen_model", lambda options: loaded())
    output = tmp_path / "program"

    def run(*words: str) -> tuple[int, pathlib.Path]:
        try:
            command("export-program", ["--model=runs/tiny", f"--output={output}", *words])
        except SystemExit as end:
            return int(end.code or 0), output
        return 0, output

    return run


def test_files_are_written_and_listed(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    status, output = run("--capacity=64", "--chunk=16")
    assert status == 0
    shown = capsys.readouterr().out
    for path in output.iterdir():
        assert path.name in shown
    assert {"program.json", "generate.py", "step.stablehlo"} <= {p.name for p in output.iterdir()}
    status, _ = run()
    assert status == 2 and "is not an empty folder" in capsys.readouterr().err


def test_what_does_not_fit_is_one_line(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for word, problem in (
        (f"--capacity={CONFIG.max_length + 1}", "--capacity: 81 exceeds the 80 tokens"),
        ("--criterion=klr", "('klr',) is not allowed; each item must be one of 'fixed'"),
        ("--format=tflite", "it must be one of 'stablehlo', 'onnx'"),
        ("--criterion=learned_gate", "--criterion: reads an exit gate, and the model has none"),
    ):
        assert run(word)[0] == 2
        assert problem in capsys.readouterr().err.splitlines()[-1]
