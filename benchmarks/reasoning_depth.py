"""Accuracy against iterations of a trained reasoning model, decoded token by token with the cache.

    python -m benchmarks.reasoning_depth --workdir=runs/reasoning
    python -m benchmarks.reasoning_depth --workdir=runs/reasoning --sections fixed criteria \
        --problems=128 --json=result.json

The run's held-out problems, as its own validation reads them. An answer is exact if every symbol of
it is right. Iterations are means over all tokens; "saved" is against the setting's full depth.
Sections:

  fixed     every token takes the same number of iterations
  criteria  every exit criterion at several thresholds (the default has a star), token by token and
            in one pass, as a prompt is read; "from N": none exits after fewer iterations
  cache     budgets of slots and how iterations share them, at fixed depths
  exits     budgets together with an exit criterion, and what later tokens read of exited ones
  warm      a token's first state is the last one of the token before it
  frontier  exit criteria at many thresholds, then the fewest iterations of each at equal accuracy

A model with an exit gate has learned_gate among its criteria.
"""

import argparse
import dataclasses
import json
import pathlib
import platform
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib

from megatransformer_jax.config.build import load_config
from megatransformer_jax.config.option import UserError
from megatransformer_jax.data.pipeline import validation_batches
from megatransformer_jax.evaluation.answers import CachedScores, cached_answers, cached_scores
from megatransformer_jax.models.exit_criteria import DepthRule, exit_criterion
from megatransformer_jax.nn.kv_cache import SHARINGS, CacheShape, init_cache
from megatransformer_jax.runs.load import LoadedModel, load_model
from megatransformer_jax.types import Batch

