"""A folder of a plain model becomes a recurrent run in one command, with its tokenizer."""

import pathlib
from typing import Any

import numpy as np
import pytest
from chat_tokenizer import chat_tokenizer

import megatransformer_jax as mt
from megatransformer_jax.cli.commands import main

PLAIN: dict[str, Any] = {
    "width": 16,
    "max_length": 48,
    "vocab_size": 264,
    "prelude_layers": 4,
    "attention": {"num_heads": 2, "num_kv_heads": 1},
    "mlp": {"hidden_width": 16},
}
MESSAGES = [{"role": "user", "content": "Hello"}]
IDS = [256, 40, 41, 42, 43]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A small Llama with the tokenizer of a chat model."""
    folder = tmp_path_factory.mktemp("retrofit")
    tokenizer = chat_tokenizer(folder / "tokenizer")
    lm = mt.create("modern_small", tokenizer=tokenizer, seed=3, **PLAIN)
    return lm.save(folder / "llama", format="llama")


def test_the_options_are_those_of_the_folder(llama: pathlib.Path) -> None:
    config = mt.configure(f"retrofit:{llama}", model={"core_layers": 1})
    assert isinstance(config, mt.RunConfig)
    model = config.model
    assert (model.width, model.attention.num_kv_heads, model.mlp.hidden_width) == (16, 1, 16)
    assert (model.prelude_layers, model.core_layers, model.coda_layers) == (1, 1, 1)
    assert model.recurrence.ramp == "linear" and not model.recurrence.output_norm
    assert config.fine_tuning.init_from == str(llama) and config.fine_tuning.retrofit


@pytest.mark.parametrize(
    ("argument", "problem"),
    [
        ("", "name the plain model, as in --config=retrofit:my/llama"),
        (":absent", "absent: no such folder"),
        (":runs/absent", "runs/absent: no such folder"),
    ],
)
def test_a_model_that_is_not_there_is_named(argument: str, problem: str) -> None:
    with pytest.raises(mt.UserError, match=problem):
        mt.configure(f"retrofit{argument}")


@pytest.mark.slow
def test_it_starts_as_the_plain_model_trains_saves_and_is_loaded(
    llama: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    plain, workdir = mt.load(llama), tmp_path / "run"
    words = [
        f"--config=retrofit:{llama}",
        f"--config.workdir={workdir}",
        "--config.data.sequence_length=16",
        "--config.data.batch_size=8",
        "--config.train.steps=1",
        "--config.optimizer.warmup_steps=0",
        "--config.model.recurrence.backprop_depth=2",
        "--config.evaluation.final_depths=1,4",
        "--config.evaluation.num_batches=1",
        "--config.samples.every_steps=0",
    ]
    config = mt.configure(f"retrofit:{llama}", samples={"every_steps": 0})
    before = mt.Trainer(config, workdir=None).model
    expected = plain(IDS).logits
    for depth in (1, 4):
        # Two programs of the same formulas.
        np.testing.assert_allclose(before(IDS, depth=depth).logits, expected, rtol=0, atol=1e-5)
    main("train", words)
    trained = mt.load(workdir)
    assert trained.trained_depth == 4 and trained.tokenizer is not None
    assert trained.tokenizer.digest() == plain.tokenizer.digest()  # type: ignore[union-attr]
    assert np.abs(np.asarray(trained(IDS, depth=4).logits - expected)).max() > 1e-3
    once, often = (np.asarray(trained(IDS, depth=depth).logits) for depth in (1, 4))
    assert np.abs(once - often).max() > 1e-6
    # The chat template has come along too.
    assert trained.tokenizer.apply_chat_template(MESSAGES) == "<|user|>Hello<|end|>"  # type: ignore[attr-defined]
