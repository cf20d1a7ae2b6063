"""Continues the prompts of one call that each have settings of their own, in one batch.

    each = [{"depth": 4}, {"depth": 32, "exit_criterion": "kl"}]
    texts = prompt_texts(text_model, GenerationConfig(), prompts, each)
    new = continue_texts(text_model, texts, num_rows=2)

What a prompt gives is what it gives alone: a batch at the grain of an iteration has no rows that
wait for others.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from megatransformer_jax.config.calibration import Calibration
from megatransformer_jax.config.generation import (
    GENERATION_OPTIONS,
    GenerationConfig,
    MediaGenerationConfig,
    for_model,
)
from megatransformer_jax.config.option import ConfigError, UserError, declared_values, unknown_key
from megatransformer_jax.data.tokenizer import Tokenizer
from megatransformer_jax.generation.continuous.batcher import Batcher
from megatransformer_jax.generation.continuous.lanes import (
    BatchShape,
    DeviceEvents,
    Events,
    RowText,
    StepLimits,
)
from megatransformer_jax.generation.endings import (
    END_OF_TEXT,
    EXHAUSTED,
    FINISH_REASONS,
    RUNNING,
    StopFinder,
)
from megatransformer_jax.generation.processors.row_chain import MAX_NGRAM
from megatransformer_jax.generation.request import (
    CachePlan,
    Completion,
    parts_of_ids,
    plan_cache,
    round_columns,
)
from megatransformer_jax.models.megatransformer import MegaTransformer

# What a prompt may set for itself.
OWN_OPTIONS = (
    "strategy",
    "max_new_tokens",
    "seed",
    "stop",
    "depth",
    "exit_criterion",
    "exit_threshold",
    "min_depth",
    "warm_start",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "no_repeat_ngram",
)
# What no row of such a batch can do, with what it must be.
_NEUTRAL = {
    "gate_readout": "last",
    "banned_words": (),
    "forced_words": (),
}
# Prompt tokens per pass, at most.
_CHUNK = 64
# Room for end tokens; that of a model that has more.
_NUM_ENDS = 4
# Where the deepest prompt asks for less than so many times the mean, texts go token by token.
_ALIKE = 1.5

# ------------------------------------------------------------------------------
# From a call to texts.


@dataclasses.dataclass(frozen=True)
class TextModel:
    """A model as texts are continued with it.

    Attributes:
      model: the model.
      params: its parameters.
      tokenizer: between text and ids, or None.
      trained_depth: mean iterations in training; None without a core.
      end_ids: tokens that end a text.
      calibration: what exit_threshold=auto stands for.
    """

    model: MegaTransformer
    params: Any
    tokenizer: Tokenizer | None
    trained_depth: int | None
    end_ids: tuple[int, ...]
    calibration: Calibration | None = None


@dataclasses.dataclass(frozen=True)
class PromptText:
    """One text of a call.

    Attributes:
      ids: its prompt.
      config: its settings, with the depth that is used.
      number: of the prompt in its call, for the draws.
      sample: of the text among those of its prompt.
    """

    ids: tuple[int, ...]
    config: GenerationConfig
    number: int
    sample: int


def prompt_texts(
    given: TextModel,
    config: GenerationConfig,
    prompts: Sequence[Sequence[int]],
    each: Any,
) -> list[PromptText]:
    """The texts of a call, `num_samples` per prompt, in the order of the prompts.

    A prompt that sets its own seed draws as if it were alone in its call.

    Args:
      given: the model.
      config: of all prompts.
      prompts: token ids.
      each: what each prompt changes, by the short names of the options.

    Raises:
      UserError: if there are not as many settings as prompts, or several processes share the mesh.
      ConfigError: if a prompt's settings cannot be used; its path names the prompt, 'each[1]'.
    """
    if given.model.sharder.mesh is not None and jax.process_count() > 1:
        raise UserError(
            "each needs a mesh of one process, as the host says after every token what comes next; "
            "call generate once per setting, or use a mesh of this process alone."
        )
    if isinstance(each, Mapping) or not isinstance(each, Sequence):
        raise UserError(f"each is a list with the options of every prompt, not {each!r}.")
    if len(each) != len(prompts):
        raise UserError(
            f"each has {len(each)} sets of options for {len(prompts)} prompts; give one dict per "
            "prompt, {} to change nothing."
        )
    texts = []
    for number, (ids, own) in enumerate(zip(prompts, each, strict=True)):
        try:
            own_config = _own_config(given, config, own)
        except ConfigError as error:
            raise error.below(f"each[{number}]") from None
        drawn_as = 0 if "seed" in own else number
        texts += [
            PromptText(tuple(ids), own_config, drawn_as, sample)
            for sample in range(config.num_samples)
        ]
    return texts


def _own_config(given: TextModel, config: GenerationConfig, own: Any) -> GenerationConfig:
    if not isinstance(own, Mapping):
        raise ConfigError("", f"{own!r} is not a dict of options, such as {{'depth': 4}}.")
    for name in own:
        if not isinstance(name, str):
            raise ConfigError("", f"{name!r} is not the name of an option, such as 'depth'.")
        if name not in GENERATION_OPTIONS:
            raise unknown_key(name, OWN_OPTIONS)
        if name not in OWN_OPTIONS:
            raise ConfigError(
                name,
                "is the same for all prompts of a call; a prompt may set "
                f"{', '.join(OWN_OPTIONS)}.",
            )
    changed = config.with_options(**declared_values(own, GENERATION_OPTIONS))
    if changed.strategy not in ("greedy", "sample"):
        raise ConfigError(
            "strategy",
            f"{changed.strategy!r} decodes all prompts alike; with settings of their own choose "
            "'greedy' or 'sample'.",
        )
    for name, neutral in _NEUTRAL.items():
        path = GENERATION_OPTIONS[name].path
        section_name, _, field = path.rpartition(".")
        value = getattr(getattr(changed, section_name), field)
        if value != neutral:
            raise ConfigError(
                path, f"{value!r} does not work with settings per prompt; leave out either."
            )
    ngram = changed.sampling.no_repeat_ngram
    if ngram is not None and ngram > MAX_NGRAM:
        raise ConfigError(
            "sampling.no_repeat_ngram",
            f"{ngram} is too long for settings per prompt; make it at most {MAX_NGRAM}.",
        )
    if changed.media != MediaGenerationConfig():
        raise ConfigError("media", "settings per prompt are for text alone; leave out either.")
    has_gate = given.model.config.exit_gate.enabled
    return for_model(
        changed, given.trained_depth, has_exit_gate=has_gate, calibration=given.calibration
    )


def continue_each(
    given: TextModel,
    config: GenerationConfig,
    prompts: Sequence[Any] | np.ndarray,
    ids: Sequence[Sequence[int]],
    each: Any,
    num_rows: int,
) -> list[Completion]:
    """`num_samples` completions per prompt, in the order of the prompts.

    Args:
      given: the model.
      config: of all prompts.
      prompts: as they were given.
      ids: theirs.
      each: what each prompt changes, see `prompt_texts`.
      num_rows: texts at once.

    Raises:
      UserError: as `prompt_texts`, or if a text is too long.
    """
    texts = prompt_texts(given, config, ids, each)
    found = continue_texts(given, texts, num_rows)
    completions = []
    for index, (text, new) in enumerate(zip(texts, found, strict=True)):
        prompt, stops = prompts[index // config.num_samples], text.config.stop
        parts = parts_of_ids(given.tokenizer, text.ids, new.token_ids, stops=stops)
        completions.append(
            Completion(
                prompt if isinstance(prompt, str) else None,
                parts,
                tuple(new.token_ids),
                tuple(new.depths),
                new.score,
                new.finish_reason,
            )
        )
    return completions


# ------------------------------------------------------------------------------
# From texts to tokens.


@dataclasses.dataclass
class NewText:
    """What a text got.

    Attributes:
      token_ids: without an end token.
      depths: iterations that led to each.
      score: sum of the log-probabilities, the end token's included.
      finish_reason: as of `Completion`; 'running' until the text has ended.
    """

    token_ids: list[int] = dataclasses.field(default_factory=list)
    depths: list[int] = dataclasses.field(default_factory=list)
    score: float = 0.0
    finish_reason: str = FINISH_REASONS[RUNNING]

    def add(self, events: Events, row: int, finder: StopFinder) -> None:
        """What a turn gave the row of this text."""
        token = int(events.token[row])
        reason = finder.reason(token, int(events.reason[row]))
        self.finish_reason = FINISH_REASONS[reason]
        if reason != EXHAUSTED:
            self.score += float(events.log_prob[row])
        if reason not in (END_OF_TEXT, EXHAUSTED):
            self.token_ids.append(token)
            self.depths.append(int(events.depth[row]))

    @property
    def is_running(self) -> bool:
        """Whether more may come."""
        return self.finish_reason == FINISH_REASONS[RUNNING]


def continue_texts(given: TextModel, texts: Sequence[PromptText], num_rows: int) -> list[NewText]:
    """Continues texts, so many at once; one that ends makes room for the next.

    Args:
      given: the model.
      texts: see `prompt_texts`.
      num_rows: texts at once. Another number compiles again.

    Raises:
      UserError: if a text is too long.
    """
    plans = [_plan(given, text) for text in texts]
    shape = _shape(given, texts, plans, num_rows)
    batcher = Batcher(given.model, given.params, given.tokenizer, shape)
    rows = [_row_text(given, text) for text in texts]
    finders = [StopFinder(text.config.stop, given.tokenizer) for text in texts]
    found = [NewText() for _ in texts]
    launches = _launches(batcher, rows, found, _min_waiting(texts, num_rows), shape.rows)
    for events, numbers in launches:
        stopped = []
        for row, number in numbers.items():
            # A text that the host has ended may get a token more from a turn on its way.
            if events.is_done[row] and found[number].is_running:
                found[number].add(events, row, finders[number])
                if found[number].finish_reason == "stop":
                    stopped.append(row)
        if stopped:
            batcher.release(stopped)
    return found


def _launches(
    batcher: Batcher,
    texts: Sequence[RowText],
    found: Sequence[NewText],
    min_waiting: int,
    num_rows: int,
) -> Iterator[tuple[Events, Mapping[int, int]]]:
    """The events of each turn, and the number of the text in each row that it was for.

    They come one launch late: while the host reads them, the device has the next to do.
    """
    waiting = list(range(len(texts)))[::-1]
    holds: dict[int, int] = {}
    deepest = max(text.depth for text in texts)
    before: tuple[DeviceEvents, Mapping[int, int]] | None = None
    while True:
        holds = {row: number for row, number in holds.items() if found[number].is_running}
        for row in range(num_rows):
            if waiting and row not in holds:
                holds[row] = waiting.pop()
                batcher.place(row, texts[holds[row]])
                while not batcher.prefill(row):
                    pass
        if not holds:
            return
        limits = StepLimits(min_waiting, deepest, batcher.shape.turns, len(holds))
        dispatched = batcher.step(limits), dict(holds)
        if before is not None:
            for events in before[0].fetch():
                yield events, before[1]
        before = dispatched


def _min_waiting(texts: Sequence[PromptText], num_rows: int) -> int:
    """How many rows wait before they get their tokens: all if the depths are alike."""
    depths = [text.config.depth.depth or 1 for text in texts]
    is_alike = max(depths) * len(depths) < _ALIKE * sum(depths)
    return num_rows if is_alike else max(1, num_rows // 4)


def _plan(given: TextModel, text: PromptText) -> CachePlan:
    config, model = text.config, given.model
    return plan_cache(
        model.config,
        config,
        given.trained_depth,
        len(text.ids),
        config.max_new_tokens,
        model.platform,
    )


def _shape(
    given: TextModel,
    texts: Sequence[PromptText],
    plans: Sequence[CachePlan],
    num_rows: int,
) -> BatchShape:
    cache = texts[0].config.cache
    criteria = {text.config.depth.exit_criterion for text in texts} | {"fixed"}
    num_slots, chunk = max(plan.num_slots for plan in plans), cache.prefill_chunk
    if chunk is None:
        chunk = round_columns(max(len(text.ids) for text in texts))
        # With shared slots it matters how prompts are cut; `prefill` leaves them whole then.
        if num_slots >= max(text.config.depth.depth or 1 for text in texts):
            chunk = min(_CHUNK, chunk)
    return BatchShape(
        rows=num_rows,
        capacity=min(given.model.config.max_length, max(plan.capacity for plan in plans)),
        num_slots=num_slots,
        chunk=chunk,
        criteria=tuple(sorted(criteria)),
        num_top=1,
        num_bias=1,
        num_ends=max(_NUM_ENDS, len(given.end_ids)),
        sharing=cache.sharing,
        exited_reads=cache.exited_reads,
    )


def _row_text(given: TextModel, text: PromptText) -> RowText:
    return RowText.of_config(
        text.ids,
        text.config,
        prompt_number=text.number,
        sample=text.sample,
        end_ids=given.end_ids,
    )
