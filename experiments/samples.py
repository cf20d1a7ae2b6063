"""What a run shows of its model: continued prompts, or answered problems."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from experiments.assemble import Vocabulary, trained_depth
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.data.tokenizer import Tokenizer
from megatransformer_jax.evaluation.answers import answer_samples
from megatransformer_jax.evaluation.validation import ValidationSet
from megatransformer_jax.generation.sampling import sample_text
from megatransformer_jax.models.megatransformer import MegaTransformer

NUM_PROBLEMS = 3


def make_sampler(
    config: RunConfig,
    model: MegaTransformer,
    vocabulary: Vocabulary,
    validation_set: ValidationSet,
) -> Callable[[Any, int], Mapping[str, str]]:
    """A function from (params, step) to texts by name.

    Raises:
      ConfigError: if a prompt and its continuation exceed what the model can read.
    """
    own = config.samples.depth
    depth = trained_depth(config) if own is None else own
    tokenizer = vocabulary.tokenizer

    def answer(params: Any, step: int) -> Mapping[str, str]:
        del step  # Answers are not drawn at random.
        texts = answer_samples(
            params,
            validation_set.eval_step,
            validation_set.batches[0],
            (depth,),
            vocabulary.decode,
            count=NUM_PROBLEMS,
        )
        return {f"problem_{index}": text for index, text in enumerate(texts)}

    if tokenizer is None:
        return answer
    _check_lengths(config, tokenizer)

    def continue_prompts(params: Any, step: int) -> Mapping[str, str]:
        texts = sample_text(
            model,
            params,
            tokenizer,
            config.samples.prompts,
            num_steps=1 if depth is None else depth,
            max_new_tokens=config.samples.max_new_tokens,
            temperature=config.samples.temperature,
            key=jax.random.fold_in(jax.random.key(config.train.seed), step),
        )
        return {f"prompt_{index}": text for index, text in enumerate(texts)}

    return continue_prompts


def _check_lengths(config: RunConfig, tokenizer: Tokenizer) -> None:
    """At the start of a run, not at its first sample."""
    samples = config.samples
    if not samples.every_steps:
        return
    lengths = {prompt: 1 + len(tokenizer.encode(prompt)) for prompt in samples.prompts}
    longest = max(lengths, key=lambda prompt: lengths[prompt])
    room = config.model.max_length - lengths[longest]
    if samples.max_new_tokens > room:
        raise ConfigError(
            "samples.max_new_tokens",
            f"{samples.max_new_tokens} after the {lengths[longest]} tokens (with the first, bos) "
            f"of {longest[:40]!r} exceed model.max_length={config.model.max_length}; "
            + (f"use at most {room}, or shorten" if room > 0 else "shorten")
            + " samples.prompts, or set samples.every_steps=0.",
        )
