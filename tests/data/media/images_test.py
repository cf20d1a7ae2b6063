"""Sources of images: digits, photographs, folders; sizes that do not fit."""

import json
import pathlib
import pickle
import re

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from megatransformer_jax.config.data import DataConfig, TokenizerConfig
from megatransformer_jax.config.image import ImageConfig
from megatransformer_jax.config.media_data import ImageDataConfig, MediaDataConfig
from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.data.fingerprint import data_fingerprint
from megatransformer_jax.data.media.build import build_image_source
from megatransformer_jax.data.media.folders import IMAGE_FOLDER, folder_files
from megatransformer_jax.data.media.images import (
    WORDS,
    Digits,
    ImageFitter,
    ImageFolder,
    Photographs,
)
from megatransformer_jax.data.media.records import ImageRecord
from megatransformer_jax.data.sources.record import BadRecord

GREY = ImageConfig(enabled=True, height=8, width=8, channels=1, patch_size=2)
COLOUR = ImageConfig(enabled=True, height=16, width=24, channels=3, patch_size=4)


def record(source: object, index: int) -> ImageRecord:
    found = source[index]  # type: ignore[index]
    assert isinstance(found, ImageRecord)
    return found


def test_digits_are_scikit_learns_with_their_names() -> None:
    digits, original = Digits(GREY, "varied", "error"), load_digits()
    assert len(digits) == 1797
    for index in (0, 8, 1796):
        found, label = record(digits, index), original.target[index]
        np.testing.assert_allclose((found.pixels[..., 0] + 1) * 8, original.images[index])
        assert found.pixels.dtype == np.float32 and found.captions == (WORDS[label],)
        assert f"a handwritten {WORDS[label]}" in found.prompts and str(label) in found.prompts
    assert "draw an eight" in record(digits, 8).prompts
    assert record(Digits(GREY, "simple", "error"), 8).prompts == ("eight",)


def test_digits_of_another_size_are_an_error_or_resized() -> None:
    with pytest.raises(ConfigError, match=r"model\.image: the image is 8x8x1 .* is 16x24x3"):
        Digits(COLOUR, "simple", "error")
    large = record(Digits(COLOUR, "simple", "resize"), 0).pixels
    assert large.shape == (16, 24, 3) and large.dtype == np.float32
    assert large.min() >= -1 and large.max() > 0.5 and (large[..., 0] == large[..., 2]).all()


def test_the_split_follows_from_the_seed() -> None:
    def images(seed: int, split: str) -> set[bytes]:
        config = DataConfig(
            source="media",
            tokenizer=TokenizerConfig(kind="bytes"),
            seed=seed,
            validation_fraction=0.2,
        )
        source = build_image_source(config, GREY, split)
        return {record(source, n).pixels.tobytes() for n in range(len(source))}

    train, held_out = images(0, "train"), images(0, "validation")
    assert len(held_out) == 359 and len(train) == 1797 - 359 and not train & held_out
    assert images(1, "validation") != held_out


def test_crops_of_photographs_say_which_and_where() -> None:
    crops = Photographs(COLOUR, 40, seed=3)
    found = [record(crops, index) for index in range(len(crops))]
    assert all(each.pixels.shape == (16, 24, 3) and np.ptp(each.pixels) > 0.1 for each in found)
    pattern = r"the ((upper|middle|lower) )?(left|middle|right) of a photograph of a .*"
    captions = {each.captions[0] for each in found}
    assert all(re.fullmatch(pattern, caption) for caption in captions) and len(captions) > 8
    assert {caption.rsplit(" of ", 1)[1] for caption in captions} == {
        "a Chinese palace",
        "a flower",
    }
    np.testing.assert_array_equal(record(Photographs(COLOUR, 9, 3), 5).pixels, found[5].pixels)
    assert record(Photographs(GREY, 9, 3), 5).pixels.shape == (8, 8, 1)
    with pytest.raises(ConfigError, match=r"model\.image\.channels: 2 suits no photograph"):
        Photographs(ImageConfig(channels=2), 9, 3)


