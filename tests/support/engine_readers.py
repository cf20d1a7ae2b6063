"""Who takes the events of an engine's texts, for tests."""

import collections
import threading

from megatransformer_jax.serving.requests import Failed, Finished, NewToken

SECONDS = 60


class Reader:
    """Takes the events of a ticket, and knows when it is over."""

    def __init__(self, count=1):
        self.events = collections.defaultdict(list)
        self._left = threading.Semaphore(0)
        self._count = count

    def __call__(self, number, event):
        self.events[number].append(event)
        if isinstance(event, Finished | Failed):
            self._left.release()

    def wait(self):
        for _ in range(self._count):
            assert self._left.acquire(timeout=SECONDS), "a text hangs"
        return self

    def tokens(self, number=0):
        """All tokens, an end token too."""
        events = self.events[number]
        ids = [event.scored.token for event in events if isinstance(event, NewToken)]
        end = getattr(events[-1], "end_token", None)
        return ids if end is None else [*ids, end.token]

    def text(self, number=0):
        return "".join(getattr(event, "text", "") for event in self.events[number])

    def reason(self, number=0):
        return self.events[number][-1].reason
