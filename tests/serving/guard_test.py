"""Who is let in, and which bodies are read, without a server around."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from megatransformer_jax.serving import guard
from megatransformer_jax.serving.errors import RequestError
from megatransformer_jax.serving.guard import Guard, json_response, read_body

JSON = {"content-type": "application/json"}


async def hello(scope: Scope, receive: Receive, send: Send) -> None:
    await json_response({"id": scope["state"]["request_id"]})(scope, receive, send)


def scope_of(path: str, headers: dict[str, str]) -> dict[str, Any]:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    return {"type": "http", "method": "GET", "path": path, "headers": raw}


def ask(app: Guard, path: str = "/v1/models", **headers: str) -> tuple[int, dict[str, str], Any]:
    """Status, headers and body of what a request gets."""
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    names = {name.replace("_", "-"): value for name, value in headers.items()}
    asyncio.run(app(scope_of(path, names), receive, send))
    answered = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], answered, json.loads(sent[1]["body"])


def test_the_key_is_asked_for_but_where_it_is_not() -> None:
    app = Guard(hello, lambda host: True, "s3cret", ("/health", "/", "/playground/"))
    assert ask(app, authorization="Bearer s3cret")[0] == 200
    assert ask(app, authorization="bearer  s3cret")[0] == 200
    for path in ("/health", "/", "/playground/app.js"):
        assert ask(app, path)[0] == 200
    for headers in (
        {},
        {"authorization": "Bearer s3cre"},
        {"authorization": "s3cret"},
        {"authorization": "Bearer \xe9"},
    ):
        status, answered, body = ask(app, **headers)
        assert status == 401 and answered["www-authenticate"] == "Bearer"
        assert body["error"]["code"] == "invalid_api_key" and "s3cret" not in str(body)
    assert ask(app, "/healthy")[0] == ask(app, "/playground")[0] == 401
    assert ask(Guard(hello, lambda host: True, None, ()))[0] == 200


def test_other_host_names_are_refused() -> None:
    app = Guard(hello, {"here:80"}.__contains__, None, ())
    assert ask(app, host="here:80")[0] == 200
    status, _, body = ask(app, host="evil.example")
    assert status == 403 and "'evil.example'" in body["error"]["message"]
    assert ask(app)[0] == 403


def test_every_answer_has_a_request_id() -> None:
    app = Guard(hello, lambda host: host != "no", None, ())
    _, answered, body = ask(app, x_request_id="mine-1")
    assert answered["x-request-id"] == body["id"] == "mine-1"
    assert answered["x-content-type-options"] == "nosniff"
    for unusable in ("", "a b", "x" * 129, "\xe9"):
        made = {ask(app, x_request_id=unusable)[1]["x-request-id"] for _ in range(2)}
        assert len(made) == 2 and all(name.startswith("req-") for name in made)
    assert ask(app, host="no", x_request_id="mine-2")[1]["x-request-id"] == "mine-2"


def body_of(parts: Sequence[bytes | None], headers: dict[str, str]) -> tuple[Any, int]:
    """What `read_body` makes of parts with at most 100 bytes, and how many parts it took.

    None among them: the client leaves.
    """
    rest = list(parts)

    async def receive() -> Any:
        if not rest:
            await asyncio.Event().wait()
        part = rest.pop(0)
        if part is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": part, "more_body": bool(rest)}

    async def run() -> Any:
        try:
            return await read_body(Request(scope_of("/", headers), receive), 100)
        except (RequestError, ClientDisconnect) as error:
            return error

    found = asyncio.run(run())
    return found, len(parts) - len(rest)


def test_a_body_is_read_up_to_its_limit() -> None:
    assert body_of([b"a" * 60, b"b" * 40], JSON)[0] == b"a" * 60 + b"b" * 40
    long, length = [b"a" * 60] * 2, {"content-length": "120"}
    # What comes is dropped, so that the client reads the answer, unless it waits or is huge.
    for parts, headers, taken in (
        (long, JSON, 2),
        (long, JSON | length, 2),
        (long, JSON | length | {"expect": "100-continue"}, 0),
        ([b"a" * 1000] * 9, JSON, 2),
        ([b"a" * 1000] * 9, JSON | {"content-length": "9000"}, 0),
    ):
        found, num_taken = body_of(parts, headers)
        assert found.status == 413 and "over 100 bytes" in str(found)
        assert num_taken == taken


def test_a_body_must_be_json_and_come(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ({}, {"content-type": "text/plain"}, {"content-type": "application/json5"}):
        assert body_of([b"{}"], kind)[0].status == 415
    for kind in ("Application/JSON", "application/json; charset=utf-8"):
        assert body_of([b"{}"], {"content-type": kind})[0] == b"{}"
    assert isinstance(body_of([b"{", None], JSON)[0], ClientDisconnect)
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.01)
    parts: list[bytes | None] = []
    assert body_of(parts, JSON)[0].status == 408
