"""The decoding strategies and options that `benchmarks.strategies` compares."""

import dataclasses
import functools
from typing import Any

from benchmarks.timing import Phase
from megatransformer_jax.config.generation import (
    BeamConfig,
    ParallelConfig,
    SpeculativeConfig,
)
from megatransformer_jax.config.sampling import (
    EXIT_CRITERIA,
    CacheConfig,
    DepthConfig,
    SamplingConfig,
)
from megatransformer_jax.generation.request import Completion

GREEDY = "greedy"
# How much deeper than in training the second group goes.
DEEPER = 4
LIKELIEST = SamplingConfig(temperature=0.0)


@dataclasses.dataclass
class Case:
    """One row of the table.

    Attributes:
      name: of strategy and options.
      depth: full depth.
      options: of GenerationConfig, but for those that all cases share.
      is_greedy: meant to give greedy's tokens.
      problem: why it was left out.
      phase: its times.
      completions: one per prompt.
    """

    name: str
    depth: int
    options: dict[str, Any]
    is_greedy: bool = True
    problem: str | None = None
    phase: Phase | None = None
    completions: list[Completion] = dataclasses.field(default_factory=list)


def make_cases(trained_depth: int, *, has_exit_gate: bool) -> list[Case]:
    """Greedy, draws and exits at both depths; the others at the trained one."""
    criteria = [name for name in EXIT_CRITERIA[1:] if name != "learned_gate" or has_exit_gate]
    cases: list[Case] = []
    for depth in (trained_depth, DEEPER * trained_depth):
        add = functools.partial(_case, cases, depth)
        add(GREEDY)
        add("sample", strategy="sample", is_greedy=False)
        for criterion in criteria:
            add(f"exit {criterion}", exit_criterion=criterion)
        add("warm start", warm_start=True)
        add("warm start with exit latent_diff", warm_start=True, exit_criterion="latent_diff")
        for slots in (1, 2, 4):
            add(f"cache of {slots} slots", cache=CacheConfig(slots=slots))
        add("cache of 4 slots shared by last", cache=CacheConfig(slots=4, sharing="last"))
        add("cache of 4 slots shared by anchor", cache=CacheConfig(slots=4, sharing="anchor"))
        add("beam 4", strategy="beam", beam=BeamConfig(num_beams=4), is_greedy=False)
        for draft_depth, length in ((1, 4), (2, 4), (4, 4), (4, 8)):
            options = SpeculativeConfig(draft_depth=draft_depth, draft_length=length)
            add(
                f"speculative {length} drafts at {draft_depth}",
                strategy="speculative",
                speculative=options,
                sampling=LIKELIEST,
            )
        for iterations, threshold in ((4, 0.03), (4, 0.1), (2, 0.03), (1, 0.03)):
            parallel = ParallelConfig(iterations_per_round=iterations, settle_threshold=threshold)
            add(
                f"parallel {iterations} per round settled at {threshold}",
                strategy="parallel",
                parallel=parallel,
                sampling=LIKELIEST,
            )
    return cases


def _case(
    cases: list[Case],
    depth: int,
    name: str,
    *,
    strategy: str = GREEDY,
    is_greedy: bool = True,
    exit_criterion: str = "fixed",
    warm_start: bool = False,
    **options: Any,
) -> None:
    options |= {
        "strategy": strategy,
        "depth": DepthConfig(depth, exit_criterion=exit_criterion, warm_start=warm_start),
    }
    cases.append(Case(name, depth, options, is_greedy))
