"""The command on a small run's checkpoint, from the words on the command line to the text."""

import io
import json
import pathlib
import re
from typing import Any

import pytest
from written_run import write_run

from megatransformer_jax.cli.commands import main as command
from megatransformer_jax.config.build import build


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory, small_run: Any) -> str:
    folder = tmp_path_factory.mktemp("run") / "run"
    write_run(build(small_run(folder)), {4: 1.0, 8: 2.0})
    return str(folder)


@pytest.fixture
def run(workdir: str, capfd: pytest.CaptureFixture[str]) -> Any:
    """Runs the command; returns what it wrote to stdout and stderr."""

    def run(*words: str) -> tuple[str, str]:
        command("generate", [f"--model={workdir}", "--max_new_tokens=6", *words])
        shown = capfd.readouterr()
        return shown.out, shown.err

    return run


def fails(run: Any, capfd: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line of an error."""
    with pytest.raises(SystemExit) as caught:
        run(*words)
    assert caught.value.code == 2
    return capfd.readouterr().err.splitlines()[-1]


def test_a_prompt_is_continued(run: Any, caplog: pytest.LogCaptureFixture) -> None:
    out, err = run("--prompt=The ", "--strategy=greedy")
    assert out.startswith("The ")
    assert re.search(r"run .*, step 8 \(latest\)\n", caplog.text)
    assert re.search(r"\d tokens in .* tokens/s\), the first after .*, mean depth 2\.00", err)
    assert run("--prompt=The ", "--strategy=greedy")[0] == out


def test_json_has_every_sample(run: Any, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "out.jsonl"
    words = ["--prompt=a", "--prompt=The ", "--num_samples=2", f"--json={path}", "--depth=3"]
    out, _ = run(*words, "--step=best", "--seed=1")
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [(record["prompt"], record["sample"]) for record in records] == [
        ("a", 0),
        ("a", 1),
        ("The ", 0),
        ("The ", 1),
    ]
    for record in records:
        assert 1 <= len(record["token_ids"]) == len(record["depths"]) <= 6
        assert set(record["depths"]) == {3}
        assert record["score"] < 0
        assert record["prompt"] + record["text"] in out
    assert records[0]["token_ids"] != records[1]["token_ids"]
    first = path.read_text()
    run(*words, "--step=best", "--seed=1")
    assert path.read_text() == first


def test_depth_is_shown_and_exits_shorten_it(run: Any) -> None:
    words = ["--prompt=a", "--strategy=greedy", "--show_depth", "--depth=5"]
    out, _ = run(*words)
    assert re.search(r"\[5[\],]", out)
    assert out.endswith("iterations: mean 5.00 of 5\n")
    out, _ = run(*words, "--exit_criterion=latent_diff", "--exit_threshold=1000", "--min_depth=2")
    assert out.endswith("iterations: mean 2.00 of 5\n")


def test_ids_are_continued(run: Any) -> None:
    assert run("--prompt_ids=1,68,69", "--strategy=greedy")[0].startswith("AB")


def test_a_session_continues_lines_and_changes_its_settings(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "The \n/depth 3\n/depth none such\n/reset\nThe \n/max_new_tokens 2\n/quit\nThe \n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    _, err = run("--interactive", "--strategy=greedy")
    assert re.findall(r"mean depth (\S+?),?\s", err) == ["2.00", "3.00"]
    assert "error: /depth: 'none such' is not a whole number" in err


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--prompt=a", "--cache_slots=3"], "error: --cache_slots: 3 exceeds depth=2"),
        (["--prompt=a", "--step=5"], "has no such checkpoint; it has the steps 4, 8"),
        (["--prompt=a", "--param_dtype=stored"], "error: --param_dtype: 'stored' is for check"),
        (["--prompt=a", "--weights=raw"], "has one set of weights and no average"),
        (["--prompt_ids=1,999"], "999"),
        (["--prompt=" + "a" * 2000], "max_length"),
        (["--prompt=a", "--json=absent/a"], "error: --json=absent/a: folder absent does not exist"),
    ],
)
def test_what_does_not_fit_the_model_is_one_line(
    run: Any, capfd: pytest.CaptureFixture[str], words: list[str], problem: str
) -> None:
    assert problem in fails(run, capfd, *words)


def test_a_folder_without_a_model_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command("generate", ["--model=absent", "--prompt=a"])
    assert "absent: no such folder" in capfd.readouterr().err
