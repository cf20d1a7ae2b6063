"""The rows of a batch whose texts come and go: what they hold on the device, and on the host."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int

from megatransformer_jax.config.generation import GenerationConfig
from megatransformer_jax.config.option import UserError
from megatransformer_jax.config.sampling import SamplingConfig
from megatransformer_jax.generation.history import History
from megatransformer_jax.generation.processors.row_chain import RowNumbers, RowSizes, row_numbers
from megatransformer_jax.models.exit_criteria import EXIT_CRITERIA, exit_criterion
from megatransformer_jax.models.passes.tick import Criteria, RowRules, Tokens

# ------------------------------------------------------------------------------
# On the host: what is compiled in, and a text as a row is given it.


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """What is compiled in; hashable, so static in jit.

    Attributes:
      rows: texts at once (B). On a mesh, a multiple of the ways of its batch axes cuts them.
      capacity: most tokens of a text, its prompt's and the new ones together; rounded up to whole
        blocks of the cache.
      num_slots: cache slots of each core layer (R).
      turns: of one launch of `step`, at most.
      chunk: prompt tokens per pass.
      short_chunks: prompt tokens of shorter passes; those from `chunk` on are left out.
      criteria: exit criteria that rows may name; 'fixed' always is one.
      num_top: most likeliest tokens that come with each new one.
      num_bias: most tokens of a row's `logit_bias`.
      num_ends: most end tokens of a row.
      sharing: how iterations share slots, as `CacheConfig.sharing`.
      exited_reads: as `CacheConfig.exited_reads`.
      with_images: whether prompts may have images.

    Raises:
      UserError: a number below 1, or a criterion that there is not.
    """

    rows: int
    capacity: int
    num_slots: int
    turns: int = 4
    chunk: int = 64
    short_chunks: tuple[int, ...] = (8, 16)
    criteria: tuple[str, ...] = ("fixed", "latent_diff", "cosine")
    num_top: int = 20
    num_bias: int = 32
    num_ends: int = 4
    sharing: str = "modulo"
    exited_reads: str = "latest"
    with_images: bool = False

    def __post_init__(self) -> None:
        names = ("rows", "capacity", "num_slots", "turns", "chunk", "num_top", "num_bias")
        numbers = [(name, getattr(self, name)) for name in (*names, "num_ends")]
        for name, number in (*numbers, *(("short_chunks", size) for size in self.short_chunks)):
            if number < 1:
                raise UserError(f"{name} of a batch is {number}; it must be at least 1.")
        for name in self.criteria:
            exit_criterion(name)

    @property
    def chunks(self) -> tuple[int, ...]:
        """Prompt tokens of all passes that there are, ascending."""
        return (*sorted({size for size in self.short_chunks if size < self.chunk}), self.chunk)

    @property
    def part_size(self) -> int | None:
        """Tokens of the passes that may be cut between iterations. None: there is none."""
        return self.chunks[-2] if len(self.chunks) > 1 else None

    @property
    def choice(self) -> Criteria:
        """The criteria as rows choose from them."""
        return Criteria.of(self.criteria)

    @property
    def sizes(self) -> RowSizes:
        """Widths of a row's lists."""
        return RowSizes(self.num_bias, self.num_ends)


@dataclasses.dataclass(frozen=True)
class RowText:
    """A text as a row is given it: plain numbers, checked already.

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
      sampling: what is done to the scores.
      seed: of the draws.
      prompt_number: of this prompt in its call.
      sample: of this text among those of its prompt.
      logit_bias: added to the scores of these tokens.
      min_new_tokens: no end token before so many.
      end_ids: tokens that end the text.
      num_top: likeliest tokens wanted with each new one; 0 is none.
      images: float32 [height, width, C] each, that stand behind their opening tokens.
    """

    ids: Sequence[int]
    max_new_tokens: int
    depth: int = 1
    min_depth: int = 1
    criterion: str = "fixed"
    threshold: float = 0.0
    warm_start: bool = False
    is_drawn: bool = False
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    seed: int = 0
    prompt_number: int = 0
    sample: int = 0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    min_new_tokens: int = 0
    end_ids: Sequence[int] = ()
    num_top: int = 0
    images: Sequence[np.ndarray] = ()

    @classmethod
    def of_config(cls, ids: Sequence[int], config: GenerationConfig, **others: Any) -> "RowText":
        """The text that a configuration asks for.

        Args:
          ids: the prompt.
          config: with the depth that is used, see `config.generation.for_model`. Its stop texts and
            its cache are not the row's.
          others: the fields that it does not have: prompt_number, sample, end_ids, ...
        """
        depth = config.depth
        threshold = depth.threshold
        if threshold is None:
            threshold = EXIT_CRITERIA[depth.exit_criterion].default_threshold
        return cls(
            ids,
            config.max_new_tokens,
            depth.depth or 1,
            depth.min_depth,
            depth.exit_criterion,
            threshold,
            depth.warm_start,
            not config.is_deterministic,
            config.sampling,
            config.seed,
            **others,
        )


