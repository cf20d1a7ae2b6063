"""Texts that come and go in one batch, each with its own depth, criterion and settings.

One row, one text. A batch advances by iterations of the core, not by tokens: a row whose token has
iterated enough waits for the next `turn`, which gives it a token and starts the next one, while
the other rows stay in the middle of theirs. What a row gives does not depend on the others.

    batcher = Batcher(model, params, tokenizer, BatchShape(rows=8, capacity=1024, num_slots=8))
    batcher.compile()                      # afterwards nothing compiles
    batcher.place(0, RowText(ids=(1, 5, 9), max_new_tokens=16, depth=8))
    while not batcher.prefill(0):          # chunk by chunk
        pass
    events = batcher.turn()                # admits row 0: its last prompt token begins
    while ...:
        batcher.advance(min_waiting=1, max_ticks=64)
        events = batcher.turn()            # rows that wait get a token each
        host = events.fetch()              # waits for the device
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import struct

from megatransformer_jax.config.option import UserError
from megatransformer_jax.data.tokenizer import Tokenizer
from megatransformer_jax.models.exit_criteria import EXIT_CRITERIA
from megatransformer_jax.models.megatransformer import MegaTransformer


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """What is compiled in; hashable, so static in jit.

    Attributes:
      rows: texts at once (B). On a mesh, a multiple of the ways of its batch axes cuts them.
      capacity: most tokens of a text, its prompt's and the new ones together; rounded up to whole
        blocks of the cache.
      num_slots: cache slots of each core layer (R).
      chunk: prompt tokens per pass.
      criteria: exit criteria that rows may name, 'fixed' among them or not: it always can be.
      num_top: most likeliest tokens that come with each new one.
      num_bias: most tokens of a row's `logit_bias`.
      num_ends: most end tokens of a row.
      sharing: how iterations share slots, as `CacheConfig.sharing`.
      exited_reads: as `CacheConfig.exited_reads`.

    Raises:
      UserError: a number below 1, or a criterion that there is not.
    """

    rows: int
    capacity: int
    num_slots: int
    chunk: int = 64
    criteria: tuple[str, ...] = ("fixed", "latent_diff", "cosine")
    num_top: int = 20
    num_bias: int = 32
    num_ends: int = 4
    sharing: str = "modulo"
    exited_reads: str = "latest"

    def __post_init__(self) -> None:
        for name in ("rows", "capacity", "num_slots", "chunk", "num_top", "num_bias", "num_ends"):
            number = getattr(self, name)
            if number < 1:
                raise UserError(f"{name} of a batch is {number}; it must be at least 1.")
        for name in self.criteria:
            if name not in EXIT_CRITERIA:
                known = ", ".join(EXIT_CRITERIA)
                raise UserError(f"unknown exit criterion {name!r}; choose one of {known}.")


@dataclasses.dataclass(frozen=True)
class RowText:
    """A text as a row is given it: plain numbers, at their neutral values if left out.

    A text's draws depend on (seed, prompt_number, sample) and are those that `Generator` makes for
    sample `sample` of prompt `prompt_number`.

    Attributes:
      ids: the prompt.
      max_new_tokens: the text ends after so many.
      depth: most iterations per token; any number without a core.
      min_depth: no token leaves earlier.
      criterion: one of the batch's criteria.
      threshold: of the criterion.
      warm_start: a new token's first state is the last one of the token before.
      is_drawn: tokens are drawn; otherwise the likeliest is taken and the cuts are not read.
      temperature: and what follows: as `SamplingConfig` has them.
      seed: of the draws.
      prompt_number: of this prompt in its call.
      sample: of this text among those of its prompt.
      logit_bias: added to the scores of these tokens.
      min_new_tokens: no end token before so many.
      end_ids: tokens that end the text.
      num_top: likeliest tokens wanted with each new one; 0 is none.
    """

    ids: Sequence[int]
    max_new_tokens: int
    depth: int = 1
    min_depth: int = 1
    criterion: str = "fixed"
    threshold: float = 0.0
    warm_start: bool = False
    is_drawn: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    prompt_number: int = 0
    sample: int = 0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    min_new_tokens: int = 0
    end_ids: Sequence[int] = ()
    num_top: int = 0


@struct.dataclass
class Events:
    """What one `turn` did to each row, [B] each; arrays of the device until `fetch`.

    Attributes:
      is_done: rows that got a token, or ended without one ('exhausted').
      token: the new token; an end token too.
      log_prob: under the model's own distribution, before penalties and cuts.
      top_ids: int32 [B, num_top], the likeliest tokens, likeliest first.
      top_log_probs: theirs; without meaning where the row has not asked.
      depth: iterations that led to the token; 0 without a core.
      reason: RUNNING, END_OF_TEXT, LENGTH or EXHAUSTED (no token came) of `generation.endings`.
      is_running: rows that hold a text that has been admitted and has not ended.
      iteration: of the token on its way in each row, after the turn: 0, it has just begun.
      ticks: int32 [], iterations of the batch since the start, all `advance` together.
    """

    is_done: Any
    token: Any
    log_prob: Any
    top_ids: Any
    top_log_probs: Any
    depth: Any
    reason: Any
    is_running: Any
    iteration: Any
    ticks: Any

    def fetch(self) -> "Events":
        """The same with NumPy arrays; waits for the device."""
        fetched: Events = jax.tree.map(np.asarray, jax.device_get(self))
        return fetched


@dataclasses.dataclass(frozen=True)
class PromptScores:
    """Log-probabilities of a chunk of a prompt's own tokens.

    Attributes:
      first: number of the first of them in the prompt, at least 1: token 0 has none.
      log_probs: float32 [count].
      top_ids: int32 [count, num_top].
      top_log_probs: float32 [count, num_top].
    """

    first: int
    log_probs: np.ndarray
    top_ids: np.ndarray
    top_log_probs: np.ndarray


class Batcher:
    """Compiles the programs of a batch and owns its arrays on the device. For one thread.

    All methods but `score` and `Events.fetch` return before the device has finished.

    Args:
      model: the model, on a mesh or not.
      params: its parameters, laid out as the model's sharder says.
      tokenizer: whose tokens may be drawn. None: all.
      shape: what is compiled.

    Raises:
      UserError: if the shape does not fit the model.
    """

    def __init__(
        self, model: MegaTransformer, params: Any, tokenizer: Tokenizer | None, shape: BatchShape
    ):
        raise NotImplementedError

    def compile(self, progress: Callable[[str], object] = lambda name: None) -> None:
        """Compiles every program; otherwise each is compiled when it is first needed.

        Args:
          progress: is told each program's name when its turn comes.
        """
        raise NotImplementedError

    def place(self, row: int, text: RowText) -> None:
        """Puts a text into a row, whatever was there. Nothing is computed of its prompt yet.

        Raises:
          UserError: if the text does not fit the batch's shape.
        """
        raise NotImplementedError

    def copy(self, source: int, row: int, num_tokens: int) -> None:
        """Gives a row the first cached tokens of another (or of the text that it held before).

        After `place`, before the row's first `prefill`. Both texts must begin with the same
        tokens, and the source must have that many in its cache: those of its prompt that have been
        read, and its new ones but for the last. What they are depends on depth, min_depth,
        criterion and threshold, so these must be the same; and on seed and prompt_number where
        `recurrence.state_init` draws (new tokens then on sample too).

        Args:
          source: the other row.
          row: the new one, or the same.
          num_tokens: less than the prompt's tokens, as the last enters by `turn`.
        """
        raise NotImplementedError

    def prefill(self, row: int) -> bool:
        """Reads one chunk of the row's prompt; True once only its last token is left.

        That one enters by the next `turn`. True at once for a prompt of one token.
        """
        raise NotImplementedError

    def score(self, row: int) -> tuple[PromptScores | None, bool]:
        """As `prefill`, and waits for the log-probabilities of the tokens behind those read.

        Returns:
          They, None if there was nothing to read; and what `prefill` returns.
        """
        raise NotImplementedError

    def advance(self, min_waiting: int, max_ticks: int) -> None:
        """Iterates the core until so many running rows wait for a turn, at most `max_ticks` times.

        Returns at once on the device if no row is on its way.
        """
        raise NotImplementedError

    def turn(self) -> Events:
        """Gives each row that waits a token and starts the next; admits rows whose prompt is read.

        A row that ends is neither running nor free: its cached rows stay until another `place`.
        """
        raise NotImplementedError

    def release(self, rows: Sequence[int]) -> None:
        """Stops rows, wherever they are. Their cached rows stay until another `place`."""
        raise NotImplementedError

    def cache_bytes(self) -> int:
        """Bytes of keys and values, over all devices."""
        raise NotImplementedError
