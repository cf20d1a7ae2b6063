"""Chat templates: Jinja texts that write messages as the prompts which a chat model was trained on.

They come with a tokenizer, as chat_template.jinja or in tokenizer_config.json, and render here to
the text that transformers makes of them. A template is a program from somewhere else, so it runs in
Jinja's sandbox and sees copies of plain values only. Needs Jinja (extra 'hub').
"""

import dataclasses
import datetime
import functools
import json
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from megatransformer_jax.config.build import read_text, read_values
from megatransformer_jax.config.option import UserError, nearest_hint
from megatransformer_jax.config.sampling import check_encodable
from megatransformer_jax.extras import import_extra
from megatransformer_jax.storage import AnyPath

TEMPLATE_FILE = "chat_template.jinja"
# Further templates by name, such as tool_use.jinja.
TEMPLATE_FOLDER = "additional_chat_templates"
CONFIG_FILE = "tokenizer_config.json"
DEFAULT = "default"
# Chosen by itself if there are tools.
TOOL_USE = "tool_use"
# Earlier versions let a template out of the sandbox.
MIN_JINJA = (3, 1, 6)

# The names under which a message may hold its reasoning; templates read the first or the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")

Message = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """The templates of a tokenizer.

    Attributes:
      texts: (name, Jinja text) of every template. One that is alone is the default by any name.
      special_tokens: (name, token) that templates may write, such as ('bos_token', '<s>').
      name: where they come from, for messages.
    """

    texts: tuple[tuple[str, str], ...]
    special_tokens: tuple[tuple[str, str], ...] = ()
    name: str = "chat template"

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        template: str | None = None,
        **variables: Any,
    ) -> str:
        """The messages as a text.

        Args:
          messages: {"role": "user", "content": "..."} one after the other. A key whose value is
            None counts as absent.
          tools: JSON schemas of functions, for templates that write them.
          documents: with title and text, for templates that write them.
          add_generation_prompt: ends with what opens an answer.
          template: name of one of several, or a Jinja text. None: tool_use if there are tools and
            such a template, else the default.
          **variables: more that a template reads, such as enable_thinking=False.

        Raises:
          UserError: if a message is not one, the template refuses the messages or is broken, there
            is no such template, or Jinja is not installed.
        """
        text = self._choose(template, has_tools=tools is not None)
        given = {
            "messages": [_checked_message(message) for message in _checked_list(messages)],
            "tools": _dicts("tools", tools),
            "documents": _dicts("documents", documents),
            "add_generation_prompt": bool(add_generation_prompt),
        }
        rendered = dict(self.special_tokens) | _plain("template variables", variables) | given
        errors = import_extra("jinja2.exceptions", "hub", "chat templates")
        compiled = _compile(text, self.name)
        try:
            written = compiled.render(rendered)
        except errors.TemplateError as error:
            raise UserError(
                f"{self.name}: the chat template refuses these messages "
                f"({error.message or error}); change their roles, order or fields."
            ) from error
        except Exception as error:  # A template is a program, which may fail in any way.
            raise UserError(
                f"{self.name}: the chat template failed on these messages ({type(error).__name__}: "
                f"{error}); look for a field that it expects and they lack."
            ) from error
        check_encodable("messages", (written,))
        return str(written)

    def files(self) -> dict[str, str]:
        """What a tokenizer's folder has of the templates, for `read_chat_template`: the text of
        chat_template.jinja, or of several templates an entry of tokenizer_config.json.
        """
        if len(self.texts) == 1:
            return {TEMPLATE_FILE: self.texts[0][1]}
        named = [{"name": name, "template": text} for name, text in self.texts]
        return {CONFIG_FILE: json.dumps({"chat_template": named})}

    def _default(self) -> str | None:
        if len(self.texts) == 1:
            return self.texts[0][1]
        return dict(self.texts).get(DEFAULT)

    def _choose(self, template: str | None, *, has_tools: bool) -> str:
        named = dict(self.texts)
        if template is not None:
            if template in named:
                return named[template]
            if "{" in template:
                return template
            raise UserError(
                f"template={template!r} is neither the name of a template nor one; "
                f"{nearest_hint(template, named)}known: {', '.join(named)}."
            )
        if has_tools and TOOL_USE in named:
            return named[TOOL_USE]
        default = self._default()
        if default is None:
            raise UserError(
                f"{self.name} has several templates and none is the default; choose with template= "
                f"one of {', '.join(named)}."
            )
        return default


def read_chat_template(folder: AnyPath, special_tokens: Mapping[str, str]) -> ChatTemplate | None:
    """The templates of a folder, or None if it has none.

    Args:
      folder: with chat_template.jinja, which wins, or tokenizer_config.json, whose 'chat_template'
        is a text or a list of {"name", "template"}; others in additional_chat_templates/.
      special_tokens: by name, for the templates.

    Raises:
      UserError: if a file cannot be read.
    """
    config = folder / CONFIG_FILE
    named: dict[str, str] = {}
    if config.is_file():
        named = _named_texts(read_values(config).get("chat_template"), config)
    if (folder / TEMPLATE_FILE).is_file():
        named = {}
    for path in template_files(folder):
        named[DEFAULT if path.name == TEMPLATE_FILE else path.stem] = read_text(path)
    if not named:
        return None
    return ChatTemplate(tuple(named.items()), tuple(special_tokens.items()), str(folder))


