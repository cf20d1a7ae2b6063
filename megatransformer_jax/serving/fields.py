"""Bodies of requests, checked, as jobs for the engine. Pure: no HTTP, no device.

A field is one of three: an option of generation, whose checks and messages are those of
`GenerationConfig`; one of `config.serving`'s request options; or one of `SPECIAL_COMPLETION` or
`SPECIAL_CHAT`, which hold texts, lists and objects. `null` is the same as leaving a field out.
"""

import dataclasses
import functools
import re
import secrets
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from megatransformer_jax.config.generation import (
    GENERATION_OPTIONS,
    GenerationConfig,
    for_model,
)
from megatransformer_jax.config.option import (
    MAX_SEED,
    ConfigError,
    options_of,
)
from megatransformer_jax.config.sampling import check_encodable
from megatransformer_jax.config.serving import (
    DEFAULT_MAX_TOKENS,
    MAX_LOGIT_BIAS,
    MAX_STOPS,
    ChatRequestConfig,
    CompletionRequestConfig,
    RequestConfig,
    ServingConfig,
    check_end_ids,
    check_min_tokens,
)
from megatransformer_jax.generation.endings import MAX_TEXT_BYTES
from megatransformer_jax.serving.bodies import (
    as_declared,
    check_names,
    is_number,
    is_whole,
    kind_of,
    named,
    read_options,
    unknown_field,
)
from megatransformer_jax.serving.errors import RequestError
from megatransformer_jax.serving.prompts import (
    check_model,
    check_token,
    read_messages,
    read_prompts,
)
from megatransformer_jax.serving.requests import Job
from megatransformer_jax.serving.served import ServedModel

_TOKEN = re.compile("0|[1-9][0-9]{0,9}")
# As OpenAI's.
MAX_BIAS = 100
STREAM_OPTIONS = ("include_usage", "include_obfuscation")
# Texts, lists and objects, whose schemas stand in `openapi`.
SPECIAL_COMPLETION = ("prompt", "logit_bias", "stream_options")
SPECIAL_CHAT = ("messages", "logit_bias", "stream_options", "chat_template_kwargs")
# Characters of a stop text.
MAX_STOP_LENGTH = MAX_TEXT_BYTES // 4
# Options of generation that are fields, by the same names.
GENERATION_FIELDS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
    "depth",
    "min_depth",
    "exit_criterion",
    "exit_threshold",
    "warm_start",
)
# (least, most) of numbers that the options of generation do not bound, or more widely: they become
# float32, where the least of these are not 0, and quotients of two of them are finite.
BOUNDS: Mapping[str, tuple[float, float]] = {
    "temperature": (0.001, 100.0),
    "repetition_penalty": (0.01, 100.0),
    "presence_penalty": (-100.0, 100.0),
    "frequency_penalty": (-100.0, 100.0),
    "top_p": (1e-6, 1.0),
    "min_p": (1e-6, 1.0),
    "typical_p": (1e-6, 1.0),
    "exit_threshold": (1e-30, 1e30),
}
# Other words of common clients for an option that is off.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "top_k": (0, -1),
    "top_p": (1,),
    "min_p": (0,),
    "typical_p": (1,),
}
# Cuts that always keep the likeliest token, so that they change nothing at temperature 0.
_KEEP_THE_LIKELIEST = ("top_k", "top_p", "min_p")
# OpenAI's fields that cannot be met, and the values of each that ask for nothing.
UNSUPPORTED_COMPLETION: Mapping[str, tuple[Any, ...]] = {"best_of": (1,), "suffix": ()}
UNSUPPORTED_CHAT: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "metadata": ({},),
    "web_search_options": (),
}


@dataclasses.dataclass(frozen=True)
class Request:
    """A request that has been checked.

    Attributes:
      jobs: prompt by prompt, `options.n` of each.
      prompts: ids.
      prompt_texts: what `echo` shows of each.
      num_prompt_tokens: of all prompts, with the places of their images.
      options: what was asked for besides generation.
      model: name of the model.
      include_usage: whether a stream ends with the usage.
    """

    jobs: tuple[Job, ...]
    prompts: tuple[tuple[int, ...], ...]
    prompt_texts: tuple[str, ...]
    num_prompt_tokens: int
    options: CompletionRequestConfig | ChatRequestConfig
    model: str
    include_usage: bool = False

    @property
    def is_chat(self) -> bool:
        """Whether messages are answered, rather than prompts continued."""
        return isinstance(self.options, ChatRequestConfig)


