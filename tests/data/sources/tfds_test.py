"""A TFDS data set that the test prepares itself, without TensorFlow."""

import dataclasses
import pathlib
import pickle
import re
import sys

import numpy as np
import pytest
from etils import epath

from megatransformer_jax.config.data import DataConfig
from megatransformer_jax.config.option import UserError
from megatransformer_jax.data.sources import build_source

tfds = pytest.importorskip("tensorflow_datasets")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tfds")

    class TinyText(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = epath.Path(folder)
        # TFDS looks for the files of a package where the name has dots.
        __module__ = "tiny_set"

        def _info(self):
            features = {"text": tfds.features.Text(), "number": np.int64}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(6), "test": self._generate_examples(2)}

        def _generate_examples(self, count):
            for number in range(count):
                yield number, {"text": f"text {number} é", "number": number}

    TinyText(data_dir=folder, file_format="array_record").download_and_prepare()
    return str(folder)


def config(data_dir: str, **changes) -> DataConfig:
    return DataConfig(
        **{"source": "tfds", "tfds_name": "tiny_text"} | changes, tfds_data_dir=data_dir
    )


def texts(source) -> set[str]:
    return {source[index] for index in range(len(source))}


def test_splits_are_read_without_tensorflow(data_dir: str):
    settings = config(data_dir, tfds_validation_split="test")
    train = pickle.loads(pickle.dumps(build_source(settings, "train")))
    assert texts(train) == {f"text {number} é" for number in range(6)}
    assert texts(build_source(settings, "validation")) == {"text 0 é", "text 1 é"}
    assert "tensorflow" not in sys.modules


def test_part_of_the_training_split_is_held_out(data_dir: str):
    settings = config(data_dir, tfds_split="train[:4]", validation_fraction=0.5)
    train, validation = (texts(build_source(settings, split)) for split in ("train", "validation"))
    assert len(train) == len(validation) == 2
    assert not train & validation


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tfds_name": "no_such_set"}, r"no_such_set\[train\]: TFDS cannot read it"),
        ({"tfds_split": "nothing"}, r"tiny_text\[nothing\]: TFDS cannot read it .*nothing"),
        ({"text_field": "body"}, r"no feature 'body'; its features: .*'text'"),
    ],
)
def test_what_is_not_there_is_named(changes: dict, message: str, data_dir: str):
    with pytest.raises(UserError, match=message):
        build_source(config(data_dir, **changes), "train")


def test_a_set_that_is_not_prepared_is_named(data_dir: str, tmp_path: pathlib.Path):
    changes = {"tfds_name": "lm1b"}
    with pytest.raises(UserError) as error:
        build_source(
            dataclasses.replace(config(data_dir, **changes), tfds_data_dir=str(tmp_path)), "train"
        )
    assert "no prepared data there" in str(error.value)
    assert "root causes" not in str(error.value)
    assert "`tfds build lm1b --file_format=array_record`" in str(error.value)


def test_without_the_package_the_error_names_the_extra(data_dir: str, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(UserError, match=r"pip install -e .\.\[tfds\]"):
        build_source(config(data_dir), "train")


def test_a_feature_that_is_no_text_is_named(data_dir: str):
    source = build_source(config(data_dir, text_field="number"), "train")
    message = r"tiny_text\[train\], record \d: field 'number' is int, not text"
    assert re.match(message, str(source[0]))


def test_paths_may_be_relative(data_dir: str, monkeypatch):
    monkeypatch.chdir(pathlib.Path(data_dir).parent)
    settings = config(pathlib.Path(data_dir).name)
    assert len(build_source(settings, "train")) == 5
