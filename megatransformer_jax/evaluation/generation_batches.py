"""Continues many prompts, batch by batch, with progress."""

import dataclasses
from collections.abc import Callable, Sequence

from megatransformer_jax.config.generation import GenerationConfig
from megatransformer_jax.config.option import MAX_SEED
from megatransformer_jax.generation.generator import Generator
from megatransformer_jax.generation.request import Completion


def continue_in_batches(
    make_generator: Callable[[GenerationConfig], Generator],
    config: GenerationConfig,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int,
    progress: Callable[[int], object] = lambda count: None,
) -> list[Completion]:
    """One completion per prompt, in the order of the prompts.

    The longest prompts come first and stand beside others of their length, and a batch that is not
    full is filled up, so that few programs are compiled. If tokens are drawn, each batch has a seed
    of its own.

    Args:
      make_generator: from a configuration to a generator of the model.
      config: of one text per prompt.
      prompts: token ids.
      batch_size: prompts that are continued at once.
      progress: called with the number of prompts that were continued since.

    Raises:
      ValueError: if `config` asks for several texts per prompt, or batch_size is not positive.
      UserError: if a prompt does not fit.
    """
    if config.num_samples != 1:
        raise ValueError(f"num_samples is {config.num_samples}; one text per prompt is scored.")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
    generator = make_generator(config)
    longest_first = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    found: dict[int, Completion] = {}
    for first in range(0, len(prompts), batch_size):
        if first and not config.is_deterministic:
            generator = make_generator(_with_next_seed(config, first))
        numbers = longest_first[first : first + batch_size]
        filled = [*numbers, *numbers[:1] * (batch_size - len(numbers))]
        completions = generator.generate([prompts[number] for number in filled])
        found.update(zip(numbers, completions[: len(numbers)], strict=True))
        progress(len(numbers))
    return [found[number] for number in range(len(prompts))]


def _with_next_seed(config: GenerationConfig, batch: int) -> GenerationConfig:
    return dataclasses.replace(config, seed=(config.seed + batch) % (MAX_SEED + 1))
