"""Whole runs of other kinds than transformers, and what is loaded from them."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from megatransformer_jax.checkpoints.compatibility import CheckpointMismatch
from megatransformer_jax.config.build import build, merge
from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.runs.find_lr import find_learning_rate
from megatransformer_jax.runs.load import load_model
from megatransformer_jax.runs.tasks.load_medium import load_image_vae, load_vocoder
from megatransformer_jax.runs.train import train
from megatransformer_jax.training.loop import StopRequest
from megatransformer_jax.training.recorder import read_metrics

pytestmark = pytest.mark.slow

RUN = {
    "data": {"source": "media", "batch_size": 8, "tokenizer": {"kind": "bytes"}},
    "optimizer": {"warmup_steps": 1, "learning_rate": 1e-2},
    "train": {"steps": 4, "ema_decay": 0.9},
    "checkpoint": {"every_steps": 2},
    "evaluation": {"every_steps": 2, "num_batches": 1},
    "samples": {"every_steps": 4},
    "logging": {"every_steps": 2, "progress": "lines"},
}
MEL = {
    "sample_rate_hz": 4000,
    "num_mels": 8,
    "fft_samples": 64,
    "window_samples": 64,
    "hop_samples": 16,
}
VOCODER = {
    "kind": "vocoder",
    "vocoder": {
        "kind": "hifigan",
        "mel": MEL,
        "width": 8,
        "segment_frames": 8,
        "hifigan": {"upsample_rates": [4, 4], "kernel_sizes": [3], "dilations": [1]},
        "loss": {"fft_samples": [32]},
    },
    "data": {"media": {"tasks": ["speak=1"], "audio": {"source": "tones", "num_tones": 200}}},
}
IMAGE_VAE = {
    "kind": "image_vae",
    "image_vae": {
        "height": 8,
        "width": 8,
        "channels": 1,
        "model": {"base_width": 8, "width_multipliers": [1]},
    },
    "data": {"media": {"tasks": ["draw=1"]}},
    "train": {"steps": 2},
}


def run(kind, workdir, changes=None):
    return build(merge(merge(merge(RUN, kind), changes or {}), {"workdir": str(workdir)}))


def same(a, b) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def test_a_vocoder_trains_resumes_bit_for_bit_and_is_used_elsewhere(tmp_path, monkeypatch) -> None:
    whole = train(run(VOCODER, tmp_path / "whole"))
    with monkeypatch.context() as changed:
        changed.setattr(StopRequest, "is_due", lambda self, now: now == 3)
        assert not train(run(VOCODER, tmp_path / "halves")).is_finished
    with pytest.raises(CheckpointMismatch, match=r"vocoder\.segment_frames: saved 8, now 9"):
        train(run(VOCODER, tmp_path / "halves", {"vocoder": {"segment_frames": 9}}))
    result = train(run(VOCODER, tmp_path / "halves"))
    same(result.state, whole.state)
    texts = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "halves")]
    assert texts[0] == texts[1]

    rows = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert {"loss", "stft_loss", "mel_loss", "grad_norm"} <= rows[0].keys()
    names = {path.name for path in (tmp_path / "whole/samples/step_000004").iterdir()}
    assert {"spectrograms.png", "recorded_0.wav", "generated_0.wav"} <= names
    assert set(json.loads((tmp_path / "whole/summary.json").read_text())) == {
        "loss", "stft_loss", "mel_loss",
    }  # fmt: skip

    vocoder = load_vocoder(str(tmp_path / "whole"))
    mels = np.random.default_rng(0).uniform(-1, 0, (2, 9, 8)).astype(np.float32)
    waveforms = vocoder(mels, np.array([9, 5]))
    assert waveforms.shape == (2, 144)
    np.testing.assert_array_equal(waveforms[1, 80:], 0)
    average = whole.state.opt_state.average["generator"]
    same(vocoder.params, average)
    with pytest.raises(ValueError, match=r"reads .clips, frames, 8 bins"):
        vocoder(mels[..., :7], np.array([9, 5]))
    other = dataclasses.replace(vocoder.config.mel, hop_samples=8)
    with pytest.raises(UserError, match=r"differ in hop_samples \(16 and 8\)"):
        load_vocoder(str(tmp_path / "whole"), other)
    with pytest.raises(UserError, match="kind='vocoder', and this needs one with kind='trans"):
        load_model(str(tmp_path / "whole"))
    with pytest.raises(ConfigError, match="kind: 'vocoder': this command needs a transformer"):
        find_learning_rate(run(VOCODER, tmp_path / "none"), 1e-4, 1e-1, 20)


def test_an_image_autoencoder_trains_and_is_loaded(tmp_path) -> None:
    automatic = {"train": {"memory_budget_gib": "auto"}}
    result = train(run(IMAGE_VAE, tmp_path, automatic))
    saved = json.loads((tmp_path / "config.json").read_text())["train"]
    assert (saved["accumulation"], saved["memory_budget_gib"]) == (1, None)
    with pytest.raises(ConfigError, match=r"memory_budget_gib: 1e-06 GiB is not enough: state"):
        train(run(IMAGE_VAE, tmp_path / "less", {"train": {"memory_budget_gib": 1e-6}}))
    assert (tmp_path / "samples/step_000002/restored.png").is_file()
    config, params = load_image_vae(str(tmp_path))
    assert config.model.base_width == 8
    same(params, result.state.opt_state.average)
    with pytest.raises(UserError, match="kind='image_vae', and this needs one with kind='vocoder'"):
        load_vocoder(str(tmp_path))
    with pytest.raises(ConfigError, match=r"data\.batch_size: 4 rows per micro-batch are not"):
        train(run(IMAGE_VAE, tmp_path / "few", {"data": {"batch_size": 4}}))
    with pytest.raises(UserError, match="is not the workdir of a run"):
        load_image_vae(str(tmp_path / "nothing"))
