"""A served model of bytes without weights, for the tests of what requests and answers look like."""

import dataclasses
import json
from typing import Any

from megatransformer_jax.config.serving import ServingConfig
from megatransformer_jax.data.tokenizer import BytesTokenizer
from megatransformer_jax.serving.bodies import read_body
from megatransformer_jax.serving.errors import RequestError
from megatransformer_jax.serving.fields import Request, chat_request, completion_request
from megatransformer_jax.serving.served import ServedModel

MODEL = ServedModel("bytes", BytesTokenizer(), 259, capacity=128, trained_depth=8, created=5)
CONFIG = ServingConfig(
    name="bytes",
    capacity=128,
    criteria=("latent_diff", "kl"),
    max_depth=32,
    cache_slots=32,
    max_prompts=4,
    max_n=4,
)


def completion(
    model: ServedModel = MODEL, config: ServingConfig = CONFIG, /, **body: Any
) -> Request:
    """The request of a body, with seed 7 if it has none."""
    return completion_request(sent(body), model, config, lambda: 7)


def chat(model: ServedModel, config: ServingConfig = CONFIG, /, **body: Any) -> Request:
    """The same of a chat."""
    return chat_request(sent(body), model, config, lambda: 7)


def sent(body: dict[str, Any]) -> dict[str, Any]:
    """A body as it arrives."""
    return read_body(json.dumps(body).encode())


def with_tokenizer(tokenizer: Any, **changes: Any) -> ServedModel:
    """MODEL with another tokenizer."""
    size = 259 if tokenizer is None else tokenizer.vocab_size
    return dataclasses.replace(MODEL, **{"tokenizer": tokenizer, "vocab_size": size} | changes)


def refusal(call: Any, *arguments: Any, **body: Any) -> tuple[str | None, str]:
    """Field and code of the error that a call raises."""
    try:
        call(*arguments, **body)
    except RequestError as error:
        return error.param, error.code
    raise AssertionError("nothing was refused")
