"""What the engine says of a request's texts, as OpenAI's objects: whole, or piece by piece."""

from collections.abc import Sequence
from typing import Any

from megatransformer_jax.serving.fields import Request
from megatransformer_jax.serving.requests import Event
from megatransformer_jax.serving.served import ServedModel


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
        raise NotImplementedError

    def first_chunks(self) -> list[dict[str, Any]]:
        """What a stream sends before any event: of chat the roles."""
        raise NotImplementedError

    def add(self, number: int, event: Event) -> list[dict[str, Any]]:
        """Takes an event of one job; returns the chunks that a stream sends for it, maybe none.

        Raises:
          RequestError: if the text failed or was cancelled, or its time was over before it began.
        """
        raise NotImplementedError

    @property
    def is_finished(self) -> bool:
        """Whether all texts have ended."""
        raise NotImplementedError

    def last_chunks(self) -> list[dict[str, Any]]:
        """What a stream sends once all texts have ended: the usage, if it was asked for."""
        raise NotImplementedError

    def whole(self) -> dict[str, Any]:
        """The answer in one piece; all texts have ended."""
        raise NotImplementedError

    def usage(self) -> dict[str, Any]:
        """Tokens so far, and iterations of the core that led to the new ones."""
        raise NotImplementedError


def model_card(model: ServedModel, criteria: Sequence[str], max_depth: int) -> dict[str, Any]:
    """The model as /v1/models and /v1/models/NAME tell of it."""
    raise NotImplementedError
