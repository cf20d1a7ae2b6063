"""What the engine says of a request's texts, as OpenAI's objects: whole, or piece by piece.

Beyond OpenAI's, a choice says in `end_reason` why its text ended in this package's words, and has
`token_ids` and `depths` if asked; `usage.completion_tokens_details` tells iterations of the core.
"""

import codecs
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatransformer_jax.config.serving import ServingConfig
from megatransformer_jax.serving.errors import RequestError
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

# Why texts end, in OpenAI's words. Of a text whose time is over it has none; like one that is too
# long it is not whole.
FINISH_REASONS: Mapping[str, str] = {
    "end_of_text": "stop",
    "stop": "stop",
    "exhausted": "stop",
    "length": "length",
    "deadline": "length",
}
OWNER = "megatransformer_jax"
# JSON has no infinity.
_LEAST_LOG_PROB = -9999.0


class Answer:
    """The answer to one request, which grows with the engine's events.

    A stream sends `first_chunks`, then what `add` gives for each event, then `last_chunks`. An
    answer in one piece adds all events and sends `whole`.

    Args:
      request: what was asked.
      model: what is served.
      identifier: unique among answers, without OpenAI's prefix.
      created: seconds since 1970.
    """

    def __init__(self, request: Request, model: ServedModel, identifier: str, created: int):
        self._request = request
        prefix, kind = ("chatcmpl", "chat.completion") if request.is_chat else ("cmpl", "")
        self._head = {
            "id": f"{prefix}-{identifier}",
            "object": kind or "text_completion",
            "created": created,
            "model": request.model,
        }
        n = request.options.n
        self._choices = [
            _Choice(request, model, number, number // n) for number in range(len(request.jobs))
        ]

    def first_chunks(self) -> list[dict[str, Any]]:
        """What a stream sends before any event: of chat the roles."""
        if not self._request.is_chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(choice.piece(delta=delta)) for choice in self._choices]

    def add(self, number: int, event: Event) -> list[dict[str, Any]]:
        """Takes an event of one job; returns the chunks that a stream sends for it, maybe none.

        Raises:
          RequestError: if the text failed or was cancelled, or its time was over before it began.
        """
        piece = self._choices[number].add(event)
        return [] if piece is None else [self._chunk(piece)]

    @property
    def is_finished(self) -> bool:
        """Whether all texts have ended."""
        return all(choice.end is not None for choice in self._choices)

    def last_chunks(self) -> list[dict[str, Any]]:
        """What a stream sends once all texts have ended: the usage, if it was asked for."""
        if not self._request.include_usage:
            return []
        return [{**self._chunk(), "usage": self.usage()}]

    def whole(self) -> dict[str, Any]:
        """The answer in one piece; all texts have ended."""
        choices = [choice.whole() for choice in self._choices]
        return {**self._head, "choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Tokens so far, and iterations of the core that led to the new ones."""
        prompt = self._request.num_prompt_tokens
        new = sum(choice.num_tokens for choice in self._choices)
        iterations = sum(choice.num_iterations for choice in self._choices)
        # Further texts of a prompt share its rows.
        reused = sum(choice.num_reused for choice in self._choices[:: self._request.options.n])
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": reused},
            "completion_tokens_details": {
                "core_iterations": iterations,
                "mean_depth": iterations / new if new else 0.0,
            },
        }

    def _chunk(self, *pieces: dict[str, Any]) -> dict[str, Any]:
        chunk = {**self._head, "choices": list(pieces)}
        if self._request.is_chat:
            chunk["object"] = "chat.completion.chunk"
        if self._request.include_usage:
            chunk["usage"] = None
        return chunk


