"""Bodies of requests, checked, as jobs for the engine. Pure: no HTTP, no device.

A field is one of three: an option of generation, whose checks and messages are those of
`GenerationConfig`; one of `config.serving`'s request options; or one of `SPECIAL_FIELDS`, whose
values are texts, lists and objects of OpenAI's. `null` is the same as leaving a field out.
"""

import dataclasses
import secrets
import typing
from collections.abc import Callable, Mapping
from typing import Any

from megatransformer_jax.config.option import (
    MAX_SEED,
)
from megatransformer_jax.config.serving import (
    ChatRequestConfig,
    CompletionRequestConfig,
    RequestConfig,
    ServingConfig,
)
from megatransformer_jax.serving.requests import Job
from megatransformer_jax.serving.served import ServedModel

R = typing.TypeVar("R", bound=RequestConfig)

# Objects and lists within each other, more than any request needs and fewer than Python's stack.
MAX_NESTING = 64
# Largest number that JSON's readers agree on.
_MAX_INTEGER = 2**63 - 1
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
# (least, most) of numbers that the options of generation do not bound: scores are float32, and
# quotients of two of these must be finite.
BOUNDS: Mapping[str, tuple[float, float]] = {
    "temperature": (0.001, 100.0),
    "repetition_penalty": (0.01, 100.0),
    "presence_penalty": (-100.0, 100.0),
    "frequency_penalty": (-100.0, 100.0),
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
# What a message may have besides its role and content; templates read it.
MESSAGE_FIELDS = ("name", "reasoning_content", "tool_calls", "tool_call_id")
# What OpenAI's own answers have in a message, with nothing in it.
_EMPTY_MESSAGE_FIELDS = ("refusal", "annotations", "audio", "function_call", "tool_calls")
# Arguments of rendering that are not a request's to choose: a template is a program.
_NOT_FOR_TEMPLATES = ("messages", "tools", "documents", "template", "add_generation_prompt")


@dataclasses.dataclass(frozen=True)
class Request:
    """A request that has been checked.

    Attributes:
      jobs: prompt by prompt, `options.n` of each.
      prompts: ids.
      prompt_texts: what `echo` shows of each.
      options: what was asked for besides generation.
      model: name of the model.
      include_usage: whether a stream ends with the usage.
    """

    jobs: tuple[Job, ...]
    prompts: tuple[tuple[int, ...], ...]
    prompt_texts: tuple[str, ...]
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


def read_body(raw: bytes) -> dict[str, Any]:
    """The object that a body holds.

    Raises:
      RequestError: if it is not one JSON object in UTF-8, names a key twice, holds a number that
        is not finite or is beyond 64 bits, or is nested too deeply.
    """
    raise NotImplementedError


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
    raise NotImplementedError


def chat_request(
    body: Mapping[str, Any],
    model: ServedModel,
    config: ServingConfig,
    new_seed: Callable[[], int] = fresh_seed,
) -> Request:
    """A request to /v1/chat/completions; arguments and errors as of `completion_request`."""
    raise NotImplementedError


def tokenize(body: Mapping[str, Any], model: ServedModel) -> dict[str, Any]:
    """The answer of /tokenize: {"tokens", "count", "max_model_len", "token_strs"}.

    Raises:
      RequestError: as `completion_request`.
    """
    raise NotImplementedError


def detokenize(body: Mapping[str, Any], model: ServedModel) -> dict[str, Any]:
    """The answer of /detokenize: {"prompt"}.

    Raises:
      RequestError: as `completion_request`.
    """
    raise NotImplementedError
