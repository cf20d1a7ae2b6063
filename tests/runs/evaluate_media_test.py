"""experiments.evaluate on a run with images, and what is measured of one with sound."""

import json
import pathlib
import sys
import types

import jax
import numpy as np
import pytest
import written_run

from megatransformer_jax.cli.commands import main as command
from megatransformer_jax.config.build import build
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.config.scoring import MEDIA_OPTIONS, ScoringConfig
from megatransformer_jax.data.media.encoding import RowShape, encode_sample, make_batch
from megatransformer_jax.data.media.records import AudioPart, AudioRecord, MediaFormats, Sample
from megatransformer_jax.data.media_tokenizer import MediaTokenizer
from megatransformer_jax.data.mel import fill_hops
from megatransformer_jax.data.sources.record import BadRecord
from megatransformer_jax.data.tokenizer import BytesTokenizer
from megatransformer_jax.evaluation.media.features import moments
from megatransformer_jax.evaluation.media.judges import LabelledClips
from megatransformer_jax.generation.request import Completion, GeneratedClip, GeneratedImage
from megatransformer_jax.models.megatransformer import init_params
from megatransformer_jax.runs import evaluate_media
from megatransformer_jax.runs.evaluate_media import MediaMeasures

TOKENIZER = MediaTokenizer(BytesTokenizer())
SMALL_MODEL = {
    "vocab_size": 272,
    "width": 8,
    "max_length": 96,
    "prelude_layers": 1,
    "coda_layers": 0,
    "attention": {"num_heads": 2},
    "mlp": {"hidden_width": 8},
}
IMAGE = {
    "enabled": True,
    "height": 8,
    "width": 8,
    "channels": 1,
    "patch_size": 4,
    "prelude_layers": 0,
    "coda_layers": 0,
    "decoder": {
        "unet": {
            "base_width": 8,
            "width_multipliers": [1],
            "attention_levels": [],
            "head_width": 8,
            "norm_groups": 2,
        },
        "sampler": {"num_steps": 2},
    },
}
AUDIO = {
    "enabled": True,
    "max_frames": 8,
    "mel": {
        "sample_rate_hz": 8000,
        "num_mels": 8,
        "fft_samples": 128,
        "window_samples": 128,
        "hop_samples": 64,
    },
}


def media_run(small_run, workdir, model, tasks, **data):
    return build(
        small_run(
            workdir,
            {
                "model": SMALL_MODEL | model,
                "data": {
                    "source": "media",
                    "batch_size": 16,
                    "sequence_length": 32,
                    "media": {"tasks": tasks} | data,
                },
                "evaluation": {"final_depths": [2]},
            },
        )
    )


def loaded_with(generator, config):
    """What was loaded, with this class of generators and no weights."""
    return types.SimpleNamespace(
        tokenizer=TOKENIZER,
        model=None,
        params=None,
        config=config.model,
        description="a run",
        generator=generator,
    )


def random_params(model, key):
    """To compile the initialisation takes long."""
    shapes = jax.eval_shape(lambda key: init_params(model, key), key)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, small_run):
    folder = tmp_path_factory.mktemp("media") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(written_run, "init_params", random_params)
        written_run.write_run(
            media_run(small_run, folder, {"image": IMAGE}, ["draw=1", "caption=1"]), {4: 1.0}
        )
    return folder


def test_images_are_scored_and_drawn(workdir, capfd):
    words = ["--num_batches=1", "--media_per_class=1", "--guidance_scale=2", "--sampler_steps=3"]
    command("evaluate", [f"--model={workdir}", *words])
    out = " ".join(capfd.readouterr().out.split())
    folder = pathlib.Path(workdir) / "evaluation"
    content = json.loads((folder / "media_scores.json").read_text())
    (row,) = content["rows"]
    assert content["trained_depth"] == row["validation"]["depth"] == 2
    assert row["validation"]["tasks"].keys() == {"draw", "caption"}
    assert row["validation"]["image_terms"]["loss"] > 0
    assert row["transcripts"] is None and row["spoken"] is None
    found = row["drawn"]["recognition"]
    assert found["media"] == 10 and found["judge_accuracy"] > 0.95
    assert [of_class["media"] for of_class in found["by_class"]] == [1] * 10
    assert (folder / "drawn_digits.png").stat().st_size > 1000
    assert f"{row['validation']['loss']:.4f}" in out
    assert f"{row['drawn']['frechet_distance']:.2f}" in out
    assert "Drawn digits at depth 2" in out and "real held-out" in out


