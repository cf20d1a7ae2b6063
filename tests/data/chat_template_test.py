"""Chat templates render as transformers renders them, and nothing gets out of the sandbox."""

import dataclasses
import json
import sys

import pytest

from megatransformer_jax.config.option import UserError
from megatransformer_jax.data.chat_template import (
    ChatTemplate,
    checked_variables,
    read_chat_template,
)

pytest.importorskip("jinja2")

CHATML = """\
{%- if messages[0].role != 'system' -%}
    {{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
{%- endif -%}
{% for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- generation %}{{ message['content'] }}{% endgeneration -%}
    {{- '<|im_end|>' + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
# With what Llama 3 and Qwen 3 use: tools as JSON, namespaces, break, reasoning, the date.
TOOLS = """\
{{- bos_token }}
{%- set found = namespace(last=-1, text='') %}
{%- if tools is not none and tools %}
    {{- "tools since " + (date_string or strftime_now("%Y")) + ":\\n" }}
    {%- for tool in tools %}{{ tool | tojson(indent=2) }}{% endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set found.last = loop.index0 %}{% break %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set head = dict(role=message.role, at=loop.index0) %}
    {{- head | tojson }}{{ message.content | trim }}
    {%- if message.reasoning_content is defined and enable_thinking is not false %}
        {{- '<think>' + message.reasoning_content + '</think>' }}
    {%- endif %}
    {%- if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}
    {{- eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' ~ found.last }}{% endif %}
"""
ALTERNATING = """\
{% for m in messages %}
{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant') }}
{% endif %}
{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ m.content + eos_token }}{% endif %}
{% endfor %}"""  # noqa: E501

USER = {"role": "user", "content": " Größe & <b>? "}
TALK = [
    {"role": "system", "content": "Be short."},
    USER,
    {"role": "assistant", "content": "Yes.", "thinking": "hm", "name": None},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": "é"}}}],
    },
    USER,
]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture(scope="module")
def reference():
    """transformers' own rendering, by a tokenizer of two tokens."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), **SPECIAL
    )

    def render(template, messages, **options):
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, **options
        )

    return render


@pytest.mark.parametrize("template", [CHATML, TOOLS])
@pytest.mark.parametrize("messages", [[USER], TALK, TALK[:2]])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_generation_prompt": True},
        {"tools": [TOOL], "date_string": "26 Jul 2024"},
        {"tools": [TOOL], "enable_thinking": False, "add_generation_prompt": True},
        {"tools": None, "bos_token": "<other>", "documents": [{"title": "a", "text": "b"}]},
    ],
)
def test_the_text_is_that_of_transformers(reference, template, messages, options):
    ours = ChatTemplate((("default", template),), tuple(SPECIAL.items()))
    assert ours.render(messages, **options) == reference(template, messages, **options)


def test_a_template_may_refuse(reference):
    ours = ChatTemplate((("default", ALTERNATING),), tuple(SPECIAL.items()), "a/folder")
    good = [USER, {"role": "assistant", "content": "Ja."}, USER]
    assert ours.render(good) == reference(ALTERNATING, good)
    with pytest.raises(UserError, match=r"a/folder: the chat template refuses .*must alternate"):
        ours.render([USER, USER])


@pytest.mark.parametrize(
    "escape",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__ }}{{ ().__class__.__bases__[0].__subclasses__()[0] }}",
        "{% set n = namespace(__init__=1) %}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
        "{{ messages.append(1) }}",
        "{{ dict.mro()[1].__subclasses__()[0].x }}",
    ],
)
def test_the_sandbox_holds(escape):
    with pytest.raises(UserError, match=r"chat template (refuses|failed)"):
        ChatTemplate((("default", escape),)).render([USER])


@dataclasses.dataclass
class Tape:
    text: str


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("Hello", "messages are 'Hello'; give a list"),
        ([], "messages are empty"),
        (["Hello"], "the message 'Hello' is not a dict with a role"),
        ([{"content": "Hello"}], "is not a dict with a role"),
        ([{"role": "user", "content": Tape("x")}], r"Tape\(text='x'\) is Tape; templates take"),
        ([{"role": "user", "content": "\ud800"}], "which is not text; write it in UTF-8"),
    ],
)
def test_bad_messages_are_named(messages, message):
    with pytest.raises(UserError, match=message):
        ChatTemplate((("default", CHATML),)).render(messages)


def test_bad_templates_are_named():
    with pytest.raises(UserError, match="line 2 of the chat template is not Jinja"):
        ChatTemplate((("default", "\n{% for %}"),)).render([USER])
    with pytest.raises(UserError, match=r"failed on these messages \(TypeError"):
        ChatTemplate((("default", "{{ messages + 1 }}"),)).render([USER])
    with pytest.raises(UserError, match="tools are 1; give a list of dicts"):
        ChatTemplate((("default", CHATML),)).render([USER], tools=1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "template_options: 3 is not a dict of names"),
        ({3: 1}, "is not a dict of names"),
        ({"messages": []}, "template_options: has 'messages', which is set already"),
    ],
)
def test_what_a_template_reads_besides_has_names_of_its_own(given, message):
    with pytest.raises(UserError, match=message):
        checked_variables("template_options", given)


def test_several_templates_by_name(tmp_path):
    listed = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": listed}))
    found = read_chat_template(tmp_path, SPECIAL)
    assert found is not None and found.special_tokens == tuple(SPECIAL.items())
    assert found.render([USER]) == "D" and found.render([USER], tools=[TOOL]) == "T"
    assert found.render([USER], template="tool_use") == "T"
    assert found.render([USER], template="{{ bos_token }}") == "<s>"
    with pytest.raises(UserError, match=r"template='tool_us' is neither .*did you mean 'tool_use'"):
        found.render([USER], template="tool_us")
    # What is written is read; a file of its own wins over the configuration.
    [(file, text)] = found.files().items()
    assert json.loads(text) == json.loads((tmp_path / file).read_text())
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("T")
    (tmp_path / "chat_template.jinja").write_text("new")
    found = read_chat_template(tmp_path, {})
    assert found is not None and dict(found.texts) == {"default": "new", "tool_use": "T"}
    no_default = ChatTemplate((("a", "A"), ("b", "B")))
    with pytest.raises(UserError, match="none is the default; choose with template= one of a, b"):
        no_default.render([USER])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": 3}))
    with pytest.raises(UserError, match="chat_template is neither a text nor a list"):
        read_chat_template(tmp_path, {})


def test_without_jinja_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.setitem(sys.modules, "jinja2.exceptions", None)
    with pytest.raises(UserError, match=r"pip install 'megatransformer_jax\[hub\]'"):
        ChatTemplate((("default", "never compiled"),)).render([USER])