class _Choice:
    """One text of an answer."""

    def __init__(self, request: Request, model: ServedModel, number: int, prompt: int):
        self._options = request.options
        self._is_chat = request.is_chat
        self._job = request.jobs[number]
        self._number = number
        self._prompt_text = request.prompt_texts[prompt]
        self._echoes = bool(getattr(request.options, "echo", False))
        logprobs = request.options.logprobs
        self._shows_scores = logprobs is not None and logprobs is not False
        self._scores = _Scores(model, self._is_chat, len(self._prompt_text) * self._echoes)
        self._texts = [self._prompt_text] if self._echoes else []
        self._shown: list[dict[str, Any]] = []
        self._token_ids: list[int] = []
        self._depths: list[int] = []
        self._end_depth = 0
        self.num_tokens = 0
        self.num_reused = 0
        self.end: str | None = None

    @property
    def num_iterations(self) -> int:
        """Iterations of the core that led to its tokens, an end token included."""
        return sum(self._depths) + self._end_depth

    def add(self, event: Event) -> dict[str, Any] | None:
        """Takes an event; returns the choice of a chunk, if there is anything to say."""
        match event:
            case PromptRead():
                return self._read(event)
            case NewToken():
                return self._token(event)
            case Finished():
                return self._finish(event)
            case Failed():
                raise RequestError(event.message, status=500, code="generation_failed")

    def piece(self, **values: Any) -> dict[str, Any]:
        """The choice of a chunk that says nothing, but for some values."""
        content: dict[str, Any] = {"delta": {}} if self._is_chat else {"text": ""}
        return {
            "index": self._number,
            **content,
            "logprobs": None,
            "finish_reason": None,
            **values,
        }

    def whole(self) -> dict[str, Any]:
        """The choice of an answer in one piece."""
        text = "".join(self._texts)
        content: dict[str, Any] = {"text": text}
        if self._is_chat:
            content = {"message": {"role": "assistant", "content": text, "refusal": None}}
        scores = self._scores.joined(self._shown) if self._shows_scores else None
        extras = self._extras(self._token_ids, self._depths)
        if self._options.return_token_ids:
            extras["prompt_token_ids"] = list(self._job.ids)
        return {
            "index": self._number,
            **content,
            "logprobs": scores,
            **self._reasons(),
            **extras,
        }

    def _read(self, event: PromptRead) -> dict[str, Any] | None:
        self.num_reused = event.num_reused
        values: dict[str, Any] = {}
        if self._echoes:
            values["text"] = self._prompt_text
            if self._shows_scores and event.scores:
                shown = self._scores.of_prompt(event.scores, len(self._prompt_text))
                self._shown += shown
                values["logprobs"] = self._scores.joined(shown)
        if self._options.return_token_ids:
            values["prompt_token_ids"] = list(self._job.ids)
        return self.piece(**values) if values else None

    def _token(self, event: NewToken) -> dict[str, Any] | None:
        self.num_tokens += 1
        self._token_ids.append(event.scored.token)
        self._depths.append(event.depth)
        values = self._extras([event.scored.token], [event.depth])
        if self._shows_scores:
            shown = self._scores.of_token(event.scored)
            self._shown.append(shown)
            values["logprobs"] = self._scores.joined([shown])
        if event.text:
            values |= self._text(event.text)
        return self.piece(**values) if values else None

    def _finish(self, event: Finished) -> dict[str, Any]:
        if event.reason not in FINISH_REASONS:
            raise RequestError(
                "the text was cancelled, as the server stops; ask again.",
                status=503,
                code="draining",
            )
        if event.reason == "deadline" and not self.num_tokens:
            raise RequestError(
                "the time of the request was over before its text began; ask again later, for "
                "fewer or shorter texts.",
                status=503,
                code="deadline_exceeded",
            )
        self.end = event.reason
        if event.end_token is not None:
            self.num_tokens += 1
            self._end_depth = event.end_depth
        values = self._text(event.text) if event.text else {}
        return self.piece(**values, **self._reasons())

    def _text(self, text: str) -> dict[str, Any]:
        self._texts.append(text)
        return {"delta": {"content": text}} if self._is_chat else {"text": text}

    def _extras(self, token_ids: Sequence[int], depths: Sequence[int]) -> dict[str, Any]:
        extras = {}
        if self._options.return_token_ids:
            extras["token_ids"] = list(token_ids)
        if self._options.return_depths:
            extras["depths"] = list(depths)
        return extras

    def _reasons(self) -> dict[str, Any]:
        reason = self.end or ""
        return {"finish_reason": FINISH_REASONS.get(reason), "end_reason": self.end}


