"""Exhausted memory is reported as bad input; other errors stay what they are."""

import jax
import pytest

from megatransformer_jax.config.option import UserError
from megatransformer_jax.generation.request import out_of_memory_is_bad_input


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 373. GiB"),
        MemoryError(),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 4 bytes.\nmore"),
    ],
)
def test_exhausted_memory_is_one_line_with_the_fix(error):
    line = r"^there is not enough memory: [^\n]+; lower [^\n]+$"
    with pytest.raises(UserError, match=line), out_of_memory_is_bad_input():
        raise error


@pytest.mark.parametrize("error", [jax.errors.JaxRuntimeError("INTERNAL: x"), ValueError("y")])
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as caught, out_of_memory_is_bad_input():
        raise error
    assert caught.value is error
