"""Prompts of every kind become ids, or an error that says what is wrong."""

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tiny_model import Pieces

from megatransformer_jax.config.option import UserError
from megatransformer_jax.data.hf_tokenizer import HuggingFaceTokenizer
from megatransformer_jax.data.tokenizer import BytesTokenizer
from megatransformer_jax.generation.request import encode_prompts


def test_texts_get_the_start_token_and_ids_are_taken_as_they_are():
    tokenizer = BytesTokenizer()
    assert encode_prompts(["a", [3, 4]], tokenizer, 300) == [[1, 100], [3, 4]]
    assert encode_prompts([(5,), [1, 7]], None, 8) == [[5], [1, 7]]


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8])
def test_ids_may_be_arrays(dtype):
    array = np.array([[1, 2], [3, 4]], dtype)
    for prompts in (array, list(array), [array[0], [3, 4]], [jnp.asarray(array[0]), (3, 4)]):
        ids = encode_prompts(prompts, None, 8)
        assert ids == [[1, 2], [3, 4]]
        assert all(type(token) is int for row in ids for token in row)


def with_bos_template(text_of_bos="<s>"):
    """As many published tokenizers: the library's own `encode` adds the start token."""
    vocabulary = {text_of_bos: 0, "</s>": 1, "a": 2, "b": 3}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="b"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.add_special_tokens([text_of_bos, "</s>"])
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{text_of_bos} $A", special_tokens=[(text_of_bos, 0)]
    )
    assert inner.encode("a b").ids == [0, 2, 3]
    return HuggingFaceTokenizer(inner.to_str(), bos_id=0, eos_id=1, pad_id=1, end_ids=(1,))


def test_there_is_one_start_token_whoever_writes_it():
    tokenizer = with_bos_template()
    assert encode_prompts(["a b"], tokenizer, 4) == [[0, 2, 3]]
    # Chat formats spell it.
    assert encode_prompts(["<s>a b"], tokenizer, 4) == [[0, 2, 3]]
    # Further ones are text.
    assert encode_prompts(["a<s>b", "<s><s>a"], tokenizer, 4) == [[0, 2, 0, 3], [0, 0, 2]]


@pytest.mark.parametrize(
    ("prompts", "tokenizer", "message"),
    [
        ([], None, "no prompt"),
        (np.zeros((0, 3), int), None, "no prompt"),
        ([""], Pieces(), "prompt is empty"),
        ([[1], []], None, "prompt is empty"),
        ("abc", Pieces(), "'abc'; put it in a list"),
        ([1, 2], None, "a sequence of token ids, not 1"),
        (["abc"], None, "no tokenizer"),
        ([[1, 32]], None, r"0 \.\. 31, not 32"),
        ([[-1]], None, r"0 \.\. 31, not -1"),
        ([[1, 2.5]], None, "whole numbers"),
        (np.zeros((1, 2)), None, "whole numbers"),
        ([[True, False]], None, "whole numbers"),
        ([[[1, 2]]], None, "whole numbers"),
        # The model has rows that the tokenizer knows nothing of.
        ([[Pieces.vocab_size]], Pieces(), r"0 \.\. 25, not 26"),
    ],
)
def test_what_is_no_prompt_is_refused(prompts, tokenizer, message):
    with pytest.raises(UserError, match=message):
        encode_prompts(prompts, tokenizer, 32)
