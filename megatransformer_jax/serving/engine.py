"""Makes texts: one thread owns the device, others hand in jobs and get events.

    engine = Engine(lm, settle(ServingConfig(), lm))
    engine.start()                                  # returns at once; compiles in its thread
    engine.wait_until_ready()
    ticket = engine.submit([Job(ids, config)], deliver, deadline=time.monotonic() + 60)
    ticket.cancel()
    engine.drain(30)
    engine.close()

If anything fails in the thread the engine is dead: all open texts are told, and no more are taken.
The process goes on, so that it can say so.
"""

import collections
import concurrent.futures
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import logging

from megatransformer_jax.config.option import UserError
from megatransformer_jax.config.serving import MAX_END_IDS, MAX_LOGIT_BIAS, ServingConfig
from megatransformer_jax.generation.continuous.batcher import Batcher
from megatransformer_jax.generation.continuous.durations import Durations
from megatransformer_jax.generation.continuous.lanes import BatchShape
from megatransformer_jax.serving.launches import Launches, Ticket
from megatransformer_jax.serving.metrics import Metrics
from megatransformer_jax.serving.prefixes import Prefixes, reading_rule
from megatransformer_jax.serving.requests import Busy, Deliver, Failed, Job, NotServing
from megatransformer_jax.serving.scheduler import Costs, Policy, Scheduler
from megatransformer_jax.serving.served import reads_images, settle
from megatransformer_jax.serving.texts import Text, prompt_length, to_row_text

LOADING, READY, DRAINING, DEAD = "loading", "ready", "draining", "dead"
_REFUSALS = {
    LOADING: "the model is still being loaded; try again later.",
    DRAINING: "the server is shutting down; ask another one.",
    DEAD: "the engine has stopped; restart the server. Its log says why.",
}
_COMPILATION = "/jax/core/compile/backend_compile_duration"
# What a turn is taken for at most, in iterations; else a mistake of the measurement would be kept.
_MAX_TURN = 32.0
# A queue that does not move is asked about again after so many seconds.
_MAX_RETRY_SECONDS = 60

# From a model and a shape to what has the methods of `Batcher`.
MakeBatcher = Callable[[Any, BatchShape], Any]
_Order = tuple[Callable[[], Any], concurrent.futures.Future]


def batch_shape(config: ServingConfig, lm: Any) -> BatchShape:
    """What is compiled for settled options and a model."""
    assert config.capacity is not None and config.cache_slots is not None
    return BatchShape(
        rows=config.rows,
        capacity=min(config.capacity, lm.config.max_length),
        num_slots=config.cache_slots,
        turns=config.max_turns,
        chunk=config.chunk,
        short_chunks=config.short_chunks,
        criteria=config.criteria,
        num_top=config.max_logprobs,
        num_bias=MAX_LOGIT_BIAS,
        num_ends=MAX_END_IDS,
        sharing=config.cache_sharing,
        exited_reads=config.cache_exited_reads,
        with_images=reads_images(lm),
    )


def _costs(batcher: Any) -> Costs:
    """What things take, in iterations."""
    durations: Durations = batcher.durations()
    tick = max(durations.tick, 1e-9)
    return Costs(
        turn=min(durations.turn / tick, _MAX_TURN),
        chunks={
            size: (once / tick, first / tick, last / tick)
            for size, (once, first, last) in durations.chunks.items()
        },
        part_size=batcher.part_size,
        begun={size: (once / tick, each / tick) for size, (once, each) in durations.begun.items()},
        most_begun=batcher.most_begun,
    )


def _make_batcher(lm: Any, shape: BatchShape) -> Batcher:
    return Batcher(lm.module, lm.weights, lm.tokenizer, shape)


class _ClosedEarly(Exception):
    """The engine is closed before it is ready."""