def fresh_seed() -> int:
    """A seed for a request without one."""
    return secrets.randbelow(MAX_SEED + 1)


@functools.cache
def field_names(kind: type[RequestConfig]) -> tuple[str, ...]:
    """The fields of a request that have a meaning, by the class of its options."""
    special = SPECIAL_CHAT if kind is ChatRequestConfig else SPECIAL_COMPLETION
    own = tuple(option.path for option in options_of(kind))
    return (*special, *own, *GENERATION_FIELDS)


# ------------------------------------------------------------------------------
# Both kinds of requests.


@dataclasses.dataclass(frozen=True)
class _Wish:
    """What the two kinds come to.

    Attributes:
      prompts: ids.
      texts: the prompts as texts.
      most: new tokens per text, if the request says so.
      default: if it does not. None: as many as there is room for.
      name: of the field that says so.
      param: the field of the prompts.
      images: of the only prompt.
      num_top: likeliest tokens at each place.
      scores_prompt: whether the prompt's tokens are scored.
    """

    prompts: list[list[int]]
    texts: list[str]
    most: int | None
    default: int | None
    name: str
    param: str
    images: tuple[np.ndarray, ...] = ()
    num_top: int = 0
    scores_prompt: bool = False


def _request(
    body: Mapping[str, Any],
    options: CompletionRequestConfig | ChatRequestConfig,
    wish: _Wish,
    model: ServedModel,
    config: ServingConfig,
    new_seed: Callable[[], int],
) -> Request:
    _check_limits(options, len(wish.prompts), wish.num_top, config)
    generation = _generation(body, model, config, new_seed)
    if generation.strategy == "greedy" and options.n > 1:
        raise ConfigError(
            "n",
            f"{options.n} texts would be the same, as no token is drawn at temperature 0; raise "
            "that, or leave n at 1.",
        )
    end_ids = () if options.ignore_eos else model.end_ids
    check_end_ids(options.stop_token_ids, end_ids)
    for token in options.stop_token_ids:
        check_token(token, "stop_token_ids", model)
    bias = _logit_bias(body.get("logit_bias"), model)
    jobs = []
    image_places = len(wish.images) * model.image_places
    for ids in wish.prompts:
        count = _new_tokens(len(ids) + image_places, wish, model, config)
        check_min_tokens(options.min_tokens, count)
        job = Job(
            ids=tuple(ids),
            config=dataclasses.replace(generation, max_new_tokens=max(count, 1)),
            logit_bias=bias,
            min_new_tokens=options.min_tokens,
            ends=not options.ignore_eos,
            stop_ids=options.stop_token_ids,
            num_top=min(wish.num_top, model.vocab_size),
            scores_prompt=wish.scores_prompt,
            only_scores=count == 0,
            media=wish.images,
            is_streamed=options.stream,
        )
        jobs += [dataclasses.replace(job, sample=sample) for sample in range(options.n)]
    return Request(
        jobs=tuple(jobs),
        prompts=tuple(map(tuple, wish.prompts)),
        prompt_texts=tuple(wish.texts),
        num_prompt_tokens=sum(map(len, wish.prompts)) + image_places,
        options=options,
        model=model.name,
        include_usage=_include_usage(body.get("stream_options"), options.stream),
    )


def _check_limits(
    options: RequestConfig, num_prompts: int, num_top: int, config: ServingConfig
) -> None:
    """Checks against what the server allows."""
    most = config.rows + config.queue
    for name, value, limit in (
        ("n", options.n, config.max_n),
        ("prompt", num_prompts, config.max_prompts),
        (
            "top_logprobs" if isinstance(options, ChatRequestConfig) else "logprobs",
            num_top,
            config.max_logprobs,
        ),
    ):
        if value > limit:
            what = " prompts" if name == "prompt" else ""
            raise ConfigError(
                name, f"{value}{what} exceeds {limit}, the most that this server allows; lower it."
            )
    if num_prompts * options.n > most:
        raise ConfigError(
            "n" if options.n > 1 else "prompt",
            f"{num_prompts} x {options.n} texts exceed the {most} that this server can hold; send "
            "several requests.",
        )


