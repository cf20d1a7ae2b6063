import base64
import dataclasses
import io
import pathlib
import re
from typing import Any

import pytest
from chat_tokenizer import chat_tokenizer
from PIL import Image
from served_bytes import CONFIG, MODEL, chat, completion, refusal, sent, with_tokenizer

from megatransformer_jax.config.image import ImageConfig
from megatransformer_jax.data.media.records import MediaFormats
from megatransformer_jax.data.media_tokenizer import MediaTokenizer
from megatransformer_jax.data.tokenizer import BytesTokenizer
from megatransformer_jax.serving.errors import RequestError
from megatransformer_jax.serving.prompts import detokenize, tokenize
from megatransformer_jax.serving.served import ServedModel

HELLO = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    folder: pathlib.Path = tmp_path_factory.mktemp("tokenizer") / "files"
    return with_tokenizer(chat_tokenizer(folder))


def test_prompts_are_a_text_ids_or_several_of_either() -> None:
    tokenizer = BytesTokenizer()
    ids = [1, *tokenizer.encode("The")]
    for prompt in ("The", ["The"], ids, [ids]):
        request = completion(prompt=prompt)
        assert (request.prompts, request.prompt_texts) == ((tuple(ids),), ("The",))
    assert len(completion(prompt=[[5], [6, 7]]).prompts) == 2
    # 5.0 is a whole number in JSON.
    assert completion(prompt=[[5.0], [6, 7.0]]).prompts == ((5,), (6, 7))
    assert all(type(token) is int for token in completion(prompt=[5.0]).jobs[0].ids)


def test_what_is_not_an_id_among_ids_is_named() -> None:
    for prompt, place in (([5, 6, True], "prompt"), ([[5], [6, True]], "prompt[1]")):
        with pytest.raises(RequestError, match=re.escape(f"{place}: has true among its ids")):
            completion(prompt=prompt)


@pytest.mark.parametrize(
    ("prompt", "code"),
    [
        (None, "missing_field"),
        ("", "invalid_value"),
        ([], "invalid_value"),
        ([[]], "invalid_value"),
        (["a", ""], "invalid_value"),
        (["a", [5]], "invalid_value"),
        ([[5], 6], "invalid_value"),
        ([True], "invalid_value"),
        ([5.5], "invalid_value"),
        ([-1], "invalid_value"),
        ([259], "invalid_value"),
        ([2**62], "invalid_value"),
        ({"text": "a"}, "invalid_value"),
        ("\ud800", "invalid_value"),
        (["a"] * 5, "invalid_value"),
    ],
)
def test_other_prompts_are_refused(prompt: Any, code: str) -> None:
    assert refusal(completion, prompt=prompt) == ("prompt", code)


def test_markers_of_media_are_not_text() -> None:
    tokenizer = MediaTokenizer(BytesTokenizer())
    model = with_tokenizer(tokenizer, vocab_size=259)
    assert refusal(completion, model, prompt=[tokenizer.marker_id("<|IMAGE|>")])[0] == "prompt"


def test_messages_are_written_by_the_template(chatting: ServedModel) -> None:
    said = [{"role": "system", "content": "Be brief."}, *HELLO]
    request = chat(chatting, messages=said)
    text = "<|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>"
    assert request.prompt_texts == (text,)
    assert request.prompts == (tuple(chatting.tokenizer.encode(text)),)  # type: ignore[union-attr]
    # There is room for so many.
    (job,) = request.jobs
    assert job.config.max_new_tokens == 128 - len(job.ids)


def test_parts_and_what_answers_have_are_messages_too(chatting: ServedModel) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    answered = {"role": "assistant", "content": "x", "refusal": None, "tool_calls": []}
    request = chat(chatting, messages=[{"role": "user", "content": parts}, answered])
    assert request.prompt_texts == ("<|user|>a\nb<|end|><|assistant|>x<|end|><|assistant|>",)


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"messages": None}, "messages", "missing_field"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": "Hi"}, "messages", "invalid_value"),
        ({"messages": ["Hi"]}, "messages", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_field"),
        ({"messages": [{"content": "a"}]}, "messages[0].role", "missing_field"),
        ({"messages": [{"role": "", "content": "a"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": 1, "content": "a"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_value"),
        ({"messages": [{**HELLO[0], "contnt": ""}]}, "messages[0].contnt", "unknown_field"),
        (
            {"messages": [{**HELLO[0], "tool_calls": [1]}]},
            "messages[0].tool_calls",
            "unsupported_value",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages",
            "images_not_supported",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "x"}]}]}, "messages", "invalid_value"),
        ({"messages": [{"role": "user", "content": []}]}, "messages", "invalid_value"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages", "invalid_value"),
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_value"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_value"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens", "invalid_value"),
        ({"max_completion_tokens": 127}, "messages", "context_length_exceeded"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"echo": True}, "echo", "unknown_field"),
        # A template is a program, and not the client's to choose.
        (
            {"chat_template_kwargs": {"template": "{{ 1 }}"}},
            "chat_template_kwargs",
            "invalid_value",
        ),
        ({"chat_template_kwargs": []}, "chat_template_kwargs", "invalid_value"),
    ],
)
def test_refusals_of_chats_name_the_field(
    body: dict[str, Any], param: str, code: str, chatting: ServedModel
) -> None:
    assert refusal(chat, chatting, **{"messages": HELLO} | body) == (param, code)


def test_a_chat_needs_a_template_and_says_so() -> None:
    assert refusal(chat, MODEL, messages=HELLO) == ("messages", "no_chat_template")


