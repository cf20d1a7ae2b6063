"""The command with images and sound, from the words on the command line to the files.

The generator is a stand-in: tests/generation has the real one.
"""

import io
import json
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image
from smallest_media_model import TOKENIZER, VALUES

from megatransformer_jax.cli import generate
from megatransformer_jax.cli.commands import main as command
from megatransformer_jax.config.build import construct
from megatransformer_jax.config.generation import GenerationConfig
from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.data.media.records import AudioPart, ImagePart
from megatransformer_jax.data.tokenizer import BytesTokenizer
from megatransformer_jax.generation.media_prompt import MediaPrompt
from megatransformer_jax.generation.request import (
    Completion,
    GeneratedClip,
    GeneratedImage,
    StreamedToken,
)
from megatransformer_jax.models.megatransformer import build_model
from megatransformer_jax.runs.load import LoadedModel
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy

RATE_HZ, HOP = (VALUES["audio"]["mel"][name] for name in ("sample_rate_hz", "hop_samples"))


def loaded_model(values: dict[str, Any]) -> LoadedModel:
    """Without parameters."""
    config = construct(ModelConfig, values)
    model = build_model(config, DTypePolicy(), Sharder(), "cpu")
    tokenizer = TOKENIZER if config.has_media else BytesTokenizer()
    return LoadedModel(config, model, None, tokenizer, 2, "run runs/a, step 4")


class SmallMediaGenerator:
    """Makes what a prompt opens, then says 'yes'."""

    prompts: list[MediaPrompt]
    config: GenerationConfig

    def __init__(self, loaded: LoadedModel, config: GenerationConfig):
        self._mel = np.zeros((3, loaded.config.audio.mel.num_mels), np.float32)
        type(self).config = config

    def generate(self, prompts: Sequence[MediaPrompt]) -> list[Completion]:
        type(self).prompts = list(prompts)
        medium = {
            "<|IMAGE|>": GeneratedImage(np.zeros((8, 8, 1), np.float32)),
            "<|VOICE|>": GeneratedClip(self._mel, True),
        }
        completions = []
        for prompt in prompts:
            parts, ids = ("yes",), TOKENIZER.encode("yes")
            if prompt.opens is not None:
                parts = (medium[prompt.opens], *parts)
                ids = [TOKENIZER.marker_id(prompt.opens) + 1, *ids]
            depths = (2,) * len(ids)
            completion = Completion(prompt, parts, tuple(ids), depths, -1.0, "length")
            completions += [completion] * self.config.num_samples
        return completions

    def stream(self, prompt: MediaPrompt) -> Iterator[StreamedToken]:
        (completion,) = self.generate([prompt])
        for token in completion.token_ids:
            yield StreamedToken(TOKENIZER.decode([token]), token, 2)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """Runs the command with the stand-in; returns what it wrote."""
    monkeypatch.setattr(LoadedModel, "generator", lambda *own: SmallMediaGenerator(*own))

    def run(
        *words: str, values: Any = VALUES, loaded: LoadedModel | None = None
    ) -> tuple[str, str]:
        loaded = loaded_model(values) if loaded is None else loaded
        monkeypatch.setattr(generate, "load_chosen_model", lambda *_: loaded)
        command("generate", ["--model=runs/a", *words])
        shown = capfd.readouterr()
        return shown.out, shown.err

    return run


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    for name, shape in (("right.png", (8, 8)), ("large.png", (9, 20, 3))):
        Image.fromarray(rng.integers(0, 255, shape).astype(np.uint8)).save(folder / name)
    soundfile.write(folder / "right.wav", rng.uniform(-0.1, 0.1, 5 * HOP), RATE_HZ)
    soundfile.write(folder / "fast.wav", rng.uniform(-0.1, 0.1, (10 * HOP, 2)), 2 * RATE_HZ)
    (folder / "broken.png").write_text("no image")
    (folder / "empty.png").touch()
    (folder / "cut.png").write_bytes((folder / "large.png").read_bytes()[:-40])
    (folder / "p.txt").write_text("one\nsay<|VOICE|>\n")
    return folder


def fails(run: Any, capfd: pytest.CaptureFixture[str], *words: str, **options: Any) -> str:
    """The one line of an error."""
    with pytest.raises(SystemExit) as caught:
        run(*words, **options)
    assert caught.value.code == 2
    return capfd.readouterr().err.splitlines()[-1]


def test_drawn_images_are_written(run: Any, tmp_path: pathlib.Path) -> None:
    words = ["--prompt=one", "--draw", f"--output={tmp_path / 'drawn'}", "--guidance_scale=2"]
    out, err = run(*words)
    assert out == "one[000_0.png]yes\n"
    assert re.search(r"4 tokens in .* 1 images and clips", err) and "files are in " in err
    assert SmallMediaGenerator.config.media.guidance_scale == 2
    with Image.open(tmp_path / "drawn" / "000_0.png") as image:
        assert (image.size, image.mode) == ((8, 8), "L")
    assert (tmp_path / "drawn" / "contact_sheet.png").is_file()


