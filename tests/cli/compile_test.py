"""What the command refuses before anything is compiled."""

import sys
import time
import types

import pytest

from megatransformer_jax.cli import compile as compiling
from megatransformer_jax.cli.compile import COMMAND, use_described_devices
from megatransformer_jax.cli.flags import parse
from megatransformer_jax.config.option import UserError
from megatransformer_jax.sharding.topology import parse_topology

RUN = ("--config.preset=tiny",)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--topology: is missing; name a slice or a machine"),
        (("--topology=h100-9",), "--topology: 'h100-9': a machine has 1 to 8 GPUs"),
        (("--topology=v4",), "--topology: 'v4' is not the name of a slice or a machine"),
        (("--topology=v4-8", "--rows=2"), "--rows: 2 would be ignored with phase='train'"),
        (
            ("--topology=v4-8", "--phase=serve", "--prompt_tokens=3"),
            "--prompt_tokens: 3 would be ignored with phase='serve'; set phase to prefill or",
        ),
        (
            ("--topology=v4-8", "--search", "--phase=decode"),
            "--phase: 'decode' would be ignored with search",
        ),
        (("--topology=v4-8", "--budget=2"), "--budget: 2.0 would be ignored without search"),
    ],
)
def test_options_that_cannot_be_used(words, message):
    with pytest.raises(UserError) as caught:
        parse(COMMAND, [*RUN, *words])
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("option", ["json", "hlo"])
def test_files_are_checked_before_anything_is_compiled(option, tmp_path):
    for path, message in [(tmp_path, "is a folder"), (tmp_path / "a" / "b", "does not exist")]:
        with pytest.raises(UserError, match=message):
            COMMAND.run(parse(COMMAND, [*RUN, "--topology=v4-8", f"--{option}={path}"]))


def test_a_run_is_needed():
    with pytest.raises(UserError, match=r"is missing; name an experiment or a size"):
        COMMAND.run(parse(COMMAND, ["--topology=v4-8"]))


def test_jax_that_was_imported_before_is_told_of(monkeypatch):
    monkeypatch.setattr("megatransformer_jax.cli.compile.import_extra", lambda *given: None)
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    monkeypatch.setitem(sys.modules, "jax", types.ModuleType("jax"))
    with pytest.raises(UserError, match=r"already imported.*set them in the shell: .*TPU_SKIP_MDS"):
        use_described_devices(parse_topology("v4-8"))


def test_gpus_need_only_jax_to_leave_them_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", types.ModuleType("jax"))
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    use_described_devices(parse_topology("h100-8"))
    monkeypatch.delenv("JAX_PLATFORMS")
    with pytest.raises(UserError, match=r"set them in the shell: JAX_PLATFORMS=cpu$"):
        use_described_devices(parse_topology("h100-8"))


def test_a_line_a_minute_says_what_is_done_where_there_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(compiling, "_LINE_SECONDS", 0.05)

    def work(progress):
        progress("compiling the train step")
        time.sleep(0.12)
        return "report"

    assert compiling._watched(work) == "report"
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2 and lines[0] == "0:00 compiling the train step (for 0:00)"


def test_an_error_of_the_work_is_raised():
    def work(progress):
        raise UserError("no such slice")

    with pytest.raises(UserError, match="no such slice"):
        compiling._watched(work)
