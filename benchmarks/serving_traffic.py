"""Requests to a server, and what their clients see: times of tokens, refusals, errors.

A small client on plain sockets, so that it takes little of the processor that the server shares.
"""

import asyncio
import dataclasses
import json
import random
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

TEXT = "The if statement is used for conditional execution and a class may have many names"
DEPTHS = (4, 8, 32)
# As `choice` weighs them: half of the requests are shallow.
DEPTH_WEIGHTS = (50, 25, 25)


@dataclasses.dataclass
class Seen:
    """What the client of one request saw. Times are seconds of `time.perf_counter`.

    Attributes:
      depth: that the request asked for.
      status: of HTTP; 0 if there was no answer.
      began: when it was sent.
      first: from there to the first token.
      between: between two tokens that did not come at once, in seconds.
      num_tokens: as the server counts them.
      is_dropped: whether the client hung up on purpose.
      error: what went wrong, if anything did.
    """

    depth: int
    status: int = 0
    began: float = 0.0
    first: float | None = None
    between: list[float] = dataclasses.field(default_factory=list)
    num_tokens: int = 0
    is_dropped: bool = False
    error: str = ""


def bodies(seed: int, max_tokens: tuple[int, int], prompt_words: int) -> Iterator[dict[str, Any]]:
    """Requests without end: each with its own depth, criterion, temperature, seed and lengths."""
    rng = random.Random(seed)
    while True:
        depth = rng.choices(DEPTHS, DEPTH_WEIGHTS)[0]
        body: dict[str, Any] = {
            "prompt": " ".join(rng.choices(TEXT.split(), k=rng.randint(1, prompt_words))),
            "depth": depth,
            "exit_criterion": rng.choice(["fixed", "fixed", "latent_diff"]),
            "max_tokens": rng.randint(*max_tokens),
            "temperature": rng.choice([0.0, 0.7, 1.0]),
            "seed": rng.randrange(2**31),
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if rng.random() < 0.2:
            body |= {"top_k": 40, "presence_penalty": 0.5}
        yield body


async def ask(url: str, body: dict[str, Any], hangs_up_after: int | None = None) -> Seen:
    """Sends one streaming request and reads its answer.

    Args:
      url: of the server.
      body: of the request.
      hangs_up_after: pieces after which the connection is dropped; None: never.
    """
    seen = Seen(body.get("depth", 0), began=time.perf_counter())
    try:
        await _ask(url, body, seen, hangs_up_after)
    except (OSError, asyncio.IncompleteReadError, ValueError) as error:
        seen.error = f"{type(error).__name__}: {error}"
    return seen


async def _ask(url: str, body: dict[str, Any], seen: Seen, hangs_up_after: int | None) -> None:
    where = urllib.parse.urlsplit(url)
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    try:
        content = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {where.netloc}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        writer.write(head.encode() + content)
        await writer.drain()
        seen.status = int((await reader.readline()).split()[1])
        if seen.status != 200:
            text = (await reader.read()).decode()
            seen.error = "" if seen.status == 429 else text[-300:]
            return
        last, pieces, is_done = None, 0, False
        while line := await reader.readline():
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                is_done = True
                break
            chunk = json.loads(line[6:])
            if "error" in chunk:
                seen.error = str(chunk["error"])[:300]
                return
            if chunk.get("usage"):
                seen.num_tokens = chunk["usage"]["completion_tokens"]
            if not (chunk["choices"] and chunk["choices"][0].get("text")):
                continue
            now = time.perf_counter()
            if last is None:
                seen.first = now - seen.began
            else:
                seen.between.append(now - last)
            last, pieces = now, pieces + 1
            if pieces == hangs_up_after:
                seen.is_dropped = True
                return
        if not is_done:
            seen.error = "the answer ended without [DONE]"
    finally:
        writer.close()


async def closed_loop(
    url: str, requests: Iterator[dict[str, Any]], clients: int, seconds: float
) -> list[Seen]:
    """So many clients that each send the next request when they have their answer."""
    found: list[Seen] = []
    end = time.perf_counter() + seconds

    async def client() -> None:
        while time.perf_counter() < end:
            found.append(await ask(url, next(requests)))

    await asyncio.gather(*(client() for _ in range(clients)))
    return found


async def open_loop(
    url: str,
    requests: Iterator[dict[str, Any]],
    rate: float,
    seconds: float,
    *,
    drop_share: float = 0.0,
    seed: int = 0,
    watch: Callable[[float, list[Seen]], None] = lambda seconds, found: None,
) -> list[Seen]:
    """Requests at random moments, whether or not those before have been answered.

    Args:
      url: of the server.
      requests: what is sent.
      rate: requests per second, on average; the moments are a Poisson process.
      seconds: how long requests are sent.
      drop_share: of requests whose client hangs up after some tokens.
      seed: of the moments.
      watch: called with the seconds so far and what has been seen, before each request.

    Returns:
      What was seen, once all have been answered.
    """
    rng, found, open_requests = random.Random(seed), [], set()
    begin = due = time.perf_counter()

    async def one(body: dict[str, Any], hangs_up_after: int | None) -> None:
        found.append(await ask(url, body, hangs_up_after))

    while (due := due + rng.expovariate(rate)) < begin + seconds:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        watch(time.perf_counter() - begin, found)
        hangs_up_after = rng.randint(1, 8) if rng.random() < drop_share else None
        task = asyncio.create_task(one(next(requests), hangs_up_after))
        open_requests.add(task)
        task.add_done_callback(open_requests.discard)
    await asyncio.gather(*open_requests)
    return found
