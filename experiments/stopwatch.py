"""Time that programs run, with the time that JAX takes to compile them kept apart."""

import time

import jax.monitoring

# Tracing, lowering and compiling; each is reported at its end with its length.
_COMPILE_EVENTS = "/jax/core/compile/"


class Stopwatch:
    """Seconds since it was started, without those of compilation.

    Use it as a context manager: inside, it listens to JAX.
    """

    def __init__(self) -> None:
        self._compilations: list[tuple[float, float]] = []  # Intervals that do not overlap.
        self._started = (time.perf_counter(), 0.0)

    def __enter__(self) -> "Stopwatch":
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def start(self) -> None:
        """Sets it to 0."""
        self._started = (time.perf_counter(), self._compiled())

    def seconds(self) -> float:
        """Time since the start, compilation left out."""
        return time.perf_counter() - self._started[0] - self.compile_seconds()

    def compile_seconds(self) -> float:
        """Compilation since the start."""
        return self._compiled() - self._started[1]

    def _compiled(self) -> float:
        return sum(end - begin for begin, end in self._compilations)

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        if not event.startswith(_COMPILE_EVENTS):
            return
        end = time.perf_counter()
        begin = end - duration_secs
        # One function's tracing holds that of the functions it calls.
        while self._compilations and self._compilations[-1][1] > begin:
            begin = min(begin, self._compilations.pop()[0])
        self._compilations.append((begin, end))
