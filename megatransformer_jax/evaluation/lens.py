"""The model's view after every iteration: latents, residuals and next tokens (a logit lens).

`trace_iterations` looks at all tokens of whole texts, `trace_token` at one token behind a cache,
with the values that exit criteria compare with their thresholds.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, Key
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.option import ConfigError, as_whole
from megatransformer_jax.data.tokenizer import Tokenizer
from megatransformer_jax.evaluation.report import new_figure, tables_as_html, tables_as_text
from megatransformer_jax.models.exit_criteria import (
    EXIT_CRITERIA,
    DepthRule,
    ExitCriterion,
    Observation,
)
from megatransformer_jax.models.megatransformer import MegaTransformer
from megatransformer_jax.models.passes.cached import NewTokens, cached_forward
from megatransformer_jax.models.passes.observed import open_core
from megatransformer_jax.nn.kv_cache import KVCache


@struct.dataclass
class IterationTrace:
    """What each iteration made of each token; entry i - 1 is iteration i.

    Attributes:
      latents: the state after the output norm, as the coda reads it.
      residuals: |h_i - h_{i-1}| / |h_i| of each token's state, over its channels.
      top_ids: the likeliest next tokens if the core stopped there, likeliest first.
      top_log_probs: their log-probabilities, float32.
    """

    latents: Float[Array, "n B T D"]
    residuals: Float[Array, "n B T"]
    top_ids: Int[Array, "n B T k"]
    top_log_probs: Float[Array, "n B T k"]


@functools.partial(jax.jit, static_argnames=("model", "depth", "top_k"))
def trace_iterations(
    model: MegaTransformer,
    params: Any,
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None,
    key: Key[Array, ""],
    *,
    depth: int,
    top_k: int,
) -> IterationTrace:
    """Iterates the core and runs coda and head on the state after each iteration.

    The last iteration's latents and scores are those of the model called with the same key as rng
    stream 'state'.

    Args:
      model: with a core.
      params: its parameters.
      tokens: one document per row, padding at the end.
      segment_ids: 1 for tokens, 0 for padding. None: no padding.
      key: of the first state.
      depth: n, at least 1; static.
      top_k: k, static.

    Raises:
      ValueError: if the model has no core.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    core = open_core(model, params, tokens, positions=positions, segment_ids=segment_ids)
    variables = {"params": params}
    # A module derives its key from the stream's.
    state_key = cast(
        jax.Array, model.apply(variables, rngs={"state": key}, method=lambda m: m.make_rng("state"))
    )

    def iterate(state: jax.Array, iteration: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        new = core.iterate(state, iteration)
        latent, x = model.apply(variables, new, core.outer, method="run_coda")
        logits = cast(jax.Array, model.apply(variables, x, method="run_head"))
        log_probs, ids = jax.lax.top_k(jax.nn.log_softmax(logits), top_k)
        moved = _length(new.astype(jnp.float32) - state.astype(jnp.float32))
        size = _length(new.astype(jnp.float32))
        # A state of zeros that stays there has moved by 0 and not by 0 / 0.
        residual = jnp.where(moved == 0, 0.0, moved / jnp.where(size == 0, 1.0, size))
        return new, (latent, residual, ids, log_probs)

    _, found = jax.lax.scan(iterate, core.first_state(state_key), jnp.arange(depth))
    return IterationTrace(*found)


def _length(state: Float[Array, "B T D"]) -> Float[Array, "B T"]:
    return jnp.linalg.norm(state, axis=-1)


# Part of the machine's memory that a trace may take: twice on a CPU, as results and as copies.
_MEMORY_SHARE = 0.25


def check_trace_size(model: ModelConfig, shape: tuple[int, ...], depth: int, top_k: int) -> None:
    """Checks that what a trace holds fits into the machine; XLA ends the process if it does not.

    Args:
      model: that is traced.
      shape: of the tokens, [B, T].
      depth: iterations.
      top_k: next tokens that are kept.

    Raises:
      ConfigError: otherwise.
    """
    numbers = depth * math.prod(shape) * (model.width + 1 + 2 * top_k)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 4 * numbers > _MEMORY_SHARE * memory:
        raise ConfigError(
            "depth",
            f"a trace of {depth} iterations over {math.prod(shape)} tokens holds "
            f"{4 * numbers / 2**30:.1f} GiB, more than a quarter of this machine's "
            f"{memory / 2**30:.1f} GiB; trace fewer iterations or shorter inputs.",
        )


# ------------------------------------------------------------------------------
# One token behind a cache, with what every exit criterion makes of its iterations.


@struct.dataclass
class TokenTrace:
    """What the iterations over one token led to; entry i - 1 is iteration i.

    Entries beyond the depth that was asked for mean nothing.

    Attributes:
      top_ids: the likeliest next tokens if the core stopped there, likeliest first.
      top_log_probs: their log-probabilities.
      next_log_probs: log-probabilities of one token of interest.
      entropies: of the next token's distribution, nats.
      values: of each exit criterion by its name, see models/exit_criteria.py.
    """

    top_ids: Int[Array, "n k"]
    top_log_probs: Float[Array, "n k"]
    next_log_probs: Float[Array, "n"]
    entropies: Float[Array, "n"]
    values: dict[str, Float[Array, "n"]]


def traced_criteria(has_exit_gate: bool) -> tuple[str, ...]:
    """The criteria whose values a trace has: all that measure something in such a model."""
    return tuple(
        name
        for name, criterion in EXIT_CRITERIA.items()
        if name != "fixed" and (has_exit_gate or not criterion.needs_gate)
    )


def trace_token(
    model: MegaTransformer,
    params: Any,
    new: NewTokens,
    cache: KVCache,
    depth: Int[Array, ""],
    next_token: Int[Array, ""],
    *,
    num_iterations: int,
    top_k: int,
) -> TokenTrace:
    """Iterates over one token that sees a cache, and writes nothing. Pure; depth is data.

    The token has the numbers that decoding with this cache gives it: all of its iterations up to
    the one at which a criterion would end them.

    Args:
      model: with a core, laid out for one row.
      params: its parameters.
      new: the token, [1, 1].
      cache: of one row, with the tokens before.
      depth: iterations, at most `num_iterations`.
      next_token: whose log-probabilities are wanted besides.
      num_iterations: n, static.
      top_k: k, static.
    """
    names = traced_criteria(model.config.exit_gate.enabled)
    watching = _watching(names, next_token, num_iterations, top_k)
    rule = DepthRule(depth, jnp.float32(0), jnp.int32(1), watching)
    output = cached_forward(model, params, new, cache, rule, last_logits_only=True)
    found = jax.tree.map(lambda array: array[0, 0], output.memory.found)
    return TokenTrace(**found)


@struct.dataclass
class _Watched:
    """The memory of `_watching`: that of every criterion, and what was found so far.

    Attributes:
      number: iterations so far.
      kept: by the criteria.
      found: the fields of a `TokenTrace`, of each token.
    """

    number: Int[Array, "B T"]
    kept: tuple[Any, ...]
    found: dict[str, Any]


def _watching(
    names: tuple[str, ...], next_token: jax.Array, num_iterations: int, top_k: int
) -> ExitCriterion:
    """A criterion that settles no token, and keeps what the named ones measure of it."""
    members = [EXIT_CRITERIA[name] for name in names]

    def init(state: jax.Array, vocab_size: int) -> _Watched:
        shape = (*state.shape[:2], num_iterations)
        numbers = jnp.zeros(shape, jnp.float32)
        found = {
            "top_ids": jnp.zeros((*shape, top_k), jnp.int32),
            "top_log_probs": jnp.zeros((*shape, top_k), jnp.float32),
            "next_log_probs": numbers,
            "entropies": numbers,
            "values": dict.fromkeys(names, numbers),
        }
        kept = tuple(member.init(state, vocab_size) for member in members)
        return _Watched(jnp.zeros(shape[:2], jnp.int32), kept, found)

    def measure(memory: _Watched, observation: Observation) -> tuple[jax.Array, _Watched]:
        pairs = [
            member.measure(kept, observation)
            for member, kept in zip(members, memory.kept, strict=True)
        ]
        assert observation.logits is not None
        log_probs = jax.nn.log_softmax(observation.logits.astype(jnp.float32))
        top_log_probs, top_ids = jax.lax.top_k(log_probs, top_k)
        finite = jnp.where(jnp.isneginf(log_probs), 0.0, log_probs)
        new = {
            "top_ids": top_ids,
            "top_log_probs": top_log_probs,
            "next_log_probs": log_probs[..., next_token],
            "entropies": -jnp.sum(jnp.exp(log_probs) * finite, axis=-1),
            "values": {name: value for name, (value, _) in zip(names, pairs, strict=True)},
        }
        place = memory.number[0, 0]
        found = jax.tree.map(lambda old, new: old.at[:, :, place].set(new), memory.found, new)
        kept = tuple(kept for _, kept in pairs)
        never = jnp.full(memory.number.shape, jnp.inf)
        return never, _Watched(memory.number + 1, kept, found)

    return ExitCriterion(
        name="watching",
        needs_logits=True,
        default_threshold=0.0,
        init=init,
        measure=measure,
        is_settled=lambda value, threshold: value < 0,
        needs_gate=any(member.needs_gate for member in members),
    )


# ------------------------------------------------------------------------------
# For people.


@dataclasses.dataclass(frozen=True, repr=False)
class Trace:
    """Every iteration of the core over some inputs, on the host. Prints itself as a table.

    Attributes:
      tokens: int32 [B, T], the inputs, padded at the end.
      lengths: int32 [B], tokens of each row.
      latents: [n, B, T, D], the state after the output norm, of iterations 1 to n.
      residuals: [n, B, T], |h_i - h_{i-1}| / |h_i| of each token.
      top_ids: [n, B, T, k], the likeliest next tokens if the core stopped there.
      top_probs: [n, B, T, k], their probabilities.
      tokenizer: to show tokens as text. None: they are shown as ids.

    Examples:
      >>> trace = lm.trace("The ", depth=3)
      >>> trace.depth, trace.latents.shape
      (3, (3, 1, 3, 64))
      >>> [len(trace.next_tokens(iteration)) for iteration in (1, 2, 3)]
      [5, 5, 5]
    """

    tokens: np.ndarray
    lengths: np.ndarray
    latents: np.ndarray
    residuals: np.ndarray
    top_ids: np.ndarray
    top_probs: np.ndarray
    tokenizer: Tokenizer | None

    @property
    def depth(self) -> int:
        """Number of iterations."""
        return len(self.residuals)

    def next_tokens(
        self, iteration: int, position: int = -1, row: int = 0
    ) -> list[tuple[str, float]]:
        """The likeliest next tokens as text, with their probabilities.

        Args:
          iteration: after which, from 1.
          position: after which token of the row; -1 is the last.
          row: which input.

        Raises:
          UserError: if there is no such iteration, token or row.
        """
        iteration = as_whole("iteration", iteration, 1, self.depth)
        place = (iteration - 1, row, self._place(position, row))
        ids, probs = self.top_ids[place].tolist(), self.top_probs[place].tolist()
        return [(self._shown(token), prob) for token, prob in zip(ids, probs, strict=True)]

    def table(self, position: int = -1, row: int = 0) -> Table:
        """One line per iteration: residual, and the likeliest next tokens after a position."""
        place = self._place(position, row)
        read = self._shown(int(self.tokens[row, place]))
        table = Table(title=f"Iterations after token {place} ({read})")
        table.add_column("iteration", justify="right")
        table.add_column("residual", justify="right")
        table.add_column("next token and its probability")
        for iteration in range(1, self.depth + 1):
            residual = self.residuals[iteration - 1, row, place]
            likely = self.next_tokens(iteration, place, row)
            shown = "  ".join(f"{text} {prob:.2f}" for text, prob in likely)
            table.add_row(str(iteration), f"{residual:.4f}", shown)
        return table

    def figure(self, row: int = 0) -> Figure:
        """Residual of every token in every iteration, with the likeliest next token written in.

        Args:
          row: which input.
        """
        length = self._length(row)
        size = (max(4.0, 0.9 * length), max(2.5, 0.4 * self.depth + 1))
        figure = new_figure(*size)
        axes = figure.subplots()
        values = np.log10(np.maximum(self.residuals[:, row, :length], 1e-6))
        image = axes.imshow(values, aspect="auto", origin="lower", cmap="viridis")
        middle = (values.min() + values.max()) / 2
        for iteration in range(self.depth):
            for place in range(length):
                text = self._shown(int(self.top_ids[iteration, row, place, 0]))
                color = "black" if values[iteration, place] > middle else "white"
                axes.text(place, iteration, text, ha="center", va="center", size=8, color=color)
        inputs = [self._shown(token) for token in self.tokens[row, :length].tolist()]
        axes.set_xticks(range(length), inputs, rotation=45)
        axes.set_yticks(range(self.depth), [str(i + 1) for i in range(self.depth)])
        axes.set_xlabel("token that is read; in each cell the likeliest next one")
        axes.set_ylabel("iteration")
        figure.colorbar(image, label="log10 of the residual")
        return figure

    def plot(self, position: int = -1, row: int = 0) -> Figure:
        """Three views of one input: how far it moves, what it would say, how one answer forms.

        The answer's curves are of the tokens that were ever the likeliest, 0 where they are not
        among the `top_k` that the trace keeps.

        Args:
          position: the token whose answer is shown by iteration; -1 is the last.
          row: which input.
        """
        place, length = self._place(position, row), self._length(row)
        width = 6.0 + min(0.35 * length, 12.0)
        figure = new_figure(width, max(3.2, min(0.3 * self.depth + 1, 9.0)))
        moves, says, answer = figure.subplots(1, 3, width_ratios=(3, width - 6, 3))
        self._plot_residuals(moves, row)
        self._plot_lens(says, row)
        self._plot_answer(answer, place, row)
        inputs = [self._shown(token) for token in self.tokens[row, :length].tolist()]
        says.set_xticks(range(length), inputs, size=8, rotation=45 if _is_long(inputs) else 0)
        return figure

    def _plot_residuals(self, axes: Axes, row: int) -> None:
        """One thin line per token, and their median."""
        residuals = np.maximum(self.residuals[:, row, : self._length(row)], 1e-7)
        iterations = range(1, self.depth + 1)
        axes.plot(iterations, residuals, color="tab:blue", alpha=0.25, linewidth=0.8)
        axes.plot(iterations, np.median(residuals, axis=1), color="tab:orange", label="median")
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title("residual |h_i - h_(i-1)| / |h_i|", size=9)
        axes.set_xlabel("iteration")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)

    def _plot_lens(self, axes: Axes, row: int) -> None:
        """The likeliest next token of every iteration and position, coloured by probability."""
        length = self._length(row)
        probs = self.top_probs[:, row, :length, 0]
        axes.imshow(probs, aspect="auto", origin="lower", cmap="viridis", vmin=0, vmax=1, alpha=0.9)
        for iteration, place in np.ndindex(*probs.shape) if probs.size <= _WRITTEN_CELLS else ():
            text = self._shown(int(self.top_ids[iteration, row, place, 0]))
            color = "black" if probs[iteration, place] > 0.5 else "white"
            axes.text(place, iteration, text, ha="center", va="center", size=7, color=color)
        axes.set_yticks(range(self.depth), [str(i + 1) for i in range(self.depth)], size=8)
        axes.set_title("likeliest token if the core stopped there (yellow: certain)", size=9)
        axes.set_xlabel("token that is read")
        axes.set_ylabel("iteration")

    def _plot_answer(self, axes: Axes, place: int, row: int) -> None:
        """Probabilities, by iteration, of the tokens that were ever the likeliest at one place."""
        ids, probs = self.top_ids[:, row, place], self.top_probs[:, row, place]
        iterations = range(1, self.depth + 1)
        for token in dict.fromkeys(ids[::-1, 0].tolist()):
            kept = np.where(ids == token, probs, 0.0).sum(axis=1)
            axes.plot(iterations, kept, marker=".", label=self._shown(token))
        axes.set_ylim(-0.03, 1.03)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(f"answer after token {place}", size=9)
        axes.set_xlabel("iteration")
        axes.set_ylabel("probability")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)

    def __str__(self) -> str:
        return tables_as_text([self.table()])

    __repr__ = __str__  # Not all numbers, when a session shows it.

    def _repr_html_(self) -> str:
        return tables_as_html([self.table()])

    def _place(self, position: int, row: int) -> int:
        length = self._length(row)
        return as_whole("position", position, -length, length - 1) % length

    def _length(self, row: int) -> int:
        return int(self.lengths[as_whole("row", row, 0, len(self.lengths) - 1)])

    def _shown(self, token: int) -> str:
        if self.tokenizer is None:
            return str(token)
        text = self.tokenizer.decode([token]) or f"<{token}>"
        # Line ends would break tables, dollars mean something in figures.
        return repr(text)[1:-1].replace("$", r"\$")


# More cells than these are coloured only, as their texts would overlap.
_WRITTEN_CELLS = 700


def _is_long(texts: Sequence[str]) -> bool:
    return float(np.median([len(text) for text in texts])) > 2


def make_trace(
    found: IterationTrace,
    tokens: np.ndarray,
    lengths: Sequence[int],
    tokenizer: Tokenizer | None,
) -> Trace:
    """What was traced, fetched from the device."""
    return Trace(
        tokens=tokens,
        lengths=np.asarray(lengths, np.int32),
        latents=np.asarray(found.latents),
        residuals=np.asarray(found.residuals),
        top_ids=np.asarray(found.top_ids),
        top_probs=np.exp(found.top_log_probs),
        tokenizer=tokenizer,
    )
