import dataclasses
import json
import pathlib
from typing import Any

import jsonschema_rs
import pytest
from chat_tokenizer import chat_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from served_bytes import CONFIG, MODEL, chat, completion, sent, with_tokenizer

from megatransformer_jax.config.serving import CompletionRequestConfig
from megatransformer_jax.serving.answers import Answer, model_list
from megatransformer_jax.serving.errors import RequestError, error_answer
from megatransformer_jax.serving.fields import completion_request, field_names
from megatransformer_jax.serving.openapi import openapi_document
from megatransformer_jax.serving.prompts import detokenize, tokenize
from megatransformer_jax.serving.requests import Finished, NewToken, PromptRead, Scored

DOCUMENT = openapi_document(MODEL, CONFIG)


def problems(name: str, value: Any) -> list[str]:
    """What a schema of the document finds wrong with a value."""
    schema = {"$ref": f"#/components/schemas/{name}", "components": DOCUMENT["components"]}
    found = jsonschema_rs.Draft202012Validator(schema).iter_errors(value)
    return [error.message for error in found]


def test_every_reference_of_the_document_is_there_and_used() -> None:
    text = json.dumps(DOCUMENT)
    schemas = DOCUMENT["components"]["schemas"]
    assert {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]} == set(schemas)
    for schema in schemas.values():
        assert jsonschema_rs.meta.is_valid(schema)


def test_a_model_without_a_core_has_no_lens() -> None:
    plain = openapi_document(dataclasses.replace(MODEL, trained_depth=None), CONFIG)
    assert "/lens" in DOCUMENT["paths"] and "/lens" not in plain["paths"]
    assert "LensRequest" not in plain["components"]["schemas"]


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "a", "temperature": 0, "top_k": -1, "stop": None, "seed": None},
        {"prompt": ["a", "b"], "n": 2, "logit_bias": {"5": -1.5}, "depth": 4},
        {
            "prompt": [5, 6],
            "stop": ["x"],
            "stream": True,
            "stream_options": {"include_usage": True},
        },
        {"prompt": [[5]], "best_of": 1, "suffix": None, "exit_criterion": "kl", "min_depth": 2},
    ],
)
def test_usual_requests_are_of_the_schema(body: dict[str, Any]) -> None:
    assert problems("CompletionRequest", body) == []
    completion(**body)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompt": ""},
        {"prompt": [259]},
        {"prompt": "a", "depht": 1},
        {"prompt": "a", "depth": 33},
        {"prompt": "a", "n": 5},
        {"prompt": "a", "temperature": 1e-5},
        {"prompt": "a", "top_k": -2},
        {"prompt": "a", "top_p": 0},
        {"prompt": "a", "exit_criterion": "cosine"},
        {"prompt": "a", "logit_bias": {"x": 1}},
        {"prompt": "a", "stop": ["a"] * 5},
        {"prompt": "a", "best_of": 2},
        {"prompt": "a", "model": "other"},
    ],
)
def test_what_is_refused_for_its_values_is_not_of_the_schema(body: dict[str, Any]) -> None:
    assert problems("CompletionRequest", body)
    with pytest.raises(RequestError):
        completion(**body)


VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-2, 40)
    | st.sampled_from([0.0, 0.25, 1.0, 2.0, 101.0, "kl", "a", "", "bytes", [], ["a"], [5], {}])
    | st.dictionaries(st.sampled_from(["5", "x", "include_usage"]), st.integers(-1, 101))
)
NAMES = st.sampled_from([*field_names(CompletionRequestConfig), "best_of", "suffix"])


@settings(max_examples=100)
@given(st.dictionaries(NAMES, VALUES, max_size=3))
def test_what_is_accepted_is_of_the_schema(more: dict[str, Any]) -> None:
    body = {"prompt": "a"} | more
    try:
        completion_request(sent(body), MODEL, CONFIG)
    except RequestError:
        return
    assert problems("CompletionRequest", body) == []


def test_answers_are_of_their_schemas(tmp_path: pathlib.Path) -> None:
    scored = Scored(5, -0.5, ((5, -0.5), (6, -1.0)))
    request = completion(
        prompt="a", logprobs=2, echo=True, return_token_ids=True, return_depths=True
    )
    answered = Answer(request, MODEL, "x", 9)
    scores = (Scored(1, None), Scored(100, -1.0, ((5, -0.5),)))
    for event in (PromptRead(scores), NewToken(scored, 3, "b"), Finished("length")):
        answered.add(0, event)
    assert problems("CompletionAnswer", answered.whole()) == []
    said = [{"role": "user", "content": "a"}]
    asked = chat(with_tokenizer(chat_tokenizer(tmp_path / "files")), messages=said, logprobs=True)
    answered = Answer(asked, MODEL, "x", 9)
    for event in (NewToken(scored, 3, "b"), Finished("stop", "", Scored(2, -1.0), 3)):
        answered.add(0, event)
    assert problems("ChatAnswer", answered.whole()) == []
    assert problems("ModelList", model_list(MODEL, CONFIG)) == []
    tokens = tokenize(sent({"prompt": "a", "return_token_strs": True}), MODEL)
    assert problems("TokenizeAnswer", tokens) == []
    assert problems("DetokenizeAnswer", detokenize({"tokens": [100]}, MODEL)) == []
    for error in (ValueError("x"), RequestError("no", status=404, param="model")):
        assert problems("Error", error_answer(error).body) == []


def test_prompts_of_a_model_without_a_tokenizer_are_ids() -> None:
    document = openapi_document(with_tokenizer(None), CONFIG)
    prompt = document["components"]["schemas"]["CompletionRequest"]["properties"]["prompt"]
    assert all(kind["type"] == "array" for kind in prompt["anyOf"])
