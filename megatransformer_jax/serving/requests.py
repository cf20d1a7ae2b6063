"""What the HTTP side hands to the engine, and what comes back: plain values, no JAX, no HTTP."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from megatransformer_jax.config.generation import GenerationConfig
from megatransformer_jax.config.option import UserError


@dataclasses.dataclass(frozen=True)
class Job:
    """One prompt to be continued by one text, so one row of the batch.

    Attributes:
      ids: the prompt, at least one token.
      config: how; strategy 'greedy' or 'sample', `num_samples` 1.
      sample: number of this text among the `n` of its prompt; its draws depend on it.
      logit_bias: added to the scores of these tokens.
      min_new_tokens: no end token before so many.
      ends: whether the tokenizer's end tokens end the text (`ignore_eos` says no).
      stop_ids: more tokens that end it.
      num_top: likeliest tokens that come with each new one; 0: none, and log-probabilities of the
        chosen ones come always.
      scores_prompt: whether log-probabilities of the prompt's own tokens are wanted.
      only_scores: whether nothing is generated (OpenAI's `max_tokens=0` with `echo`).
      media: float32 arrays of images that stand at the prompt's places for them.
      is_streamed: whether somebody waits for each token. Otherwise several may come at once.
    """

    ids: tuple[int, ...]
    config: GenerationConfig
    sample: int = 0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    min_new_tokens: int = 0
    ends: bool = True
    stop_ids: tuple[int, ...] = ()
    num_top: int = 0
    scores_prompt: bool = False
    only_scores: bool = False
    media: tuple[Any, ...] = ()
    is_streamed: bool = True


@dataclasses.dataclass(frozen=True)
class Scored:
    """A token with its log-probability under the model's own distribution.

    Attributes:
      token: its id.
      log_prob: nats; None for the first token of a prompt.
      top: the likeliest tokens at its place, likeliest first, with theirs.
    """

    token: int
    log_prob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class PromptRead:
    """The prompt is in the cache (or has been scored).

    Attributes:
      scores: of its tokens, if they were asked for.
      num_reused: its tokens whose rows were copied from a text before.
    """

    scores: tuple[Scored, ...] = ()
    num_reused: int = 0


@dataclasses.dataclass(frozen=True)
class NewToken:
    """One more token of the text.

    Attributes:
      scored: which, and its log-probabilities.
      depth: iterations of the core that led to it; 0 without a core.
      text: what can be shown now that it has come; may be empty, see `TextStream`.
    """

    scored: Scored
    depth: int
    text: str


@dataclasses.dataclass(frozen=True)
class Finished:
    """The text has ended.

    Attributes:
      reason: 'end_of_text', 'stop', 'length', 'exhausted', 'cancelled' or 'deadline'.
      text: what was still held back.
      end_token: the end token that ended it, if one did; it counts as generated, but is not text.
      end_depth: iterations of the core that led to the end token; 0 without one, or without a core.
    """

    reason: str
    text: str = ""
    end_token: Scored | None = None
    end_depth: int = 0


@dataclasses.dataclass(frozen=True)
class Failed:
    """The engine could not go on with this text; nothing more will come."""

    message: str


Event = PromptRead | NewToken | Finished | Failed

# Called from the engine's thread, in order, once per event; must return at once and not raise.
Deliver = Callable[[int, Event], None]


class Busy(UserError):
    """The queue is full; try again after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: int):
        super().__init__(message)
        self.retry_after = retry_after


class NotServing(UserError):
    """The engine is loading, draining or dead; `state` says which."""

    def __init__(self, message: str, state: str):
        super().__init__(message)
        self.state = state
