import dataclasses
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from served_bytes import CONFIG, MODEL, completion, refusal, sent, with_tokenizer

from megatransformer_jax.config.calibration import Calibration
from megatransformer_jax.config.generation import GenerationConfig
from megatransformer_jax.config.serving import CompletionRequestConfig
from megatransformer_jax.serving.errors import error_answer, json_bytes
from megatransformer_jax.serving.fields import (
    GENERATION_FIELDS,
    UNSUPPORTED_COMPLETION,
    completion_request,
    field_names,
    fresh_seed,
)
from megatransformer_jax.serving.openapi import openapi_document

GATED = dataclasses.replace(MODEL, has_exit_gate=True)
PLAIN = dataclasses.replace(MODEL, trained_depth=None)


def test_a_request_becomes_the_generation_that_generate_would_make() -> None:
    request = completion(
        prompt="The",
        max_tokens=5,
        temperature=0.7,
        top_p=0.9,
        repetition_penalty=1.2,
        depth=4,
        exit_criterion="kl",
        exit_threshold=1e-3,
        min_depth=2,
        warm_start=True,
        stop="\n",
        seed=3,
        logit_bias={"50": -100, "51": 2.5},
    )
    wanted = GenerationConfig.of(
        strategy="sample",
        max_new_tokens=5,
        temperature=0.7,
        top_p=0.9,
        repetition_penalty=1.2,
        depth=4,
        exit_criterion="kl",
        exit_threshold=1e-3,
        min_depth=2,
        warm_start=True,
        stop=("\n",),
        seed=3,
    )
    (job,) = request.jobs
    assert (job.ids, job.config) == ((1, 87, 107, 104), wanted)
    assert dict(job.logit_bias) == {50: -100.0, 51: 2.5}


def test_what_a_request_leaves_out_or_leaves_null_is_as_openai_has_it() -> None:
    (job,) = completion(prompt="a").jobs
    names = (*field_names(CompletionRequestConfig), *UNSUPPORTED_COMPLETION)
    assert completion(**dict.fromkeys(names) | {"prompt": "a"}).jobs == (job,)
    assert (job.config.max_new_tokens, job.config.seed, job.config.depth.depth) == (16, 7, 8)
    assert (job.config.strategy, job.num_top, job.scores_prompt) == ("sample", 0, False)
    assert 0 <= fresh_seed() < 2**32


def test_every_prompt_has_n_texts() -> None:
    request = completion(prompt=["a", "bc"], n=2, seed=1)
    assert [(job.ids[1:], job.sample) for job in request.jobs] == [
        ((100,), 0),
        ((100,), 1),
        ((101, 102), 0),
        ((101, 102), 1),
    ]
    assert request.prompt_texts == ("a", "bc")


def test_temperature_0_is_greedy_and_cuts_that_change_nothing_are_taken() -> None:
    (job,) = completion(prompt="a", temperature=0, top_p=0.9, top_k=5, min_p=0.1).jobs
    assert job.config == GenerationConfig.of(strategy="greedy", depth=8, max_new_tokens=16)
    assert refusal(completion, prompt="a", temperature=0, top_p=2)[0] == "top_p"
    # It may cut the likeliest token.
    assert refusal(completion, prompt="a", temperature=0, typical_p=0.5)[0] == "typical_p"


@pytest.mark.parametrize("off", [{"top_k": -1}, {"top_k": 0}, {"top_p": 1}, {"min_p": 0.0}])
def test_other_words_for_an_option_that_is_off_are_understood(off: dict[str, Any]) -> None:
    assert completion(prompt="a", **off) == completion(prompt="a")
    assert completion(prompt="a", top_k=10_000) == completion(prompt="a")


