"""The OpenAPI 3.1 document of a server, from the same option dataclasses that check requests.

Bounds are those of the server that is running: its model's tokens, its depth, its limits.
"""

import importlib.metadata
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from megatransformer_jax.config.generation import GENERATION_OPTIONS
from megatransformer_jax.config.option import MAX_SEED, Option, options_of
from megatransformer_jax.config.sampling import AUTO
from megatransformer_jax.config.serving import (
    MAX_END_IDS,
    MAX_LOGIT_BIAS,
    MAX_STOPS,
    ChatRequestConfig,
    CompletionRequestConfig,
    ModelNameConfig,
    RequestConfig,
    ServingConfig,
    TokenizeRequestConfig,
)
from megatransformer_jax.serving.answers import FINISH_REASONS
from megatransformer_jax.serving.errors import ALL_CODES, CODES, TYPES
from megatransformer_jax.serving.fields import (
    BOUNDS,
    GENERATION_FIELDS,
    MAX_BIAS,
    MAX_STOP_LENGTH,
    NEUTRAL,
    UNSUPPORTED_CHAT,
    UNSUPPORTED_COMPLETION,
)
from megatransformer_jax.serving.prompts import EMPTY_MESSAGE_FIELDS, MESSAGE_FIELDS
from megatransformer_jax.serving.served import ServedModel

Schema = dict[str, Any]

_JSON_TYPES = {int: "integer", float: "number", str: "string", bool: "boolean"}
_JSON = "application/json"
# What may be wrong with any request that has a body.
_BODY_ERRORS = (400, 401, 403, 404, 408, 413, 415, 500)
_MEANINGS: Mapping[int, str] = {
    400: "The request cannot be used; `param` names the field.",
    401: "The API key is missing or wrong.",
    403: "The server is not to be addressed by this host name.",
    404: "There is no such model or path.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    429: "The queue is full; come again after Retry-After seconds.",
    500: "The server failed; its log says how.",
    503: "The server is loading, draining or dead, or the time was over.",
}