def _generation(
    body: Mapping[str, Any],
    model: ServedModel,
    config: ServingConfig,
    new_seed: Callable[[], int],
) -> GenerationConfig:
    """What the options of generation among the fields come to, for the model that is served."""
    given = {
        name: as_declared(body[name], GENERATION_OPTIONS[name].declared)
        for name in GENERATION_FIELDS
        if body.get(name) is not None
    }
    if "stop" in given:
        given["stop"] = _stops(body["stop"], model)
    for name, words in NEUTRAL.items():
        if is_number(given.get(name)) and given[name] in words:
            del given[name]
    if is_whole(given.get("top_k")) and given["top_k"] >= model.vocab_size:
        del given["top_k"]
    is_greedy = is_number(given.get("temperature")) and given["temperature"] == 0
    if is_greedy:
        del given["temperature"]
    for name, (least, most) in BOUNDS.items():
        if is_number(given.get(name)) and not least <= given[name] <= most:
            zero = "0, or " if name == "temperature" else ""
            raise ConfigError(
                name, f"{given[name]} is not allowed; it must be {zero}{least:g} to {most:g}."
            )
    # First states may be drawn as well: at temperature 0 the same request has the same answer.
    given.setdefault("seed", 0 if is_greedy else new_seed())
    if model.makes_media:
        given["max_media"] = 0
    checked = GenerationConfig.of(strategy="sample", **given)
    if is_greedy:
        if "typical_p" in given:
            raise ConfigError(
                "typical_p", "would be ignored at temperature 0; raise that, or leave it out."
            )
        kept = {name: value for name, value in given.items() if name not in _KEEP_THE_LIKELIEST}
        checked = GenerationConfig.of(strategy="greedy", **kept)
    checked = for_model(
        checked,
        model.trained_depth,
        has_exit_gate=model.has_exit_gate,
        makes_media=model.makes_media,
        calibration=model.calibration,
    )
    _check_depth(checked, config)
    return checked


def _check_depth(generation: GenerationConfig, config: ServingConfig) -> None:
    depth = generation.depth
    if None not in (depth.depth, config.max_depth) and depth.depth > config.max_depth:  # type: ignore[operator]
        raise ConfigError(
            "depth",
            f"{depth.depth} exceeds {config.max_depth}, the most that this server allows; lower "
            "it.",
        )
    criteria = ("fixed", *(name for name in config.criteria if name != "fixed"))
    if depth.exit_criterion not in criteria:
        raise ConfigError(
            "exit_criterion",
            f"{depth.exit_criterion!r} is not among those that this server was started with: "
            f"{', '.join(criteria)}.",
        )


def _stops(value: Any, model: ServedModel) -> tuple[str, ...]:
    stops = (value,) if isinstance(value, str) else value
    if not isinstance(stops, list | tuple) or not all(isinstance(text, str) for text in stops):
        raise ConfigError("stop", f"is {kind_of(value)}; give a text, or a list of texts.")
    if len(stops) > MAX_STOPS:
        raise ConfigError("stop", f"has {len(stops)} texts; at most {MAX_STOPS} are allowed.")
    if stops and model.tokenizer is None:
        raise RequestError(
            "stop: this model has no tokenizer, so no text; use stop_token_ids.",
            param="stop",
            code="no_tokenizer",
        )
    check_encodable("stop", stops)
    longest = max(map(len, stops), default=0)
    if longest > MAX_STOP_LENGTH:
        raise ConfigError(
            "stop", f"has {longest} characters in a text; at most {MAX_STOP_LENGTH} are allowed."
        )
    num_bytes = sum(len(text.encode()) for text in stops)
    if num_bytes >= MAX_TEXT_BYTES:
        raise ConfigError(
            "stop", f"has {num_bytes} bytes; it must have less than {MAX_TEXT_BYTES}."
        )
    if any("\N{REPLACEMENT CHARACTER}" in text for text in stops):
        raise ConfigError("stop", "has U+FFFD, which stands for bytes that are not text.")
    return tuple(stops)


def _new_tokens(length: int, wish: _Wish, model: ServedModel, config: ServingConfig) -> int:
    """New tokens that a text may have behind a prompt of `length`; 0: it is only scored."""
    room = model.capacity - length
    limit = model.capacity if config.max_tokens is None else config.max_tokens
    if wish.most is not None and wish.most > limit:
        raise ConfigError(
            wish.name, f"{wish.most} exceeds {limit}, the most that this server allows; lower it."
        )
    # The batch keeps a place for a new token even if the prompt is only scored.
    if room < max(wish.most or 1, 1):
        prompt = f"a text may have {model.capacity} tokens, and this prompt has {length}"
        if length == model.capacity:
            prompt += ", which leaves no place for a new one"
        asked, lower = f", and {wish.name}={wish.most} asks for more", f", or lower {wish.name}"
        if room < 1 or wish.most is None:
            asked, lower = "", ""
        raise RequestError(
            f"{wish.param}: {prompt}{asked}; shorten it{lower}.",
            param=wish.param,
            code="context_length_exceeded",
        )
    if wish.most is not None:
        return wish.most
    return min(room, limit, room if wish.default is None else wish.default)