@pytest.mark.parametrize(
    ("image", "size"),
    [
        (Image.new("L", (9, 8)), "8x9x1"),
        (Image.new("RGB", (8, 8)), "8x8x3"),
        (Image.new("RGBA", (8, 8)), "8x8x4"),
        (Image.new("P", (8, 8)), "8x8x3"),
    ],
)
def test_wrong_sizes_and_channels_are_errors_or_counted(image: Image.Image, size: str) -> None:
    problem = ImageFitter(GREY, "error").fit(image, "a.png")
    assert isinstance(problem, BadRecord)
    assert f"the image is {size} (height x width x channels)" in str(problem)
    assert "on_wrong_size='resize'" in problem.problem
    fitter = ImageFitter(GREY, "resize")
    fitted = fitter.fit(image, "a.png")
    assert isinstance(fitted, np.ndarray) and fitted.shape == GREY.shape
    assert fitter.note.count == 1


def test_resizing_keeps_the_middle_and_makes_transparent_places_white() -> None:
    wide = np.zeros((10, 30, 4), np.uint8)
    wide[:, 10:20] = 255
    wide[:5, 10:20, 3] = 0
    wide[:5, 10:20, :3] = 7
    fitted = ImageFitter(GREY, "resize").fit(Image.fromarray(wide), "a.png")
    np.testing.assert_array_equal(fitted, np.ones((8, 8, 1), np.float32))


def test_pixels_are_kept_as_they_are_and_16_bits_become_8() -> None:
    values = np.arange(64, dtype=np.uint8).reshape(8, 8)
    fitter = ImageFitter(GREY, "error")
    fitted = fitter.fit(Image.fromarray(values), "a.png")
    np.testing.assert_allclose((fitted[..., 0] + 1) * 127.5, values, atol=1e-4)  # type: ignore[index]
    deep = fitter.fit(Image.fromarray(values.astype(np.uint16) * 257), "a.png")
    np.testing.assert_array_equal(deep, fitted)
    assert fitter.note.count == 0


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    for name in ("b", "a"):
        (tmp_path / "deep").mkdir(exist_ok=True)
        Image.new("L", (8, 8), ord(name)).save(tmp_path / "deep" / f"{name}.png")
        (tmp_path / "deep" / f"{name}.txt").write_text(f" the letter {name}\n")
    return tmp_path


def folder_source(folder: pathlib.Path) -> ImageFolder:
    return pickle.loads(pickle.dumps(ImageFolder(str(folder), ImageFitter(GREY, "error"))))


def test_a_folder_is_read_with_texts_beside_images_or_an_index(folder: pathlib.Path) -> None:
    source = folder_source(folder)
    assert [record(source, n).captions for n in (0, 1)] == [("the letter a",), ("the letter b",)]
    np.testing.assert_allclose(record(source, 0).pixels, ord("a") / 127.5 - 1, atol=1e-6)
    index = {"image": "deep/b.png", "caption": "second"}
    (folder / "captions.jsonl").write_text(f"\ufeff{json.dumps(index)}\n\n")
    (only,) = [record(folder_source(folder), 0)]
    assert only.captions == only.prompts == ("second",)
    assert only.where.endswith("b.png (" + str(folder / "captions.jsonl") + ", line 1)")


def test_broken_files_are_named(folder: pathlib.Path) -> None:
    (folder / "deep" / "a.png").write_bytes(b"\x89PNG nothing")
    cut = folder / "deep" / "b.png"
    cut.write_bytes(cut.read_bytes()[:50])
    Image.new("L", (8, 8)).save(folder / "c.png")
    Image.new("L", (8, 8)).save(folder / "d.png")
    (folder / "d.txt").write_text("  \n")
    source = folder_source(folder)
    problems = [str(source[index]) for index in range(4)]
    assert "c.png: its text c.txt cannot be read (No such file" in problems[0]
    assert "d.png: its text d.txt is empty" in problems[1]
    assert re.search(r"deep/a\.png: cannot be read as an image", problems[2])
    assert re.search(r"deep/b\.png: cannot be read as an image", problems[3])
    index = folder / "captions.jsonl"
    index.write_text('{"image": "no.png", "caption": "x"}')
    problem = str(folder_source(folder)[0])
    assert f"no.png ({index}, line 1): there is no such file. Correct the line, or put" in problem


