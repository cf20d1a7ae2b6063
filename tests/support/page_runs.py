"""What the pages of documentation take for granted: runs, texts and pictures, at their smallest."""

import json
import pathlib
import re
import wave
from typing import Any

import jax
import numpy as np
from huginn_values import HUGINN_RUN
from PIL import Image
from smallest_media_model import VALUES
from written_run import write_run

from megatransformer_jax.checkpoints.manager import CheckpointManager
from megatransformer_jax.config.build import build, merge
from megatransformer_jax.runs.tasks.start import run_info
from megatransformer_jax.runs.tasks.vocoder import make_vocoder

# Before a command's own words, so that those count: the sizes.
_TEXT = {
    "data.batch_size": 8,
    "data.sequence_length": 16,
    "data.tokenizer.max_training_bytes": 20_000,
    "model.width": 16,
    "model.vocab_size": 400,
    "model.attention.num_heads": 2,
    "model.attention.num_kv_heads": 1,
    "model.mlp.hidden_width": 16,
    "model.recurrence.mean_steps": 2,
    "model.recurrence.backprop_depth": 1,
}
_REASONING = {
    "data.batch_size": 8,
    "data.reasoning.num_eval": 8,
    "model.width": 16,
    "model.mlp.hidden_width": 16,
    "model.recurrence.mean_steps": 2,
    "model.recurrence.backprop_depth": 1,
}
# After them: how long everything takes.
_SHORT = {
    "train.steps": 2,
    "optimizer.warmup_steps": 0,
    "checkpoint.every_steps": 1,
    "evaluation.every_steps": 2,
    "evaluation.final_depths": "1,2",
    "evaluation.num_batches": 1,
    "samples.every_steps": 0,
    "logging.progress": "lines",
}
_LAST = {
    "generate": ["--max_new_tokens=4"],
    "evaluate": ["--num_batches=1"],
    "evaluate --model=runs/image": ["--media_per_class=1"],
    "diagnose": ["--num_steps=2"],
    "quantize": ["--num_batches=1"],
    "export-program": ["--capacity=64", "--chunk=16", "--check=False"],
}


def smallest(words: list[str]) -> list[str]:
    """A command's words, changed so that it does the same in the shortest time."""
    name, *own = words
    # JAX has been imported, and has eight devices.
    own = [word for word in own if not word.startswith("--config.environment=")]
    if name == "train":
        is_of_text = not any("vocoder" in word or "image_vae" in word for word in own)
        short = _SHORT if is_of_text else {k: v for k, v in _SHORT.items() if "evaluation" not in k}
        return [name, *_flags(_sizes(own)), *own, *_flags(short)]
    if name == "prepare":
        sizes = dict(_sizes(own))
        if any("tokenizer.model_file" in word for word in own):
            sizes.pop("data.tokenizer.max_training_bytes")
        return [name, *_flags(sizes), *own]
    line = " ".join(words)
    if "--references" in line:
        return words
    return [
        name,
        *own,
        *(word for start, last in _LAST.items() if line.startswith(start) for word in last),
    ]


def _sizes(own: list[str]) -> dict[str, Any]:
    """Of a training command's model; those of files, and those with media, keep theirs."""
    experiments = [word[9:] for word in own if word.startswith("--config=")]
    if any("reasoning" in name or "puzzles" in name for name in experiments):
        return _REASONING
    if any("recurrent" not in name or "." in name for name in experiments):
        return {}
    is_plain = "--config.preset=modern_small" in own
    return {k: v for k, v in _TEXT.items() if not (is_plain and k.startswith("model.recurrence"))}


def _flags(values: dict[str, Any]) -> list[str]:
    return [f"--config.{name}={value}" for name, value in values.items()]


