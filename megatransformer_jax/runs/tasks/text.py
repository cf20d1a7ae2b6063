"""Runs on text and on reasoning problems: they show continued prompts, or answers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatransformer_jax.config.generation import GenerationConfig
from megatransformer_jax.config.option import MAX_SEED, ConfigError
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.config.sampling import DepthConfig, SamplingConfig
from megatransformer_jax.data.reasoning import build_task
from megatransformer_jax.data.tokenizer import Tokenizer
from megatransformer_jax.evaluation.answers import answer_samples
from megatransformer_jax.evaluation.validation import PROBLEM_SCORES
from megatransformer_jax.generation.generator import Generator
from megatransformer_jax.models.megatransformer import MegaTransformer
from megatransformer_jax.runs.build import trained_depth
from megatransformer_jax.runs.tasks.transformer import TransformerTask
from megatransformer_jax.training.loop import Hook, SampleHook
from megatransformer_jax.training.writers import MultiWriter

# ------------------------------------------------------------------------------
# Text.


class TextTask(TransformerTask):
    """A `Task`: to predict text."""

    def make_sampler(self) -> Callable[[Any, int], Mapping[str, str]]:
        """See `TransformerTask`."""
        return prompt_sampler(self.config, self.model, self.tokenizer)

    def sample_hook(self, make_samples: Callable[[Any, int], Any], writer: MultiWriter) -> Hook:
        """See `TransformerTask`."""
        return SampleHook(self.config.samples.every_steps, make_samples, writer.write_texts)


def prompt_sampler(
    config: RunConfig, model: MegaTransformer, tokenizer: Tokenizer
) -> Callable[[Any, int], Mapping[str, str]]:
    """A function from (params, step) to prompts and what the model makes of them, by name.

    Raises:
      ConfigError: if a prompt and its continuation exceed what the model can read.
    """
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


# ------------------------------------------------------------------------------
# Reasoning problems.

NUM_PROBLEMS = 3


class ReasoningTask(TextTask):
    """A `Task`: to answer generated problems. Shown are solved problems, not continued prompts."""

    shown = PROBLEM_SCORES

    def make_sampler(self) -> Callable[[Any, int], Mapping[str, str]]:
        """See `TransformerTask`."""
        own = self.config.samples.depth
        depth = trained_depth(self.config) if own is None else own

        def answer(params: Any, step: int) -> Mapping[str, str]:
            del step  # Answers are not drawn at random.
            texts = self.final_texts(params, (depth,))
            return {f"problem_{index}": text for index, text in enumerate(texts)}

        return answer

    def final_texts(self, params: Any, depths: Sequence[int | None]) -> list[str]:
        """Problems of the validation set, each with its answer at every depth."""
        return answer_samples(
            params,
            self.validation_set.eval_step,
            self.validation_set.batches[0],
            depths,
            build_task(self.config.data.reasoning).decode,
            count=NUM_PROBLEMS,
        )
