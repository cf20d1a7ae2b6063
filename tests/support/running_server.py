"""Servers in this process, on models that need no training and clients that speak to them."""

import contextlib
import pathlib
import unittest.mock
from collections.abc import Iterator
from typing import Any

import fake_batcher
import openai
from chat_tokenizer import chat_tokenizer
from fake_batcher import ALPHABET, FakeBatcher
from tiny_model import DEPTH, make, tiny

from megatransformer_jax.config.serving import ServingConfig
from megatransformer_jax.model import Model
from megatransformer_jax.runs.load import LoadedModel
from megatransformer_jax.serving.server import Server

MAX_LENGTH = 256


def chat_model(folder: pathlib.Path) -> Model:
    """A model of bytes with a chat template and random weights; its tokenizer is written there."""
    tokenizer = chat_tokenizer(folder)
    config = tiny(vocab_size=tokenizer.vocab_size, max_length=MAX_LENGTH)
    module, params = make(config)
    return Model(LoadedModel(config, module, params, tokenizer, DEPTH, "a tiny model"))


@contextlib.contextmanager
def running(lm: Model, make_batcher: Any = FakeBatcher, **options: Any) -> Iterator[Server]:
    """A server that is ready; a `FakeBatcher` writes letters of the model's tokenizer."""
    api_key = options.pop("api_key", None)
    config = ServingConfig(**{"port": 0, "name": "tiny", "rows": 4, **options})
    letters = lm.tokenizer.encode("abcdefghijklmnopqrstuvwxyz ") if lm.tokenizer else ALPHABET
    with (
        unittest.mock.patch.object(fake_batcher, "ALPHABET", letters),
        Server(lm, config, api_key, make_batcher) as server,
    ):
        server.start()
        server.wait_until_ready()
        yield server


def client_of(server: Server, api_key: str = "-") -> openai.OpenAI:
    """OpenAI's, which asks once."""
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=api_key, max_retries=0, timeout=30)
