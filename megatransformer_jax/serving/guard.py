"""Who may ask, and what is read: request numbers, host names, the API key, bodies of bounded size.

A page of another site that a browser shows can send requests to this machine. The check of the host
name keeps out those that reach it under a name of theirs, and bodies must say that they are JSON,
which a page may send only where the server allows it (CORS), which it does not unless told to.
"""

import asyncio
import hmac
import re
import secrets
from collections.abc import Callable, Collection, Mapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megatransformer_jax.serving.errors import RequestError, error_answer, json_bytes

# A client that sends its body more slowly than this keeps a connection for nothing.
BODY_SECONDS = 30.0
# Of a body that is too large, so many times the limit are read and dropped: a client that is still
# sending would see a broken connection, not the answer.
_DROPPED = 16
_REQUEST_ID = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)


class Guard:
    """Middleware around the whole application.

    Every answer gets `x-request-id`, that of the request if it has a usable one.

    Args:
      app: what is guarded.
      allows_host: whether a request may name this host, by the value of its header `Host`.
      api_key: what `Authorization: Bearer` must say. None: nothing is asked for.
      open_paths: those that need no key; one that ends with "/" stands for all below it as well.
    """

    def __init__(
        self,
        app: ASGIApp,
        allows_host: Callable[[str], bool],
        api_key: str | None,
        open_paths: Collection[str],
    ):
        self._app = app
        self._allows_host = allows_host
        self._api_key = None if api_key is None else api_key.encode()
        self._open_paths = tuple(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers, or has the application answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = _request_id(headers.get("x-request-id"))
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                answered = MutableHeaders(scope=message)
                answered["x-request-id"] = request_id
                answered["x-content-type-options"] = "nosniff"
            await send(message)

        try:
            self._check_host(headers.get("host", ""))
            self._check_key(scope["path"], headers)
        except RequestError as error:
            await error_response(error)(scope, receive, send_with_id)
            return
        await self._app(scope, receive, send_with_id)

    def _check_host(self, host: str) -> None:
        if not self._allows_host(host):
            raise RequestError(
                f"the server does not answer as {host!r}; use the address that it shows, or start "
                "it with --allowed_hosts=NAME.",
                status=403,
            )

    def _check_key(self, path: str, headers: Headers) -> None:
        if self._api_key is None or self._is_open(path):
            return
        given = headers.get("authorization")
        scheme, _, key = (given or "").partition(" ")
        # Names of schemes have no case, and any number of spaces may follow.
        is_key = hmac.compare_digest(key.strip(" ").encode("latin-1"), self._api_key)
        if is_key and scheme.lower() == "bearer":
            return
        problem = "is missing" if given is None else "is not the server's"
        raise RequestError(
            f"the API key {problem}; send it as 'Authorization: Bearer KEY'.", status=401
        )

    def _is_open(self, path: str) -> bool:
        return any(
            path == place or (place.endswith("/") and place != "/" and path.startswith(place))
            for place in self._open_paths
        )


def _request_id(given: str | None) -> str:
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given
    return f"req-{secrets.token_hex(12)}"


def error_response(error: BaseException) -> Response:
    """The answer that says what was wrong."""
    answer = error_answer(error)
    headers = dict(answer.headers)
    if answer.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if answer.status == 413:  # Nobody reads the rest of the body.
        headers["Connection"] = "close"
    return json_response(answer.body, answer.status, headers)


def json_response(
    value: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """An answer in JSON."""
    return Response(json_bytes(value), status, headers, media_type="application/json")


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The body of a request, which must say that it is JSON.

    Raises:
      RequestError: if it says something else, or is too long or too slow.
      ClientDisconnect: if the client is gone.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(
            f"the body's type is {kind!r}; send JSON with 'Content-Type: application/json'.",
            status=415,
        )
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await _received(request, max_bytes)
    except TimeoutError:
        raise RequestError(
            f"the body did not come within {BODY_SECONDS:g} s; send it again.", status=408
        ) from None


async def _received(request: Request, max_bytes: int) -> bytes:
    length = request.headers.get("content-length", "")
    is_too_long = length.isdecimal() and int(length) > max_bytes
    body, size = bytearray(), 0
    if not (is_too_long and _stops_early(request, int(length), max_bytes)):
        async for part in request.stream():
            size += len(part)
            if size > _DROPPED * max_bytes:
                break
            if not is_too_long:
                body += part
                is_too_long = len(body) > max_bytes
    if is_too_long:
        raise RequestError(
            f"the body has over {max_bytes} bytes; send less, or start the server with a larger "
            "--max_body_bytes.",
            status=413,
        )
    return bytes(body)


def _stops_early(request: Request, length: int, max_bytes: int) -> bool:
    """Whether nothing of a body that is too long is read: it waits to be asked for, or is huge."""
    expects = request.headers.get("expect", "").lower() == "100-continue"
    return expects or length > _DROPPED * max_bytes
