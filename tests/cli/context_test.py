"""What sessions keep: texts that go on, and messages in the format of the model."""

from typing import Any

import pytest
from chat_tokenizer import chat_tokenizer

from megatransformer_jax.cli.context import ChatContext, TextContext, chat_prompts
from megatransformer_jax.config.option import UserError
from megatransformer_jax.data.tokenizer import BytesTokenizer

pytest.importorskip("jinja2")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return chat_tokenizer(tmp_path_factory.mktemp("chat"))


def test_lines_stand_below_each_other() -> None:
    context = TextContext(str.upper)
    assert context.is_empty and context.prompt("ab") == "AB"
    assert context.is_empty  # Nothing is kept that was not continued.
    context.keep("ab", "c")
    assert context.prompt("d") == "ABC\nD"
    context.reset()
    assert context.is_empty and context.prompt("d") == "D"


def test_a_chat_is_a_list_of_messages(tokenizer: Any) -> None:
    context = ChatContext(tokenizer, system="Be short.")
    start = "<|system|>Be short.<|end|>"
    first = f"{start}<|user|>Hi<|end|><|assistant|>"
    assert context.prompt("Hi") == tokenizer.encode(first)
    context.keep("Hi", "Yes?")
    assert not context.is_empty
    assert context.prompt("x") == tokenizer.encode(
        f"{first}Yes?<|end|><|user|>x<|end|><|assistant|>"
    )
    context.reset()
    assert context.is_empty and context.prompt("Hi") == tokenizer.encode(first)


def test_every_prompt_is_a_chat_of_its_own(tokenizer: Any) -> None:
    texts = [f"<|user|>{letter}<|end|><|assistant|>" for letter in "ab"]
    assert chat_prompts(tokenizer, None, ["a", "b"]) == [tokenizer.encode(text) for text in texts]


@pytest.mark.parametrize(
    ("tokenizer", "problem"),
    [(None, "this model has no tokenizer, so no chat"), (BytesTokenizer(), "no chat template")],
)
def test_a_chat_needs_a_template(tokenizer: Any, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        ChatContext(tokenizer)