def test_options_that_would_be_ignored(workdir, capfd, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("Some text.")
    words = [f"--files={text}", "--media_per_class=2"]
    with pytest.raises(SystemExit):
        command("evaluate", [f"--model={workdir}", *words])
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("error: --media_per_class: 2 would be ignored, as no media are made")
    with pytest.raises(ConfigError, match=r"guidance_scale: 2\.0 would be ignored"):
        ScoringConfig(guidance_scale=2.0).reject_media("x", MEDIA_OPTIONS)
    # None are asked for, and none are made.
    ScoringConfig(media_per_class=0).reject_media("x", MEDIA_OPTIONS)


def clips_and_batch(config):
    """Ten clips, each a bright bin of its own, and a batch in which they are transcribed."""
    formats = MediaFormats.of_model(config.model)
    mels = np.full((10, 8, 8), -1, np.float32)
    mels[np.arange(10), :, np.arange(10) % 8] = 1
    mels[8:, 4:] = -1
    clips = LabelledClips(mels, np.full(10, 6), np.arange(10))
    rows = []
    for mel, word in zip(mels, evaluate_media.WORDS, strict=True):
        clip = AudioPart(np.zeros(64, np.float32), 8000, mel=mel[:6])
        rows.append(encode_sample(Sample((clip, word)), TOKENIZER, formats))
    shape = RowShape(32)
    return clips, make_batch(rows, [1] * 10, shape, formats, TOKENIZER.pad_id)


@pytest.fixture
def measures(small_run, tmp_path, monkeypatch):
    """Of a model that says 'one' of every clip and speaks every digit as it is, the ninth wrong."""
    config = media_run(small_run, tmp_path, {"audio": AUDIO}, ["speak=1", "transcribe=1"])
    clips, batch = clips_and_batch(config)
    calls = []

    class SmallGenerator:
        """Says 'one' of every clip, and speaks every digit as it is, but the ninth."""

        def __init__(self, config):
            self.config = config

        def generate(self, prompts):
            assert self.config.strategy == "greedy" and self.config.media.max_media == 0
            assert all(len(prompt.mels) == 1 for prompt in prompts)
            return [Completion(None, ("one",), (), (), 0.0, "end_of_text") for _ in prompts]

        def make(self, prompts):
            texts = [prompt.parts[0] for prompt in prompts]
            calls.append((self.config, texts))
            said = [evaluate_media.WORDS.index(text) for text in texts]
            said = [8 if digit == 9 else digit for digit in said]
            return [
                GeneratedClip(clips.mels[digit, : clips.lengths[digit]], True) for digit in said
            ]

    for name, value in (
        ("make_media_eval_step", lambda *unused: None),
        ("labelled_clips", lambda *unused, **also: clips),
        ("audio_source_name", lambda *unused: "spoken_digits"),
    ):
        monkeypatch.setattr(evaluate_media, name, value)
    monkeypatch.setattr(evaluate_media.jax, "jit", lambda function: function)
    loaded = loaded_with(SmallGenerator, config)
    options = ScoringConfig(media_per_class=1, guidance_scale=3.0)
    subject = MediaMeasures(options, loaded, config, [batch], jax.random.key(0))
    return subject.measures, calls, (loaded, config, batch)


def test_sound_is_transcribed_and_spoken(measures):
    by_name, calls, (loaded, config, batch) = measures
    assert by_name.keys() == {"validation", "transcripts", "spoken"}
    transcripts = by_name["transcripts"](2)
    assert (transcripts.transcripts, transcripts.word_error_rate) == (10, 0.9)
    assert transcripts.exact == 0.1
    spoken = by_name["spoken"](2)
    assert (spoken.media, spoken.share, spoken.judge_accuracy) == (10, 0.9, 1)
    ((generation, texts),) = calls
    assert texts == list(evaluate_media.WORDS)
    assert (generation.media.guidance_scale, generation.media.sampler_steps) == (3.0, None)
    assert generation.depth.depth == 2
    # Without anything to make, options of making are errors.
    options = ScoringConfig(media_per_class=0, sampler_steps=5)
    with pytest.raises(ConfigError, match="sampler_steps: 5 would be ignored, as a run makes no"):
        MediaMeasures(options, loaded, config, [batch], jax.random.key(0))


def test_other_images_than_digits_are_drawn_for_the_users_features(
    small_run, tmp_path, monkeypatch
):
    """From held-out captions in turn, ten times media_per_class."""
    image = IMAGE | {"channels": 3}
    config = media_run(
        small_run,
        tmp_path,
        {"image": image},
        ["draw=1"],
        images={"source": "photographs", "num_crops": 40},
    )
    asked = []

    class Blank:
        def __init__(self, config):
            pass

        def make(self, prompts):
            asked.extend(prompt.parts[0] for prompt in prompts)
            return [GeneratedImage(np.zeros((8, 8, 3), np.float32)) for _ in prompts]

    module = types.ModuleType("user_module")
    module.features = lambda images: images.mean(axis=(1, 2))
    monkeypatch.setitem(sys.modules, "user_module", module)
    monkeypatch.setattr(evaluate_media, "make_media_eval_step", lambda *unused: None)
    monkeypatch.setattr(evaluate_media.jax, "jit", lambda function: function)
    loaded = loaded_with(Blank, config)
    batch = types.SimpleNamespace(tokens=np.zeros((4, 64), np.int32))
    arguments = (loaded, config, [batch], jax.random.key(0))
    options = ScoringConfig(media_per_class=1, image_features="user_module:features")
    subject = MediaMeasures(options, *arguments)
    scores = subject.measures["drawn"](2)
    held_out = evaluate_media.labelled_images(config.data, config.model.image, "validation")
    wanted = moments(held_out.images.mean(axis=(1, 2)))
    assert scores.recognition is None
    assert scores.frechet_distance == pytest.approx(
        np.square(wanted.mean).sum() + np.trace(wanted.covariance), rel=1e-4
    )
    captions = [prompts[0] for prompts in held_out.prompts.values()]
    assert asked == (captions * 10)[:10]
    # Without features nobody could judge them.
    with pytest.raises(ConfigError, match="media_per_class: 1 would be ignored, as a run makes no"):
        MediaMeasures(ScoringConfig(media_per_class=1), *arguments)


class Clips:
    """Held-out clips; one cannot be read."""

    def __init__(self, *unused):
        times = np.arange(8000) / 8000
        wave = np.sin(2 * np.pi * 300 * times) * np.clip(np.sin(2 * np.pi * 3 * times), 0, None)
        self.waves = [wave.astype(np.float32), wave[:1000].astype(np.float32)]

    def __len__(self):
        return 3

    def __getitem__(self, index):
        if index == 1:
            return BadRecord("clip 1", "broken")
        wave = self.waves[index // 2]
        return AudioRecord(wave, 8000, "one", True, f"clip {index}")


def test_clips_are_made_again(measures, monkeypatch):
    _, _, (loaded, config, _) = measures
    monkeypatch.setattr(evaluate_media, "build_audio_source", Clips)
    wanted = ScoringConfig(resynthesized_clips=10)
    scores = evaluate_media.score_resynthesis(wanted, loaded, config)
    assert (scores.method, scores.clips, scores.stoi.clips) == ("Griffin-Lim", 2, 1)
    assert scores.pesq.clips == 1 and 1 < scores.pesq.mean < 4.6
    made = []

    def load_vocoder(folder, mel):
        assert (folder, mel) == ("runs/vocoder", config.model.audio.mel)

        def vocoder(mels, lengths):
            made.append((mels.shape, int(lengths[0])))
            return np.stack([fill_hops(Clips().waves[len(made) - 1], mel)])

        return vocoder

    monkeypatch.setattr(evaluate_media, "load_vocoder", load_vocoder)
    options = ScoringConfig(vocoder="runs/vocoder")
    scores = evaluate_media.score_resynthesis(options, loaded, config)
    assert made == [((1, 125, 8), 125), ((1, 16, 8), 16)]
    assert scores.si_sdr_db.mean > 100 and scores.method == "the vocoder runs/vocoder"
    # None at all.
    none = ScoringConfig(resynthesized_clips=0)
    assert evaluate_media.score_resynthesis(none, loaded, config) is None
    options = ScoringConfig(resynthesized_clips=0, vocoder="b")
    with pytest.raises(ConfigError, match="vocoder: 'b' would be ignored, as no clips are made"):
        evaluate_media.score_resynthesis(options, loaded, config)


def test_rows_and_media_fit_the_model(workdir, capfd):
    with pytest.raises(SystemExit):
        command("evaluate", [f"--model={workdir}", "--sequence_length=93"])
    error = capfd.readouterr().err.splitlines()[-1]
    assert "93 exceeds the model's max_length=96 less the 4 places" in error and "92" in error


def test_images_have_no_sound(workdir, capfd):
    with pytest.raises(SystemExit):
        command("evaluate", [f"--model={workdir}", "--num_batches=1", "--vocoder=a"])
    assert "error: --vocoder: 'a' would be ignored, as run" in capfd.readouterr().err
