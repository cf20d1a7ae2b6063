"""How far two models of the same architecture are apart, by depth.

It is meant for a model and its quantised form. One pass shows whether an error of the weights grows
when the core is iterated: the same tokens, the same first states, every depth.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key
from rich.table import Table

from megatransformer_jax.evaluation.report import Report
from megatransformer_jax.evaluation.validation import (
    EvalSums,
    depth_argument,
    mean_scores,
    score_sums,
)
from megatransformer_jax.models.exit_criteria import Observation, exit_criterion
from megatransformer_jax.models.megatransformer import MegaTransformer
from megatransformer_jax.models.passes.observed import open_batch
from megatransformer_jax.storage import write_json
from megatransformer_jax.types import Batch

# Needs neither logits nor a gate, so it serves every model with a core.
_CRITERION = "latent_diff"
FILE = "divergence.json"


@dataclasses.dataclass(frozen=True)
class Divergence:
    """Means over the tokens that count, at one depth.

    Attributes:
      depth: iterations of the core; None: the model has none.
      loss: nats per token, of the second model.
      reference_loss: of the first.
      kl: nats per token, KL(first || second) of the next token's distributions.
      latent_error: |second - first| / |first| of the latents.
      exact_accuracy: share of rows with all tokens right, of the second model.
      reference_exact_accuracy: of the first.
      exit_depth: iterations until a token of the second model would leave by `latent_diff` at its
        default threshold, at most `depth`. None without a core.
      reference_exit_depth: of the first.
      tokens: how many counted.
    """

    depth: int | None
    loss: float
    reference_loss: float
    kl: float
    latent_error: float
    exact_accuracy: float
    reference_exact_accuracy: float
    exit_depth: float | None
    reference_exit_depth: float | None
    tokens: int


def measure_divergence(
    model: MegaTransformer,
    reference: Any,
    params: Any,
    batches: Sequence[Batch],
    depths: Sequence[int | None],
    key: Key[Array, ""],
    progress: Callable[[], None] = lambda: None,
) -> list[Divergence]:
    """Compares two sets of parameters of one model.

    Args:
      model: the model.
      reference: parameters.
      params: parameters; quantised ones too.
      batches: on the host.
      depths: iterations of the core; [None] for a model without one.
      key: of the core's first states.
      progress: called after each batch at each depth.

    Raises:
      UserError: if no token counts.
    """
    rows = []
    exits: list[np.ndarray] = []
    most = max((depth for depth in depths if depth is not None), default=0)
    for batch in batches if most else ():
        counts = np.asarray(batch.loss_mask) > 0
        both = [_exit_depths(model, p, batch, most, key) for p in (reference, params)]
        exits.append(np.stack([np.asarray(steps)[counts] for steps in both]))
    exit_depths = np.concatenate(exits, axis=1) if exits else None
    for depth in depths:
        sums = []
        for batch in batches:
            one = _compare(model, reference, params, batch, depth_argument(depth), key)
            sums.append(jax.device_get(one))
            progress()
        rows.append(_row(depth, sums, exit_depths))
    return rows


@functools.partial(jax.jit, static_argnums=0)
def _compare(
    model: MegaTransformer,
    reference: Any,
    params: Any,
    batch: Batch,
    num_steps: Int[Array, ""],
    key: Key[Array, ""],
) -> tuple[EvalSums, EvalSums, Float[Array, ""], Float[Array, ""]]:
    """Sums over a batch: both models' scores, KL, relative error of the latents."""
    (logits, latent), (ours, our_latent) = (
        _outputs(model, each, batch, num_steps, key) for each in (reference, params)
    )
    before, now = jax.nn.log_softmax(logits), jax.nn.log_softmax(ours)
    # As in `exit_criteria`: the sums of both are 1, so rounding cancels and no term is below 0.
    terms = jnp.exp(before) * (before - now) - jnp.exp(before) + jnp.exp(now)
    counts = batch.loss_mask > 0
    if batch.media is None:
        size = jnp.linalg.norm(latent, axis=-1)
        error = jnp.linalg.norm(our_latent - latent, axis=-1) / jnp.where(size == 0, 1.0, size)
        of_latents = jnp.sum(jnp.where(counts, error, 0.0))
    else:  # Latents of text and media stand in one sequence: as a whole.
        size = jnp.linalg.norm(latent)
        of_latents = jnp.linalg.norm(our_latent - latent) / size * jnp.sum(counts)
    kl = jnp.sum(jnp.where(counts, jnp.sum(terms, axis=-1), 0.0))
    return score_sums(logits, batch)[0], score_sums(ours, batch)[0], kl, of_latents


