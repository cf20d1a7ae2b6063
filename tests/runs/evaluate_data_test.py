"""What is scored of a Huginn folder, which has no data of its own."""

import json
import shutil

import numpy as np
import pytest

from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.config.scoring import ScoringConfig
from megatransformer_jax.runs import evaluate
from megatransformer_jax.runs.evaluate import evaluation_batches
from megatransformer_jax.runs.load import load_model

tokenizers = pytest.importorskip("tokenizers")

WORDS = ["<s>", "</s>", "the", "fox", "and", "dog", "."]


@pytest.fixture(scope="module")
def folder(huginn_fixture, tmp_path_factory):
    """With a tokenizer of a few words."""
    folder = tmp_path_factory.mktemp("huginn") / "folder"
    shutil.copytree(huginn_fixture, folder)
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="."))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(WORDS[:2])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(folder)


def test_files_are_read_with_its_tokenizer(loaded, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the fox and the dog .")
    options = ScoringConfig(files=(str(path),))
    (batch,) = evaluation_batches(options, loaded)
    # Rows of 1024, or less if the model reads less.
    assert batch.tokens.shape == (8, 128)
    assert batch.tokens[0, :7].tolist() == [0, 2, 3, 4, 2, 5, 6]
    assert batch.targets[0, :7].tolist() == [2, 3, 4, 2, 5, 6, 1]
    assert np.asarray(batch.loss_mask).sum() == 7
    options = ScoringConfig(files=(str(path),), batch_size=2, sequence_length=4)
    (batch,) = evaluation_batches(options, loaded)
    assert batch.tokens.shape == (2, 4)


def test_depths_surround_the_trained_mean(loaded):
    assert evaluate.evaluation_depths(ScoringConfig(), loaded) == (4, 8, 16, 32)
    options = ScoringConfig(depths=(5, 1))
    assert evaluate.evaluation_depths(options, loaded) == (5, 1)


def test_data_is_needed(loaded):
    with pytest.raises(ConfigError, match="files: is missing; Huginn model"):
        evaluation_batches(ScoringConfig(), loaded)
    options = ScoringConfig(files=("x.txt",), sequence_length=129)
    with pytest.raises(ConfigError, match="129 exceeds the model's max_length=128"):
        evaluation_batches(options, loaded)