THRESHOLDS = {
    "latent_diff": (0.1, 0.03, 0.02, 0.01),
    "cosine": (5e-3, 5e-4, 2e-4, 5e-5),
    "entropy_diff": (1e-2, 1e-3, 1e-5, 1e-6),
    "kl": (5e-3, 5e-4, 1e-5, 1e-7, 1e-9),
    "minp_kl": (1e-4, 1e-6, 1e-8, 1e-10),
    "argmax_stability": (3, 5, 8, 12),
    "learned_gate": (0.9, 0.5, 0.2, 0.05),
}
FRONTIER = {
    "latent_diff": (0.3, 0.2, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01, 0.005),
    "cosine": (5e-2, 2e-2, 5e-3, 2e-3, 1e-3, 5e-4, 2e-4, 5e-5, 1e-5),
    "kl": (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9),
    "argmax_stability": (1, 2, 3, 4, 5, 6, 8, 10, 12),
    "learned_gate": (0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 1e-3, 1e-4),
}
# Exact answers that may be lost against the full depth.
ALLOWED_LOSSES = (0.0, 0.01, 0.05)
SLOTS = (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One row of a table. `slots` None: full. `threshold` None: the criterion's default."""

    depth: int
    criterion: str = "fixed"
    threshold: float | None = None
    min_depth: int = 1
    slots: int | None = None
    sharing: str = "modulo"
    exited_reads: str = "latest"
    warm_start: bool = False
    one_by_one: bool = True


class Problems:
    """A trained model and its held-out problems.

    Args:
      loaded: the model.
      batches: the problems.
      full_slots: slots of a full cache, the same for all depths so that they share a compilation.
    """

    def __init__(self, loaded: LoadedModel, batches: list[Batch], full_slots: int, seed: int):
        self._loaded, self._full_slots = loaded, full_slots
        self._batches = [jax.device_put(batch) for batch in batches]
        self._keys = jax.random.key(seed)

    def supports(self, setting: Setting) -> bool:
        """Whether the model has what the setting's criterion reads."""
        has_gate = self._loaded.config.exit_gate.enabled
        return has_gate or not exit_criterion(setting.criterion).needs_gate

    def score(self, setting: Setting) -> CachedScores:
        """Answers all problems in one way."""
        return cached_scores(
            self._batches,
            [self._answer(setting, number, batch) for number, batch in enumerate(self._batches)],
        )

    def _answer(self, setting: Setting, number: int, batch: Batch) -> Any:
        model = self._loaded.model
        batch_size, length = batch.tokens.shape
        cache = init_cache(
            model.config,
            CacheShape(
                batch_size,
                length,
                num_slots=setting.slots or self._full_slots,
                dtype=model.policy.compute,
                platform=model.platform,
                sharing=setting.sharing,
                exited_reads=setting.exited_reads,
            ),
        )
        criterion = exit_criterion(setting.criterion)
        threshold = setting.threshold
        rule = DepthRule(
            jnp.int32(setting.depth),
            jnp.float32(criterion.default_threshold if threshold is None else threshold),
            jnp.int32(setting.min_depth),
            criterion,
        )
        rows = jnp.arange(number * batch_size, (number + 1) * batch_size)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(self._keys, rows)
        return cached_answers(
            model,
            self._loaded.params,
            batch,
            cache,
            rule,
            keys,
            one_by_one=setting.one_by_one,
            warm_start=setting.warm_start,
        )


def fixed(depth: int) -> Iterator[Setting]:
    for one_by_one in (True, False):
        for times in (0.125, 0.25, 0.5, 0.5625, 0.625, 0.75, 1, 2):
            yield Setting(max(1, round(depth * times)), one_by_one=one_by_one)


def criteria(depth: int) -> Iterator[Setting]:
    for name, thresholds in THRESHOLDS.items():
        for one_by_one in (True, False):
            for threshold in thresholds:
                yield Setting(depth, name, threshold, one_by_one=one_by_one)
            yield Setting(depth, name, min_depth=depth // 2, one_by_one=one_by_one)


def budgets(depth: int) -> Iterator[Setting]:
    for slots in SLOTS:
        for sharing in SHARINGS:
            if slots == 1 and sharing != "modulo":
                continue  # One slot is shared in one way only.
            for part in (16, 8, 4, 1):
                if depth // part >= slots:
                    yield Setting(depth // part, slots=slots, sharing=sharing)


def exits(depth: int) -> Iterator[Setting]:
    for slots, sharing in ((1, "modulo"), *((4, sharing) for sharing in SHARINGS)):
        for threshold in (0.1, 0.03, 0.01):
            yield Setting(depth, "latent_diff", threshold, slots=slots, sharing=sharing)
    for name in ("kl", "argmax_stability"):
        yield Setting(depth, name, slots=4)
    for budget in (4, None):
        for threshold in (0.03, 0.01):
            yield Setting(depth, "latent_diff", threshold, slots=budget, exited_reads="skip")


def warm(depth: int) -> Iterator[Setting]:
    for slots in (None, 4, 1):
        for part in (16, 8, 4, 2, 1):
            if depth // part >= (slots or depth // 4):
                yield Setting(depth // part, slots=slots, warm_start=True)
        for threshold in (0.03, 0.01):
            yield Setting(depth, "latent_diff", threshold, slots=slots, warm_start=True)


def frontier(depth: int) -> Iterator[Setting]:
    yield Setting(depth)
    for name, thresholds in FRONTIER.items():
        for threshold in thresholds:
            yield Setting(depth, name, threshold)


SECTIONS: dict[str, Callable[[int], Iterator[Setting]]] = {
    "fixed": fixed,
    "criteria": criteria,
    "cache": budgets,
    "exits": exits,
    "warm": warm,
    "frontier": frontier,
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, help="of a trained reasoning run")
    parser.add_argument("--step", default="latest", help="which checkpoint: latest, best, a number")
    parser.add_argument("--depth", type=int, help="full depth; default: twice the trained mean")
    parser.add_argument(
        "--sections", nargs="+", default=list(SECTIONS), choices=tuple(SECTIONS), metavar="SECTION"
    )
    parser.add_argument("--problems", type=int, help="the first ones; default: all held out")
    parser.add_argument("--seed", type=int, default=0, help="of random first states")
    parser.add_argument("--json", help="also write all numbers to this file")
    return parser.parse_args()


def load_problems(arguments: argparse.Namespace) -> tuple[Problems, int]:
    """The model with its problems, and the full depth.

    Raises:
      UserError: if the run is none of a recurrent model on a reasoning task.
    """
    workdir = pathlib.Path(arguments.workdir)
    loaded = load_model(workdir, step=arguments.step)
    data = load_config(workdir / "config.json").data
    if data.source != "reasoning" or loaded.trained_depth is None:
        raise UserError(
            f"{workdir} was trained on data.source={data.source!r}"
            f"{'' if loaded.trained_depth else ' without a core'}; this benchmark needs a "
            "recurrent model of a reasoning task, such as experiments/configs/reasoning.py."
        )
    num_batches = None
    if arguments.problems is not None:
        if arguments.problems < 1 or arguments.problems % data.batch_size:
            raise UserError(
                f"--problems={arguments.problems} must be a multiple of the run's "
                f"data.batch_size={data.batch_size}."
            )
        num_batches = arguments.problems // data.batch_size
    depth = arguments.depth or 2 * loaded.trained_depth
    batches = validation_batches(data, None, num_batches=num_batches)
    print(f"{loaded.description}; trained depth {loaded.trained_depth}, full depth {depth}")
    return Problems(loaded, batches, 2 * depth, arguments.seed), depth


def print_head(section: str) -> None:
    print(f"\n{section}\n")
    print("| setting | passes | exact answers | symbols right | mean iterations | saved |")
    print("|---|---|---|---|---|---|")


def print_row(setting: Setting, scores: CachedScores, depth: int) -> None:
    words = [f"depth {setting.depth}"]
    if setting.criterion != "fixed":
        default = exit_criterion(setting.criterion).default_threshold
        threshold = default if setting.threshold is None else setting.threshold
        star = "*" if threshold == default else ""
        words.append(f"{setting.criterion} {threshold:g}{star}")
    if setting.min_depth > 1:
        words.append(f"from {setting.min_depth}")
    if setting.slots is not None:
        words.append(f"{setting.slots} slots, {setting.sharing}" if setting.slots > 1 else "1 slot")
    if setting.exited_reads != "latest":
        words.append(f"reads {setting.exited_reads}")
    if setting.warm_start:
        words.append("warm start")
    cells = (
        ", ".join(words),
        "per token" if setting.one_by_one else "one",
        f"{scores.exact_accuracy:.3f}",
        f"{scores.accuracy:.4f}",
        f"{scores.mean_steps:.2f}",
        f"{1 - scores.mean_steps / depth:.0%}",
    )
    print(f"| {' | '.join(cells)} |", flush=True)


def print_frontier(scored: list[tuple[Setting, CachedScores]]) -> None:
    """Of each criterion, the threshold with the fewest iterations at equal accuracy."""
    full = scored[0][1].exact_accuracy
    heads = [f"exact answers >= {max(full - loss, 0):.3f}" for loss in ALLOWED_LOSSES]
    print(f"\nmean iterations (threshold)\n\n| criterion | {' | '.join(heads)} |")
    print("|---" * (1 + len(heads)) + "|")
    for name in dict.fromkeys(setting.criterion for setting, _ in scored[1:]):
        cells = []
        for loss in ALLOWED_LOSSES:
            enough = [
                (scores.mean_steps, setting.threshold)
                for setting, scores in scored
                if setting.criterion == name and scores.exact_accuracy >= full - loss
            ]
            best = min(enough, default=None)
            cells.append("none" if best is None else f"{best[0]:.2f} ({best[1]:g})")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    arguments = parse_arguments()
    try:
        problems, depth = load_problems(arguments)
    except UserError as error:
        sys.exit(f"error: {error}")
    rows = []
    for section in arguments.sections:
        print_head(section)
        scored = []
        for setting in filter(problems.supports, SECTIONS[section](depth)):
            scores = problems.score(setting)
            print_row(setting, scores, depth)
            row = dataclasses.asdict(setting) | dataclasses.asdict(scores)
            rows.append({"section": section, **row})
            scored.append((setting, scores))
        if section == "frontier":
            print_frontier(scored)
    if arguments.json:
        versions = {"jax": jax.__version__, "jaxlib": jaxlib.__version__}
        summary = {
            "workdir": arguments.workdir,
            "depth": depth,
            "device": jax.devices()[0].device_kind,
            "versions": {"python": platform.python_version(), **versions},
            "rows": rows,
        }
        pathlib.Path(arguments.json).write_text(json.dumps(summary, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
