"""What a session in the terminal keeps of what was said: a text that goes on, or a chat's messages.

The chat's messages are written in the format that the model was trained on, which its tokenizer
knows (`data/chat_template.py`); so are the prompts of a command with --chat.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from megatransformer_jax.data.chat_template import ChatTemplate
from megatransformer_jax.data.hf_tokenizer import HuggingFaceTokenizer, require_chat_template


class Context(Protocol):
    """What was said so far."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing was said."""
        ...

    def prompt(self, line: str) -> Any:
        """What is continued when a line was typed; nothing is kept yet."""
        ...

    def keep(self, line: str, answer: str) -> None:
        """Keeps the line and its continuation."""
        ...

    def reset(self) -> None:
        """Forgets everything."""
        ...


class TextContext:
    """One text: each line is appended to it, and so is its continuation.

    Args:
      to_prompt: from the text so far to what is continued, such as one with images. None: the text.
    """

    def __init__(self, to_prompt: Callable[[str], Any] | None = None):
        self._to_prompt = to_prompt
        self._text = ""

    @property
    def is_empty(self) -> bool:
        """Whether there is no text yet."""
        return not self._text

    def prompt(self, line: str) -> Any:
        """The text with the line at its end."""
        text = self._with(line)
        return text if self._to_prompt is None else self._to_prompt(text)

    def keep(self, line: str, answer: str) -> None:
        """Appends both."""
        self._text = self._with(line) + answer

    def reset(self) -> None:
        """Starts with an empty text."""
        self._text = ""

    def _with(self, line: str) -> str:
        is_at_line_start = not self._text or self._text.endswith("\n")
        return self._text + ("" if is_at_line_start else "\n") + line


class ChatContext:
    """Messages: each line is the user's next one, and its continuation the answer.

    Args:
      tokenizer: of the model.
      system: the message that stands before all others. None: there is none.

    Raises:
      UserError: if the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any, system: str | None = None):
        self._template: ChatTemplate = require_chat_template(tokenizer)
        self._tokenizer: HuggingFaceTokenizer = tokenizer
        self._start = [] if system is None else [{"role": "system", "content": system}]
        self._messages = list(self._start)

    @property
    def is_empty(self) -> bool:
        """Whether no line was answered yet."""
        return self._messages == self._start

    def prompt(self, line: str) -> list[int]:
        """The ids of all messages, of the line as the newest, and of what opens an answer.

        Raises:
          UserError: if the template refuses them.
        """
        messages = [*self._messages, {"role": "user", "content": line}]
        text = self._template.render(messages, add_generation_prompt=True)
        return self._tokenizer.encode(text)

    def keep(self, line: str, answer: str) -> None:
        """Adds two messages."""
        self._messages += [
            {"role": "user", "content": line},
            {"role": "assistant", "content": answer},
        ]

    def reset(self) -> None:
        """Forgets all messages but the system's."""
        self._messages = list(self._start)


def chat_prompts(tokenizer: Any, system: str | None, prompts: Sequence[str]) -> list[list[int]]:
    """The ids of prompts that are each the first message of a chat.

    Raises:
      UserError: if the tokenizer has no chat template, or it refuses them.
    """
    chat = ChatContext(tokenizer, system)
    return [chat.prompt(prompt) for prompt in prompts]
