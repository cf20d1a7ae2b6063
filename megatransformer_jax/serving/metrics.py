"""What a server tells Prometheus: names of vLLM where it has the same, and what depth adds.

Every text counts for itself: a request for three texts counts as three, and its prompt's tokens
once.
"""

import time
from collections.abc import Sequence
from typing import Any

from megatransformer_jax.extras import import_extra

PREFIX = "megatransformer:"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_DEPTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
# Ends of a text that its reader did not ask for.
_ABORTS = ("cancelled", "deadline")


class Metrics:
    """Counters, gauges and histograms of one engine, in a registry of their own.

    Args:
      model_name: label of all of them.
      num_rows: of the batch.
      capacity: tokens of a row.

    Raises:
      UserError: if the extra 'serve' is missing.
    """

    def __init__(self, model_name: str, num_rows: int, capacity: int):
        self._num_rows, self._capacity = num_rows, capacity
        self._client = import_extra("prometheus_client", "serve", "serving")
        self.registry = self._client.CollectorRegistry()
        self._model_name = model_name
        self._running = self._make("Gauge", "num_requests_running", "Texts that have a row.")
        self._waiting = self._make("Gauge", "num_requests_waiting", "Texts that wait for a row.")
        self._cache_usage = self._make(
            "Gauge", "cache_usage_perc", "Share of the cache that texts fill, 1 is all of it."
        )
        self._prompt_tokens = self._make("Counter", "prompt_tokens", "Tokens of prompts read.")
        self._reused_tokens = self._make(
            "Counter", "prompt_tokens_reused", "Of these, tokens copied from another text's rows."
        )
        self._new_tokens = self._make("Counter", "generation_tokens", "Tokens generated.")
        self._successes = self._make(
            "Counter", "request_success", "Texts that ended, by reason.", "finished_reason"
        )
        self._aborts = self._make(
            "Counter", "request_aborted", "Texts that were cancelled or took too long."
        )
        self._failures = self._make(
            "Counter", "request_failed", "Texts that the engine could not finish."
        )
        self._first_token = self._make_seconds(
            "time_to_first_token_seconds", "From a request's arrival to its first token.", _SECONDS
        )
        self._between_tokens = self._make_seconds(
            "inter_token_latency_seconds",
            "Between two tokens of a text, by the depth of the second.",
            _TOKEN_SECONDS,
            "depth",
        )
        self._whole = self._make_seconds(
            "e2e_request_latency_seconds", "From a request's arrival to its end.", _SECONDS
        )
        self._queue_time = self._make_seconds(
            "request_queue_time_seconds", "From a request's arrival to its row.", _SECONDS
        )
        self._depth = self._make_seconds(
            "token_depth", "Iterations of the core per generated token.", _DEPTHS
        )
        self._iterations = self._make(
            "Counter", "core_iterations", "Iterations of the core, summed over generated tokens."
        )
        self._saved = self._make(
            "Counter", "core_iterations_saved", "Iterations that exit criteria spared."
        )
        self._ticks = self._make("Counter", "ticks", "Iterations of the whole batch.")
        self._turns = self._make("Counter", "turns", "Times that waiting rows got their tokens.")
        self._rows_per_turn = self._make_seconds(
            "rows_per_turn", "Tokens that a turn gave.", (0, 1, 2, 4, 8, 16, 32, 64, 128)
        )
        self._occupancy = self._make("Gauge", "row_occupancy", "Share of rows that have a text.")
        self._min_waiting = self._make(
            "Gauge", "min_waiting", "Rows that must wait before the next turn, at present."
        )
        self._compilations = self._make(
            "Counter", "compilations", "Programs compiled since the server is ready; stays 0."
        )

    def _make(self, kind: str, name: str, text: str, *labels: str, **options: Any) -> Any:
        made = getattr(self._client, kind)(
            PREFIX + name, text, ("model_name", *labels), registry=self.registry, **options
        )
        return made if labels else made.labels(self._model_name)

    def _make_seconds(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Any:
        return self._make("Histogram", name, text, *labels, buckets=buckets)

    @property
    def content_type(self) -> str:
        """Of `text`."""
        kind: str = self._client.CONTENT_TYPE_LATEST
        return kind

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        written: bytes = self._client.generate_latest(self.registry)
        return written

    # --------------------------------------------------------------------------
    # What happens.

    def see_rows(self, num_running: int, num_waiting: int, num_tokens: int) -> None:
        """How full the batch is now: rows with a text, texts without, tokens of all rows."""
        self._running.set(num_running)
        self._waiting.set(num_waiting)
        self._occupancy.set(num_running / self._num_rows)
        self._cache_usage.set(num_tokens / (self._num_rows * self._capacity))

    def see_placed(self, arrived: float) -> None:
        """A text got a row."""
        self._queue_time.observe(time.monotonic() - arrived)

    def see_prompt(self, num_tokens: int, num_reused: int, *, is_first: bool) -> None:
        """A prompt has been read; `is_first` for the first text of its prompt."""
        if is_first:
            self._prompt_tokens.inc(num_tokens)
        self._reused_tokens.inc(num_reused)

    def see_turn(self, num_ticks: int, num_tokens: int, min_waiting: int) -> None:
        """A turn is over, and so many iterations before it."""
        self._ticks.inc(num_ticks)
        self._turns.inc()
        self._rows_per_turn.observe(num_tokens)
        self._min_waiting.set(min_waiting)

    def see_token(self, depth: int, most: int, seconds: float, *, is_first: bool) -> None:
        """A text got a token.

        Args:
          depth: iterations that led to it; 0 without a core.
          most: that it could have had.
          seconds: since the text's last token, or since the text came if this is its first.
          is_first: whether it is.
        """
        self._new_tokens.inc()
        self._depth.observe(depth)
        self._iterations.inc(depth)
        self._saved.inc(max(most - depth, 0) if depth else 0)
        if is_first:
            self._first_token.observe(seconds)
            return
        group = "<=8" if depth <= 8 else "<=32" if depth <= 32 else ">32"
        self._between_tokens.labels(self._model_name, group).observe(seconds)

    def see_end(self, reason: str, arrived: float) -> None:
        """A text has ended, for a reason of `requests.Finished`."""
        if reason in _ABORTS:
            self._aborts.inc()
            return
        self._successes.labels(self._model_name, reason).inc()
        self._whole.observe(time.monotonic() - arrived)

    def see_failure(self) -> None:
        """A text could not be finished."""
        self._failures.inc()

    def see_compilation(self) -> None:
        """Something was compiled although all programs should have been."""
        self._compilations.inc()