def test_clips_and_texts_are_written(
    run: Any, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = ["--prompt=one", "--prompt=two", "--speak", "--num_samples=2", f"--output={tmp_path}"]
    out, err = run(*words)
    assert "--- prompt 2, text 1: length, score -1.00 ---\ntwo[002_0.wav]yes" in out
    assert re.search(r"16 tokens in .* 4 images and clips", err)
    assert re.search(r"max_new_tokens=\d+, as more do not fit in the model", caplog.text)
    assert "Griffin and Lim's method" in caplog.text
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [(record["prompt"], record["sample"]) for record in records] == [
        ("one", 0),
        ("one", 1),
        ("two", 0),
        ("two", 1),
    ]
    first, text = records[0]["parts"]
    samples, rate_hz = soundfile.read(tmp_path / first["audio"])
    assert rate_hz == RATE_HZ and len(samples) == 3 * HOP
    assert first["is_voice"] and first["seconds"] == 3 * HOP / RATE_HZ
    assert text == {"text": "yes"}
    assert not (tmp_path / "contact_sheet.png").exists()


def test_files_are_read_in_their_places(run: Any, files: pathlib.Path) -> None:
    given = (f"--image={files / 'large.png'}", f"--audio={files / 'fast.wav'}", "--convert")
    prompt = "a<|AUDIO|><|/AUDIO|>b<|IMAGE|><|/IMAGE|>"
    out, _ = run(f"--prompt={prompt}", *given)
    assert out == f"{prompt}yes\n"
    first, clip, second, image = SmallMediaGenerator.prompts[0].parts
    assert (first, second) == ("a", "b")
    assert isinstance(clip, AudioPart) and not clip.is_voice
    assert clip.sample_rate_hz == RATE_HZ and len(clip.waveform) == 5 * HOP
    assert isinstance(image, ImagePart) and image.pixels.shape == (8, 8, 1)


def test_answers_about_a_file_are_streamed(
    run: Any, files: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = f"--image={files / 'right.png'}"
    out, err = run(image, "--prompt=is", "--show_depth", "--depth=2")
    assert out.startswith("<|IMAGE|><|/IMAGE|>isy[2]e[2]s[2]\n") and ", the first after " in err
    # A session asks about the same file again and again.
    monkeypatch.setattr("sys.stdin", io.StringIO("what\nsure\n"))
    out, _ = run(image, "--interactive")
    assert out == "yes\nyes\n"
    picture, text = SmallMediaGenerator.prompts[0].parts
    assert isinstance(picture, ImagePart) and text == "whatyes\nsure"
    assert SmallMediaGenerator.config.media.max_media == 0


def test_files_without_places_come_first(run: Any, files: pathlib.Path, tmp_path: Any) -> None:
    words = [f"--image={files / 'right.png'}", "--prompt=is", f"--output={tmp_path}"]
    out, _ = run(*words)
    assert out == "<|IMAGE|><|/IMAGE|>isyes\n"
    # What was given stands on the sheet, with what was said of it.
    assert (tmp_path / "contact_sheet.png").is_file()
    assert run(f"--image={files / 'right.png'}")[0] == "<|IMAGE|><|/IMAGE|>yes\n"
    assert run("--prompt=a<|IMAGE|>", f"--output={tmp_path}")[0] == "a[000_0.png]yes\n"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--image={}/large.png"], r"--image=.*large.png: .*9x20x3.* 8x8x1\. .*give --convert"),
        (["--audio={}/fast.wav"], r"--audio=.*fast.wav: .* 2 channels and 16000 .*give --convert"),
        (["--image={}/broken.png"], r"broken.png: .* \(no known format\); name .* PNG or JPEG"),
        (["--image={}/empty.png"], r"empty.png: .* \(no known format\); name .* PNG or JPEG"),
        (["--image={}/cut.png"], r"cut.png: .* \(.*truncated.*\); name .* PNG or JPEG"),
        (["--image={}/absent.png"], r"absent.png: .* \(No such file or directory\); name "),
        (["--image={}"], r"--image=.*: .* \(Is a directory\); name a file"),
        (["--audio={}/absent.wav"], r"absent.wav: .* \(No such file .*\); name .* WAV or FLAC"),
        (["--audio={}/empty.png"], r"empty.png: .* \(.*[Ff]ormat.*\); name .* WAV or FLAC"),
        (["--prompt=a<|IMAGE|>"], r"--prompt: .*<|IMAGE|> needs a folder for the result; give "),
        (["--prompts_file={}/p.txt"], r"--prompts_file: .*<|VOICE|> needs a folder .*--output"),
        (
            ["--draw", "--output={}", f"--prompt={'a' * 70}"],
            r"takes 72 places with its media, but 59 fit .*max_length=64 .*by 13\.",
        ),
        (["--draw", "--output={}", "--prompt=a", "--max_media=16"], r"lower --max_media\."),
        (["--image={}/right.png", "--prompt=<|VOICE|><|/VOICE|>"], "prompt 1: has places for 0"),
        (["--prompt=a<|IMAGE|>b"], "after <|IMAGE|> stands 'b'"),
        (["--prompt_ids=1", "--max_media=2"], "--prompt_ids: is for text alone"),
        (["--prompt=a", "--draw", "--output={}/right.png"], "--output: .* cannot be written to"),
    ],
)
def test_what_does_not_fit_is_one_line(
    run: Any,
    capfd: pytest.CaptureFixture[str],
    files: pathlib.Path,
    words: list[str],
    problem: str,
) -> None:
    error = fails(run, capfd, *(word.replace("{}", str(files)) for word in words))
    assert re.search(problem.replace("|", r"\|"), error), error


def test_models_of_text_refuse_media(run: Any, capfd: pytest.CaptureFixture[str]) -> None:
    text = {"width": 8, "attention": {"num_heads": 2}}
    for words in (["--draw", "--output=a"], ["--guidance_scale=2"], ["--prompt=<|IMAGE|>"]):
        assert "reads and makes text alone" in fails(run, capfd, "--prompt=a", *words, values=text)


def test_a_kind_that_the_model_lacks_is_refused(
    run: Any, capfd: pytest.CaptureFixture[str], files: pathlib.Path
) -> None:
    deaf = {name: value for name, value in VALUES.items() if name != "audio"}
    error = fails(run, capfd, f"--audio={files / 'right.wav'}", values=deaf)
    assert error.startswith("error: --audio: the model takes none (model.audio.enabled=False)")