def prepare(folder: pathlib.Path, pages: list[pathlib.Path], small_run: Any) -> None:
    """Puts everything that the pages name into a folder; their own texts are texts to learn."""
    (folder / "my" / "texts").mkdir(parents=True)
    (folder / "corpus").mkdir()
    texts = [page.read_text(encoding="utf-8")[:4000] for page in pages[:8]]
    for number, text in enumerate(texts):
        (folder / "my" / "texts" / f"{number}.txt").write_text(text, encoding="utf-8")
    lines = [json.dumps({"text": text}) for text in texts]
    for name in ("my/texts.jsonl", "corpus/a.jsonl"):
        (folder / name).write_text("\n".join(lines), encoding="utf-8")
    reference = json.dumps({"prompt": "The ", "reference": "if statement"})
    references = "\n".join([reference] * len(lines))
    (folder / "my" / "references.jsonl").write_text(references, encoding="utf-8")
    (folder / "my" / "tasks").mkdir()
    (folder / "my" / "tasks" / "texts.jsonl").write_text(lines[0], encoding="utf-8")
    [page] = [page for page in pages if page.name == "evaluation.md"]
    [task] = re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    task = task.replace("dataset_kwargs: {", f"dataset_kwargs: {{cache_dir: {folder}/cache, ")
    (folder / "my" / "tasks" / "my_task.yaml").write_text(task, encoding="utf-8")
    (folder / "words.tsv").write_text("big\tlarge,huge\n", encoding="utf-8")
    (folder / "my_images").mkdir()
    for number in range(8):
        _picture(folder / "my_images" / f"{number}.png", number)
        (folder / "my_images" / f"{number}.txt").write_text("three", encoding="utf-8")
    for number, name in enumerate(("my/three", "a", "b", "c"), start=3):
        _picture(folder / f"{name}.png", number)
    with wave.open(str(folder / "my" / "seven.wav"), "wb") as file:
        file.setparams((1, 2, VALUES["audio"]["mel"]["sample_rate_hz"], 0, "NONE", ""))
        file.writeframes(np.zeros(256, np.int16).tobytes())
    _write_runs(folder / "runs", small_run)
    write_run(build(merge(small_run(folder / "my" / "huginn_run"), HUGINN_RUN)), {2: 1.0})


def _picture(path: pathlib.Path, number: int) -> None:
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8), np.uint8)
    Image.fromarray(pixels).save(path)


def _write_runs(folder: pathlib.Path, small_run: Any) -> None:
    """Runs that pages read and do not make: one of text, one with media, one of many steps."""
    folder.mkdir()
    keep = {"checkpoint": {"keep_last": 9}, "model": {"recurrence": {"max_steps": 64}}}
    many = {100 * step: 1 / step for step in range(1, 6)}
    accuracies = {step: 1 - loss for step, loss in many.items()}
    write_run(build(small_run(folder / "mine", keep)), many, accuracies)
    tasks = {"image": ["draw=1", "caption=1"], "audio": ["speak=1", "transcribe=1"]}
    _write_vocoder(folder / "vocoder")
    for name, kinds in {"image": ("image",), "multimodal": ("image", "audio")}.items():
        media = {
            "model": {
                key: value for key, value in VALUES.items() if key not in {*tasks} - {*kinds}
            },
            "data": {
                "source": "media",
                "sequence_length": 24,
                "validation_fraction": 0.2,
                "media": {"tasks": [task for kind in kinds for task in tasks[kind]]},
            },
        }
        write_run(build(small_run(folder / name, media)), {2: 1.0})


def _write_vocoder(folder: pathlib.Path) -> None:
    """A vocoder for the sound of the runs above, its parameters drawn at random."""
    options = {"kind": "hifigan", "width": 8, "mel": VALUES["audio"]["mel"]}
    hifigan = {"upsample_rates": [8, 8], "kernel_sizes": [3], "dilations": [1]}
    config = build({"kind": "vocoder", "vocoder": options | {"hifigan": hifigan}})
    shapes = jax.eval_shape(make_vocoder(config).init, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(leaf.dtype), shapes)
    checkpoints = CheckpointManager(folder / "checkpoints", config.checkpoint)
    checkpoints.save(1, {"params": params}, {}, run_info(config, "no text"), {})
    checkpoints.close()
