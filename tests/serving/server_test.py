"""A server starts, ends in order, and outlives clients that leave and an engine that fails."""

import asyncio
import concurrent.futures
import contextlib
import functools
import gc
import pathlib
import random
import socket
import threading
import time
from typing import Any

import httpx2
import openai
import pytest
from fake_batcher import FakeBatcher
from running_server import chat_model, client_of, running

from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.config.serving import ServingConfig
from megatransformer_jax.model import Model
from megatransformer_jax.serving.server import Server, check_address, serve

SLOW = functools.partial(FakeBatcher, seconds_per_tick=0.002)


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return chat_model(tmp_path_factory.mktemp("chat"))


def ask(server: Server, prompt: str = "abc", **body: Any) -> httpx2.Response:
    body = {"prompt": prompt, "max_tokens": 20, "ignore_eos": True, **body}
    return httpx2.post(f"{server.url}/v1/completions", json=body, timeout=30)


def health(server: Server) -> tuple[int, str]:
    answer = httpx2.get(f"{server.url}/health")
    return answer.status_code, answer.json()["status"]


def wait_for(condition: Any, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "this takes too long"
        time.sleep(0.005)


def test_it_is_loading_until_it_is_ready(lm: Model) -> None:
    go = threading.Event()

    class Waits(FakeBatcher):
        def compile(self, *args: Any) -> None:
            go.wait(30)
            super().compile(*args)

    config = ServingConfig(port=0, name="tiny")
    with Server(lm, config, make_batcher=Waits) as server:
        server.start()
        try:
            wait_for(lambda: server._http.started)
            assert health(server) == (503, "loading")
            refused = ask(server)
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "loading"
            assert int(refused.headers["retry-after"]) > 0
        finally:
            go.set()
        server.wait_until_ready()
        assert health(server) == (200, "ready")
        assert ask(server).status_code == 200
        assert f'href="{server.url}/"' in server._repr_html_()
    assert server.state == "stopped"
    with pytest.raises(httpx2.ConnectError):
        health(server)


def test_what_is_stopped_while_it_compiles_compiles_no_more(lm: Model) -> None:
    compiled = []

    class Compiles(FakeBatcher):
        def compile(self, progress: Any = None) -> None:
            for name in ("prefill", "turn", "advance"):
                progress(name)
                wait_for(lambda: server.state != "loading")
                compiled.append(name)

    with Server(lm, ServingConfig(port=0, name="tiny"), make_batcher=Compiles) as server:
        server.start()
        wait_for(lambda: server.engine.progress == "prefill")
        server.stop()
        assert compiled == ["prefill"] and server.state == "stopped"
        assert server.engine.failure is None


def test_stopping_loses_nothing_and_takes_nothing_new(lm: Model) -> None:
    """As after SIGTERM."""
    with running(lm, SLOW, rows=4, queue=32) as server:
        with client_of(server) as client, concurrent.futures.ThreadPoolExecutor(16) as pool:

            def read(number: int) -> int:
                stream = client.completions.create(
                    model="tiny",
                    prompt=f"p{number}",
                    max_tokens=25,
                    stream=number % 2 == 0,
                    extra_body={"ignore_eos": True, "return_token_ids": True},
                )
                parts = stream if number % 2 == 0 else [stream]
                return sum(len(getattr(part.choices[0], "token_ids", [])) for part in parts)

            texts = [pool.submit(read, number) for number in range(16)]
            wait_for(lambda: server.engine.num_open == 16)
            stopping = pool.submit(server.stop)
            wait_for(lambda: server.state == "draining")
            assert health(server) == (503, "draining")
            assert ask(server).json()["error"]["code"] == "draining"
            assert [text.result(30) for text in texts] == [25] * 16
            stopping.result(30)
        assert server.state == "stopped"


def test_what_takes_too_long_to_end_is_told_so(lm: Model) -> None:
    with (
        running(lm, functools.partial(FakeBatcher, seconds_per_tick=0.05)) as server,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        answer = pool.submit(ask, server, max_tokens=200)
        wait_for(lambda: server.engine.num_open == 1)
        began = time.monotonic()
        server.stop(0.1)
        assert time.monotonic() - began < 5
        assert answer.result(10).status_code == 500
        assert answer.result().json()["error"]["code"] == "generation_failed"


def test_an_engine_that_fails_is_told_to_all_and_the_process_goes_on(lm: Model) -> None:
    failing = functools.partial(FakeBatcher, seconds_per_tick=0.005, fail_at_turn=60)
    with (
        running(lm, failing, rows=2) as server,
        client_of(server) as client,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        options: Any = {"model": "tiny", "max_tokens": 100, "extra_body": {"ignore_eos": True}}

        def read() -> str:
            got = ""
            with pytest.raises(openai.APIError, match="engine has failed"):
                for part in client.completions.create(prompt="s", stream=True, **options):
                    got += part.choices[0].text
            return got

        def whole(prompt: str) -> None:
            with pytest.raises(openai.InternalServerError) as raised:
                client.completions.create(prompt=prompt, **options)
            assert raised.value.status_code == 500

        # The third waits for a row.
        waiting = []
        for count, ask_for in enumerate((read, lambda: whole("w"), lambda: whole("q")), 1):
            waiting.append(pool.submit(ask_for))
            wait_for(lambda count=count: server.engine.num_open == count)
        assert waiting[0].result(20)
        for future in waiting[1:]:
            future.result(20)
        assert health(server) == (503, "dead")
        refused = ask(server)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "dead"
        assert httpx2.get(f"{server.url}/metrics").status_code == 200


def test_a_stream_that_fails_has_no_end(lm: Model) -> None:
    """Load generators take a stream with an end for a success."""
    failing = functools.partial(FakeBatcher, seconds_per_tick=0.005, fail_at_turn=60)
    with running(lm, failing) as server:
        body = {"prompt": "a", "max_tokens": 100, "ignore_eos": True, "stream": True}
        url = f"{server.url}/v1/completions"
        text = b""
        with (
            pytest.raises(httpx2.RemoteProtocolError),
            httpx2.stream("POST", url, json=body) as answer,
        ):
            assert answer.status_code == 200
            for part in answer.iter_raw():
                text += part
        assert b'"code":"generation_failed"' in text and b"[DONE]" not in text


# ------------------------------------------------------------------------------
# Clients that leave.


def resident_bytes() -> int:
    gc.collect()
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


async def drop(port: int, rng: random.Random) -> None:
    """Sends a request, or a part of one, and leaves at a random moment."""
    stream = "true" if rng.random() < 0.7 else "false"
    body = f'{{"prompt":"p{rng.random()}","max_tokens":200,"ignore_eos":true,"stream":{stream}}}'
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()
    if rng.random() < 0.1:
        request = request[: rng.randrange(len(request))]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(reader.read(rng.choice([1, 4000])), rng.random() * 0.1)
    if rng.random() < 0.5:  # A reset instead of an orderly end.
        linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.close()


def test_clients_that_leave_free_their_rows(lm: Model) -> None:
    count = 500
    rng = random.Random(0)

    async def drop_all(number: int, port: int) -> None:
        for start in range(0, number, 20):
            await asyncio.gather(*(drop(port, rng) for _ in range(min(20, number - start))))

    batchers = []

    def make(*args: Any) -> FakeBatcher:
        batchers.append(SLOW(*args))
        return batchers[0]

    with running(lm, make, rows=8, queue=64) as server:
        port = int(server.url.rpartition(":")[2])
        asyncio.run(drop_all(count // 5, port))
        before = resident_bytes()
        asyncio.run(drop_all(count, port))
        wait_for(lambda: not server._http.server_state.tasks)
        turns = batchers[0].num_turns
        wait_for(lambda: server.engine.num_open == 0)
        # One launch may be on its way, and one be begun before the cancellation is seen.
        assert batchers[0].num_turns <= turns + 2
        grown = resident_bytes() - before
        assert grown < 20 * 2**20, f"{grown / 2**20:.1f} MiB more"
        counts = server.counts()
        assert counts["num_requests_running"] == counts["num_requests_waiting"] == 0
        assert {slot["state"] for slot in server.engine.slots()} == {"free"}
        assert counts["request_aborted_total"] > count / 2
        assert not server._http.server_state.connections
        assert ask(server).status_code == 200


# ------------------------------------------------------------------------------
# Starting.


def test_what_cannot_be_served_is_said_at_once(lm: Model) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port: {port} is taken at 127.0.0.1; choose"):
            check_address(ServingConfig(port=port))
    with pytest.raises(ConfigError, match="is not an address of this machine"):
        check_address(ServingConfig(host="no.such.host.invalid"))
    with pytest.raises(UserError, match="did you mean 'rows'"):
        serve(lm, row=3)
    with pytest.raises(UserError, match=r"is not an mt\.Model"):
        serve("runs/recurrent")  # type: ignore[arg-type]


@pytest.mark.parametrize("key", ["", "two words", "schl\xfcssel"])
def test_a_key_that_cannot_be_sent_is_an_error(lm: Model, key: str, tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="api_key: is not a key"):
        serve(lm, api_key=key)
    file = tmp_path / "key.txt"
    file.write_text(f"{key}\nmore")
    with pytest.raises(ConfigError, match="api_key_file: is not a key"):
        serve(lm, api_key_file=str(file))
    with pytest.raises(ConfigError, match=r"key_file: .* cannot be read"):
        serve(lm, api_key_file=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="give one of the two"):
        serve(lm, api_key="a", api_key_file=str(file))


def test_the_key_of_a_file_is_asked_for(lm: Model, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "key.txt"
    file.write_text("s3cret\n")
    with running(lm, api_key_file=str(file)) as server:
        assert server.has_key and ask(server).status_code == 401
        with client_of(server, "s3cret") as client:
            assert client.models.list().data
