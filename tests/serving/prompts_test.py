import dataclasses
import pathlib
from typing import Any

import pytest
from chat_tokenizer import chat_tokenizer
from served_bytes import CONFIG, MODEL, chat, completion, refusal, sent, with_tokenizer

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