def test_whole_numbers_may_be_written_with_a_point() -> None:
    body = {"prompt": "a", "n": 2.0, "seed": 3.0, "stop_token_ids": [4.0]}
    assert completion(**body) == completion(prompt="a", n=2, seed=3, stop_token_ids=[4])


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"depht": 3}, "depht", "unknown_field"),
        ({"strategy": "beam"}, "strategy", "unsupported_field"),
        ({"best_of": 2}, "best_of", "unsupported_value"),
        ({"suffix": "x"}, "suffix", "unsupported_value"),
        ({"model": "gpt"}, "model", "model_not_found"),
        ({"n": True}, "n", "invalid_value"),
        ({"n": 5}, "n", "invalid_value"),
        ({"n": 2, "temperature": 0}, "n", "invalid_value"),
        ({"stream": 1}, "stream", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 127}, "prompt", "context_length_exceeded"),
        ({"max_tokens": 129}, "max_tokens", "invalid_value"),
        ({"min_tokens": 17}, "min_tokens", "invalid_value"),
        ({"temperature": 1e-9}, "temperature", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_value"),
        ({"top_p": 1.5}, "top_p", "invalid_value"),
        ({"top_p": 1e-50}, "top_p", "invalid_value"),
        ({"typical_p": 1e-50}, "typical_p", "invalid_value"),
        ({"exit_criterion": "kl", "exit_threshold": 1e300}, "exit_threshold", "invalid_value"),
        ({"repetition_penalty": 1e-30}, "repetition_penalty", "invalid_value"),
        ({"seed": -1}, "seed", "invalid_value"),
        ({"depth": 33}, "depth", "invalid_value"),
        ({"exit_criterion": "cosine"}, "exit_criterion", "invalid_value"),
        ({"exit_criterion": "learned_gate"}, "exit_criterion", "invalid_value"),
        ({"exit_threshold": 0.1}, "exit_threshold", "invalid_value"),
        ({"exit_criterion": "kl", "min_depth": 9}, "min_depth", "invalid_value"),
        ({"stop": ["a"] * 5}, "stop", "invalid_value"),
        ({"stop": [1]}, "stop", "invalid_value"),
        ({"stop": "\ud800"}, "stop", "invalid_value"),
        ({"stop": "\ufffd"}, "stop", "invalid_value"),
        ({"temperature": [[1.5], 2.0]}, "temperature", "invalid_value"),
        ({"stop": "x" * 1025}, "stop", "invalid_value"),
        ({"stop": ["x" * 1024] * 4}, "stop", "invalid_value"),
        ({"stop": ""}, "stop", "invalid_value"),
        ({"stop_token_ids": [259]}, "stop_token_ids", "invalid_value"),
        ({"stop_token_ids": [5, 6, 7, 8]}, "stop_token_ids", "invalid_value"),
        ({"stop_token_ids": 5}, "stop_token_ids", "invalid_value"),
        ({"logit_bias": {"259": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"050": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"50": 101}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"50": None}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {str(i): 1 for i in range(33)}}, "logit_bias", "invalid_value"),
        ({"logit_bias": [1]}, "logit_bias", "invalid_value"),
        ({"logprobs": 21}, "logprobs", "invalid_value"),
        ({"logprobs": True}, "logprobs", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        (
            {"stream": True, "stream_options": {"usage": True}},
            "stream_options.usage",
            "unknown_field",
        ),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options",
            "unsupported_value",
        ),
    ],
)
def test_a_refusal_names_the_field(body: dict[str, Any], param: str, code: str) -> None:
    assert refusal(completion, prompt="a", **body) == (param, code)


def test_limits_are_the_servers() -> None:
    tight = dataclasses.replace(CONFIG, max_tokens=8, max_logprobs=2, rows=1, queue=2)
    assert completion(MODEL, tight, prompt="a").jobs[0].config.max_new_tokens == 8
    assert refusal(completion, MODEL, tight, prompt="a", max_tokens=9)[0] == "max_tokens"
    assert refusal(completion, MODEL, tight, prompt="a", logprobs=3)[0] == "logprobs"
    assert refusal(completion, MODEL, tight, prompt=["a", "b"], n=2)[0] == "n"
    assert refusal(completion, MODEL, tight, prompt=["a"] * 4)[0] == "prompt"
    assert completion(prompt="a" * 126).jobs[0].config.max_new_tokens == 1
    assert refusal(completion, prompt="a" * 127) == ("prompt", "context_length_exceeded")


