"""What a run shows of its model: continued prompts, or answered problems."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from experiments.assemble import Vocabulary, trained_depth
from megatransformer_jax.config.run import RunConfig
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
    """A function from (params, step) to texts by name."""
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
