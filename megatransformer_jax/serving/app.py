"""The HTTP side: OpenAI's endpoints and a few more, over an engine.

What a request means and what an answer looks like is said in `fields`. Here are the paths, and the
order in which a request is read, handed to the engine and answered.
"""

import dataclasses
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from megatransformer_jax.config.option import UserError
from megatransformer_jax.config.serving import ServingConfig
from megatransformer_jax.serving import bodies, fields, prompts
from megatransformer_jax.serving.answers import Answer, model_card
from megatransformer_jax.serving.delivery import Disconnected, EventStream, Exchange
from megatransformer_jax.serving.engine import Engine
from megatransformer_jax.serving.errors import RequestError, error_body
from megatransformer_jax.serving.guard import Guard, error_response, json_response, read_body
from megatransformer_jax.serving.openapi import openapi_document
from megatransformer_jax.serving.served import ServedModel

# Nobody reads an answer with this status (nginx's for a client that has left).
_CLIENT_GONE = 499


@dataclasses.dataclass(frozen=True)
class Service:
    """What endpoints work with.

    Attributes:
      engine: makes the texts.
      served: facts about the model.
      config: the options; settled.
    """

    engine: Engine
    served: ServedModel
    config: ServingConfig

    async def body(self, request: Request) -> dict[str, Any]:
        """The JSON object that a request sends.

        Raises:
          RequestError: if it sends none, or one that is too long.
        """
        return bodies.read_body(await read_body(request, self.config.max_body_bytes))


def make_app(
    service: Service,
    api_key: str | None = None,
    more: Sequence[BaseRoute] = (),
    open_paths: Sequence[str] = (),
) -> ASGIApp:
    """The whole HTTP side, to be run by a server.

    Args:
      service: what is served.
      api_key: that requests must show. None: anyone may ask.
      more: routes besides those of this module.
      open_paths: of those, the ones that need no key, see `Guard`.
    """
    app = Starlette(
        routes=[*_text_routes(service), *_token_routes(service), *_state_routes(service), *more],
        exception_handlers={
            HTTPException: _routing_error,
            UserError: _refusal,
            Disconnected: _nobody_reads,
            ClientDisconnect: _nobody_reads,
            Exception: _refusal,
        },
    )
    app.router.redirect_slashes = False
    guarded: ASGIApp = Guard(app, service.config.allows_host, api_key, ("/health", *open_paths))
    if not service.config.cors_origins:
        return guarded
    return CORSMiddleware(
        guarded,
        allow_origins=service.config.cors_origins,
        allow_methods=("GET", "POST"),
        allow_headers=("authorization", "content-type", "x-request-id"),
        expose_headers=("x-request-id",),
    )


# ------------------------------------------------------------------------------
# Texts.


def _text_routes(service: Service) -> list[BaseRoute]:
    async def completions(request: Request) -> Response:
        return await _answer(service, request, fields.completion_request)

    async def chat(request: Request) -> Response:
        return await _answer(service, request, fields.chat_request)

    return [
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
    ]


async def _answer(
    service: Service,
    request: Request,
    read: Callable[[Mapping[str, Any], ServedModel, ServingConfig], fields.Request],
) -> Response:
    body = await service.body(request)
    # Tokenizing a long prompt takes a while, and other answers must go on.
    asked = await run_in_threadpool(read, body, service.served, service.config)
    answer = Answer(asked, service.served, secrets.token_hex(12), int(time.time()))
    deadline = time.monotonic() + service.config.request_seconds
    exchange = Exchange(len(asked.jobs), request.receive, deadline)
    is_handed_on = False
    try:
        ticket = service.engine.submit(
            asked.jobs, exchange.deliver, deadline, request.state.request_id
        )
        exchange.keep(ticket)
        chunks = answer.first_chunks()
        # What goes wrong before anything has been made is reported by the status code.
        while True:
            for number, event in await exchange.next():
                chunks += answer.add(number, event)
            if asked.options.stream:
                is_handed_on = True
                return EventStream(exchange, chunks, answer)
            if exchange.is_over:
                return json_response(answer.whole())
    finally:
        if not is_handed_on:
            exchange.close()


# ------------------------------------------------------------------------------
# Tokens.


def _token_routes(service: Service) -> list[BaseRoute]:
    async def tokenize(request: Request) -> Response:
        body = await service.body(request)
        return json_response(await run_in_threadpool(prompts.tokenize, body, service.served))

    async def detokenize(request: Request) -> Response:
        body = await service.body(request)
        return json_response(await run_in_threadpool(prompts.detokenize, body, service.served))

    return [
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
    ]


# ------------------------------------------------------------------------------
# The server and its model.


def _state_routes(service: Service) -> list[BaseRoute]:
    engine, served, config = service.engine, service.served, service.config
    card = model_card(served, config)
    document = openapi_document(served, config)

    async def health(request: Request) -> Response:
        state = engine.state
        return json_response({"status": state}, 200 if state == "ready" else 503)

    async def metrics(request: Request) -> Response:
        return Response(
            engine.metrics.text(), headers={"content-type": engine.metrics.content_type}
        )

    async def slots(request: Request) -> Response:
        return json_response({"object": "list", "data": engine.slots()})

    async def models(request: Request) -> Response:
        return json_response({"object": "list", "data": [card]})

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        if name != served.name:
            raise RequestError(
                f"there is no model {name!r}; this server has {served.name!r}.",
                status=404,
                param="model",
                code="model_not_found",
            )
        return json_response(card)

    async def openapi(request: Request) -> Response:
        return json_response(document)

    return [
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/slots", slots),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/openapi.json", openapi),
    ]


# ------------------------------------------------------------------------------
# Errors.


async def _routing_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    method, path = request.method, request.url.path
    if error.status_code == 404:
        message = f"there is no {path}; /openapi.json lists what there is."
    elif error.status_code == 405:
        allowed = sorted((error.headers or {}).get("Allow", "").split(", "))
        message = f"{path} does not take {method}; use {' or '.join(allowed)}."
    else:
        message = error.detail
    return json_response(error_body(message, error.status_code), error.status_code, error.headers)


async def _refusal(request: Request, error: Exception) -> Response:
    return error_response(error)


async def _nobody_reads(request: Request, error: Exception) -> Response:
    return Response(status_code=_CLIENT_GONE)
