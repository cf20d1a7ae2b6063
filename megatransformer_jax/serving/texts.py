"""A text while it is made: from a job to what its row is told, from the row's tokens to events."""

import dataclasses
import time
from collections.abc import Hashable
from typing import Any, Protocol

from megatransformer_jax.config.generation import GenerationConfig, for_model
from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.option import ConfigError, UserError, require_defaults
from megatransformer_jax.config.sampling import CacheConfig
from megatransformer_jax.data.tokenizer import Tokenizer
from megatransformer_jax.generation.continuous.images import prompt_places
from megatransformer_jax.generation.continuous.lanes import BatchShape, RowText
from megatransformer_jax.generation.endings import (
    END_OF_TEXT,
    EXHAUSTED,
    FINISH_REASONS,
    RUNNING,
    StopFinder,
    end_ids_of,
)
from megatransformer_jax.generation.request import TextStream
from megatransformer_jax.serving.requests import Event, Finished, Job, NewToken, Scored

# What a batch of rows that differ cannot do.
_NOT_IN_A_BATCH = ("no_repeat_ngram", "banned_words", "forced_words")


class ServedTexts(Protocol):
    """What is needed of a model to check jobs; `mt.Model` has it."""

    @property
    def config(self) -> ModelConfig:
        """Its architecture."""
        ...

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Between text and ids."""
        ...

    @property
    def trained_depth(self) -> int | None:
        """Mean iterations in training, None without a core."""
        ...


def to_row_text(job: Job, lm: ServedTexts, shape: BatchShape) -> RowText:
    """What a row is told of a job.

    Raises:
      UserError: if the batch cannot make this text.
    """
    config = for_model(
        job.config,
        lm.trained_depth,
        has_exit_gate=lm.config.exit_gate.enabled,
        makes_media=lm.config.has_media,
    )
    _check_config(config, shape)
    _check_ids(job, lm, shape)
    end_ids = tuple(dict.fromkeys((*(end_ids_of(lm.tokenizer) if job.ends else ()), *job.stop_ids)))
    if len(end_ids) > shape.num_ends:
        raise ConfigError(
            "stop_token_ids",
            f"with the tokenizer's own, {len(end_ids)} tokens would end the text; at most "
            f"{shape.num_ends} may.",
        )
    return RowText.of_config(
        job.ids,
        config,
        sample=job.sample,
        logit_bias=job.logit_bias,
        min_new_tokens=job.min_new_tokens,
        end_ids=end_ids,
        num_top=job.num_top,
        images=job.media,
    )


def _check_config(config: GenerationConfig, shape: BatchShape) -> None:
    if config.strategy not in ("greedy", "sample"):
        raise ConfigError(
            "strategy",
            f"{config.strategy!r} decodes a batch of its own; choose greedy or sample.",
        )
    criterion = config.depth.exit_criterion
    if criterion not in ("fixed", *shape.criteria):
        known = ", ".join(dict.fromkeys(("fixed", *shape.criteria)))
        raise ConfigError(
            "exit_criterion", f"{criterion!r} is not compiled into this batch; it has {known}."
        )
    because, fix = "by a batch of texts that differ", "use Model.generate"
    require_defaults(config.depth, ("gate_readout", "gate_threshold"), because, fix)
    require_defaults(config.sampling, _NOT_IN_A_BATCH, because, fix)
    of_cache = [field.name for field in dataclasses.fields(CacheConfig)]
    require_defaults(config.cache, of_cache, because, "set it for the whole batch")
    if config.num_samples != 1:
        raise ConfigError("num_samples", "is 1 for each text; give a job per text.")


def _check_ids(job: Job, lm: ServedTexts, shape: BatchShape) -> None:
    if not job.ids:
        raise UserError("the prompt is empty; give at least one token.")
    # A model may have more rows than its tokenizer has ids; nothing has been learned for them.
    size = lm.config.vocab_size
    size = size if lm.tokenizer is None else min(size, lm.tokenizer.vocab_size)
    for name, ids in (("prompt", job.ids), ("logit_bias", job.logit_bias)):
        wrong = [token for token in ids if not 0 <= token < size]
        if wrong:
            raise UserError(f"{name}: {wrong[0]} is not an id; they are 0 to {size - 1}.")
    if len(job.logit_bias) > shape.num_bias:
        raise ConfigError(
            "logit_bias", f"has {len(job.logit_bias)} tokens; at most {shape.num_bias} may be."
        )
    if job.num_top > shape.num_top:
        raise ConfigError("top_logprobs", f"{job.num_top} exceeds {shape.num_top}; lower it.")
    if job.config.stop and lm.tokenizer is None:
        raise ConfigError("stop", "texts need a tokenizer, and this model has none.")
    room = min(shape.capacity, lm.config.max_length)
    num_new, num_prompt = job.config.max_new_tokens, prompt_length(job, lm)
    if job.media and (job.scores_prompt or not shape.with_images):
        why = "the batch is for text alone" if not shape.with_images else "they cannot be scored"
        raise UserError(f"the prompt has images, and {why}; leave them out.")
    if num_prompt + num_new > room:
        raise ConfigError(
            "max_tokens",
            f"the prompt has {num_prompt} tokens; with {num_new} new ones that is more than the "
            f"{room} of a row. Shorten it or lower max_tokens.",
        )


def prompt_length(job: Job, lm: ServedTexts) -> int:
    """Places that a prompt takes: its tokens, and those of its images.

    Raises:
      UserError: if the prompt and its images do not fit each other.
    """
    if not job.media:
        return len(job.ids)
    return len(prompt_places(lm.config, lm.tokenizer, job.ids, job.media).ids)


# ------------------------------------------------------------------------------
# From tokens to text.


class Text:
    """One job on its way through the engine.

    Attributes:
      job: what was asked for.
      row_text: the same for a row.
      rule: of its prompt, see `prefixes.reading_rule`.
      num_prompt: places of its prompt.
      key: its number; later texts have larger ones.
      row: of the batch. None while it waits.
      num_read: tokens of the prompt that are cached.
      num_reused: of these, copied.
      new_ids: tokens that it got, an end token too.
      depths: of each of them.
      iteration: of the token on its way, when last heard of.
      is_running: whether it has been admitted, so gets tokens.
      is_over: whether its last event has been delivered.
      scores: of the prompt's tokens so far.
      arrived, placed, last_token: moments (`time.monotonic`); 0: not yet.
    """

    def __init__(
        self,
        key: int,
        job: Job,
        row_text: RowText,
        rule: Hashable | None,
        tokenizer: Tokenizer | None,
        num_prompt: int,
    ):
        self.key = key
        self.job = job
        self.row_text = row_text
        self.rule = rule
        self.num_prompt = num_prompt
        self.row: int | None = None
        self.num_read = self.num_reused = 0
        self.new_ids: list[int] = []
        self.depths: list[int] = []
        self.iteration = 0
        self.is_running = self.is_over = False
        self.scores: list[Scored] = []
        self.arrived = time.monotonic()
        self.placed = self.last_token = 0.0
        stops = job.config.stop
        self._shown = None if tokenizer is None else TextStream(tokenizer, job.ids, stops)
        self._stops = StopFinder(stops, tokenizer)

    @property
    def num_to_read(self) -> int:
        """Places of the prompt that are read before its last token enters."""
        return self.num_prompt - 1

    @property
    def is_read(self) -> bool:
        """Whether only the prompt's last token is left."""
        return self.num_read >= self.num_to_read

    def progress(self) -> dict[str, Any]:
        """How far it is, for people; may be called from another thread."""
        return {
            "depth": self.row_text.depth,
            "criterion": self.row_text.criterion,
            "iteration": self.iteration,
            "prompt_tokens": self.num_prompt,
            "read_tokens": self.num_read,
            "reused_tokens": self.num_reused,
            "tokens": len(self.new_ids),
            "last_depth": self.depths[-1] if self.depths else None,
        }

    def add(self, scored: Scored, depth: int, reason: int) -> list[Event]:
        """The events of a turn that gave it a token, or ended it.

        Args:
          scored: the token.
          depth: iterations that led to it.
          reason: code of `generation.endings`.
        """
        reason = self._stops.reason(scored.token, reason)
        if reason == EXHAUSTED:
            return [self.finish(FINISH_REASONS[reason])]
        self.new_ids.append(scored.token)
        self.depths.append(depth)
        if reason == END_OF_TEXT:
            return [self.finish(FINISH_REASONS[reason], scored, depth)]
        is_last = reason != RUNNING
        text = "" if self._shown is None else self._shown.add(scored.token, is_last)
        events: list[Event] = [NewToken(scored, depth, text)]
        if is_last:
            self.is_over = True
            events.append(Finished(FINISH_REASONS[reason]))
        return events

    def finish(self, reason: str, end_token: Scored | None = None, end_depth: int = 0) -> Finished:
        """Ends it, with the text that was held back."""
        self.is_over = True
        rest = "" if self._shown is None else self._shown.end_text()
        return Finished(reason, rest, end_token, end_depth)
