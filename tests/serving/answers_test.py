import dataclasses
from typing import Any

import pytest
from chat_tokenizer import chat_tokenizer
from served_bytes import CONFIG, MODEL, chat, completion, with_tokenizer

from megatransformer_jax.serving.answers import Answer, model_card, model_list
from megatransformer_jax.serving.errors import RequestError, json_bytes
from megatransformer_jax.serving.fields import Request
from megatransformer_jax.serving.requests import (
    Event,
    Failed,
    Finished,
    NewToken,
    PromptRead,
    Scored,
)
from megatransformer_jax.serving.served import ServedModel

# "né" as bytes: the second character comes with its second byte.
N, E1, E2 = 3 + 0x6E, 3 + 0xC3, 3 + 0xA9
TOKENS = [
    NewToken(Scored(N, -0.5, ((N, -0.5), (7, -2.0))), 4, "n"),
    NewToken(Scored(E1, -0.25, ((9, -0.125), (E1, -0.25))), 8, ""),
    NewToken(Scored(E2, -1.0, ((8, -0.75), (9, -0.875))), 2, "é"),
]
END = Finished("end_of_text", "", Scored(2, -3.0), 6)
TEXT: list[Event] = [PromptRead(num_reused=1), *TOKENS, END]


def answer(request: Request, *texts: list[Event], model: ServedModel = MODEL) -> Any:
    """The answer to texts with these events, and the chunks that a stream sends."""
    answered = Answer(request, model, "x", 9)
    chunks = answered.first_chunks()
    for number, events in enumerate(texts):
        assert not answered.is_finished
        for event in events:
            chunks += answered.add(number, event)
    assert answered.is_finished
    chunks += answered.last_chunks()
    json_bytes(chunks)
    return answered, chunks


def test_a_completion_has_openais_shape() -> None:
    answered, _ = answer(completion(prompt="ab"), TEXT)
    assert answered.whole() == {
        "id": "cmpl-x",
        "object": "text_completion",
        "created": 9,
        "model": "bytes",
        "choices": [
            {
                "index": 0,
                "text": "né",
                "logprobs": None,
                "finish_reason": "stop",
                "end_reason": "end_of_text",
            }
        ],
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 4,
            "total_tokens": 7,
            "prompt_tokens_details": {"cached_tokens": 1},
            "completion_tokens_details": {"core_iterations": 20, "mean_depth": 5.0},
        },
    }


def test_ids_and_depths_come_if_asked() -> None:
    request = completion(prompt="ab", return_token_ids=True, return_depths=True)
    answered, chunks = answer(request, TEXT)
    (choice,) = answered.whole()["choices"]
    assert (choice["token_ids"], choice["depths"]) == ([N, E1, E2], [4, 8, 2])
    assert choice["prompt_token_ids"] == list(request.prompts[0])
    streamed = [chunk["choices"][0] for chunk in chunks]
    assert streamed[0]["prompt_token_ids"] == choice["prompt_token_ids"]
    # A token whose text is held back has a chunk all the same.
    assert [piece.get("depths") for piece in streamed] == [None, [4], [8], [2], None]


def test_a_stream_says_the_same_as_the_whole() -> None:
    request = completion(
        prompt=["ab", "c"], n=2, stream=True, stream_options={"include_usage": True}
    )
    answered, chunks = answer(request, TEXT, TEXT, TEXT[1:], TEXT)
    *pieces, last = chunks
    assert (last["choices"], last["usage"]) == ([], answered.usage())
    assert all(piece["usage"] is None for piece in pieces)
    texts, reasons = ["", "", "", ""], [None] * 4
    for piece in pieces:
        (choice,) = piece["choices"]
        texts[choice["index"]] += choice["text"]
        reasons[choice["index"]] = choice["finish_reason"]
    assert texts == [choice["text"] for choice in answered.whole()["choices"]] == ["né"] * 4
    assert reasons == ["stop"] * 4
    # A prompt counts once, whatever n is, and so do the rows that were there.
    assert (last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]) == (5, 16)
    assert last["usage"]["prompt_tokens_details"]["cached_tokens"] == 1


def test_log_probabilities_of_completions() -> None:
    answered, chunks = answer(completion(prompt="ab", logprobs=2), TEXT)
    wanted = {
        "tokens": ["n", "bytes:\\xc3", "bytes:\\xa9"],
        "token_logprobs": [-0.5, -0.25, -1.0],
        "top_logprobs": [
            {"n": -0.5, "\x04": -2.0},
            {"\x06": -0.125, "bytes:\\xc3": -0.25},
            # The chosen token is there although it is none of the two.
            {"\x05": -0.75, "\x06": -0.875, "bytes:\\xa9": -1.0},
        ],
        "text_offset": [0, 1, 1],
    }
    assert answered.whole()["choices"][0]["logprobs"] == wanted
    streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks[:3]]
    for name, values in wanted.items():
        assert [value for part in streamed for value in part[name]] == values


