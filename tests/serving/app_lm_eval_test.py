"""lm-eval's `local-completions`, which only knows HTTP, gives the scores of our adapter."""

import json
import pathlib

import pytest
from chat_tokenizer import chat_tokenizer

import megatransformer_jax as mt
from megatransformer_jax.evaluation.lm_eval import MegaTransformerLM

DEPTH = 3
QUESTIONS = [
    {"question": "Is it day?", "choices": [" yes", " no", " perhaps"], "answer": 0},
    {"question": "A question about night", "choices": [" dark", " bright"], "answer": 1},
    {"question": "Say", "choices": [" a", " bc", " d"], "answer": 1},
]
TASK = """
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choices.jsonl}, cache_dir: FOLDER/cache}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: "{{choices}}"
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


def test_scores_over_http_are_those_of_the_adapter(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tenacity", reason="lm-eval's models over HTTP need it")
    evaluator = pytest.importorskip("lm_eval.evaluator")
    api = pytest.importorskip("lm_eval.models.openai_completions")
    tasks = pytest.importorskip("lm_eval.tasks")
    lm = mt.create(
        "tiny",
        tokenizer=chat_tokenizer(tmp_path / "tokenizer"),
        width=16,
        core_layers=1,
        max_length=64,
        attention={"num_heads": 2},
        mlp={"hidden_width": 16},
        recurrence={"mean_steps": DEPTH, "state_init": "zero"},
    )
    named = tmp_path / "tokenizer" / "tokenizer_config.json"
    values = {**json.loads(named.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}
    named.write_text(json.dumps(values))
    (tmp_path / "choices.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    (tmp_path / "task.yaml").write_text(TASK.replace("FOLDER", str(tmp_path)))
    manager = tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")

    def scores(model: object) -> dict:
        results = evaluator.simple_evaluate(
            model=model, tasks=["local_choice"], task_manager=manager, bootstrap_iters=0
        )
        assert results is not None
        return results

    wanted = scores(
        MegaTransformerLM(lm.module, lm.params, lm.tokenizer, depth=DEPTH, add_bos_token=False)
    )
    with mt.serve(
        lm, api_key="secret", rows=4, capacity=64, name="tiny", criteria=("fixed",), max_depth=4
    ) as server:
        over_http = api.LocalCompletionsAPI(
            model="tiny",
            base_url=f"{server.url}/v1/completions",
            tokenizer=str(tmp_path / "tokenizer"),
            tokenizer_backend="huggingface",
            max_length=64,
            num_concurrent=4,
        )
        got = scores(over_http)
    assert got["results"]["local_choice"] == pytest.approx(wanted["results"]["local_choice"])
    for one, other in zip(
        *(each["samples"]["local_choice"] for each in (got, wanted)), strict=True
    ):
        for (log_prob, is_greedy), (expected, expected_greedy) in zip(
            one["filtered_resps"], other["filtered_resps"], strict=True
        ):
            assert float(log_prob) == pytest.approx(float(expected), abs=1e-3)
            assert is_greedy == expected_greedy
