"""What a run shows of its model: continued prompts, or answered problems."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.assemble import Vocabulary, trained_depth
from megatransformer_jax.config.generation import GenerationConfig
from megatransformer_jax.config.option import MAX_SEED, ConfigError
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.config.sampling import DepthConfig, SamplingConfig
from megatransformer_jax.evaluation.answers import answer_samples
from megatransformer_jax.evaluation.validation import ValidationSet
from megatransformer_jax.generation.generator import Generator
from megatransformer_jax.models.megatransformer import MegaTransformer

NUM_PROBLEMS = 3


def make_sampler(
    config: RunConfig,
    model: MegaTransformer,
    vocabulary: Vocabulary,
    validation_set: ValidationSet,
) -> Callable[[Any, int], Mapping[str, str]]:
    """A function from (params, step) to texts by name, for all processes of a run to call together.

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
    # As ids, since a prompt may be empty: then the start token alone is continued.
    prompts = config.samples.prompts
    ids = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    if config.samples.every_steps:
        _check_lengths(config, ids)

    def continue_prompts(params: Any, step: int) -> Mapping[str, str]:
        generation = _generation(config, step)
        generator = Generator(model, params, tokenizer, generation, trained_depth(config))
        completions = generator.generate(ids)
        return {
            f"prompt_{index}": prompt + completion.text
            for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        }

    return continue_prompts


def _generation(config: RunConfig, step: int) -> GenerationConfig:
    """The draws differ from step to step."""
    samples = config.samples
    is_greedy = samples.temperature == 0
    return GenerationConfig(
        strategy="greedy" if is_greedy else "sample",
        max_new_tokens=samples.max_new_tokens,
        seed=(config.train.seed + step) % (MAX_SEED + 1),
        depth=DepthConfig(depth=samples.depth),
        sampling=SamplingConfig() if is_greedy else SamplingConfig(temperature=samples.temperature),
    )


def _check_lengths(config: RunConfig, ids: Sequence[Sequence[int]]) -> None:
    """At the start of a run, not at its first sample."""
    samples, max_length = config.samples, config.model.max_length
    longest = max(range(len(ids)), key=lambda index: len(ids[index]))
    room = max_length - len(ids[longest])
    if samples.max_new_tokens > room:
        raise ConfigError(
            "samples.max_new_tokens",
            f"{samples.max_new_tokens} after the {len(ids[longest])} tokens (with the first, bos) "
            f"of {samples.prompts[longest][:40]!r} exceed model.max_length={max_length}; "
            + (f"use at most {room}, or shorten" if room > 0 else "shorten")
            + " samples.prompts, or set samples.every_steps=0.",
        )
