"""The way of a request's events: from the engine's thread to an answer, or to a stream of it."""

import asyncio
import collections
import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from megatransformer_jax.config.option import UserError
from megatransformer_jax.serving.errors import RequestError, error_answer, json_bytes
from megatransformer_jax.serving.requests import Event, Failed, Finished

# An engine that runs ends texts at their deadline itself. One that hangs is given up after so many
# more seconds.
GRACE_SECONDS = 15.0

Arrived = list[tuple[int, Event]]


class Disconnected(Exception):
    """The client has closed its connection, so that nobody reads the answer."""


class Cancellable(Protocol):
    """What the engine returns for jobs that it has taken."""

    def cancel(self) -> None:
        """Ends the texts that are not finished; returns at once."""
        ...


class Exchange:
    """The texts of one HTTP request while the engine makes them.

    `deliver` is called by the engine's thread, everything else by the event loop's. Events that
    have come together are taken together. Whoever makes an exchange calls `close` in the end.

    Args:
      num_texts: that the request asked for.
      receive: of the request, whose body has been read; tells when the client is gone.
      deadline: when the engine should have finished, by `time.monotonic`.
    """

    def __init__(self, num_texts: int, receive: Receive, deadline: float):
        self._loop = asyncio.get_running_loop()
        self._arrived: collections.deque[tuple[int, Event]] = collections.deque()
        self._wake_up = asyncio.Event()
        self._is_waking = False
        self._is_disconnected = False
        self._open = set(range(num_texts))
        self._deadline = deadline + GRACE_SECONDS
        self._ticket: Cancellable | None = None
        self._watch = self._loop.create_task(self._watch_connection(receive))

    def deliver(self, index: int, event: Event) -> None:
        """Takes an event of text `index`."""
        self._arrived.append((index, event))
        if not self._is_waking:
            self._is_waking = True
            with contextlib.suppress(RuntimeError):  # The loop is closed: the server has stopped.
                self._loop.call_soon_threadsafe(self._wake)

    def keep(self, ticket: Cancellable) -> None:
        """Keeps what the engine gave for the jobs, to cancel them."""
        self._ticket = ticket

    @property
    def is_over(self) -> bool:
        """Whether every text is finished and its events were taken."""
        return not self._open

    async def next(self) -> Arrived:
        """The events that have come since the last call, at least one.

        Raises:
          Disconnected: if the client is gone.
          RequestError: if the engine says nothing although the time is over.
        """
        while not self._arrived:
            if self._is_disconnected:
                raise Disconnected
            self._wake_up.clear()
            try:
                seconds = max(self._deadline - time.monotonic(), 0.0)
                await asyncio.wait_for(self._wake_up.wait(), seconds)
            except TimeoutError:
                raise RequestError(
                    "the engine does not answer; the server must be restarted.",
                    status=500,
                    code="generation_failed",
                ) from None
        taken: Arrived = []
        while self._arrived:
            index, event = self._arrived.popleft()
            if isinstance(event, Finished | Failed):
                self._open.discard(index)
            taken.append((index, event))
        return taken

    def close(self) -> None:
        """Cancels what is not finished, and stops listening to the client."""
        self._watch.cancel()
        if self._open and self._ticket is not None:
            self._ticket.cancel()
        self._open.clear()

    def _wake(self) -> None:
        self._is_waking = False
        self._wake_up.set()

    async def _watch_connection(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._is_disconnected = True
        self._wake_up.set()


class Chunks(Protocol):
    """What a stream sends; `Answer` has it."""

    def first_chunks(self) -> Sequence[Mapping[str, Any]]:
        """Before any event."""
        ...

    def add(self, number: int, event: Event) -> Sequence[Mapping[str, Any]]:
        """For an event of a text. A UserError ends the stream."""
        ...

    def last_chunks(self) -> Sequence[Mapping[str, Any]]:
        """After all events."""
        ...


class EventStream(Response):
    """Server-sent events of an exchange, as OpenAI sends them: `data: {...}`, at last `[DONE]`.

    If the engine fails after the headers, an event says so, `[DONE]` does not come, and the
    connection is closed in the middle of the body, so that no client takes the text for whole.

    Args:
      exchange: the texts; closed at the end.
      first: what is sent of what has been taken from it.
      answer: what is sent of what comes.
    """

    media_type = "text/event-stream"

    def __init__(self, exchange: Exchange, first: Sequence[Mapping[str, Any]], answer: Chunks):
        # Proxies such as nginx keep answers back unless they are told not to.
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._exchange = exchange
        self._first = first
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends everything."""
        try:
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            if await self._send_texts(send):
                await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
        except (Disconnected, OSError):
            pass
        finally:
            self._exchange.close()

    async def _send_texts(self, send: Send) -> bool:
        """Sends all texts, and says whether they are whole."""
        await _send_part(send, self._first)
        while not self._exchange.is_over:
            data: list[Mapping[str, Any]] = []
            try:
                for number, event in await self._exchange.next():
                    data += self._answer.add(number, event)
            except UserError as error:
                await _send_part(send, [*data, error_answer(error).body])
                return False
            await _send_part(send, data)
        await _send_part(send, self._answer.last_chunks())
        return True


async def _send_part(send: Send, data: Sequence[Mapping[str, Any]]) -> None:
    if data:
        body = b"".join(map(as_event, data))
        await send({"type": "http.response.body", "body": body, "more_body": True})


def as_event(data: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json_bytes(data) + b"\n\n"
