"""The letters of annotations mean something: in the tests every call's arrays are checked."""

import jax.numpy as jnp
import pytest
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import TypeCheckError

from megatransformer_jax.config.model import NormConfig
from megatransformer_jax.nn.norms import Norm
from megatransformer_jax.ops.attention_xla import attention_xla
from megatransformer_jax.ops.masks import AttentionMask


def test_a_letter_has_one_size_in_a_call_and_another_in_the_next() -> None:
    for rows in (1, 2):
        x = jnp.ones((rows, 3, 2, 4))
        assert attention_xla(x, x, x, AttentionMask()).shape == x.shape
    with pytest.raises(BeartypeCallHintViolation, match="parameter value"):
        attention_xla(x, x, x[:1], AttentionMask())
    with pytest.raises(BeartypeCallHintViolation, match="parameter key"):
        attention_xla(x, x.astype(int), x, AttentionMask())


def test_other_arguments_and_fields_of_modules_have_their_types() -> None:
    x = jnp.ones((1, 3, 2, 4))
    with pytest.raises(BeartypeCallHintViolation, match="parameter mask=3"):
        attention_xla(x, x, x, 3)
    with pytest.raises(TypeCheckError, match="config"):
        Norm("rms")
    assert Norm(NormConfig()).config == NormConfig()