# ------------------------------------------------------------------------------
# On the device.


@struct.dataclass
class RowSettings:
    """What each row has been asked, [B]; that of one row, as the host gives it, has no axis B.

    Attributes:
      rules: how deep its tokens go.
      numbers: what is done to its scores, and what ends it.
      is_warm: whether a token begins with the state of the one before.
      max_new_tokens: it ends after so many.
      num_top: likeliest tokens that it wants.
      seed: uint32, of its draws.
      prompt_number: of its prompt in its call.
      sample: of the text among those of its prompt.
      num_places: of its prompt: tokens, and places of images.
    """

    rules: RowRules
    numbers: RowNumbers
    is_warm: Any
    max_new_tokens: Any
    num_top: Any
    seed: Any
    prompt_number: Any
    sample: Any
    num_places: Any

    def prompt_keys(self) -> Any:
        """Keys [B] of the first states of prompts' tokens, as `request.prompt_keys` makes them."""
        fold = jax.vmap(lambda seed, number: jax.random.fold_in(jax.random.key(seed), number))
        return fold(self.seed, self.prompt_number)

    def row_keys(self) -> Any:
        """Keys [B] of draws and of new tokens' first states, as `request.sample_keys` has them."""
        return jax.vmap(jax.random.fold_in)(self.prompt_keys(), self.sample)


def row_settings(text: RowText, shape: BatchShape, num_places: int) -> RowSettings:
    """The settings of one row, NumPy arrays.

    Args:
      text: of the row.
      shape: of the batch.
      num_places: of its prompt.

    Raises:
      UserError: if the batch has no place for some of it.
    """
    names = shape.choice.names
    if text.criterion not in names:
        raise UserError(
            f"exit criterion {text.criterion!r} is not compiled in; choose one of "
            f"{', '.join(names)}, or add it to the criteria of the batch."
        )
    if text.num_top > shape.num_top:
        raise UserError(
            f"{text.num_top} likeliest tokens are more than the {shape.num_top} there is room for."
        )
    rules = RowRules(
        np.int32(text.depth),
        np.int32(text.min_depth),
        np.float32(text.threshold),
        np.int32(names.index(text.criterion)),
    )
    numbers = row_numbers(
        text.sampling,
        is_drawn=text.is_drawn,
        sizes=shape.sizes,
        logit_bias=text.logit_bias,
        min_new_tokens=text.min_new_tokens,
        end_ids=text.end_ids,
    )
    return RowSettings(
        rules,
        numbers,
        np.bool_(text.warm_start),
        np.int32(text.max_new_tokens),
        np.int32(text.num_top),
        np.uint32(text.seed),
        np.int32(text.prompt_number),
        np.int32(text.sample),
        np.int32(num_places),
    )


@struct.dataclass
class Lanes:
    """All of a batch but its keys and values; arrays begin with [B].

    Attributes:
      settings: of each row's text.
      history: prompts and new tokens. A running row's last token is not in the cache yet.
      counts: state of the chain of processors.
      tokens: on their way through the core.
      is_reading: rows whose prompt is being read.
      is_running: rows whose prompt has been read and whose text has not ended.
      ticks: int32 [], iterations so far.
    """

    settings: RowSettings
    history: History
    counts: Int[Array, "B V"]
    tokens: Tokens
    is_reading: Bool[Array, "B"]
    is_running: Bool[Array, "B"]
    ticks: Int[Array, ""]

    @property
    def is_live(self) -> Bool[Array, "B"]:
        """Rows whose cached tokens are read."""
        return self.is_reading | self.is_running