def openapi_document(model: ServedModel, config: ServingConfig) -> dict[str, Any]:
    """The document of a server; `config` is settled."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": f"megatransformer_jax: {model.name}",
            "description": "OpenAI's completions and chat for a model of recurrent depth. Depth, "
            "exit criterion and threshold are fields of each request.",
            "version": importlib.metadata.version("megatransformer_jax"),
        },
        "paths": _paths(model),
        "components": {
            "schemas": _schemas(model, config),
            "securitySchemes": {
                "key": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "Asked for only where the server has a key.",
                }
            },
        },
        "security": [{}, {"key": []}],
    }


# ------------------------------------------------------------------------------
# Paths.


def _paths(model: ServedModel) -> dict[str, Any]:
    paths = {
        "/v1/completions": _post("Continues prompts.", "Completion", streams=True),
        "/v1/chat/completions": _post("Answers messages.", "Chat", streams=True),
        "/tokenize": _post("Ids of a text or of messages.", "Tokenize"),
        "/detokenize": _post("Text of ids.", "Detokenize"),
        "/v1/models": _get("The model that is served.", {200: "ModelList"}),
        "/v1/models/{name}": _get("The model by its name.", {200: "Model"}, (404,), model.name),
        "/health": _get("Whether texts are made.", {200: "Health", 503: "Health"}),
        "/slots": _get("What each row of the batch does.", {200: "Slots"}),
        "/openapi.json": _get("This document.", {200: "Document"}),
        "/metrics": _get("Metrics in Prometheus' format.", {}, text="text/plain"),
    }
    if model.has_lens:
        paths["/lens"] = _post("How one token came about, iteration by iteration.", "Lens")
    return paths


def _post(summary: str, name: str, *, streams: bool = False) -> dict[str, Any]:
    content: dict[str, Any] = {_JSON: {"schema": _ref(f"{name}Answer")}}
    if streams:
        content["text/event-stream"] = {
            # Before version 3.2 this describes one event.
            "schema": {
                "type": "object",
                "properties": {"data": {"type": "string"}},
                "required": ["data"],
                "description": "With stream=true: the data of each event is a chunk in JSON, at "
                "last [DONE]. An error after the first chunk is an event with `error`; then the "
                "connection breaks.",
            }
        }
    statuses = (*_BODY_ERRORS, *((429, 503) if streams or name == "Lens" else ()))
    return {
        "post": {
            "summary": summary,
            "operationId": name[0].lower() + name[1:],
            "requestBody": {
                "required": True,
                "content": {_JSON: {"schema": _ref(f"{name}Request")}},
            },
            "responses": {
                "200": {"description": "The answer.", "content": content},
                **_errors(statuses),
            },
        }
    }


def _get(
    summary: str,
    schemas: Mapping[int, str],
    statuses: Sequence[int] = (),
    example: str | None = None,
    text: str = "",
) -> dict[str, Any]:
    answers: dict[str, Any] = {
        str(status): {
            "description": "The answer.",
            "content": {_JSON: {"schema": _ref(name)}},
        }
        for status, name in schemas.items()
    }
    if text:
        answers["200"] = {
            "description": "The answer.",
            "content": {text: {"schema": {"type": "string"}}},
        }
    operation: dict[str, Any] = {
        "summary": summary,
        "responses": {**_errors((401, 403, *statuses, 500)), **answers},
    }
    if example is not None:
        operation["parameters"] = [
            {
                "name": "name",
                "in": "path",
                "required": True,
                "schema": {"type": "string", "minLength": 1},
                "example": example,
            }
        ]
    return {"get": operation}


def _errors(statuses: Sequence[int]) -> dict[str, Any]:
    answers: dict[str, Any] = {}
    for status in statuses:
        answers[str(status)] = {
            "description": _MEANINGS[status],
            "content": {_JSON: {"schema": _ref("Error")}},
        }
        if status == 429:
            answers["429"]["headers"] = {
                "Retry-After": {"description": "Seconds.", "schema": {"type": "string"}}
            }
    return answers


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


# ------------------------------------------------------------------------------
# Requests.


def option_schema(option: Option) -> Schema:
    """What JSON may have for an option; null stands for its default."""
    schema = _type_schema(option.declared)
    check = option.check
    items = schema.get("items", schema)
    bounds = {
        "minimum": check.minimum,
        "maximum": check.maximum,
        "exclusiveMinimum": check.above,
        "exclusiveMaximum": check.below,
    }
    items |= {name: value for name, value in bounds.items() if value is not None}
    if check.choices:
        items["enum"] = [*check.choices, None]
    default = list(option.default) if isinstance(option.default, tuple) else option.default
    return {**schema, "description": " ".join((option.meaning, *option.rules)), "default": default}


def _type_schema(declared: Any) -> Schema:
    if typing.get_origin(declared) in (typing.Union, types.UnionType):
        declared = next(part for part in typing.get_args(declared) if part is not type(None))
    if typing.get_origin(declared) is tuple:
        item = typing.get_args(declared)[0]
        return {"type": ["array", "null"], "items": {"type": _JSON_TYPES[item]}}
    return {"type": [_JSON_TYPES[declared], "null"]}


def _request_schema(
    kind: type[RequestConfig], special: Mapping[str, Schema], model: ServedModel, config: Any
) -> Schema:
    """Of completions or chat."""
    is_chat = kind is ChatRequestConfig
    fields = dict(special)
    for option in options_of(kind):
        fields[option.path] = option_schema(option)
    for name in GENERATION_FIELDS:
        fields[name] = _generation_schema(name, model, config)
    limit = model.capacity - 1 if config.max_tokens is None else config.max_tokens
    lower = {
        "n": config.max_n,
        "max_tokens": limit,
        "max_completion_tokens": limit,
        "min_tokens": limit,
        "depth": config.max_depth,
        "min_depth": config.max_depth,
        "top_logprobs" if is_chat else "logprobs": config.max_logprobs,
    }
    for name, most in lower.items():
        if name in fields:
            fields[name]["maximum"] = most
    fields["model"]["enum"] = [model.name, None]
    fields["stop_token_ids"]["items"] = _token(model)
    fields["stop_token_ids"]["maxItems"] = max(MAX_END_IDS - len(model.end_ids), 0)
    fields["logit_bias"] = {
        "type": ["object", "null"],
        "description": "Added to the scores of tokens, by their ids.",
        "maxProperties": MAX_LOGIT_BIAS,
        "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,9})$"},
        "additionalProperties": {"type": "number", "minimum": -MAX_BIAS, "maximum": MAX_BIAS},
    }
    fields["stream_options"] = {
        **_nullable_object(
            {
                "include_usage": {"type": ["boolean", "null"]},
                "include_obfuscation": {"enum": [False, None]},
            }
        ),
        "description": "Of streams alone.",
    }
    for name, values in (UNSUPPORTED_CHAT if is_chat else UNSUPPORTED_COMPLETION).items():
        fields[name] = {
            "enum": [None, *values],
            "description": "OpenAI's, which this server cannot meet.",
        }
    return _object(fields, ["messages" if is_chat else "prompt"])


def _generation_schema(name: str, model: ServedModel, config: ServingConfig) -> Schema:
    schema = option_schema(GENERATION_OPTIONS[name])
    if name in BOUNDS:
        least, most = BOUNDS[name]
        schema |= {"minimum": least, "maximum": most}
    if name == "temperature":
        within = {key: schema.pop(key) for key in ("type", "minimum", "maximum")}
        schema["anyOf"] = [{"const": 0}, within]
        schema["description"] = (
            "Divides the logits. Below 1 favours likely tokens, above 1 flattens the distribution. "
            "0: the likeliest token."
        )
    if name in NEUTRAL:
        outside = [value for value in NEUTRAL[name] if value <= 0]
        if outside:
            bounds = ("type", "minimum", "maximum", "exclusiveMinimum")
            within = {key: schema.pop(key) for key in bounds if key in schema}
            schema["anyOf"] = [{"enum": outside}, within]
    if name == "exit_threshold" and model.calibration is not None:
        bounds = ("type", "minimum", "maximum", "exclusiveMinimum")
        within = {key: schema.pop(key) for key in bounds if key in schema}
        schema["anyOf"] = [{"enum": [AUTO]}, within]
    if name == "stop":
        text = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH}
        schema.pop("items")
        schema.pop("type")
        schema["anyOf"] = [
            {**text, "type": ["string", "null"]},
            {"type": "array", "maxItems": MAX_STOPS, "items": text},
        ]
    if name == "exit_criterion":
        schema["enum"] = [*dict.fromkeys(("fixed", *config.criteria)), None]
    if name == "seed":
        schema["description"] += " Default (null): another one for each request."
        schema["default"] = None
        schema["maximum"] = MAX_SEED
    return schema


def _prompt_schema(model: ServedModel, config: ServingConfig) -> Schema:
    ids = {"type": "array", "minItems": 1, "maxItems": model.capacity, "items": _token(model)}
    most = min(config.max_prompts, config.rows + config.queue)
    kinds: list[Schema] = [
        ids,
        {"type": "array", "minItems": 1, "maxItems": most, "items": ids},
    ]
    if model.tokenizer is not None:
        text = {"type": "string", "minLength": 1}
        many = {"type": "array", "minItems": 1, "maxItems": most, "items": text}
        kinds = [text, many, *kinds]
    return {"anyOf": kinds, "description": "A text, token ids, or several of either."}


def _messages_schema(model: ServedModel) -> Schema:
    text = {"type": "string"}
    part = _object({"type": {"const": "text"}, "text": text})
    if model.formats is not None:
        url = {"type": "string", "pattern": "^data:image/[a-z]+;base64,"}
        image = _object({"url": url, "detail": {"enum": ["auto", None]}}, ["url"])
        part = {"anyOf": [part, _object({"type": {"const": "image_url"}, "image_url": image})]}
    fields: dict[str, Schema] = {
        "role": {"type": "string", "minLength": 1, "examples": ["system", "user", "assistant"]},
        "content": {"anyOf": [text, {"type": "array", "minItems": 1, "items": part}]},
        **{name: {"type": ["string", "null"]} for name in MESSAGE_FIELDS},
        **{name: {"enum": [None, *values]} for name, values in EMPTY_MESSAGE_FIELDS.items()},
    }
    return {
        "type": "array",
        "minItems": 1,
        "items": _object(fields, ["role", "content"]),
        "description": "What was said, in order; the answer follows the last.",
    }


def _template_schema() -> Schema:
    return {
        "type": ["object", "null"],
        "description": "More that the chat template reads, such as enable_thinking.",
    }


def _token(model: ServedModel) -> Schema:
    return {"type": "integer", "minimum": 0, "maximum": model.vocab_size - 1}


def _object(properties: Mapping[str, Schema], required: Sequence[str] | None = None) -> Schema:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties) if required is None else list(required),
        "additionalProperties": False,
    }


def _nullable_object(properties: Mapping[str, Schema]) -> Schema:
    return {**_object(properties, []), "type": ["object", "null"]}


def _schemas(model: ServedModel, config: ServingConfig) -> dict[str, Schema]:
    """Everything by its name."""
    tokenize = {option.path: option_schema(option) for option in options_of(TokenizeRequestConfig)}
    names = {option.path: option_schema(option) for option in options_of(ModelNameConfig)}
    for fields in (tokenize, names):
        fields["model"]["enum"] = [model.name, None]
    chat = {"messages": _messages_schema(model), "chat_template_kwargs": _template_schema()}
    token = _token(model)
    tokenize_text = _object({"prompt": {"type": "string"}, **tokenize}, ["prompt"])
    tokens = {"type": "array", "items": token}
    return {
        "CompletionRequest": _request_schema(
            CompletionRequestConfig, {"prompt": _prompt_schema(model, config)}, model, config
        ),
        "ChatRequest": _request_schema(ChatRequestConfig, chat, model, config),
        "TokenizeRequest": {"anyOf": [tokenize_text, _object({**chat, **tokenize}, ["messages"])]},
        "DetokenizeRequest": _object({"tokens": tokens, **names}, ["tokens"]),
        **({"LensRequest": _lens_request(model, config)} if model.has_lens else {}),
        **_answer_schemas(model),
    }


def _lens_request(model: ServedModel, config: ServingConfig) -> Schema:
    count = {"type": ["integer", "null"], "minimum": 0, "maximum": MAX_SEED}
    names = ("depth", "min_depth", "exit_criterion", "exit_threshold")
    rule = {name: _generation_schema(name, model, config) for name in names}
    ids = {"type": "array", "minItems": 1, "maxItems": model.capacity, "items": _token(model)}
    fields: dict[str, Schema] = {
        "model": {"enum": [model.name, None]},
        "ids": {**ids, "description": "The text, prompt included."},
        "position": {
            **count,
            "description": "The token behind which to look. Default: the last.",
        },
        "prompt_tokens": {**count, "description": "How many of the ids were the prompt."},
        "seed": {**count, "description": "Of the request that made the text."},
        "sample": {**count, "description": "Number of the text among those of its prompt."},
        **rule,
    }
    return _object(fields, ["ids"])


# ------------------------------------------------------------------------------
# Answers.


def _answer_schemas(model: ServedModel) -> dict[str, Schema]:
    text, count, number = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "number"}
    reasons = sorted(set(FINISH_REASONS.values()))
    choice: dict[str, Schema] = {
        "index": count,
        "finish_reason": {"enum": reasons},
        "end_reason": {"enum": list(FINISH_REASONS)},
    }
    extras: dict[str, Schema] = {
        "token_ids": {"type": "array", "items": count},
        "prompt_token_ids": {"type": "array", "items": count},
        "depths": {"type": "array", "items": count},
    }
    message = _object({"role": {"const": "assistant"}, "content": text, "refusal": {"const": None}})
    kinds: dict[str, dict[str, Schema]] = {
        "text_completion": {"text": text, "logprobs": _completion_logprobs()},
        "chat.completion": {"message": message, "logprobs": _chat_logprobs()},
    }
    answers = {}
    for kind, own in kinds.items():
        fields = {**choice, **own}
        answers[kind] = _object(
            {
                "id": text,
                "object": {"const": kind},
                "created": count,
                "model": {"const": model.name},
                "choices": {"type": "array", "items": _object({**fields, **extras}, list(fields))},
                "usage": _usage(),
            }
        )
    error: dict[str, Schema] = {
        "message": text,
        "type": {"enum": sorted(set(TYPES.values()))},
        "param": {"type": ["string", "null"]},
        "code": {"enum": sorted({*ALL_CODES, *CODES.values()})},
    }
    tokenized: dict[str, Schema] = {"tokens": {"type": "array", "items": count}, "count": count}
    tokenized |= {"max_model_len": count, "token_strs": {"type": "array", "items": text}}
    card: dict[str, Schema] = {
        **{"id": text, "object": {"const": "model"}, "created": count, "owned_by": text},
        **{"max_model_len": count, "meta": {"type": "object"}},
    }
    return {
        "CompletionAnswer": answers["text_completion"],
        "ChatAnswer": answers["chat.completion"],
        "TokenizeAnswer": _object(tokenized, ["tokens", "count", "max_model_len"]),
        "DetokenizeAnswer": _object({"prompt": text}),
        "LensAnswer": {"type": "object", "properties": {"depth": number}, "required": ["depth"]},
        "Model": _object(card),
        "ModelList": _object(
            {"object": {"const": "list"}, "data": {"type": "array", "items": _ref("Model")}}
        ),
        "Health": {"type": "object", "properties": {"status": text}, "required": ["status"]},
        "Slots": _object(
            {"object": {"const": "list"}, "data": {"type": "array", "items": {"type": "object"}}}
        ),
        "Document": {"type": "object", "required": ["openapi", "paths"]},
        "Error": _object({"error": _object(error)}),
    }


def _usage() -> Schema:
    count = {"type": "integer", "minimum": 0}
    details: dict[str, Schema] = {
        "core_iterations": count,
        "mean_depth": {"type": "number", "minimum": 0},
    }
    return _object(
        {
            "prompt_tokens": count,
            "completion_tokens": count,
            "total_tokens": count,
            "prompt_tokens_details": _object({"cached_tokens": count}),
            "completion_tokens_details": _object(details),
        }
    )


def _completion_logprobs() -> Schema:
    likeliest = {"type": ["object", "null"], "additionalProperties": {"type": "number"}}
    fields: dict[str, Schema] = {
        "tokens": {"type": "array", "items": {"type": "string"}},
        "token_logprobs": {"type": "array", "items": {"type": ["number", "null"]}},
        "top_logprobs": {"type": "array", "items": likeliest},
        "text_offset": {"type": "array", "items": {"type": "integer", "minimum": 0}},
    }
    return {**_object(fields), "type": ["object", "null"]}


def _chat_logprobs() -> Schema:
    one: dict[str, Schema] = {
        "token": {"type": "string"},
        "logprob": {"type": "number"},
        "bytes": {"type": ["array", "null"], "items": {"type": "integer"}},
    }
    top = {"top_logprobs": {"type": "array", "items": _object(one)}}
    content = {"type": "array", "items": _object({**one, **top})}
    fields: dict[str, Schema] = {"content": content, "refusal": {"const": None}}
    return {**_object(fields), "type": ["object", "null"]}
