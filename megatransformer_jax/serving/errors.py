"""Errors of requests in OpenAI's shape: a status, and a body that says what was wrong.

`{"error": {"message", "type", "param", "code"}}`, where `param` names the field and `code` is a
word that programs can tell errors apart by.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from megatransformer_jax.config.generation import flag_name
from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.serving.requests import Busy, NotServing

# What was sent may be long, and is quoted in messages.
MAX_MESSAGE = 1000
MAX_PARAM = 100

INVALID = "invalid_request_error"
# What OpenAI calls errors of each status. Others are as the nearest: 4xx the caller's, 5xx ours.
TYPES: Mapping[int, str] = {
    400: INVALID,
    401: INVALID,
    403: INVALID,
    404: INVALID,
    405: INVALID,
    408: INVALID,
    413: INVALID,
    415: INVALID,
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}
# Statuses that mean one thing here.
CODES: Mapping[int, str] = {
    400: "invalid_value",
    401: "invalid_api_key",
    403: "host_not_allowed",
    404: "not_found",
    405: "method_not_allowed",
    408: "body_timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
    429: "queue_full",
    500: "internal_error",
    503: "unavailable",
}
# All values of `code`; /openapi.json lists them.
ALL_CODES = (
    *CODES.values(),
    "invalid_json",
    "missing_field",
    "unknown_field",
    "unsupported_field",
    "unsupported_value",
    "model_not_found",
    "no_chat_template",
    "no_tokenizer",
    "images_not_supported",
    "invalid_image",
    "context_length_exceeded",
    "deadline_exceeded",
    "generation_failed",
    "loading",
    "draining",
    "dead",
)


@dataclasses.dataclass(frozen=True)
class ErrorAnswer:
    """What is sent.

    Attributes:
      status: of HTTP.
      body: as JSON has it.
      headers: more of them.
    """

    status: int
    body: dict[str, Any]
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)


class RequestError(UserError):
    """A request that is refused.

    Attributes:
      status: of HTTP.
      param: the field that is wrong; None: none in particular.
      code: one of `ALL_CODES`.
    """

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = CODES[status] if code is None else code


def error_answer(error: BaseException) -> ErrorAnswer:
    """What to send because of an exception.

    A `UserError` is the caller's mistake, and its message is sent. Of any other nothing is told but
    that it happened: whoever catches it logs it.
    """
    if isinstance(error, Busy):
        headers = {"Retry-After": str(error.retry_after)}
        return ErrorAnswer(429, error_body(str(error), 429), headers)
    if isinstance(error, NotServing):
        # A server that loads or drains is back soon, or another one is.
        headers = {} if error.state == "dead" else {"Retry-After": "5"}
        return ErrorAnswer(503, error_body(str(error), 503, code=error.state), headers)
    if isinstance(error, RequestError):
        body = error_body(str(error), error.status, error.param, error.code)
        return ErrorAnswer(error.status, body)
    if isinstance(error, ConfigError):
        name = flag_name(error.path)
        return ErrorAnswer(400, error_body(f"{name}: {error.problem}", 400, name or None))
    if isinstance(error, UserError):
        return ErrorAnswer(400, error_body(str(error), 400))
    return ErrorAnswer(500, error_body("The server failed on this request; its log says how.", 500))


def error_body(
    message: str, status: int, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The body of an error; what is too long is cut."""
    message, param = _cut(message, MAX_MESSAGE), param and _cut(param, MAX_PARAM)
    kind = TYPES.get(status, INVALID if status < 500 else "server_error")
    code = CODES.get(status, "invalid_value") if code is None else code
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _cut(text: str, length: int) -> str:
    """The beginning and the end of a text that is too long."""
    half = length // 2
    return text if len(text) <= length else f"{text[:half]} ... {text[-half:]}"


def json_bytes(value: Any) -> bytes:
    """A JSON text in ASCII: lone surrogates, which UTF-8 cannot write, are escaped as all others.

    Raises:
      ValueError: for a number that JSON does not have, such as NaN.
    """
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode("ascii")
