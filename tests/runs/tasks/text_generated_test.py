"""Validation that scores what the model generates."""

import contextlib
import json

import jax
import numpy as np
import pytest

from megatransformer_jax.config.build import build
from megatransformer_jax.config.generation import GenerationConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.evaluation.text_metrics import bleu
from megatransformer_jax.generation.generator import Generator
from megatransformer_jax.runs.tasks.text import ReasoningTask, TextTask
from megatransformer_jax.runs.workdir import Workdir

PROMPTS = ("The if", "A", "never read")
NEW_TOKENS = 5


def noisy(task, seed=0):
    """Fresh models score all tokens alike; noise tells them apart."""
    rng = np.random.default_rng(seed)
    params = task.fresh_state().params
    return jax.tree.map(lambda x: x + 0.3 * rng.standard_normal(x.shape, np.float32), params)


def write_references(path, *texts):
    lines = [{"prompt": p, "reference": t} for p, t in zip(PROMPTS, texts, strict=True)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def open_task(small_run, tmp_path):
    with contextlib.ExitStack() as stack:

        def make(task_class, generated, changes=None):
            values = {"evaluation": {"generated": generated}} | (changes or {})
            config = build(small_run(tmp_path, values))
            return task_class(config, Workdir(tmp_path, tmp_path), stack, None)

        yield make


def test_continuations_are_scored_against_their_references(open_task, tmp_path):
    path = tmp_path / "references.jsonl"
    options = {
        "metrics": ["bleu", "exact_match"],
        "references": str(path),
        "num_texts": 2,
        "max_new_tokens": NEW_TOKENS,
    }
    write_references(path, "a", "b", "c")
    task = open_task(TextTask, options)
    params = noisy(task)
    generation = GenerationConfig(strategy="greedy", max_new_tokens=NEW_TOKENS)
    generator = Generator(task.model, params, task.tokenizer, generation, 2)
    texts = [generator.generate([prompt])[0].text for prompt in PROMPTS[:2]]
    write_references(path, texts[0], f"{texts[1]} and more", "c")
    scores = open_task(TextTask, options).scores(params)
    assert list(scores) == ["loss", "perplexity", "accuracy", "bleu", "exact_match"]
    assert scores["exact_match"] == 0.5
    assert scores["bleu"] == bleu(texts, [[texts[0]], [f"{texts[1]} and more"]])
    with pytest.raises(ConfigError, match=r"max_new_tokens: \d+ after the \d+ tokens of the long"):
        open_task(TextTask, options | {"max_new_tokens": 100_000})


def test_generated_answers_are_as_often_right_as_predicted_ones(open_task):
    """The prefill, the cache and the loop of decoding against one pass over the right answer."""
    data = {
        "source": "reasoning",
        "batch_size": 16,
        "tokenizer": {"kind": "sentencepiece"},
        "reasoning": {"task": "hop", "num_symbols": 2, "num_eval": 16, "eval_max_length": 18},
        "sequence_length": 32,
    }
    changes = {"data": data, "model": {"vocab_size": 5, "recurrence": {"state_init": "zero"}}}
    task = open_task(ReasoningTask, {"metrics": ["exact_match"]}, changes)
    found = [task.scores(noisy(task, seed)) for seed in (1, 2)]
    for scores in found:
        assert scores["exact_match"] == scores["exact_accuracy"]
    assert any(0 < scores["exact_match"] < 1 for scores in found)


def test_a_sum_is_asked_up_to_its_sign(open_task):
    data = {
        "source": "reasoning",
        "tokenizer": {"kind": "sentencepiece"},
        "reasoning": {"task": "addition", "max_length": 3, "eval_min_length": 2}
        | {"eval_max_length": 3},
    }
    changes = {"data": data, "model": {"max_length": 16}}
    task = open_task(ReasoningTask, {"metrics": ["exact_match"], "num_texts": 6}, changes)
    questions = task.questions()
    assert len(questions.prompts) == 6
    for prompt, (answer,) in zip(questions.prompts, questions.references, strict=True):
        terms = task.tokenizer.decode(prompt).replace(" ", "")
        assert terms.endswith("=")
        left, right = (int(digits[::-1]) for digits in terms[:-1].split("+"))
        assert int(answer.replace(" ", "")[::-1]) == left + right
    longest = max(len(prompt) for prompt in questions.prompts)
    assert longest + questions.max_new_tokens <= 16
