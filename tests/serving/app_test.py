"""Paths, statuses and headers, as any client sees them."""

import concurrent.futures
import functools
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import prometheus_client.parser
import pytest
from fake_batcher import FakeBatcher
from running_server import chat_model, running

from megatransformer_jax.model import Model
from megatransformer_jax.serving.server import Server


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return chat_model(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def server(lm: Model) -> Iterator[Server]:
    with running(lm) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=server.url, timeout=30) as client:
        yield client


def complete(client: httpx2.Client, **body: Any) -> httpx2.Response:
    return client.post("/v1/completions", json={"prompt": "abc", "ignore_eos": True, **body})


def test_what_is_not_there_is_said_in_the_same_shape(client: httpx2.Client) -> None:
    for method, path, status, code, message in (
        ("GET", "/v2", 404, "not_found", "there is no /v2; /openapi.json lists what there is."),
        ("GET", "/v1/models/", 404, "model_not_found", "there is no model ''"),
        ("GET", "/v1/completions", 405, "method_not_allowed", "does not take GET; use POST."),
        ("POST", "/health", 405, "method_not_allowed", "does not take POST; use GET or HEAD."),
        ("OPTIONS", "/v1/completions", 405, "method_not_allowed", "does not take OPTIONS"),
    ):
        answer = client.request(method, path)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (status, code)
        assert message in error["message"] and error["type"] == "invalid_request_error"
        assert answer.headers["x-request-id"]
        if status == 405:
            assert answer.headers["allow"]


def test_bodies_that_are_no_json(client: httpx2.Client) -> None:
    post = functools.partial(client.post, "/v1/completions")
    assert post(data={"prompt": "a"}).status_code == 415
    assert post(content=b'{"prompt": "a"}').status_code == 415
    json_type = {"content-type": "application/json"}
    for body in (b"", b"[]", b'{"prompt": NaN}', b"{" * 10_000):
        answer = post(content=body, headers=json_type)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")


def test_other_pages_may_not_read_answers_unless_told_so(lm: Model, client: httpx2.Client) -> None:
    origin = {"origin": "https://example.org"}
    asked = origin | {
        "access-control-request-method": "POST",
        "access-control-request-headers": "content-type,authorization",
    }
    assert client.options("/v1/completions", headers=asked).status_code == 405
    answer = client.get("/v1/models", headers=origin)
    assert not any(name.startswith("access-control") for name in answer.headers)
    with running(lm, cors_origins=("https://example.org",), api_key="k") as server:
        allowed = httpx2.options(f"{server.url}/v1/completions", headers=asked)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://example.org"
        others = httpx2.get(f"{server.url}/health", headers={"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in others.headers


def test_tokens_and_texts(client: httpx2.Client) -> None:
    found = client.post("/tokenize", json={"prompt": "abc"}).json()
    assert found["count"] == len(found["tokens"]) == 4
    back = client.post("/detokenize", json={"tokens": found["tokens"]}).json()
    assert back == {"prompt": "abc"}


def test_metrics_are_the_sums_of_usages(lm: Model) -> None:
    with running(lm, rows=2) as server, httpx2.Client(base_url=server.url) as client:
        usages = [
            complete(client, prompt=f"p{number}", max_tokens=3 + number, depth=1 + number).json()
            for number in range(4)
        ]
        usages.append(complete(client, n=3, max_tokens=5, exit_criterion="latent_diff").json())
        answer = client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        values = {
            sample.name.removeprefix("megatransformer:"): sample.value
            for family in prometheus_client.parser.text_string_to_metric_families(answer.text)
            for sample in family.samples
        }
        usages = [usage["usage"] for usage in usages]
        assert values["generation_tokens_total"] == 3 + 4 + 5 + 6 + 3 * 5
        for name, total in (("completion", "generation"), ("prompt", "prompt")):
            wanted = sum(usage[f"{name}_tokens"] for usage in usages)
            assert values[f"{total}_tokens_total"] == wanted
        details = [usage["completion_tokens_details"]["core_iterations"] for usage in usages]
        assert values["core_iterations_total"] == values["token_depth_sum"] == sum(details)
        assert details[:4] == [3 * 1, 4 * 2, 5 * 3, 6 * 4]
        assert values["num_requests_running"] == values["compilations_total"] == 0


def test_rows_tell_what_they_do(lm: Model) -> None:
    slow = functools.partial(FakeBatcher, seconds_per_tick=0.01)
    with (
        running(lm, slow, rows=2) as server,
        httpx2.Client(base_url=server.url) as client,
        client.stream(
            "POST",
            "/v1/completions",
            json={"prompt": "a", "max_tokens": 50, "depth": 7, "stream": True, "ignore_eos": True},
            headers={"x-request-id": "mine"},
        ) as stream,
    ):
        next(stream.iter_lines())
        slots = client.get("/slots").json()["data"]
        assert len(slots) == 2
        (busy,) = (slot for slot in slots if slot["state"] != "free")
        assert (busy["request"], busy["depth"], busy["row"]) == ("mine", 7, slots.index(busy))


def test_a_request_ends_when_its_time_is_over(lm: Model) -> None:
    """With what it has; one that has nothing yet is an error."""
    slow = functools.partial(FakeBatcher, seconds_per_tick=0.01)
    with (
        running(lm, slow, rows=1, request_seconds=0.6) as server,
        httpx2.Client(base_url=server.url, timeout=30) as client,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        first = pool.submit(complete, client, max_tokens=200)
        while server.engine.num_open < 1:
            time.sleep(0.005)
        late = complete(client, max_tokens=200)
        choice = first.result(10).json()["choices"][0]
        assert 1 < len(choice["text"]) < 100
        assert (choice["finish_reason"], choice["end_reason"]) == ("length", "deadline")
        assert late.status_code == 503
        assert late.json()["error"]["code"] == "deadline_exceeded"