def _logit_bias(value: Any, model: ServedModel) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(
            "logit_bias", f'is {kind_of(value)}; give an object such as {{"50": -100}}.'
        )
    if len(value) > MAX_LOGIT_BIAS:
        raise ConfigError(
            "logit_bias", f"has {len(value)} tokens; at most {MAX_LOGIT_BIAS} are allowed."
        )
    bias = {}
    for key, number in value.items():
        if not _TOKEN.fullmatch(key):
            raise ConfigError("logit_bias", f"{key!r} is not the id of a token, such as '50'.")
        check_token(int(key), "logit_bias", model)
        if not is_number(number) or not -MAX_BIAS <= number <= MAX_BIAS:
            raise ConfigError(
                "logit_bias",
                f"{number!r} of token {key} is not allowed; it must be a number from -{MAX_BIAS} "
                f"to {MAX_BIAS}.",
            )
        bias[int(key)] = float(number)
    return bias


def _include_usage(value: Any, streams: bool) -> bool:
    if value is None:
        return False
    if not isinstance(value, dict):
        raise ConfigError(
            "stream_options",
            f'is {kind_of(value)}; give {{"include_usage": true}}, or leave it out.',
        )
    if not streams:
        raise ConfigError("stream_options", "is for streams only; set stream=true or leave it out.")
    for name, item in value.items():
        if name not in STREAM_OPTIONS:
            raise unknown_field(name, STREAM_OPTIONS, "stream_options")
        if item is not None and not isinstance(item, bool):
            raise ConfigError("stream_options", f"{name} is {kind_of(item)}; give true or false.")
    if value.get("include_obfuscation"):
        raise RequestError(
            "stream_options: include_obfuscation=true cannot be met; leave it out.",
            param="stream_options",
            code="unsupported_value",
        )
    return bool(value.get("include_usage"))


# ------------------------------------------------------------------------------
# Completions.


def completion_request(
    body: Mapping[str, Any],
    model: ServedModel,
    config: ServingConfig,
    new_seed: Callable[[], int] = fresh_seed,
) -> Request:
    """A request to /v1/completions.

    Args:
      body: of `read_body`.
      model: what is served.
      config: settled options of the server.
      new_seed: gives the seed of a request that has none.

    Raises:
      RequestError: if a field is not known or cannot be met, or its value cannot be used.
    """
    check_names(body, field_names(CompletionRequestConfig), UNSUPPORTED_COMPLETION)
    with named("prompt"):
        options = read_options(body, CompletionRequestConfig)
        check_model(options.model, model)
        prompts, texts = read_prompts(body.get("prompt"), model, config)
        wish = _Wish(
            prompts,
            texts,
            most=None if body.get("max_tokens") is None else options.max_tokens,
            default=DEFAULT_MAX_TOKENS,
            name="max_tokens",
            param="prompt",
            num_top=options.logprobs or 0,
            scores_prompt=options.echo and options.logprobs is not None,
        )
        return _request(body, options, wish, model, config, new_seed)


def chat_request(
    body: Mapping[str, Any],
    model: ServedModel,
    config: ServingConfig,
    new_seed: Callable[[], int] = fresh_seed,
) -> Request:
    """A request to /v1/chat/completions; arguments and errors as of `completion_request`."""
    check_names(body, field_names(ChatRequestConfig), UNSUPPORTED_CHAT)
    with named("messages"):
        options = read_options(body, ChatRequestConfig)
        check_model(options.model, model)
        said = read_messages(body, model)
        most = options.max_completion_tokens or options.max_tokens
        wish = _Wish(
            [said.ids],
            [said.text],
            most=most,
            default=None,
            name="max_tokens" if options.max_tokens else "max_completion_tokens",
            param="messages",
            images=said.images,
            num_top=options.top_logprobs or 0,
        )
        return _request(body, options, wish, model, config, new_seed)
