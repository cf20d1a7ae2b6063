"""A tokenizer of bytes in the files of a published chat model."""

import json
import pathlib

import pytest

from megatransformer_jax.data.hf_tokenizer import HuggingFaceTokenizer, load_huggingface_tokenizer

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|text|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def write_chat_tokenizer(folder: pathlib.Path, template: str | None = TEMPLATE) -> pathlib.Path:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    tokenizers = pytest.importorskip("tokenizers")

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE({letter: number for number, letter in enumerate(alphabet)}, [])
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<|text|>", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def chat_tokenizer(folder: pathlib.Path) -> HuggingFaceTokenizer:
    """The tokenizer of 261 ids, written to a folder and read."""
    return load_huggingface_tokenizer(write_chat_tokenizer(folder))