# ------------------------------------------------------------------------------
# Log-probabilities, in the two shapes that OpenAI has.


class _Scores:
    """Turns scored tokens into what completions or chat show.

    Args:
      model: what is served.
      is_chat: which shape.
      start: characters of the text before the first new token.
    """

    def __init__(self, model: ServedModel, is_chat: bool, start: int):
        self._model = model
        self._is_chat = is_chat
        self._position = start
        self._decoder = _decoder()

    def of_prompt(self, scores: Sequence[Scored], length: int) -> list[dict[str, Any]]:
        """Of a prompt's tokens, whose text has `length` characters."""
        decoder, places, place = _decoder(), [], 0
        for scored in scores:
            places.append(place)
            place += len(decoder.decode(self._model.token_bytes(scored.token)))
        # Some tokenizers drop a space at the start of a text.
        dropped = place - length
        places = [min(max(place - dropped, 0), length) for place in places]
        return [self._shown(scored, place) for scored, place in zip(scores, places, strict=True)]

    def of_token(self, scored: Scored) -> dict[str, Any]:
        """Of the next new token."""
        shown = self._shown(scored, self._position)
        self._position += len(self._decoder.decode(self._model.token_bytes(scored.token)))
        return shown

    def joined(self, shown: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Of several tokens, in order."""
        if self._is_chat:
            return {"content": list(shown), "refusal": None}
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        return {name: [one[name] for one in shown] for name in names}

    def _shown(self, scored: Scored, place: int) -> dict[str, Any]:
        if self._is_chat:
            top = [self._of_chat(token, value) for token, value in scored.top]
            return {**self._of_chat(scored.token, scored.log_prob), "top_logprobs": top}
        likeliest: dict[str, float] | None = None
        if scored.log_prob is not None:
            # The chosen token is among them even if it is not one of the likeliest.
            pairs = [*scored.top, (scored.token, scored.log_prob)]
            likeliest = self._by_text(pairs)
        return {
            "tokens": self._model.token_text(scored.token),
            "token_logprobs": _finite(scored.log_prob),
            "top_logprobs": likeliest,
            "text_offset": place,
        }

    def _by_text(self, pairs: Iterable[tuple[int, float]]) -> dict[str, float]:
        by_text: dict[str, float] = {}
        for token, value in pairs:
            by_text.setdefault(self._model.token_text(token), _least(value))
        return by_text

    def _of_chat(self, token: int, value: float | None) -> dict[str, Any]:
        piece = self._model.token_bytes(token)
        return {
            "token": self._model.token_text(token),
            "logprob": _finite(value),
            "bytes": list(piece) or None,
        }


def _decoder() -> codecs.IncrementalDecoder:
    return codecs.getincrementaldecoder("utf-8")("replace")


def _finite(value: float | None) -> float | None:
    return None if value is None else _least(value)


def _least(value: float) -> float:
    return float(value) if math.isfinite(value) else _LEAST_LOG_PROB


# ------------------------------------------------------------------------------
# The model.


def model_card(model: ServedModel, config: ServingConfig) -> dict[str, Any]:
    """The model as /v1/models/NAME tells of it; `config` is settled."""
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": OWNER,
        "max_model_len": model.capacity,
        "meta": {
            "parameters": model.num_parameters,
            "trained_depth": model.trained_depth,
            "max_depth": None if model.trained_depth is None else config.max_depth,
            "criteria": list(dict.fromkeys(("fixed", *config.criteria))),
            "has_exit_gate": model.has_exit_gate,
            "vocab_size": model.vocab_size,
            "rows": config.rows,
            "chats": getattr(model.tokenizer, "chat", None) is not None,
        },
    }


def model_list(model: ServedModel, config: ServingConfig) -> dict[str, Any]:
    """The answer of /v1/models."""
    return {"object": "list", "data": [model_card(model, config)]}