def _outputs(
    model: MegaTransformer, params: Any, batch: Batch, num_steps: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    output: Any = model.apply(
        {"params": params},
        batch.tokens,
        positions=batch.positions,
        segment_ids=batch.segment_ids,
        num_steps=num_steps,
        rngs={"state": key},
        media=batch.media,
    )
    return output.logits.astype(jnp.float32), output.latent.astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _exit_depths(
    model: MegaTransformer, params: Any, batch: Batch, most: int, key: Key[Array, ""]
) -> Float[Array, "B T"]:
    """The iteration after which each token of the text would leave; `most` if none."""
    criterion = exit_criterion(_CRITERION)
    entered, core = open_batch(model, params, batch)

    def iterate(carry: Any, step: jax.Array) -> tuple[Any, None]:
        state, memory, exits = carry
        state = core.iterate(state, step)
        value, memory = criterion.measure(memory, Observation(state))
        settled = criterion.is_settled(value, criterion.default_threshold)
        exits = jnp.where(settled, jnp.minimum(exits, step + 1.0), exits)
        return (state, memory, exits), None

    state = core.first_state(key)
    exits = jnp.full(state.shape[:2], float(most))
    carry = (state, criterion.init(state, model.config.vocab_size), exits)
    (_, _, exits), _ = jax.lax.scan(iterate, carry, jnp.arange(most))
    return entered.at_text(exits)


def _row(depth: int | None, sums: Sequence[Any], exit_depths: np.ndarray | None) -> Divergence:
    reference = mean_scores(depth, [one[0] for one in sums])
    scores = mean_scores(depth, [one[1] for one in sums])
    exits: list[float | None] = [None, None]
    if depth is not None and exit_depths is not None:
        exits = [float(mean) for mean in np.minimum(exit_depths, depth).mean(axis=1)]
    return Divergence(
        depth=depth,
        loss=scores.loss,
        reference_loss=reference.loss,
        kl=float(np.sum([float(one[2]) for one in sums])) / scores.tokens,
        latent_error=float(np.sum([float(one[3]) for one in sums])) / scores.tokens,
        exact_accuracy=scores.exact_accuracy,
        reference_exact_accuracy=reference.exact_accuracy,
        exit_depth=exits[1],
        reference_exit_depth=exits[0],
        tokens=scores.tokens,
    )


# ------------------------------------------------------------------------------
# The report.


def divergence_report(
    rows: Sequence[Divergence], trained_depth: int | None, *, of_problems: bool, title: str
) -> Report:
    """A table with one row per depth; the trained mean is marked with a star.

    Args:
      rows: one per depth.
      trained_depth: mean depth in training; None without a core.
      of_problems: shows exact answers too.
      title: of the table.
    """
    table = Table(title=title)
    headings = ["depth", "loss", "change", "KL", "latent error"]
    headings += ["exact answers", "before"] if of_problems else []
    headings += ["exit depth", "before"] if trained_depth is not None else []
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        is_trained = row.depth is not None and row.depth == trained_depth
        cells = [
            f"{'-' if row.depth is None else row.depth}{' *' if is_trained else ''}",
            f"{row.loss:.4f}",
            f"{row.loss - row.reference_loss:+.4f}",
            f"{row.kl:.2e}",
            f"{row.latent_error:.4f}",
        ]
        if of_problems:
            cells += [f"{row.exact_accuracy:.4f}", f"{row.reference_exact_accuracy:.4f}"]
        if trained_depth is not None:
            cells += [_number(row.exit_depth), _number(row.reference_exit_depth)]
        table.add_row(*cells)
    if trained_depth is not None:
        table.caption = (
            f"* mean depth in training ({trained_depth}). Exit depth: iterations until "
            f"{_CRITERION} is below {exit_criterion(_CRITERION).default_threshold:g}."
        )
    values = [_plain(row) for row in rows]

    def write(folder: pathlib.Path) -> list[pathlib.Path]:
        write_json(folder / FILE, {"trained_depth": trained_depth, "rows": values})
        return [folder / FILE]

    return Report(values, [table], write)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _plain(row: Divergence) -> dict[str, Any]:
    values = dataclasses.asdict(row)
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }
