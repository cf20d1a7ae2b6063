"""Runs on text and on reasoning problems: they show continued prompts, or answers."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from megatransformer_jax.config.generation import GenerationConfig
from megatransformer_jax.config.option import MAX_SEED, ConfigError
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.config.sampling import DepthConfig, SamplingConfig
from megatransformer_jax.data.reasoning import ProblemSet, build_task
from megatransformer_jax.data.tokenizer import Tokenizer
from megatransformer_jax.evaluation.answers import answer_samples
from megatransformer_jax.evaluation.text_metrics import named_scores
from megatransformer_jax.evaluation.validation import PROBLEM_SCORES
from megatransformer_jax.generation.generator import Generator, continue_in_batches
from megatransformer_jax.generation.request import encode_prompts
from megatransformer_jax.models.megatransformer import MegaTransformer
from megatransformer_jax.runs.build import MemoryPlan, trained_depth
from megatransformer_jax.runs.evaluate_text import read_references
from megatransformer_jax.runs.tasks.transformer import TransformerTask
from megatransformer_jax.runs.workdir import Workdir
from megatransformer_jax.training.loop import Hook, SampleHook
from megatransformer_jax.training.writers import MultiWriter

# ------------------------------------------------------------------------------
# Text.


class TextTask(TransformerTask):
    """A `Task`: to predict text."""

    def __init__(
        self,
        config: RunConfig,
        workdir: Workdir,
        stack: contextlib.ExitStack,
        plan: MemoryPlan | None,
    ):
        super().__init__(config, workdir, stack, plan)
        self._questions: Questions | None = None
        metrics = config.evaluation.generated.metrics
        if metrics:
            # A bad file or a missing library stops the run here, not at its first validation.
            self._questions = self.questions()
            named_scores(metrics, ["a text"], [["a text"]])

    def scores(self, params: Any) -> dict[str, float]:
        """See `Task`; with the scores of generated texts that `evaluation.generated` names."""
        scores, questions = super().scores(params), self._questions
        if questions is None:
            return scores
        texts = self._answers(params, questions)
        metrics = self.config.evaluation.generated.metrics
        return scores | named_scores(metrics, texts, questions.references)

    def _answers(self, params: Any, questions: "Questions") -> list[str]:
        """What the model says to each question, at the trained depth."""
        depth = trained_depth(self.config)

        def generator(generation: GenerationConfig) -> Generator:
            return Generator(self.model, params, self.tokenizer, generation, depth)

        generation = GenerationConfig(
            strategy="greedy",
            max_new_tokens=questions.max_new_tokens,
            stop=self.config.evaluation.generated.stop,
        )
        completions = continue_in_batches(
            generator, generation, questions.prompts, batch_size=self.config.data.batch_size
        )
        return [completion.text for completion in completions]

    def questions(self) -> "Questions":
        """The prompts of `evaluation.generated.references`.

        Raises:
          UserError: if the file cannot be used, or a prompt leaves the model no room.
        """
        options, path = self.config.evaluation.generated, "evaluation.generated"
        assert options.references is not None  # A rule of the configuration.
        found = read_references(options.references, needs_prompts=True)[: options.num_texts]
        prompts = encode_prompts(
            [reference.prompt for reference in found], self.tokenizer, self.config.model.vocab_size
        )
        longest = max(map(len, prompts))
        room = self.config.model.max_length - longest
        if options.max_new_tokens > room:
            raise ConfigError(
                f"{path}.max_new_tokens",
                f"{options.max_new_tokens} after the {longest} tokens of the longest prompt exceed "
                f"model.max_length={self.config.model.max_length}; "
                + (f"use at most {room}, or shorten" if room > 0 else "shorten")
                + f" the prompts of {options.references}.",
            )
        return Questions(prompts, [one.texts for one in found], options.max_new_tokens)

    def make_sampler(self) -> Callable[[Any, int], Mapping[str, str]]:
        """See `TransformerTask`."""
        return prompt_sampler(self.config, self.model, self.tokenizer)

    def sample_hook(self, make_samples: Callable[[Any, int], Any], writer: MultiWriter) -> Hook:
        """See `TransformerTask`."""
        return SampleHook(self.config.samples.every_steps, make_samples, writer.write_texts)


@dataclasses.dataclass(frozen=True)
class Questions:
    """Prompts, as ids, that validation continues; of each the right texts."""

    prompts: Sequence[Sequence[int]]
    references: Sequence[Sequence[str]]
    max_new_tokens: int


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

    def questions(self) -> "Questions":
        """Held-out problems up to the place from which the answer goes on."""
        data = self.config.data
        problems = ProblemSet.from_config(
            data.reasoning,
            sequence_length=data.sequence_length,
            seed=data.seed,
            held_out=True,
        )
        prompts, answers = [], []
        for index in range(min(self.config.evaluation.generated.num_texts, len(problems))):
            problem = problems[index]
            (places,) = np.nonzero(problem.loss_mask)
            prompts.append(problem.tokens[: places[0] + 1].tolist())
            answers.append(problem.targets[places].tolist())
        # The end token may find no place in the model; the text is the same without it.
        room = self.config.model.max_length - max(map(len, prompts))
        length = min(max(map(len, answers)), room)
        return Questions(prompts, [[self.tokenizer.decode(ids)] for ids in answers], length)

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
