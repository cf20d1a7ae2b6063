"""The folder: what is in it, what is refused, and its loop in processes without this package."""

import json
import subprocess
import sys

import pytest
from exported_tiny import CRITERIA, OPTIONS, loaded, written

from megatransformer_jax.config.exporting import ProgramConfig
from megatransformer_jax.config.generation import GenerationConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.export.folder import export_program

# Runs generate.py and says which modules are there afterwards.
RUN = """
import runpy, sys
sys.argv = ["generate.py", *sys.argv[2:]]
sys.modules["megatransformer_jax"] = None
runpy.run_path(sys.argv[0], run_name="__main__")
print("modules:", *[name for name in ("jax", "onnxruntime", "onnx") if name in sys.modules])
"""


@pytest.mark.parametrize("format", CRITERIA)
def test_a_fresh_process_without_the_package_continues_a_prompt(format):
    words = ["--prompt=ab", "--prompt=xyz", "--depth=5", "--max_new_tokens=6"]
    result = subprocess.run(
        [sys.executable, "-c", RUN, "-", *words, "--criterion=latent_diff", "--threshold=0.3"],
        cwd=written(format),
        capture_output=True,
        text=True,
        check=True,
    )
    config = GenerationConfig.of(
        strategy="greedy",
        depth=5,
        max_new_tokens=6,
        exit_criterion="latent_diff",
        exit_threshold=0.3,
    )
    lm, prompts = loaded(), ["ab", "xyz"]
    found = lm.generator(config).generate(prompts)
    wanted = [
        lm.tokenizer.decode([*lm.tokenizer.encode(prompt), *each.token_ids])
        for prompt, each in zip(prompts, found, strict=True)
    ]
    shown = result.stdout.rsplit("\n[", 1)[0]
    assert shown == "\n".join(wanted)
    modules = "jax" if format == "stablehlo" else "onnxruntime"
    assert result.stdout.endswith(f"modules: {modules}\n")


def test_program_json_says_what_a_loop_must_know():
    about = json.loads((written("onnx") / "program.json").read_text())
    assert about["format"] == "onnx" and about["versions"]["opset"] == 23
    assert about["batch"] == 2 and about["capacity"] == 64 and about["cache_slots"] == 8
    assert about["criteria"] == {"latent_diff": 0.03, "kl": 5e-4}
    assert about["criteria_that_read_logits"] == ["kl"]
    assert about["tokenizer"] == {"kind": "bytes", "end_ids": [2], "start_id": 1}
    assert [len(rows) for rows in about["keys"].values()] == [2, 2]
    assert {entry["fill"] for entry in about["cache"]} == {0, -1}
    shapes = {entry["name"]: entry["shape"] for entry in about["programs"]["prefill"]["inputs"]}
    assert shapes["tokens"] == [2, OPTIONS["chunk"]] and shapes["depth"] == []
    about = json.loads((written("stablehlo") / "program.json").read_text())
    assert about["platforms"] == ["cpu", "tpu", "cuda"]
    assert set(about["versions"]) == {"jax", "calling_convention", "stablehlo"}


def test_weights_stand_once_in_their_file():
    size = (written("onnx") / "weights.bin").stat().st_size
    params = sum(leaf.nbytes for leaf in _leaves(loaded().params))
    assert params <= size < params + 4096 * 60
    for name in ("prefill", "step"):
        assert (written("onnx") / f"{name}.onnx").stat().st_size < 400_000


def _leaves(tree):
    for value in tree.values():
        yield from _leaves(value) if isinstance(value, dict) else [value]


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(ConfigError, match=r"output: .* is not an empty folder; name another"):
        export_program(loaded(), tmp_path, ProgramConfig())
