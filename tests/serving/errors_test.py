import json

import pytest

from megatransformer_jax.config.generation import GenerationConfig
from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.serving.errors import (
    ALL_CODES,
    CODES,
    MAX_MESSAGE,
    TYPES,
    RequestError,
    error_answer,
    error_body,
    json_bytes,
)
from megatransformer_jax.serving.requests import Busy, NotServing


@pytest.mark.parametrize(
    ("error", "status", "kind", "param", "code"),
    [
        (UserError("bad"), 400, "invalid_request_error", None, "invalid_value"),
        (ConfigError("sampling.top_p", "bad"), 400, "invalid_request_error", "top_p", None),
        (RequestError("no", status=404, param="model"), 404, None, "model", "not_found"),
        (RequestError("no", status=401), 401, "invalid_request_error", None, "invalid_api_key"),
        (RequestError("no", status=413), 413, None, None, "request_too_large"),
        (Busy("full", 7), 429, "rate_limit_error", None, "queue_full"),
        (NotServing("soon", "loading"), 503, "service_unavailable_error", None, "loading"),
        (KeyError("secret"), 500, "server_error", None, "internal_error"),
    ],
)
def test_errors_have_openais_shape(
    error: Exception, status: int, kind: str | None, param: str | None, code: str | None
) -> None:
    answer = error_answer(error)
    body = answer.body["error"]
    assert (answer.status, list(body)) == (status, ["message", "type", "param", "code"])
    assert body["param"] == param
    assert body["type"] == (kind or TYPES[status]) and body["code"] == (code or CODES[status])
    assert body["code"] in ALL_CODES


def test_who_should_come_again_is_told_when() -> None:
    assert error_answer(Busy("full", 7)).headers == {"Retry-After": "7"}
    assert error_answer(NotServing("x", "draining")).headers["Retry-After"]
    assert not error_answer(NotServing("x", "dead")).headers


def test_of_an_error_of_ours_nothing_is_told() -> None:
    assert "secret" not in json.dumps(error_answer(RuntimeError("secret /home")).body)


def test_options_are_named_as_fields() -> None:
    with pytest.raises(ConfigError) as caught:
        GenerationConfig.of(top_p=3.0)
    message = error_answer(caught.value).body["error"]["message"]
    assert message.startswith("top_p: 3.0 is not allowed")


def test_long_and_odd_texts_can_be_sent() -> None:
    body = error_body("x" * 10**6 + "\ud800", 400, "y" * 10**6)
    raw = json_bytes(body)
    assert len(raw) < MAX_MESSAGE + 400 and raw.isascii()
    assert json.loads(raw) == body
    with pytest.raises(ValueError):
        json_bytes(float("nan"))