@struct.dataclass
class Events:
    """What one turn did to each row, [B] each.

    Attributes:
      is_done: rows that got a token, or ended without one (EXHAUSTED).
      token: the new token; an end token too.
      log_prob: under the model's own distribution, before penalties and cuts.
      top_ids: int32 [B, num_top], the likeliest tokens, likeliest first.
      top_log_probs: theirs; without meaning where the row has not asked.
      depth: iterations that led to the token; 0 without a core.
      reason: RUNNING, END_OF_TEXT, LENGTH or EXHAUSTED (no token came) of `generation.endings`.
      is_running: rows that hold a text that has been admitted and has not ended.
      iteration: of the token on its way in each row, after the turn: 0, it has just begun.
      ticks: int32 [], iterations of the batch since the start.
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

    def packed(self) -> "DeviceEvents":
        """The same in two arrays, as those of one turn."""
        ticks = jnp.broadcast_to(self.ticks, self.token.shape)
        numbers = [ticks] + [getattr(self, name) for name in _EVENT_NUMBERS]
        columns = jnp.stack([number.astype(jnp.int32) for number in numbers], axis=1)
        return DeviceEvents(
            jnp.concatenate([columns, self.top_ids], axis=1)[:, None],
            jnp.concatenate([self.log_prob[:, None], self.top_log_probs], axis=1)[:, None],
        )


# The columns of `DeviceEvents.numbers` between ticks and `top_ids`.
_EVENT_NUMBERS = ("is_done", "token", "depth", "reason", "is_running", "iteration")
# What ticks are of a turn that has not been.
_NO_TURN = -1


@struct.dataclass
class DeviceEvents:
    """`Events` of some turns on the device, in few arrays because each is sent by itself.

    Attributes:
      numbers: int32 [B, turns, numbers], everything but the log-probabilities.
      log_probs: float32 [B, turns, 1 + num_top], `log_prob` and `top_log_probs`.
    """

    numbers: Any
    log_probs: Any

    @classmethod
    def none(cls, num_rows: int, num_turns: int, num_top: int) -> "DeviceEvents":
        """Room for those of so many turns."""
        num_columns = 1 + len(_EVENT_NUMBERS) + num_top
        return cls(
            jnp.full((num_rows, num_turns, num_columns), _NO_TURN, jnp.int32),
            jnp.zeros((num_rows, num_turns, 1 + num_top)),
        )

    def fetch(self) -> list[Events]:
        """Those of each turn that has been, as NumPy arrays; waits for the device."""
        numbers, log_probs = jax.device_get((self.numbers, self.log_probs))
        num_turns = int(np.sum(numbers[0, :, 0] != _NO_TURN))
        return [_unpacked(numbers[:, turn], log_probs[:, turn]) for turn in range(num_turns)]


def _unpacked(numbers: np.ndarray, log_probs: np.ndarray) -> Events:
    first = 1 + len(_EVENT_NUMBERS)
    given = dict(zip(_EVENT_NUMBERS, numbers.T[1:], strict=False))
    for name in ("is_done", "is_running"):
        given[name] = given[name].astype(bool)
    return Events(
        **given,
        log_prob=log_probs[:, 0],
        top_ids=numbers[:, first:],
        top_log_probs=log_probs[:, 1:],
        ticks=numbers[0, 0],
    )


@dataclasses.dataclass(frozen=True)
class StepLimits:
    """How far `step` goes; plain numbers.

    Attributes:
      min_waiting: a turn comes once so many running rows wait for it,
      max_ticks: and after so many iterations in any case.
      turns: how many of them, at most; at most those of the batch's shape.
      num_running: as soon as fewer rows than that run, there is no further turn.
    """

    min_waiting: int
    max_ticks: int
    turns: int = 1
    num_running: int = 0

    def packed(self) -> np.ndarray:
        """The same as int32 [4]."""
        return np.asarray(dataclasses.astuple(self), np.int32)


@struct.dataclass
class PromptScores:
    """Log-probabilities of a chunk of a prompt's own tokens; arrays of the device until `fetch`.

    Attributes:
      count: int32 [], how many there are; what lies behind has no meaning.
      log_probs: float32 [T], of the tokens behind those that were read.
      top_ids: int32 [T, num_top].
      top_log_probs: float32 [T, num_top].
    """

    count: Any
    log_probs: Any
    top_ids: Any
    top_log_probs: Any

    def fetch(self) -> "PromptScores":
        """The same with NumPy arrays, cut to what there is; waits for the device."""
        count, *arrays = jax.tree.leaves(jax.device_get(self))
        return PromptScores(count, *(np.asarray(array)[:count] for array in arrays))
