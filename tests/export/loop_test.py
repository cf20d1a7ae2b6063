"""The loop refuses what its programs cannot do, in a line."""

import json

import numpy as np
import pytest
from exported_tiny import written

from megatransformer_jax.export import loop


def echo(inputs, cache):
    """Says token 7, and 5 iterations."""
    logits = np.zeros((2, 9), np.float32)
    logits[:, 7] = 1
    return {"logits": logits, "num_steps": np.full(2, 5, np.int32)}, cache


@pytest.fixture
def about():
    return json.loads((written("onnx") / "program.json").read_text())


def continued(about, prompts, count, end_ids=(), **settings):
    programs = {"prefill": echo, "step": echo}
    return [*loop.generate(about, programs, prompts, count, end_ids, **settings)]


def test_rows_end_one_by_one(about):
    found = continued(about, [[1, 2]], 3)
    assert [tokens.tolist() for tokens, _, _ in found] == [[7, 7]] * 3
    assert [is_running.tolist() for _, _, is_running in found] == [[True, False]] * 3
    assert len(continued(about, [[1, 2], [3]], 3, end_ids=[7])) == 1


def test_what_does_not_fit_is_said(about):
    with pytest.raises(SystemExit, match=r"3 prompts, .* takes at most 2 and 64"):
        continued(about, [[1]] * 3, 1)
    with pytest.raises(SystemExit, match=r"8 \+ 57 padded and new tokens"):
        continued(about, [[1, 2]], 57)
    with pytest.raises(SystemExit, match="81 tokens; the model reads at most 80"):
        continued(about, [[1] * 8], 74)
    with pytest.raises(SystemExit, match="criterion cosine: this program has latent_diff, kl"):
        continued(about, [[1]], 1, criterion="cosine")
    for token in (-1, 10**6):
        with pytest.raises(SystemExit, match=f"token id {token}: this program has 0 to "):
            continued(about, [[1, token]], 1)
    with pytest.raises(SystemExit, match="depth 0: give a whole number from 1"):
        continued(about, [[1]], 1, depth=0)
    with pytest.raises(SystemExit, match="ids '1,a': give whole numbers"):
        loop.main([], ["1,a"], 1)
    with pytest.raises(SystemExit, match="no tokenizer; give token ids"):
        loop.open_tokenizer(written("onnx"), {"tokenizer": {"kind": "none"}})


def test_bytes_are_read_and_written(about):
    encode, decode = loop.open_tokenizer(written("onnx"), about)
    assert decode(encode("né")) == "né"