def test_a_templates_own_refusal_is_an_error_of_the_messages(tmp_path: pathlib.Path) -> None:
    tokenizer = chat_tokenizer(tmp_path / "files")
    template = "{{ raise_exception('no system, please') }}"
    strict = dataclasses.replace(
        tokenizer, chat=dataclasses.replace(tokenizer.chat, texts=(("default", template),))
    )
    with pytest.raises(RequestError, match="no system, please") as caught:
        chat(with_tokenizer(strict), messages=HELLO)
    assert caught.value.param == "messages"


@pytest.fixture
def seeing(tmp_path: pathlib.Path) -> ServedModel:
    """It reads images of 4 x 4, each in 4 places, and has a chat template."""
    tokenizer = MediaTokenizer(chat_tokenizer(tmp_path / "files"))
    image = ImageConfig(enabled=True, height=4, width=4, channels=1, patch_size=2)
    return with_tokenizer(tokenizer, formats=MediaFormats(image), makes_media=True)


def picture(shade: int, **more: Any) -> dict[str, Any]:
    """A part with a grey image of one shade."""
    written = io.BytesIO()
    Image.new("L", (4, 4), shade).save(written, "PNG")
    url = "data:image/png;base64," + base64.b64encode(written.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url, **more}}


def say(*parts: Any, role: str = "user") -> dict[str, Any]:
    named = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"role": role, "content": named}


def test_images_stand_where_they_were_sent(seeing: ServedModel) -> None:
    said = [say("a", picture(255), "b", "c"), say(picture(0), role="assistant")]
    request = chat(seeing, messages=said, max_tokens=5)
    place = "<|IMAGE|><|/IMAGE|>"
    text = f"<|user|>a{place}b\nc<|end|><|assistant|>{place}<|end|><|assistant|>"
    assert request.prompt_texts == (text,)
    (job,) = request.jobs
    assert list(job.ids) == seeing.tokenizer.encode_with_media(text)  # type: ignore[union-attr]
    assert [float(image.mean()) for image in job.media] == [1.0, -1.0]
    assert request.num_prompt_tokens == len(job.ids) + 2 * 4
    assert job.config.most_media == 0


def test_without_a_template_one_message_is_continued(seeing: ServedModel) -> None:
    plain = dataclasses.replace(seeing, tokenizer=MediaTokenizer(BytesTokenizer()))
    (job,) = chat(plain, messages=[say("a", picture(255))]).jobs
    opening = 259 + 2
    assert (job.ids, len(job.media)) == ((1, 100, opening, opening + 1), 1)
    for said in ([say("a"), say("b")], [say("a", role="system")]):
        assert refusal(chat, plain, messages=said) == ("messages", "no_chat_template")


@pytest.mark.parametrize(
    ("parts", "code"),
    [
        (["<|IMAGE|>"], "invalid_value"),
        (["<|/VOICE|>", picture(0)], "invalid_value"),
        ([{"type": "image_url", "image_url": {"url": "https://a.org/b.png"}}], "invalid_image"),
        ([{"type": "input_audio", "input_audio": {}}], "images_not_supported"),
        ([picture(0)] * 33, "context_length_exceeded"),
        ([picture(0)] * 22, "context_length_exceeded"),
    ],
)
def test_other_parts_are_refused(seeing: ServedModel, parts: list[Any], code: str) -> None:
    assert refusal(chat, seeing, messages=[say(*parts)]) == ("messages", code)


def test_a_template_that_drops_images_is_an_error(seeing: ServedModel) -> None:
    base = seeing.tokenizer.base  # type: ignore[union-attr]
    silent = dataclasses.replace(base.chat, texts=(("default", "nothing"),))
    deaf = MediaTokenizer(dataclasses.replace(base, chat=silent))
    with pytest.raises(RequestError, match="leaves 0 of 1 images"):
        chat(dataclasses.replace(seeing, tokenizer=deaf), messages=[say(picture(0))])


def test_tokens_of_texts_and_messages(chatting: ServedModel) -> None:
    answer = tokenize(sent({"prompt": "Hi", "return_token_strs": True}), MODEL)
    assert answer == {
        "tokens": [1, 75, 108],
        "count": 3,
        "max_model_len": 128,
        "token_strs": ["token_id:1", "H", "i"],
    }
    plain = tokenize(sent({"prompt": "Hi", "add_special_tokens": False}), MODEL)
    assert detokenize(sent({"tokens": plain["tokens"]}), MODEL) == {"prompt": "Hi"}
    assert tokenize(sent({"prompt": ""}), MODEL)["tokens"] == []
    said = tokenize(sent({"messages": HELLO}), chatting)
    assert tuple(said["tokens"]) == chat(chatting, CONFIG, messages=HELLO).prompts[0]


@pytest.mark.parametrize(
    ("call", "body", "param"),
    [
        (tokenize, {}, "prompt"),
        (tokenize, {"prompt": 5}, "prompt"),
        (tokenize, {"prompt": "a", "messages": HELLO}, "messages"),
        (tokenize, {"prompt": "a", "chat_template_kwargs": {}}, "chat_template_kwargs"),
        (tokenize, {"prompt": "a", "model": "other"}, "model"),
        (tokenize, {"prompt": "\ud800", "add_special_tokens": False}, "prompt"),
        (tokenize, {"promt": "a"}, "promt"),
        (detokenize, {}, "tokens"),
        (detokenize, {"tokens": "a"}, "tokens"),
        (detokenize, {"tokens": [259]}, "tokens"),
        (detokenize, {"tokens": [True]}, "tokens"),
    ],
)
def test_other_tokens_are_refused(call: Any, body: dict[str, Any], param: str) -> None:
    assert refusal(lambda: call(sent(body), MODEL))[0] == param
