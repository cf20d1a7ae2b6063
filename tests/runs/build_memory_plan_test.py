"""A run with a memory budget and buckets is the run with the micro-batches that were chosen."""

import jax
import numpy as np
import pytest

from megatransformer_jax.config.build import build, load_config, merge
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.data.media.records import MediaFormats
from megatransformer_jax.data.media_tokenizer import MediaTokenizer
from megatransformer_jax.data.pipeline import build_pipeline
from megatransformer_jax.data.tokenizer import BytesTokenizer
from megatransformer_jax.runs import build as memory_plan
from megatransformer_jax.runs.build import abstract_batches
from megatransformer_jax.runs.tasks import transformer
from megatransformer_jax.runs.train import train
from megatransformer_jax.sharding.mesh import make_mesh
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.training.distributed import make_global_batch
from megatransformer_jax.training.loop import StopRequest

CHANGES = {
    "model": {"prelude_layers": 0, "coda_layers": 0, "recurrence": {"backprop_depth": 1}},
    "data": {"batch_size": 16, "packing": "bucket", "bucket_lengths": [16]},
    "train": {"steps": 5},
    "checkpoint": {"every_steps": 100, "keep_best": 0},
    "evaluation": {"every_steps": 100, "final_depths": [1]},
}
BUDGET = {"train": {"memory_budget_gib": 1.0}}


def test_shapes_stand_for_the_batches_of_a_run_with_media():
    data = {"source": "media", "tokenizer": {"kind": "bytes"}, "sequence_length": 64}
    data |= {"batch_size": 8, "media": {"tasks": ["fewshot=1", "speak=1"], "images_per_row": 2}}
    data["media"]["audio"] = {"source": "tones", "num_tones": 20}
    config = build({"preset": "multimodal_tiny", "data": data})
    sharder = Sharder(make_mesh(config.mesh, jax.devices()))
    (abstract,) = abstract_batches(config, sharder)
    tokenizer = MediaTokenizer(BytesTokenizer())
    formats = MediaFormats.of_model(config.model)
    with build_pipeline(config.data, tokenizer, split="train", media=formats) as batches:
        real = make_global_batch(next(batches), sharder)

    def compare(shape, array):
        assert (shape.shape, shape.dtype) == (array.shape, array.dtype)
        assert shape.sharding.is_equivalent_to(array.sharding, array.ndim)

    jax.tree.map(compare, abstract, real)


@pytest.mark.slow
def test_the_choice_is_kept_and_resumes_bit_for_bit(tmp_path, small_run, monkeypatch, caplog):
    monkeypatch.setattr(transformer.TransformerTask, "summarize", lambda *unused: None)

    def values(name, changes):
        return build(small_run(tmp_path / name, merge(CHANGES, changes)))

    whole = train(values("whole", {"train": {"accumulation": 2}}))

    # As if two micro-batches were the least that fits ...
    with monkeypatch.context() as changed:
        changed.setattr(memory_plan, "possible_accumulations", lambda rows, ways: [2])
        changed.setattr(StopRequest, "is_due", lambda self, now: now == 3)
        assert not train(values("budget", BUDGET)).is_finished
    saved = load_config(tmp_path / "budget" / "config.json").train
    assert (saved.accumulation, saved.memory_budget_gib) == (2, None)
    with pytest.raises(ConfigError, match="1e-06 GiB is not enough: state and batch alone"):
        train(values("budget", {"train": {"memory_budget_gib": 1e-6}}))
    # ... which the run keeps where a new one would take the whole batch.
    with caplog.at_level("INFO", logger="absl"):
        result = train(values("budget", BUDGET))
    assert result.is_finished
    assert "accumulation=2 is that of the run" in caplog.text

    metrics = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "budget")]
    assert metrics[0] == metrics[1]

    def compare(path, a, b):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(compare, result.state, whole.state)
