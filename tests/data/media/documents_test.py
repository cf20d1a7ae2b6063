"""Documents of a folder: parts in their order, with their media; lines that cannot be used."""

import json
import pathlib
import re

import numpy as np
import pytest
import soundfile
from PIL import Image
from smallest_media_model import TOKENIZER, VALUES

from megatransformer_jax.config.build import build, construct
from megatransformer_jax.config.data import DataConfig, TokenizerConfig
from megatransformer_jax.config.media_data import DocumentsDataConfig, MediaDataConfig
from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.data.fingerprint import data_fingerprint
from megatransformer_jax.data.media.documents import Documents, document_files
from megatransformer_jax.data.media.encoding import check_media
from megatransformer_jax.data.media.records import Given, MediaFormats, Sample
from megatransformer_jax.data.pipeline import build_pipeline
from megatransformer_jax.data.sources.record import BadRecord, BadRecordError

FORMATS = MediaFormats.of_model(construct(ModelConfig, VALUES))
DOCUMENT = [
    "two: ",
    {"image": "a.png"},
    {"image": "below/b.png", "target": True},
    {"voice": "c.wav"},
    {"given": "and?"},
    "yes",
]


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "below").mkdir()
    for name, grey in (("a.png", 0), ("below/b.png", 255)):
        Image.new("L", (8, 8), grey).save(tmp_path / name)
    soundfile.write(tmp_path / "c.wav", np.zeros(200, np.float32), 8000)
    write(tmp_path, DOCUMENT, [{"image": "a.png"}, "black"], [{"audio": "c.wav"}, "silence"])
    return tmp_path


def write(folder: pathlib.Path, *lines: object) -> None:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "documents.jsonl").write_text(text)


def config(folder: pathlib.Path, **media: object) -> DataConfig:
    return DataConfig(
        source="media",
        batch_size=4,
        sequence_length=32,
        prefetch_batches=0,
        tokenizer=TokenizerConfig(kind="bytes"),
        media=MediaDataConfig(
            tasks=("documents=1",),
            documents=DocumentsDataConfig(folder=str(folder)),
            **{"images_per_row": 2} | media,  # type: ignore[arg-type]
        ),
    )


def test_parts_keep_their_order_and_say_what_is_learned(folder: pathlib.Path) -> None:
    source = Documents(DocumentsDataConfig(folder=str(folder)), FORMATS)
    assert len(source) == 3
    sample = source[0]
    assert isinstance(sample, Sample) and sample.name.endswith("documents.jsonl, line 1")
    first, black, white, clip, question, answer = sample.parts
    assert (first, question, answer) == ("two: ", Given("and?"), "yes")
    assert black.pixels.max() == -1 and white.pixels.min() == 1
    assert (black.is_target, white.is_target, clip.is_target) == (False, True, False)
    assert clip.is_voice and len(clip.waveform) == 200
    assert not source[2].parts[0].is_voice


def test_rows_have_a_documents_media_in_its_order(folder: pathlib.Path) -> None:
    with build_pipeline(config(folder), TOKENIZER, split="train", media=FORMATS) as batches:
        rows = [next(batches) for _ in range(3)]
    texts = {}
    for batch in rows:
        check_media(batch, TOKENIZER)
        for row, tokens in enumerate(batch.tokens):
            texts[TOKENIZER.decode_with_media(tokens)] = batch, row
    held_out = 1
    assert len(texts) == 3 - held_out
    whole = [text for text in texts if text.startswith("two")]
    for text in whole:
        batch, row = texts[text]
        media = "<|IMAGE|><|/IMAGE|><|IMAGE|><|/IMAGE|><|VOICE|><|/VOICE|>"
        assert text == f"two: {media}and?yes"
        assert batch.media.images[row, :, 0, 0, 0].tolist() == [-1, 1]
        assert batch.media.is_drawn[row].tolist() == [False, True]
        learned = batch.targets[row][batch.loss_mask[row] > 0].tolist()
        assert "and?" not in TOKENIZER.decode(learned) and "yes" in TOKENIZER.decode(learned)
    assert any("black" in text or "silence" in text for text in texts)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('["a"', "line 1: not valid JSON"),
        ({"image": "a.png"}, "is not a list of texts"),
        ([], "is not a list of texts"),
        ([{"picture": "a.png"}], "unknown key 'picture'; a part has one of 'given', 'image'"),
        ([{"image": "a.png", "voice": "c.wav"}], "is not of a list of texts"),
        ([{"given": "x", "target": True}], "is not of a list of texts"),
        ([{"image": 3}], "is not of a list of texts"),
        ([{"image": "a.png", "target": 1}], "'target' is 1; it must be true or false"),
        ([{"image": "../a.png"}], "'../a.png' is outside the folder"),
        ([""], "a text is empty"),
        (["\ud800"], "has a lone surrogate"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(
    folder: pathlib.Path, line: object, message: str
) -> None:
    write(folder, line, ["fine"])
    with pytest.raises(UserError, match=re.escape(message)) as error:
        Documents(DocumentsDataConfig(folder=str(folder)), FORMATS)
    assert "documents.jsonl, line 1: " in str(error.value)


def test_missing_files_and_media_that_do_not_fit_are_bad_records(folder: pathlib.Path) -> None:
    options = DocumentsDataConfig(folder=str(folder))
    with pytest.raises(ConfigError, match=r"'/nowhere' has no file documents\.jsonl"):
        Documents(DocumentsDataConfig(folder="/nowhere"), FORMATS)
    Image.new("L", (9, 8)).save(folder / "wide.png")
    soundfile.write(folder / "stereo.wav", np.zeros((200, 2), np.float32), 8000)
    names = ({"image": "none.png"}, {"image": "wide.png"}, {"voice": "a.png"})
    write(folder, *([name] for name in names), [{"voice": "stereo.wav"}])
    source = Documents(options, FORMATS)
    for index, problem in enumerate(
        (
            "no such file",
            r"is 8x9x1 .* set data\.media\.documents\.on_wrong_size='resize'",
            "cannot be read as sound",
            r"2 channels .* set data\.media\.documents\.on_wrong_audio='convert'",
        )
    ):
        found = source[index]
        assert isinstance(found, BadRecord) and re.search(problem, found.problem)
        assert f"line {index + 1}" in found.where
    fits = Documents(DocumentsDataConfig(folder=str(folder), on_wrong_size="resize"), FORMATS)
    assert isinstance(fits[1], Sample)
    write(folder, DOCUMENT, DOCUMENT)
    tight = config(folder, images_per_row=1)
    with (
        build_pipeline(tight, TOKENIZER, split="train", media=FORMATS) as batches,
        pytest.raises(BadRecordError, match=r"has 2 images, .* Raise data\.media\.images_per_row"),
    ):
        next(batches)


def test_the_fingerprint_follows_documents_and_their_files(folder: pathlib.Path) -> None:
    names = [pathlib.Path(path).name for path in document_files(str(folder))]
    assert names == ["documents.jsonl", "a.png", "b.png", "c.wav"]
    before = data_fingerprint(config(folder))
    assert before.startswith("documents: 4 files")
    Image.new("L", (8, 8), 7).save(folder / "a.png")
    assert data_fingerprint(config(folder)) != before


def test_options_of_images_next_to_documents_alone_say_that_those_have_their_own() -> None:
    documents = {"tasks": ("documents=1",), "documents": {"folder": "mine"}}
    media = {**documents, "images": {"augmentation": {"flip_rate": 0.5}}}
    with pytest.raises(ConfigError, match=r"no task uses images but 'documents', which has its"):
        build({"data": {"source": "media", "media": media}})