def test_echo_shows_the_prompt_and_scores_it() -> None:
    request = completion(prompt="ab", echo=True, logprobs=1, stream=True)
    scores = tuple(
        Scored(token, None if place == 0 else -float(place), () if place == 0 else ((N, -0.1),))
        for place, token in enumerate(request.prompts[0])
    )
    answered, chunks = answer(request, [PromptRead(scores), *TOKENS, END])
    (choice,) = answered.whole()["choices"]
    assert choice["text"] == "abné" == "".join(chunk["choices"][0]["text"] for chunk in chunks)
    logprobs = choice["logprobs"]
    assert logprobs["tokens"][:3] == ["token_id:1", "a", "b"]
    assert logprobs["token_logprobs"] == [None, -1.0, -2.0, -0.5, -0.25, -1.0]
    assert logprobs["top_logprobs"][:2] == [None, {"n": -0.1, "a": -1.0}]
    assert logprobs["text_offset"] == [0, 0, 1, 2, 3, 3]


def test_log_probabilities_of_chats(tmp_path: Any) -> None:
    model = with_tokenizer(chat_tokenizer(tmp_path / "files"))
    tokens = model.tokenizer.encode("né")  # type: ignore[union-attr]
    said = [{"role": "user", "content": "Hi"}]
    request = chat(model, messages=said, logprobs=True, top_logprobs=1, stream=True)
    events = [
        NewToken(Scored(token, -0.5, ((tokens[0], -0.25),)), 1, text)
        for token, text in zip(tokens, ("n", "", "é"), strict=True)
    ]
    answered, chunks = answer(request, [*events, Finished("length")], model=model)
    whole = answered.whole()
    assert (whole["object"], chunks[0]["object"]) == ("chat.completion", "chat.completion.chunk")
    (choice,) = whole["choices"]
    assert "delta" not in choice
    assert choice["message"] == {"role": "assistant", "content": "né", "refusal": None}
    assert choice["finish_reason"] == "length"
    likeliest = {"token": "n", "logprob": -0.25, "bytes": [0x6E]}
    assert choice["logprobs"]["content"][1] == {
        "token": "bytes:\\xc3",
        "logprob": -0.5,
        "bytes": [0xC3],
        "top_logprobs": [likeliest],
    }
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == "né"
    assert deltas[-1] == {} and chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_infinite_log_probabilities_can_be_written() -> None:
    events = [NewToken(Scored(N, -float("inf"), ((N, float("nan")),)), 1, "n"), END]
    answered, _ = answer(completion(prompt="a", logprobs=1), events)
    assert answered.whole()["choices"][0]["logprobs"]["token_logprobs"] == [-9999.0]


@pytest.mark.parametrize(
    ("event", "status", "code"),
    [
        (Failed("out of memory"), 500, "generation_failed"),
        (Finished("cancelled"), 503, "draining"),
        (Finished("deadline"), 503, "deadline_exceeded"),
    ],
)
def test_a_text_that_is_not_made_is_an_error(event: Event, status: int, code: str) -> None:
    answered = Answer(completion(prompt="a"), MODEL, "x", 9)
    with pytest.raises(RequestError) as caught:
        answered.add(0, event)
    assert (caught.value.status, caught.value.code) == (status, code)


def test_a_text_whose_time_is_over_is_returned_as_far_as_it_came() -> None:
    answered, _ = answer(completion(prompt="a"), [TOKENS[0], Finished("deadline", "x")])
    (choice,) = answered.whole()["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("nx", "length")
    assert choice["end_reason"] == "deadline"


def test_a_model_without_a_tokenizer_answers_with_ids() -> None:
    model = with_tokenizer(None)
    request = completion(model, prompt=[5], return_token_ids=True, logprobs=0, echo=True)
    events = [PromptRead((Scored(5, None),)), NewToken(Scored(6, -1.0), 2, ""), Finished("length")]
    answered, _ = answer(request, events, model=model)
    (choice,) = answered.whole()["choices"]
    assert (choice["text"], choice["token_ids"]) == ("", [6])
    assert choice["logprobs"]["tokens"] == ["token_id:5", "token_id:6"]


def test_the_card_tells_what_can_be_asked() -> None:
    card = model_card(MODEL, CONFIG)
    assert (card["id"], card["max_model_len"]) == ("bytes", 128)
    assert (card["meta"]["trained_depth"], card["meta"]["max_depth"]) == (8, 32)
    assert card["meta"]["criteria"] == ["fixed", "latent_diff", "kl"]
    assert model_list(MODEL, CONFIG)["data"] == [card]
    assert (
        model_card(dataclasses.replace(MODEL, trained_depth=None), CONFIG)["meta"]["max_depth"]
        is None
    )