def test_a_text_without_an_image_is_a_bad_record(folder: pathlib.Path) -> None:
    (folder / "x.txt").write_text("an image of another kind")
    (folder / "x.tiff").write_bytes(b"")
    (folder / "y.txt").write_text("no image")
    source = folder_source(folder)
    problems = [str(source[index]) for index in (2, 3)]
    assert len(source) == 4
    suffixes = r"\.png, \.jpg, .*, \.gif\. Convert"
    assert re.search(
        rf"/x\.txt: next to this text is only x\.tiff, .* is read: {suffixes}", problems[0]
    )
    assert re.search(rf"/y\.txt: next to this text is nothing, no file .*: {suffixes}", problems[1])
    assert len(folder_files(str(folder), IMAGE_FOLDER)) == 6
    for image in (folder / "deep").glob("*.png"):
        image.unlink()
    with pytest.raises(ConfigError, match=r"has neither .*\.txt: next to this text is nothing"):
        folder_source(folder)


def test_a_caption_that_is_no_text_is_named_with_its_line(folder: pathlib.Path) -> None:
    lines = [{"image": "deep/a.png", "caption": "one\u2028two"}, {"image": "deep/b.png"}]
    lines[1]["caption"] = "half \ud83d"
    text = json.dumps(lines[0], ensure_ascii=False) + "\r\n" + json.dumps(lines[1])
    (folder / "captions.jsonl").write_text(text, encoding="utf-8")
    source = folder_source(folder)
    assert record(source, 0).captions == ("one\u2028two",)
    problem = str(source[1])
    assert "b.png (" in problem and "captions.jsonl, line 2): its text has a lone" in problem
    assert "'\\ud83d', at character 5" in problem and problem.encode("utf-8")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 1: not valid JSON .* Write \{\"image\": file, \"caption\": text\}"),
        ('{"image": "a.png"}', "line 1: .* is not .*caption"),
        ("[1]", "line 1: .* is not .*caption"),
        ('{"image": "a.png", "caption": ""}', "line 1: .* is not .*caption"),
        ('{"image": "a.png", "caption": " "}', "line 1: .* is not .*caption"),
        (
            '{"image": "a.png", "captoin": "x"}',
            "line 1: unknown key 'captoin'; a line has 'image' and 'caption'. Correct it",
        ),
        (
            '{"image": "a/../../x.png", "caption": "x"}',
            r"line 1: 'a/\.\./\.\./x\.png' is outside the folder; paths are relative",
        ),
        ('{"image": "/x.png", "caption": "x"}', "line 1: '/x.png' is outside the folder"),
        ('{"image": "\\ud800.png", "caption": "x"}', "line 1: .* cannot be a file's name"),
        (
            '{"image": "a.png", "caption": "x"}\n\n{"image": "./a.png", "caption": "y"}',
            "line 3: 'a.png' is on line 1 already; .* Delete one of the lines",
        ),
        ("", "has neither captions.jsonl with lines in it nor files .png, .jpg"),
    ],
)
def test_a_broken_index_is_an_error_at_once(
    line: str, message: str, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "captions.jsonl").write_text(line)
    with pytest.raises(UserError, match=message):
        folder_source(tmp_path)


def test_a_missing_folder_is_named() -> None:
    with pytest.raises(
        ConfigError, match=r"data\.media\.images\.folder: 'no/such' is not a folder"
    ):
        folder_source(pathlib.Path("no/such"))


def test_the_fingerprint_follows_the_content_of_a_folder(folder: pathlib.Path) -> None:
    images = ImageDataConfig(source="image_folder", folder=str(folder))
    media = MediaDataConfig(images=images)
    config = DataConfig(source="media", tokenizer=TokenizerConfig(kind="bytes"), media=media)
    before = data_fingerprint(config)
    assert before.startswith("images: 4 files, ") and data_fingerprint(config) == before
    (folder / "deep" / "a.txt").write_text("another")
    assert data_fingerprint(config) != before


def test_one_image_cannot_be_held_out(folder: pathlib.Path) -> None:
    (folder / "captions.jsonl").write_text('{"image": "deep/a.png", "caption": "only"}')
    images = ImageDataConfig(source="image_folder", folder=str(folder))
    media = MediaDataConfig(images=images)
    config = DataConfig(source="media", tokenizer=TokenizerConfig(kind="bytes"), media=media)
    message = (
        r"^data\.media\.images\.folder: the source has 1 record, of which none can be held out for "
        r"validation\. Put two or more files with their texts there\.$"
    )
    with pytest.raises(ConfigError, match=message):
        build_image_source(config, GREY, "train")
