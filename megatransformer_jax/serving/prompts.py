"""What a text begins with: prompts, messages of a chat, and tokens, as ids."""

import dataclasses
import json
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatransformer_jax.config.option import ConfigError, UserError, options_of
from megatransformer_jax.config.sampling import check_encodable
from megatransformer_jax.config.serving import (
    ModelNameConfig,
    ServingConfig,
    TokenizeRequestConfig,
)
from megatransformer_jax.data.hf_tokenizer import require_chat_template
from megatransformer_jax.data.media.records import ImagePart
from megatransformer_jax.data.media_tokenizer import MARKERS, MediaTokenizer
from megatransformer_jax.data.tokenizer import Tokenizer
from megatransformer_jax.generation.media_prompt import encode_media_prompt, prompt_of_text
from megatransformer_jax.generation.request import encode_prompts
from megatransformer_jax.serving.bodies import (
    check_names,
    is_number,
    is_whole,
    kind_of,
    missing_field,
    named,
    read_options,
    same,
    unknown_field,
)
from megatransformer_jax.serving.errors import RequestError
from megatransformer_jax.serving.images import image_of_part
from megatransformer_jax.serving.served import ServedModel

# What a message may have besides its role and content; templates read it.
MESSAGE_FIELDS = ("name", "reasoning_content")
# What answers of others have in a message, with nothing in it.
EMPTY_MESSAGE_FIELDS: Mapping[str, tuple[Any, ...]] = {
    "refusal": (),
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "tool_calls": ([],),
}
# Arguments of rendering that are not a request's to choose: a template is a program.
_IMAGE_PLACE = "<|IMAGE|><|/IMAGE|>"
_NOT_FOR_TEMPLATES = ("messages", "tools", "documents", "template", "add_generation_prompt")

# ------------------------------------------------------------------------------
# What fits the model.


def check_model(name: str | None, model: ServedModel) -> None:
    """Raises RequestError unless a request names the model that is served, or none."""
    if name is not None and name != model.name:
        raise RequestError(
            f"model: {name!r} is not served here; there is {model.name!r}.",
            status=404,
            param="model",
            code="model_not_found",
        )


def check_token(token: int, name: str, model: ServedModel) -> None:
    """Raises RequestError unless the model has learned something for an id."""
    if not 0 <= token < model.vocab_size:
        raise RequestError(
            f"{name}: {token} is not a token; ids are 0 to {model.vocab_size - 1}.", param=name
        )


# ------------------------------------------------------------------------------
# Prompts.


def read_prompts(
    value: Any, model: ServedModel, config: ServingConfig
) -> tuple[list[list[int]], list[str]]:
    """Ids and text of each prompt.

    Raises:
      UserError: if they are not prompts, or more than the server allows.
    """
    if value is None:
        raise missing_field("prompt", '"prompt": "The "')
    given = [value]
    # A list that begins with an id is one prompt, whatever follows.
    if isinstance(value, list) and value and not is_number(value[0]):
        given = value
    if len(given) > config.max_prompts:
        raise ConfigError(
            "prompt", f"{len(given)} prompts exceed {config.max_prompts}, the most of this server."
        )
    if not all(isinstance(prompt, type(given[0])) for prompt in given):
        raise UserError("texts and ids are mixed; give either.")
    prompts, texts = [], []
    for number, prompt in enumerate(given):
        place = f"prompt[{number}]" if given is value else "prompt"
        ids = _prompt(prompt, place, model)
        prompts.append(ids)
        texts.append(prompt if isinstance(prompt, str) else model.decode(ids))
    return prompts, texts


def _prompt(prompt: Any, place: str, model: ServedModel) -> list[int]:
    """Ids of one prompt."""
    if isinstance(prompt, str):
        if model.tokenizer is None:
            raise RequestError(
                f"{place}: this model has no tokenizer; give prompts as token ids.",
                param="prompt",
                code="no_tokenizer",
            )
        return encode_prompts([prompt], model.tokenizer, model.vocab_size)[0]
    if not isinstance(prompt, list) or not all(map(is_whole, prompt)):
        what = f"is {kind_of(prompt)}"
        if isinstance(prompt, list):
            wrong = next(item for item in prompt if not is_whole(item))
            what = f"has {json.dumps(wrong)} among its ids"
        raise RequestError(
            f"{place}: {what}; give a text, token ids, or a list of either.", param="prompt"
        )
    if not prompt:
        raise RequestError(f"{place}: is empty; give at least one token.", param="prompt")
    ids = list(map(int, prompt))
    for token in (min(ids), max(ids)):
        check_token(token, "prompt", model)
    return ids


