"""The page to try a model, and what it asks besides texts: files of the package, and POST /lens."""

import asyncio
import concurrent.futures
import importlib.resources
import mimetypes
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from megatransformer_jax.serving.guard import json_response
from megatransformer_jax.serving.lens import Lens

# The page reads and runs nothing but its own files, and no other page may show it in a frame.
SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
_HEADERS = {
    "content-security-policy": SECURITY_POLICY,
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
_SCRIPTS = ("app.js", "api.js", "depths.js", "lens.js", "pane.js")
_FILES = ("index.html", *_SCRIPTS, "style.css", "icon.svg")
# Open to all: the page asks for the key.
PAGE_PATHS = ("/", *(f"/{name}" for name in _FILES[1:]))

Body = Callable[[Request], Awaitable[dict[str, Any]]]
Order = Callable[[Callable[[], Any]], concurrent.futures.Future]


def page_routes(lens: Lens | None, read_body: Body, order: Order) -> list[BaseRoute]:
    """The page and its lens.

    Args:
      lens: of the model. None: there is nothing to look into.
      read_body: the JSON object of a request.
      order: has the engine call something between two launches.
    """
    routes: list[BaseRoute] = [
        _file_route(path, name) for path, name in zip(PAGE_PATHS, _FILES, strict=True)
    ]
    return routes if lens is None else [*routes, _lens_route(lens, read_body, order)]


def _file_route(path: str, name: str) -> Route:
    content = importlib.resources.files(__package__).joinpath("playground", name).read_bytes()
    kind = mimetypes.guess_type(name)[0] or "application/octet-stream"

    async def send(request: Request) -> Response:
        return Response(content, headers=_HEADERS, media_type=kind)

    return Route(path, send)


def _lens_route(lens: Lens, read_body: Body, order: Order) -> Route:
    async def run(function: Callable[[], Any]) -> Any:
        return await asyncio.wrap_future(order(function))

    async def look(request: Request) -> Response:
        asked = await run_in_threadpool(lens.request, await read_body(request))
        return json_response(await lens.answer(asked, run))

    return Route("/lens", look, methods=["POST"])