def test_the_model_decides_what_can_be_asked() -> None:
    gate = dataclasses.replace(CONFIG, criteria=("learned_gate",))
    request = completion(GATED, gate, prompt="a", exit_criterion="learned_gate")
    assert request.jobs[0].config.depth.exit_criterion == "learned_gate"
    assert refusal(completion, PLAIN, prompt="a", depth=2)[0] == "depth"
    assert completion(PLAIN, prompt="a").jobs[0].config.depth.depth is None
    images = dataclasses.replace(MODEL, makes_media=True)
    assert completion(images, prompt="a").jobs[0].config.most_media == 0
    ids_only = with_tokenizer(None)
    assert refusal(completion, ids_only, prompt="a") == ("prompt", "no_tokenizer")
    assert refusal(completion, ids_only, prompt=[5], stop="x") == ("stop", "no_tokenizer")
    assert completion(ids_only, prompt=[5]).jobs[0].ids == (5,)


def test_auto_is_the_threshold_that_was_found_for_the_model() -> None:
    calibrated = dataclasses.replace(MODEL, calibration=Calibration(8, 0.99, {"kl": 0.02}))
    auto = {"prompt": "a", "exit_criterion": "kl", "exit_threshold": "auto"}
    (job,) = completion(calibrated, **auto).jobs
    assert job.config.depth.threshold == 0.02
    for model, body in ((MODEL, auto), (calibrated, auto | {"depth": 9})):
        assert refusal(completion, model, **body) == ("exit_threshold", "invalid_value")
    for model, allowed in ((MODEL, False), (calibrated, True)):
        schema = openapi_document(model, CONFIG)["components"]["schemas"]["CompletionRequest"]
        field = schema["properties"]["exit_threshold"]
        assert jsonschema_rs.is_valid(field, "auto") == allowed
        assert jsonschema_rs.is_valid(field, 0.5) and not jsonschema_rs.is_valid(field, "other")


def test_a_prompt_can_be_scored_without_a_new_token() -> None:
    (job,) = completion(prompt="a" * 126, max_tokens=0, echo=True, logprobs=1).jobs
    assert (job.only_scores, job.scores_prompt, job.num_top, len(job.ids)) == (True, True, 1, 127)
    # The batch wants a place for the token that it does not make.
    full = {"prompt": "a" * 127, "max_tokens": 0, "echo": True}
    assert refusal(completion, **full) == ("prompt", "context_length_exceeded")
    (job,) = completion(prompt="a", echo=True).jobs
    assert (job.only_scores, job.scores_prompt) == (False, False)


def test_end_tokens_can_be_ignored_and_more_can_be_named() -> None:
    (job,) = completion(prompt="a", ignore_eos=True, stop_token_ids=[4, 5, 6, 7]).jobs
    assert (job.ends, job.stop_ids) == (False, (4, 5, 6, 7))


_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-2, 40)
    | st.integers(-(2**63) + 1, 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "a", "kl", "fixed", "bytes", "\ud800", "x" * 300])
)
ANY_VALUE = _SCALARS | st.lists(_SCALARS, max_size=3) | st.dictionaries(st.text(), _SCALARS)
KNOWN = [*field_names(CompletionRequestConfig), *UNSUPPORTED_COMPLETION]


@settings(max_examples=150)
@given(st.dictionaries(st.sampled_from(KNOWN) | st.text(max_size=5), ANY_VALUE, max_size=4))
def test_any_values_make_jobs_or_an_error_that_json_can_write(body: dict[str, Any]) -> None:
    try:
        request = completion_request(sent({"prompt": "a"} | body), MODEL, CONFIG)
    except Exception as error:
        answer = error_answer(error)
        assert answer.status in (400, 404)
        assert len(json_bytes(answer.body)) < 8000
    else:
        assert all(len(job.ids) + job.config.max_new_tokens <= 128 for job in request.jobs)


def test_the_fields_of_generation_are_options_of_it() -> None:
    config = GenerationConfig.of(**{"depth": 4, "exit_criterion": "kl", "stop": ("a",)})
    assert config.stop == ("a",) and set(GENERATION_FIELDS) <= {
        name for name in field_names(CompletionRequestConfig)
    }