# ------------------------------------------------------------------------------
# Messages.


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages as a prompt.

    Attributes:
      ids: tokens; an opening and a closing one per image.
      text: the same as a text.
      images: in their order, float32 [height, width, C] each.
    """

    ids: list[int]
    text: str
    images: tuple[np.ndarray, ...] = ()


def read_messages(body: Mapping[str, Any], model: ServedModel) -> Conversation:
    """The messages as the model was trained to read them: as the chat template writes them.

    A model that reads images and has no template continues what a single user message says.

    Raises:
      UserError: if they are not messages, or there is no template.
    """
    messages = body.get("messages")
    if messages is None:
        raise missing_field("messages", '"messages": [{"role": "user", "content": "Hello"}]')
    if not isinstance(messages, list) or not messages:
        what = "is empty" if isinstance(messages, list) else f"is {kind_of(messages)}"
        raise UserError(f"{what}; give a list of at least one message.")
    images: list[np.ndarray] = []
    plain = [
        _message(message, f"messages[{number}]", model, images)
        for number, message in enumerate(messages)
    ]
    given = _template_options(body.get("chat_template_kwargs"))
    tokenizer, media = model.tokenizer, model.formats
    of_text = tokenizer.base if isinstance(tokenizer, MediaTokenizer) else tokenizer
    if media is not None and getattr(of_text, "chat", None) is None:
        return _single_message(plain, given, images, model)
    try:
        template = require_chat_template(of_text)
    except UserError as error:
        raise RequestError(str(error), param="messages", code="no_chat_template") from None
    text = template.render(plain, add_generation_prompt=True, **given)
    if media is None:
        ids = typing.cast(Tokenizer, tokenizer).encode(text)
    else:
        ids = typing.cast(MediaTokenizer, tokenizer).encode_with_media(text)
        if text.count(_IMAGE_PLACE) != len(images):
            raise UserError(
                f"the chat template leaves {text.count(_IMAGE_PLACE)} of {len(images)} images; "
                "put them where it writes them."
            )
    if not ids:
        raise UserError("the chat template makes an empty prompt of these messages; say something.")
    return Conversation(ids, text, tuple(images))


def _single_message(
    plain: Sequence[Mapping[str, Any]],
    template_options: Mapping[str, Any],
    images: Sequence[np.ndarray],
    model: ServedModel,
) -> Conversation:
    """A message that is continued as a prompt is."""
    if len(plain) > 1 or plain[0]["role"] != "user" or template_options:
        raise RequestError(
            "messages: this model has no chat template, so it continues what one message of the "
            "user says; send that alone.",
            param="messages",
            code="no_chat_template",
        )
    assert isinstance(model.tokenizer, MediaTokenizer) and model.formats is not None
    parts = list(map(ImagePart, images))
    prompt = prompt_of_text(plain[0]["content"], parts, model.tokenizer, "messages[0].content")
    encoded = encode_media_prompt(prompt, model.tokenizer, model.formats)
    return Conversation(list(encoded.ids), plain[0]["content"], encoded.images)


def _template_options(given: Any) -> dict[str, Any]:
    """What the template reads besides the messages."""
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise ConfigError(
            "chat_template_kwargs",
            f'is {kind_of(given)}; give an object such as {{"enable_thinking": false}}.',
        )
    for name in given:
        if name in _NOT_FOR_TEMPLATES:
            raise ConfigError(
                "chat_template_kwargs", f"{name!r} is not the request's to choose; leave it out."
            )
    return given


def _message(
    message: Any, place: str, model: ServedModel, images: list[np.ndarray]
) -> dict[str, Any]:
    """A message as templates read it; its images go to `images`, and their places into the text."""
    if not isinstance(message, dict):
        raise RequestError(f"{place}: is {kind_of(message)}; give an object.", param="messages")
    known = ("role", "content", *MESSAGE_FIELDS)
    for name, value in message.items():
        if name in EMPTY_MESSAGE_FIELDS:
            if value is not None and not any(same(value, o) for o in EMPTY_MESSAGE_FIELDS[name]):
                raise RequestError(
                    f"{place}.{name}: cannot be met by this server; leave it out.",
                    param=f"{place}.{name}",
                    code="unsupported_value",
                )
        elif name not in known:
            raise unknown_field(name, known, place)
    plain = {name: message[name] for name in known if message.get(name) is not None}
    if "role" not in plain or "content" not in plain:
        name = "content" if "role" in plain else "role"
        raise RequestError(
            f"{place}.{name}: is missing; give a text.",
            param=f"{place}.{name}",
            code="missing_field",
        )
    if isinstance(plain["content"], str):
        plain["content"] = [{"type": "text", "text": plain["content"]}]
    plain["content"] = _content(plain["content"], f"{place}.content", model, images)
    for name, value in plain.items():
        if not isinstance(value, str) or (name == "role" and not value):
            raise RequestError(
                f"{place}.{name}: is {kind_of(value)}; give a text.", param=f"{place}.{name}"
            )
    return plain


def _content(parts: Any, place: str, model: ServedModel, images: list[np.ndarray]) -> Any:
    """A content's text: the texts of its parts, a line each, and the places of its images."""
    if not isinstance(parts, list):
        return parts
    if not parts:
        raise RequestError(f"{place}: is empty; give a text.", param="messages")
    content, follows_text = "", False
    for number, part in enumerate(parts):
        where = f"{place}[{number}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image_url" and model.formats is not None:
            _check_count(len(images) + 1, where, model)
            images.append(image_of_part(part, where, model.formats.image))
            content, follows_text = content + _IMAGE_PLACE, False
            continue
        if kind in ("image_url", "input_audio", "file"):
            reads = "text alone" if model.formats is None else "text and images"
            raise RequestError(
                f"{where}: this server reads {reads}, not {kind}; leave it out.",
                param="messages",
                code="images_not_supported",
            )
        if kind != "text" or not isinstance(part.get("text"), str) or len(part) > 2:
            raise RequestError(
                f'{where}: is not a part; give {{"type": "text", "text": "..."}}.',
                param="messages",
            )
        text = part["text"]
        marker = next((name for name in MARKERS if name in text), None)
        if marker is not None and model.formats is not None:
            raise RequestError(
                f"{where}: {marker} is not text; send images as parts.", param="messages"
            )
        content += f"\n{text}" if follows_text else text
        follows_text = True
    return content


