"""The adapter through lm-eval itself, against scores computed without it."""

import dataclasses
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import lm_eval.evaluator
import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from megatransformer_jax.config.layers import AttentionConfig
from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.option import UserError
from megatransformer_jax.config.recurrence import RecurrenceConfig
from megatransformer_jax.data.tokenizer import BytesTokenizer
from megatransformer_jax.evaluation.lm_eval import MegaTransformerLM
from megatransformer_jax.models.megatransformer import build_model, init_params
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy

DEPTH = 3
MAX_LENGTH = 32
TOKENIZER = BytesTokenizer()
# The second is longer than the model reads at once, with each of its answers.
CHOICES = [
    {"question": "Is it day?", "choices": ["yes", "no", "perhaps"], "answer": 0},
    {"question": "A long question about the night ", "choices": ["dark", "bright"], "answer": 1},
    {"question": "", "choices": ["a", "bc"], "answer": 1},
]
# The second is longer than the model reads at once.
TEXTS = [{"text": "Two words"}, {"text": "A text of more than one window, \u20ac 3 for all of it."}]
PROMPTS = [
    {"prompt": "Say", "answer": "x"},
    {"prompt": "Say much more of it, please", "answer": ""},
]
MULTIPLE_CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choices.jsonl}, cache_dir: FOLDER/cache}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: "{{choices}}"
target_delimiter: ""
metric_list: [{metric: acc}]
"""
PERPLEXITY = """
task: local_perplexity
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/texts.jsonl}, cache_dir: FOLDER/cache}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""
GENERATION = """
task: local_generation
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/prompts.jsonl}, cache_dir: FOLDER/cache}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false, temperature: 0.0}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def tiny():
    config = ModelConfig(
        vocab_size=264,
        width=16,
        max_length=64,
        core_layers=1,
        attention=AttentionConfig(num_heads=2),
        mlp=dataclasses.replace(ModelConfig().mlp, hidden_width=16),
        recurrence=RecurrenceConfig(mean_steps=2, backprop_depth=2, state_init="zero"),
    )
    model = build_model(config, DTypePolicy(), Sharder(), "cpu")
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        mean = float(path[-1].key == "scale")
        return jnp.asarray(rng.normal(mean, 0.25, leaf.shape), leaf.dtype)

    return model, jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="module")
def lm(tiny):
    return MegaTransformerLM(*tiny, TOKENIZER, depth=DEPTH, batch_size=4, max_length=MAX_LENGTH)


@pytest.fixture(scope="module")
def log_probs(tiny):
    """From ids to log-probabilities [tokens, V]; no token sees the padding behind it."""
    model, params = tiny
    apply = jax.jit(lambda tokens: model.apply({"params": params}, tokens, num_steps=DEPTH).logits)

    def log_probs(ids):
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(ids)] = ids
        logits = np.asarray(apply(jnp.asarray(padded)), np.float64)[0, : len(ids)]
        return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

    return log_probs


@pytest.fixture(scope="module")
def results(lm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for name, records in (("choices", CHOICES), ("texts", TEXTS), ("prompts", PROMPTS)):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        pathlib.Path(folder, f"{name}.jsonl").write_text(lines)
    for name, text in (("a", MULTIPLE_CHOICE), ("b", PERPLEXITY), ("c", GENERATION)):
        pathlib.Path(folder, f"{name}.yaml").write_text(text.replace("FOLDER", str(folder)))
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    with pytest.MonkeyPatch.context() as patch:
        # A report on the machine, for which torch is imported.
        patch.setattr(lm_eval.evaluator, "add_env_info", lambda storage: None)
        return lm_eval.evaluator.simple_evaluate(
            lm,
            tasks=["local_choice", "local_perplexity", "local_generation"],
            task_manager=manager,
            bootstrap_iters=0,
            torch_random_seed=None,
        )


def answer(log_probs, context, continuation):
    """Log-likelihood of ids behind others, and whether greedy decoding gives them."""
    # All but the last are read; what is too much is cut off on the left.
    ids = [*context, *continuation][-(MAX_LENGTH + 1) :]
    rows = log_probs(ids)[-len(continuation) - 1 : -1]
    chosen = rows[np.arange(len(continuation)), continuation]
    return chosen.sum(), bool((rows.argmax(axis=-1) == continuation).all())


def test_multiple_choice(results, log_probs):
    samples = sorted(results["samples"]["local_choice"], key=lambda sample: sample["doc_id"])
    hits = []
    for record, sample in zip(CHOICES, samples, strict=True):
        question = record["question"].rstrip()
        # lm-eval counts blanks at the end of a context to what follows.
        blanks = record["question"][len(question) :]
        context = [1, *TOKENIZER.encode(question)]
        scores = [
            answer(log_probs, context, TOKENIZER.encode(blanks + choice))
            for choice in record["choices"]
        ]
        got = [response[0] for response in sample["filtered_resps"]]
        assert got == pytest.approx([score for score, _ in scores], abs=1e-4)
        assert [r[1] for r in sample["filtered_resps"]] == [greedy for _, greedy in scores]
        hits.append(int(np.argmax([score for score, _ in scores])) == record["answer"])
    assert results["results"]["local_choice"]["acc,none"] == pytest.approx(np.mean(hits))


def test_perplexity(results, log_probs):
    total = 0.0
    for record in TEXTS:
        ids = [1, *TOKENIZER.encode(record["text"])]
        done = 1
        while done < len(ids):
            # The first window takes all it can; later ones move on by as much, but the last one
            # reaches back for context.
            end = min(done + MAX_LENGTH, len(ids))
            begin = max(end - MAX_LENGTH - 1, 0)
            total += answer(log_probs, ids[begin:done], ids[done:end])[0]
            done = end
    assert len(TOKENIZER.encode(TEXTS[1]["text"])) > MAX_LENGTH
    num_bytes = sum(len(record["text"].encode()) for record in TEXTS)
    num_words = sum(len(record["text"].split()) for record in TEXTS)
    scores = results["results"]["local_perplexity"]
    assert scores["bits_per_byte,none"] == pytest.approx(-total / math.log(2) / num_bytes, rel=1e-5)
    assert scores["word_perplexity,none"] == pytest.approx(math.exp(-total / num_words), rel=1e-4)


def greedy(log_probs, context, count):
    ids = list(context)
    for _ in range(count):
        ids.append(int(log_probs(ids)[-1].argmax()))
    return ids[len(context) :]


def test_generation(results, log_probs):
    samples = sorted(results["samples"]["local_generation"], key=lambda sample: sample["doc_id"])
    hits = []
    for record, sample in zip(PROMPTS, samples, strict=True):
        context = [1, *TOKENIZER.encode(record["prompt"])][-(MAX_LENGTH - 6) :]
        ids = greedy(log_probs, context, 6)
        ids = ids[: ids.index(2)] if 2 in ids else ids
        text = TOKENIZER.decode(ids).split("\n")[0]
        assert sample["filtered_resps"] == [text]
        hits.append(text == record["answer"])
    assert results["results"]["local_generation"]["exact_match,none"] == np.mean(hits)


def request(kind, *arguments):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_the_likeliest_continuation_is_called_greedy(lm, log_probs):
    context = [1, *TOKENIZER.encode("Say")]
    likeliest = greedy(log_probs, context, 3)
    other = [*likeliest[:2], 3 + (likeliest[2] + 1) % 200]
    got = lm._loglikelihood_tokens(
        [(None, context, likeliest), (None, context, other)], disable_tqdm=True
    )
    assert [is_greedy for _, is_greedy in got] == [True, False]


def generate(lm, *pairs):
    """Continuations for pairs of context and generation arguments."""
    requests = [request("generate_until", *pair) for pair in pairs]
    return lm.generate_until(requests, disable_tqdm=True)


def test_order_and_stop_texts(lm):
    contexts = ["a", "much longer than a", "abc"]
    # An empty text ends nothing, as in lm-eval's other models.
    arguments = {"until": ["", "\n"], "max_gen_toks": 6}
    together = generate(lm, *((text, arguments) for text in contexts))
    assert len(set(together)) == 3
    for text, got in zip(contexts, together, strict=True):
        assert generate(lm, (text, arguments)) == [got]
    # A stop text cuts the same continuation short; requests of both kinds may be mixed.
    whole = together[1]
    stop = next(letter for letter in whole[1:] if letter.isascii())
    stopping = {"until": [stop], "max_gen_toks": 6}
    mixed = generate(lm, *[(contexts[1], stopping), (contexts[1], arguments)] * 2)
    assert mixed == [whole[: whole.index(stop)], whole] * 2


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"num_beams": 4}, "num_beams=4, which this model does not know"),
        ({"do_sample": True}, "no temperature above 0"),
        ({"max_gen_toks": 32}, "leaves no room for a context"),
        ({"top_k": -1, "do_sample": True, "temperature": 1.0}, "top_k"),
        ({"top_p": 0.9}, "top_p"),
    ],
)
def test_unknown_generation_arguments_are_errors(lm, arguments, problem):
    with pytest.raises(UserError, match=problem):
        generate(lm, ("a", arguments))


def test_samples_follow_the_temperature(lm):
    def draw(**arguments):
        return generate(lm, ("a", {"until": ["\n"], "max_gen_toks": 6, **arguments}))

    drawn = draw(do_sample=True, temperature=0.001, top_p=1.0)
    assert drawn == draw(do_sample=False)
    assert draw(temperature=30.0) != drawn


def test_contexts_begin_with_the_start_token(tiny, lm):
    assert lm.tok_encode("a") == [1, 100]
    assert lm.tok_encode("a", add_special_tokens=False) == [100]
    without = MegaTransformerLM(*tiny, TOKENIZER, depth=DEPTH, add_bos_token=False)
    assert without.tok_encode("a") == [100]
    assert without.max_length == 64
