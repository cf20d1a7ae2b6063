"""The command: it shows where the server is, and ends in order when it is told to."""

import concurrent.futures
import functools
import os
import pathlib
import signal
import socket
import time
from typing import Any

import httpx2
import pytest
from fake_batcher import FakeBatcher
from running_server import chat_model

from megatransformer_jax.cli import serve
from megatransformer_jax.cli.commands import main as command
from megatransformer_jax.serving import engine


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> int:
    """A free port; the command finds a tiny model, whose tokens take a while."""
    loaded = chat_model(tmp_path / "chat")._loaded
    monkeypatch.setattr(serve, "load_chosen_model", lambda options: loaded)
    slow = functools.partial(FakeBatcher, seconds_per_tick=0.005)
    monkeypatch.setattr(engine, "_make_batcher", slow)
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def test_sigterm_ends_it_when_open_requests_have_ended(
    port: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(serve.API_KEY_VARIABLE, "s3cret")
    url = f"http://127.0.0.1:{port}"

    is_told = False

    def wait_until(status: int) -> None:
        end = time.monotonic() + 30
        while time.monotonic() < end:
            try:
                if httpx2.get(f"{url}/health").status_code == status:
                    return
            except httpx2.ConnectError:
                if status == 503 and is_told:
                    return  # It has stopped already.
            time.sleep(0.01)
        raise TimeoutError

    def ask_and_stop() -> Any:
        body = {"prompt": "a", "max_tokens": 40, "ignore_eos": True, "stream": True}
        headers = {"authorization": "Bearer s3cret"}
        nonlocal is_told
        try:
            wait_until(200)
            with httpx2.stream(
                "POST", f"{url}/v1/completions", json=body, headers=headers, timeout=30
            ) as answer:
                lines = answer.iter_lines()
                first = next(lines)
                is_told = True
                os.kill(os.getpid(), signal.SIGTERM)
                wait_until(503)
                return [first, *lines]
        except BaseException:
            if not is_told:  # So that the test ends.
                os.kill(os.getpid(), signal.SIGTERM)
            raise

    with concurrent.futures.ThreadPoolExecutor() as pool:
        answer = pool.submit(ask_and_stop)
        command("serve", ["--model=runs/my_model", f"--port={port}", "--rows=2"])
        lines = [line for line in answer.result(30) if line]
    assert lines[-1] == "data: [DONE]" and '"finish_reason":"length"' in lines[-2]
    shown = capsys.readouterr().out
    for text in ("my_model: a tiny model", f"{url}/v1, with a key", "ready after", "stopped"):
        assert text in shown
    assert "s3cret" not in shown
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_what_does_not_fit_is_one_line(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", port)):
        for words, problem in (
            ([f"--port={port}"], f"--port: {port} is taken at 127.0.0.1"),
            (["--max_depth=1"], "--max_depth: 1 is below the trained mean depth 3"),
            (["--api_key_file=none.txt"], "--api_key_file: none.txt cannot be read"),
            (["--criteria=klr"], "--criteria: "),
        ):
            with pytest.raises(SystemExit) as ended:
                command("serve", ["--model=runs/my_model", "--port=0", *words])
            assert ended.value.code == 2
            assert problem in capsys.readouterr().err.splitlines()[-1]