class Engine:
    """See the module. All methods may be called from any thread.

    Args:
      lm: the model, `mt.Model`.
      config: how it is served; settled (`served.settle`), or it is settled here.
      make_batcher: from model and shape to what has `Batcher`'s methods. None: a `Batcher`.
      prepare: called on the engine's thread before texts are taken, to compile what will be `run`.

    Attributes:
      config: settled.
      shape: of the batch.
      metrics: for Prometheus.
      progress: the program that is being compiled, or was last.
      failure: what killed the engine; None if nothing has.

    Raises:
      UserError: if the model cannot be served so, or the extra 'serve' is missing.
    """

    def __init__(
        self,
        lm: Any,
        config: ServingConfig,
        make_batcher: MakeBatcher | None = None,
        prepare: Callable[[], None] | None = None,
    ):
        self.config = settle(config, lm) if config.capacity is None else config
        self.shape = batch_shape(self.config, lm)
        self.metrics = Metrics(
            self.config.name or "megatransformer", self.shape.rows, self.shape.capacity
        )
        self.progress = ""
        self.failure: BaseException | None = None
        self._lm = lm
        self._make_batcher = make_batcher or _make_batcher
        self._prepare = prepare
        recurrence = lm.config.recurrence
        self._draws_states = lm.config.is_recurrent and recurrence.state_init not in (
            "zero",
            "none",
        )
        self._launches: Launches | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        # Guards all that follows.
        self._changed = threading.Condition()
        self._state = LOADING
        self._inbox: collections.deque[Ticket] = collections.deque()
        self._orders: collections.deque[_Order] = collections.deque()
        self._is_closing = self._is_awake = False
        self._num_tickets = self._num_texts = self._num_open = 0
        self._seconds_per_text, self._last_end = 1.0, time.monotonic()

    @property
    def state(self) -> str:
        """'loading', 'ready', 'draining' or 'dead'."""
        return self._state

    def start(self) -> None:
        """Begins to load and compile, and returns at once."""
        self._thread.start()

    def wait_until_ready(self, seconds: float | None = None) -> None:
        """Waits until texts are taken.

        Raises:
          NotServing: if the engine is dead, or is being closed.
          TimeoutError: if it takes longer than `seconds`.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._state != LOADING, seconds):
                raise TimeoutError(f"the engine is not ready after {seconds} s.")
            if self._state != READY:
                raise self._refusal()

    def submit(
        self,
        jobs: Sequence[Job],
        deliver: Deliver,
        deadline: float = math.inf,
        request_id: str = "",
    ) -> Ticket:
        """Takes jobs; their events come by `deliver(number of the job, event)`.

        Args:
          jobs: at least one. Those with the same prompt share its cached rows.
          deliver: called from the engine's thread, from now on; must return at once.
          deadline: moment (`time.monotonic`) at which their texts end with reason 'deadline'.
          request_id: shown in `slots`.

        Raises:
          NotServing: unless the engine is ready.
          Busy: if more texts are open than rows and queue hold.
          UserError: if a job cannot be made, or there are more than could ever wait.
        """
        if not jobs:
            raise UserError("there is no job; give at least one.")
        row_texts = [to_row_text(job, self._lm, self.shape) for job in jobs]
        most = self.config.queue + self.shape.rows
        if len(jobs) > most:
            raise UserError(
                f"{len(jobs)} texts at once are more than rows and queue hold ({most}); ask for "
                "fewer."
            )
        with self._changed:
            if self._state != READY:
                raise self._refusal()
            num_open = self._num_open + len(jobs)
            if num_open > most:
                wait = math.ceil(self._seconds_per_text * (num_open - most))
                raise Busy(
                    f"{self._num_open} texts are open and at most {most} may be; try again later.",
                    min(max(wait, 1), _MAX_RETRY_SECONDS),
                )
            texts = []
            for job, row_text in zip(jobs, row_texts, strict=True):
                self._num_texts += 1
                # Ids do not tell images apart, so their prompts are never another's.
                rule = None
                if not job.media:
                    rule = reading_rule(row_text, draws_states=self._draws_states)
                length = prompt_length(job, self._lm)
                tokenizer = self._lm.tokenizer
                texts.append(Text(self._num_texts, job, row_text, rule, tokenizer, length))
            self._num_tickets += 1
            request_id = request_id or str(self._num_tickets)
            ticket = Ticket(request_id, texts, deliver, deadline, self._wake)
            self._num_open = num_open
            self._inbox.append(ticket)
            self._wake()
        return ticket

    def run(self, function: Callable[[], Any]) -> concurrent.futures.Future:
        """Runs something on the engine's thread, between two launches.

        Returns:
          What it returns or raises, in the future; `NotServing` if the engine is loading or dead.
        """
        future: concurrent.futures.Future = concurrent.futures.Future()
        with self._changed:
            if self._state in (LOADING, DEAD):
                future.set_exception(self._refusal())
            else:
                self._orders.append((function, future))
                self._wake()
        return future

    def slots(self) -> list[dict[str, Any]]:
        """What each row does now, for people: values that JSON can write."""
        launches = self._launches
        rows = [None] * self.shape.rows if launches is None else list(launches.rows)
        found: list[dict[str, Any]] = []
        for row, item in enumerate(rows):
            if item is None:
                found.append({"row": row, "state": "free"})
                continue
            text = item.text
            state = "running" if text.is_running else "reading"
            where = {"row": row, "state": state, "request": item.ticket.request_id}
            found.append({**where, "text": item.number, **text.progress()})
        return found

    @property
    def num_open(self) -> int:
        """Texts that have not ended."""
        return self._num_open

    def drain(self, seconds: float) -> bool:
        """Takes no more jobs and waits until the open ones have ended, at most so long.

        Returns:
          Whether they all have; `close` ends the others.
        """
        with self._changed:
            self._refuse()
            self._changed.wait_for(lambda: self._num_open == 0 or self._state == DEAD, seconds)
            return self._num_open == 0 and self.failure is None

    def close(self) -> None:
        """Ends the thread. Texts that are open are told that they failed."""
        with self._changed:
            self._refuse()
            self._is_closing = True
            self._wake()
        if self._thread.ident is not None:
            self._thread.join()

    def __enter__(self) -> "Engine":
        self.start()
        self.wait_until_ready()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _refuse(self) -> None:
        if self._state in (LOADING, READY):
            self._set_state(DRAINING)

    def _set_state(self, state: str) -> None:
        with self._changed:
            self._state = state
            self._changed.notify_all()

    def _wake(self) -> None:
        """Makes the thread look around, if it waits."""
        with self._changed:
            self._is_awake = True
            self._changed.notify_all()

    def _refusal(self) -> NotServing:
        return NotServing(_REFUSALS.get(self._state, ""), self._state)

    # --------------------------------------------------------------------------
    # The thread.

    def _run(self) -> None:
        message = "the server has been closed."
        jax.monitoring.register_event_duration_secs_listener(self._see_compilation)
        try:
            launches = self._load()
            with self._changed:
                if self._state == LOADING:
                    self._set_state(READY)
            while self._take_orders(launches):
                if not launches.is_idle:
                    launches.step()
        except _ClosedEarly:
            pass
        except BaseException as error:  # Whatever it is, those who wait must hear of it.
            logging.exception("The engine has failed.")
            self.failure = error
            message = "the engine has failed; the server's log says why."
        finally:
            jax.monitoring.unregister_event_duration_listener(self._see_compilation)
            self._end(message)

    def _load(self) -> Launches:
        batcher = self._make_batcher(self._lm, self.shape)
        batcher.compile(self._see_progress)
        if self._prepare is not None:
            self._see_progress("lens")
            self._prepare()
        config = self.config
        policy = Policy(
            rows=config.rows,
            min_waiting=config.min_waiting,
            max_ticks=config.max_ticks,
            max_turns=config.max_turns,
            max_prefill_share=config.max_prefill_share,
            max_bypasses=config.max_bypasses,
        )
        self._launches = Launches(
            batcher,
            Scheduler(policy, _costs(batcher)),
            Prefixes(config.rows, config.chunk),
            self.metrics,
            self._see_end,
            copies_only_siblings=not config.prefix_reuse,
            copies_only_prompts=self._draws_states,
            num_slots=config.cache_slots if self._lm.config.is_recurrent else None,
        )
        return self._launches

    def _see_progress(self, name: str) -> None:
        """A program's turn to be compiled has come, which a server that is closed does without."""
        self.progress = name
        if self._is_closing:
            raise _ClosedEarly

    def _take_orders(self, launches: Launches) -> bool:
        """Takes what other threads want; waits while there is nothing to do. False: close."""
        with self._changed:
            if launches.is_idle:
                self._changed.wait_for(lambda: self._is_awake)
            self._is_awake = False
            while self._inbox:
                launches.add(self._inbox.popleft())
            if self._is_closing:
                return False
            orders = list(self._orders)
            self._orders.clear()
        for function, future in orders:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except Exception as error:
                    future.set_exception(error)
        return True

    def _see_end(self) -> None:
        """A text has ended."""
        with self._changed:
            now = time.monotonic()
            self._seconds_per_text += 0.1 * (now - self._last_end - self._seconds_per_text)
            self._last_end = now
            self._num_open -= 1
            self._changed.notify_all()

    def _see_compilation(self, event: str, duration_secs: float, **unused: Any) -> None:
        is_ours = threading.current_thread() is self._thread
        if event == _COMPILATION and is_ours and self._launches is not None:
            self.metrics.see_compilation()

    def _end(self, message: str) -> None:
        """The last that the thread does: all who wait are told."""
        with self._changed:
            self._set_state(DEAD)
            orders, self._orders = list(self._orders), collections.deque()
            inbox, self._inbox = list(self._inbox), collections.deque()
        for ticket in inbox:  # Not taken yet.
            for number in range(len(ticket.texts)):
                try:
                    ticket.deliver(number, Failed(message))
                except Exception:
                    logging.exception("Request %s could not be told.", ticket.request_id)
        if self._launches is not None:
            self._launches.fail(message)
        for _, future in orders:
            if future.set_running_or_notify_cancel():
                future.set_exception(self._refusal())
        with self._changed:
            self._num_open = 0
            self._changed.notify_all()