def _check_count(count: int, place: str, model: ServedModel) -> None:
    """Checks that images fit before they are decoded, which takes memory."""
    if count * model.image_places > model.capacity:
        raise RequestError(
            f"{place}: {count} images take more than the {model.capacity} tokens of a text; send "
            "fewer.",
            param="messages",
            code="context_length_exceeded",
        )


# ------------------------------------------------------------------------------
# Tokens.


def tokenize(body: Mapping[str, Any], model: ServedModel) -> dict[str, Any]:
    """The answer of /tokenize: {"tokens", "count", "max_model_len"}, and "token_strs" if asked.

    Raises:
      RequestError: as `completion_request`.
    """
    own = (option.path for option in options_of(TokenizeRequestConfig))
    known = ("prompt", "messages", "chat_template_kwargs", *own)
    check_names(body, known, {})
    is_chat = body.get("messages") is not None
    with named("messages" if is_chat else "prompt"):
        options = read_options(body, TokenizeRequestConfig)
        check_model(options.model, model)
        if is_chat and body.get("prompt") is not None:
            raise UserError("prompt is given too; give one of the two.")
        if not is_chat and body.get("chat_template_kwargs") is not None:
            raise ConfigError("chat_template_kwargs", "is for messages; leave it out.")
        ids = read_messages(body, model).ids if is_chat else _tokens_of_text(body, model, options)
    answer = {"tokens": ids, "count": len(ids), "max_model_len": model.capacity}
    if options.return_token_strs:
        answer["token_strs"] = [model.token_text(token) for token in ids]
    return answer


def _tokens_of_text(
    body: Mapping[str, Any], model: ServedModel, options: TokenizeRequestConfig
) -> list[int]:
    text = body.get("prompt")
    if text is None:
        raise missing_field("prompt", '"prompt": "The "')
    if not isinstance(text, str):
        raise UserError(f"is {kind_of(text)}; give a text.")
    if options.add_special_tokens and text:
        return _prompt(text, "prompt", model)
    tokenizer = model.require_tokenizer("prompt")
    check_encodable("prompt", (text,))
    return tokenizer.encode(text)


def detokenize(body: Mapping[str, Any], model: ServedModel) -> dict[str, Any]:
    """The answer of /detokenize: {"prompt"}.

    Raises:
      RequestError: as `completion_request`.
    """
    check_names(body, ("tokens", "model"), {})
    tokens = body.get("tokens")
    if tokens is None:
        raise missing_field("tokens", '"tokens": [1, 5, 9]')
    with named("tokens"):
        check_model(read_options(body, ModelNameConfig).model, model)
        model.require_tokenizer("tokens")
        if not isinstance(tokens, list) or not all(map(is_whole, tokens)):
            raise UserError("is not a list of token ids; give one, such as [1, 5, 9].")
        ids = list(map(int, tokens))
        for token in ids:
            check_token(token, "tokens", model)
    return {"prompt": model.decode(ids)}
