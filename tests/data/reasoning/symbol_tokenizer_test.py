"""Problems can be typed."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatransformer_jax.config.data import REASONING_TASKS, ReasoningConfig
from megatransformer_jax.config.option import UserError
from megatransformer_jax.data.reasoning import build_task
from megatransformer_jax.data.reasoning.symbol_tokenizer import SymbolTokenizer
from megatransformer_jax.data.tokenizer import Tokenizer

TOKENIZERS = {
    name: SymbolTokenizer.of_task(build_task(ReasoningConfig(task=name, eval_max_length=17)))
    for name in REASONING_TASKS
}


@pytest.mark.parametrize("task", REASONING_TASKS)
@given(data=st.data())
def test_problems_come_back(task, data):
    tokenizer = TOKENIZERS[task]
    special = {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id}
    content = [token for token in range(tokenizer.vocab_size) if token not in special]
    ids = data.draw(st.lists(st.sampled_from(content)))
    text = tokenizer.decode(ids)
    assert tokenizer.encode(text) == ids
    assert tokenizer.encode(text.replace(" ", "")) == ids
    assert b"".join(map(tokenizer.piece_bytes, ids)).decode().strip() == text


@pytest.mark.parametrize("task", REASONING_TASKS)
def test_they_are_tokenizers_of_their_tasks(task):
    tokenizer = TOKENIZERS[task]
    assert isinstance(tokenizer, Tokenizer)
    assert pickle.loads(pickle.dumps(tokenizer)) == tokenizer
    assert tokenizer.vocab_size == len(tokenizer.symbols)
    assert tokenizer.symbols[tokenizer.bos_id] == "<s>"
    special = [tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id]
    assert tokenizer.decode(special) == ""
    assert {tokenizer.piece_bytes(token) for token in special} == {b""}


def test_the_end_is_the_tasks_or_padding():
    assert TOKENIZERS["addition"].symbols[TOKENIZERS["addition"].eos_id] == "</s>"
    assert TOKENIZERS["parity"].eos_id == TOKENIZERS["parity"].pad_id


def test_digests_differ_where_symbols_do():
    symbols = {tokenizer.symbols for tokenizer in TOKENIZERS.values()}
    assert len({tokenizer.digest() for tokenizer in TOKENIZERS.values()}) == len(symbols)
    assert TOKENIZERS["hop"].digest() == TOKENIZERS["pointers"].digest()
    assert len(symbols) == len(TOKENIZERS) - 1


@pytest.mark.parametrize("text", ["1 2", "0 1 x", "<s> 1", "1 <pad>"])
def test_what_is_no_symbol_is_named_with_the_symbols(text):
    with pytest.raises(UserError, match=r"is not a symbol of the task; its symbols are: 0 1\."):
        TOKENIZERS["parity"].encode(text)


def test_many_symbols_are_not_all_listed():
    with pytest.raises(UserError, match=r"symbols are: 01234 01243 .* \.\.\.\.$"):
        TOKENIZERS["permutation"].encode("99")
