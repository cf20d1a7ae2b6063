"""OpenAI's own client against the server: what it parses, and which errors it raises."""

import asyncio
import concurrent.futures
import functools
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from fake_batcher import FakeBatcher
from running_server import MAX_LENGTH, chat_model, client_of, running

from megatransformer_jax.model import Model
from megatransformer_jax.serving.server import Server


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return chat_model(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def server(lm: Model) -> Iterator[Server]:
    with running(lm, rows=4, queue=64) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with client_of(server) as client:
        yield client


def complete(client: Any, prompt: Any = "abc", **options: Any) -> Any:
    body = {"ignore_eos": True, **options.pop("extra_body", {})}
    return client.completions.create(model="tiny", prompt=prompt, extra_body=body, **options)


def test_a_completion(client: openai.OpenAI) -> None:
    answer = complete(
        client, max_tokens=9, temperature=0, extra_body={"depth": 5, "return_depths": True}
    )
    (choice,) = answer.choices
    assert answer.object == "text_completion" and answer.model == "tiny"
    assert choice.finish_reason == "length" and choice.index == 0
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (
        4,
        9,
        13,
    )  # With the start token.
    assert choice.depths == [5] * 9
    assert usage.completion_tokens_details.mean_depth == 5
    assert usage.completion_tokens_details.core_iterations == 45
    assert answer._request_id.startswith("req-")


def test_a_stream_is_the_same_text_in_parts(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"max_tokens": 20, "temperature": 0.9, "seed": 7}
    whole = complete(client, **options)
    parts = list(complete(client, **options, stream=True, stream_options={"include_usage": True}))
    assert parts[-1].choices == []
    for name in ("prompt_tokens", "completion_tokens", "completion_tokens_details"):
        assert getattr(parts[-1].usage, name) == getattr(whole.usage, name)
    texts = [part.choices[0].text for part in parts[:-1]]
    assert "".join(texts) == whole.choices[0].text and len(texts) > 2
    assert parts[-2].choices[0].finish_reason == "length"
    assert all(part.usage is None for part in complete(client, **options, stream=True))


def test_texts_of_a_prompt_and_of_several(client: openai.OpenAI) -> None:
    """A seed gives the same texts again, whatever else there is in the batch."""
    options: dict[str, Any] = {"max_tokens": 12, "seed": 3, "n": 3}
    answer = complete(client, ["abc", "de"], **options)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert answer.usage.prompt_tokens == 7 and answer.usage.completion_tokens == 72
    again = complete(client, ["abc", "de"], **options)
    texts = [choice.text for choice in answer.choices]
    assert texts == [choice.text for choice in again.choices]
    assert len(set(texts)) > 1
    other = complete(client, ["abc", "de"], **options | {"seed": 4})
    assert texts != [choice.text for choice in other.choices]


def test_a_stop_text_ends_it(client: openai.OpenAI) -> None:
    text = complete(client, max_tokens=20, temperature=0).choices[0].text
    stop = text[3:5]
    choice = complete(client, max_tokens=20, temperature=0, stop=[stop]).choices[0]
    assert choice.text == text[: text.index(stop)] and choice.finish_reason == "stop"


def test_log_probabilities_in_both_shapes(client: openai.OpenAI) -> None:
    found = complete(client, max_tokens=4, logprobs=3, temperature=0).choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.text_offset) == 4
    assert all(len(top) <= 4 for top in found.top_logprobs)
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "hi"}],
        max_completion_tokens=4,
        logprobs=True,
        top_logprobs=2,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    items = answer.choices[0].logprobs.content
    assert len(items) == 4 and all(len(item.top_logprobs) == 2 for item in items)


def test_a_chat(client: openai.OpenAI) -> None:
    options: Any = {
        "model": "tiny",
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}],
        "max_completion_tokens": 8,
        "temperature": 0,
        "extra_body": {"ignore_eos": True, "exit_criterion": "latent_diff"},
    }
    answer = client.chat.completions.create(**options)
    message = answer.choices[0].message
    assert message.role == "assistant" and answer.object == "chat.completion"
    parts = list(client.chat.completions.create(**options, stream=True))
    assert parts[0].choices[0].delta.role == "assistant"
    texts = [part.choices[0].delta.content or "" for part in parts if part.choices]
    assert "".join(texts) == message.content


def test_many_at_once_from_the_asynchronous_client(server: Server, client: openai.OpenAI) -> None:
    """More than there are rows, of unlike depths; each gets what it gets alone."""

    def ask(client: Any, number: int) -> Any:
        depth = {"depth": 1 + number % 5}
        return complete(client, f"p{number}", max_tokens=6 + number, seed=1, extra_body=depth)

    wanted = [ask(client, number).choices[0].text for number in range(12)]

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="-", max_retries=0, timeout=30
        ) as many:
            answers = asyncio.gather(*(ask(many, number) for number in range(12)))
            stream = await complete(many, "s", max_tokens=5, stream=True)
            parts = [part async for part in stream]
            assert parts[-1].choices[0].finish_reason == "length"
            return [answer.choices[0].text for answer in await answers]

    assert asyncio.run(ask_all()) == wanted
    assert len(set(wanted)) == 12


def test_the_model_is_told(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "tiny" and client.models.retrieve("tiny") == model
    assert model.meta["trained_depth"] == 3


# ------------------------------------------------------------------------------
# Errors.


def test_a_request_that_cannot_be_met(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        complete(client, extra_body={"exit_threshhold": 0.1})
    error = raised.value
    assert error.code == "unknown_field" and error.param == "exit_threshhold"
    assert "exit_threshold" in error.message
    for options, param in (
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": MAX_LENGTH}, "prompt"),
        ({"extra_body": {"depth": 0}}, "depth"),
        ({"extra_body": {"best_of": 2}}, "best_of"),
    ):
        with pytest.raises(openai.BadRequestError) as raised:
            complete(client, **options)
        assert raised.value.param == param and raised.value.type == "invalid_request_error"


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        client.completions.create(model="gpt-5", prompt="a")
    assert raised.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("org/other")
    with pytest.raises(openai.NotFoundError, match="there is no /v1/embeddings"):
        client.embeddings.create(model="tiny", input="a")


def test_a_body_that_is_too_long(client: openai.OpenAI) -> None:
    for size in (2**20, 2**23):
        with pytest.raises(openai.APIStatusError) as raised:
            complete(client, "a" * size)
        assert raised.value.status_code == 413 and raised.value.code == "request_too_large"


def test_a_key_and_a_host_name_are_asked_for(lm: Model) -> None:
    with running(lm, api_key="s3cret") as server:
        with client_of(server) as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        with client_of(server, "s3cret") as client:
            assert client.models.list().data
            other = client.with_options(default_headers={"Host": "evil.example"})
            with pytest.raises(openai.PermissionDeniedError):
                other.models.list()


def test_a_full_queue_says_when_to_come_again(lm: Model) -> None:
    slow = functools.partial(FakeBatcher, seconds_per_tick=0.005)
    with (
        running(lm, slow, rows=1, queue=1) as server,
        client_of(server) as client,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        texts = [pool.submit(complete, client, max_tokens=30) for _ in range(2)]
        while server.engine.num_open < 2:
            time.sleep(0.005)
        with pytest.raises(openai.RateLimitError) as raised:
            complete(client)
        assert int(raised.value.response.headers["retry-after"]) >= 1
        assert raised.value.code == "queue_full"
        assert [text.result(30).usage.completion_tokens for text in texts] == [30, 30]
