"""Events on their way from another thread to an answer; no HTTP."""

import asyncio
import json
import threading
import time
from typing import Any

import pytest

from megatransformer_jax.serving import delivery
from megatransformer_jax.serving.delivery import Disconnected, EventStream, Exchange
from megatransformer_jax.serving.errors import RequestError
from megatransformer_jax.serving.requests import Failed, Finished, NewToken, Scored


class Connection:
    """A client; closed when `gone` is set."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()
        self.sent: list[dict[str, Any]] = []

    async def receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent).decode()


class Texts:
    """An answer whose chunks are the tokens' texts."""

    def first_chunks(self) -> list[dict[str, Any]]:
        return []

    def add(self, number: int, event: Any) -> list[dict[str, Any]]:
        if isinstance(event, Failed):
            raise RequestError(event.message, status=500)
        return [{"text": event.text}] if event.text else []

    def last_chunks(self) -> list[dict[str, Any]]:
        return [{"usage": 2}]


class Ticket:
    is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True


def token(number: int) -> NewToken:
    return NewToken(Scored(number, -1.0), 1, str(number))


def test_events_of_a_thread_arrive_in_order_and_none_is_lost() -> None:
    count = 2000

    async def run() -> list[int]:
        exchange = Exchange(1, Connection().receive, time.monotonic() + 60)

        def make() -> None:
            for number in range(count):
                exchange.deliver(0, token(number))
                if number % 500 == 0:
                    time.sleep(0.001)
            exchange.deliver(0, Finished("length"))

        threading.Thread(target=make).start()
        taken = []
        while not exchange.is_over:
            taken += await exchange.next()
        exchange.close()
        assert isinstance(taken.pop()[1], Finished)
        return [event.scored.token for _, event in taken]

    assert asyncio.run(run()) == list(range(count))


def test_a_client_that_leaves_cancels_what_is_not_finished() -> None:
    async def run(num_finished: int) -> bool:
        connection, ticket = Connection(), Ticket()
        exchange = Exchange(2, connection.receive, time.monotonic() + 60)
        exchange.keep(ticket)
        for index in range(num_finished):
            exchange.deliver(index, Finished("length"))
        if num_finished:
            await exchange.next()
        if num_finished < 2:
            connection.gone.set()
            with pytest.raises(Disconnected):
                await exchange.next()
        exchange.close()
        return ticket.is_cancelled

    assert asyncio.run(run(0)) and asyncio.run(run(1))
    assert not asyncio.run(run(2))


def test_an_engine_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "GRACE_SECONDS", 0.02)

    async def run() -> None:
        exchange = Exchange(1, Connection().receive, time.monotonic())
        with pytest.raises(match="does not answer"):
            await exchange.next()
        exchange.close()

    asyncio.run(run())


@pytest.mark.parametrize("fails", [False, True])
def test_a_stream_ends_with_done_only_if_it_is_whole(fails: bool) -> None:
    async def run() -> Connection:
        connection, ticket = Connection(), Ticket()
        exchange = Exchange(1, connection.receive, time.monotonic() + 60)
        exchange.keep(ticket)
        exchange.deliver(0, token(8))
        exchange.deliver(0, Failed("the device is gone.") if fails else Finished("length"))
        stream = EventStream(exchange, [{"text": "7"}], Texts())
        await stream({"type": "http"}, connection.receive, connection.send)
        assert not ticket.is_cancelled
        return connection

    connection = asyncio.run(run())
    head, *parts = connection.sent
    assert dict(head["headers"])[b"content-type"] == b"text/event-stream; charset=utf-8"
    assert b"content-length" not in dict(head["headers"])
    lines = [line.removeprefix("data: ") for line in connection.text.split("\n\n")[:-1]]
    if fails:
        assert lines[:2] == ['{"text":"7"}', '{"text":"8"}']
        assert json.loads(lines[-1])["error"]["message"] == "the device is gone."
        # The server closes a connection whose body has no end.
        assert all(part["more_body"] for part in parts)
    else:
        assert lines == ['{"text":"7"}', '{"text":"8"}', '{"usage":2}', "[DONE]"]
        assert not parts[-1].get("more_body", False)


def test_a_stream_to_a_client_that_has_left_ends() -> None:
    async def run() -> None:
        connection, ticket = Connection(), Ticket()
        exchange = Exchange(1, connection.receive, time.monotonic() + 60)
        exchange.keep(ticket)
        connection.gone.set()
        stream = EventStream(exchange, [{"text": "7"}], Texts())
        await stream({"type": "http"}, connection.receive, connection.send)
        assert ticket.is_cancelled
        assert "[DONE]" not in connection.text

    asyncio.run(run())