def template_files(folder: AnyPath) -> list[AnyPath]:
    """The files of a folder that hold nothing but a template, the default first."""
    default = folder / TEMPLATE_FILE
    others = sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))
    return [default, *others] if default.is_file() else others


def _named_texts(value: Any, path: AnyPath) -> dict[str, str]:
    match value:
        case None:
            return {}
        case str():
            return {DEFAULT: value}
        case [*items] if all(
            isinstance(item, Mapping) and {"name", "template"} <= item.keys() for item in items
        ):
            return {str(item["name"]): str(item["template"]) for item in items}
    raise UserError(
        f"{path}: chat_template is neither a text nor a list of names and templates; correct it."
    )


# ------------------------------------------------------------------------------
# What a template sees: copies of plain values.


def _checked_list(messages: Any) -> Sequence[Any]:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise UserError(
            f"messages are {messages!r}; give a list such as "
            "[{'role': 'user', 'content': 'Hello'}]."
        )
    if not messages:
        raise UserError("messages are empty; give at least one.")
    return messages


def checked_variables(name: str, given: Any) -> Mapping[str, Any]:
    """What a template reads besides messages, tools and the answer's beginning.

    Args:
      name: of the argument, for messages.
      given: what a caller gave.

    Raises:
      UserError: if it is no dict with names, or names what has an argument of its own.
    """
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
        raise UserError(
            f"{name}: {given!r} is not a dict of names; give one such as "
            "{'enable_thinking': False}."
        )
    own = sorted({"messages", "tools", "add_generation_prompt"} & given.keys())
    if own:
        raise UserError(f"{name}: has {own[0]!r}, which is set already; leave it out.")
    return given


def _checked_message(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise UserError(
            f"the message {message!r} is not a dict with a role; write it as "
            "{'role': 'user', 'content': '...'}."
        )
    plain = _plain("messages", {key: value for key, value in message.items() if value is not None})
    reasoning = next((plain[key] for key in _REASONING if plain.get(key) is not None), None)
    if reasoning is None:
        return plain
    return {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _dicts(name: str, given: Any) -> Any:
    """A list of dicts, or None."""
    is_list = isinstance(given, Sequence) and all(isinstance(item, Mapping) for item in given)
    if given is not None and not is_list:
        raise UserError(f"{name} are {given!r}; give a list of dicts, or leave it out.")
    return _plain(name, given)


def _plain(name: str, value: Any) -> Any:
    """A copy of JSON's values alone, so that no method of another object can be called."""
    match value:
        case None | bool():
            return value
        case str():
            return str.__str__(value)
        case int():
            return int.__int__(value)
        case float():
            return float.__float__(value)
        case Mapping():
            return {_plain(name, key): _plain(name, item) for key, item in value.items()}
        case list():
            return [_plain(name, item) for item in value]
        case tuple():
            return tuple(_plain(name, item) for item in value)
    raise UserError(
        f"{name}: {value!r} is {type(value).__name__}; templates take texts, numbers, lists and "
        "dicts."
    )


# ------------------------------------------------------------------------------
# Jinja, set up as transformers sets it up.


@functools.lru_cache(maxsize=16)
def _compile(text: str, name: str) -> Any:
    jinja2 = import_extra("jinja2", "hub", "chat templates")
    found = tuple(int(part) for part in re.findall(r"\d+", jinja2.__version__)[:3])
    if found < MIN_JINJA:
        raise UserError(
            f"chat templates need jinja2 {'.'.join(map(str, MIN_JINJA))} or later, whose sandbox "
            f"holds; this is {jinja2.__version__}. Run pip install -U jinja2."
        )
    environment = _environment(jinja2)
    try:
        return environment.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"{name}: line {error.lineno} of the chat template is not Jinja ({error.message}); "
            "correct it, or get the file again."
        ) from error


def _environment(jinja2: Any) -> Any:
    sandbox = import_extra("jinja2.sandbox", "hub", "chat templates")
    extensions = import_extra("jinja2.ext", "hub", "chat templates")
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_generation_blocks(jinja2, extensions), extensions.loopcontrols],
    )

    def raise_exception(message: str) -> typing.NoReturn:
        raise jinja2.TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.datetime.now().strftime(form)

    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "dict": _Dict(),
        "namespace": _namespace(jinja2),
    }
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter would escape for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _generation_blocks(jinja2: Any, extensions: Any) -> Any:
    """The tag {% generation %} around what an assistant says; it writes what stands in it."""

    class GenerationBlocks(extensions.Extension):
        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

        def _write(self, caller: Any) -> str:
            return caller()

    return GenerationBlocks


class _Dict:
    """Makes dicts, as the type does, without the type's own attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _namespace(jinja2: Any) -> Any:
    """Jinja's namespace without private attributes, which lead to the interpreter's own."""

    class Namespace(jinja2.utils.Namespace):
        def __init__(*args: Any, **kwargs: Any) -> None:
            self, args = args[0], args[1:]
            values = dict(*args, **kwargs)
            for name in values:
                check(name)
            jinja2.utils.Namespace.__init__(self, values)

        def __setitem__(self, name: str, value: Any) -> None:
            check(name)
            jinja2.utils.Namespace.__setitem__(self, name, value)

    def check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(
                f"a namespace of a chat template has no attribute {name!r}"
            )

    return Namespace
