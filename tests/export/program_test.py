"""What can be exported, as which program."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from exported_tiny import CONFIG, loaded, program_config
from tiny_model import PLAIN, TINY, make, tiny

from megatransformer_jax.config.exporting import ProgramConfig
from megatransformer_jax.config.image import ImageConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.export.program import build_programs, named
from megatransformer_jax.models.megatransformer import build_model
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy


def programs(config=CONFIG, depth=3, **options):
    lm = loaded(config)
    return build_programs(lm.model, lm.params, depth, ProgramConfig(**options))


def test_inputs_are_what_the_model_and_its_criteria_need():
    def names(made):
        return [*made.inputs("step")]

    of_core = ["tokens", "is_token", "depth"]
    made = programs(TINY, criterion=("fixed",))
    assert names(made) == of_core
    assert made.inputs("prefill")["tokens"].shape == (1, 64) and made.config.capacity == 128
    assert made.config.cache_slots == 32
    assert names(programs(TINY)) == [*of_core, "threshold", "min_depth"]
    three = program_config("onnx").criterion
    wanted = [*of_core, "threshold", "min_depth", "criterion"]
    assert names(programs(TINY, criterion=three)) == wanted
    assert names(programs()) == ["tokens", "is_token", "keys", "depth", "threshold", "min_depth"]
    plain = programs(PLAIN, None)
    assert names(plain) == ["tokens", "is_token"]
    # No arrays of stacks without layers.
    assert "cache.prelude" in plain.cache and "cache.coda" in plain.cache
    assert "cache.core" not in plain.cache


def test_what_cannot_be_exported_is_named():
    media = dataclasses.replace(TINY, image=ImageConfig(enabled=True))
    with pytest.raises(ConfigError, match=r"model\.image\.enabled: is True, and a program reads"):
        build_programs(build_model(media, DTypePolicy(), Sharder(), "cpu"), {}, 3, ProgramConfig())
    with pytest.raises(ConfigError, match="criterion: reads an exit gate"):
        programs(TINY, criterion=("learned_gate",))
    with pytest.raises(ConfigError, match="gate_readout: reads an exit gate, and the model has"):
        programs(TINY, criterion=("fixed",), gate_readout="weighted")
    with pytest.raises(ConfigError, match="gate_readout: 'weighted' reads a pass that makes all"):
        ProgramConfig(gate_readout="weighted")
    with pytest.raises(ConfigError, match="capacity: 81 exceeds the 80 tokens"):
        programs(TINY, capacity=81)
    with pytest.raises(ConfigError, match="cache_slots: 4 would be ignored as the model has no"):
        programs(PLAIN, None, cache_slots=4)
    with pytest.raises(ConfigError, match="criterion: names one twice"):
        ProgramConfig(criterion=("kl", "kl"))
    half = build_model(TINY, DTypePolicy(compute=jnp.dtype("bfloat16")), Sharder(), "cpu")
    with pytest.raises(ConfigError, match="precision: activations are bfloat16"):
        build_programs(half, {}, 3, ProgramConfig(format="onnx"))
    assert build_programs(half, {}, 3, ProgramConfig()).cache["cache.core"].dtype == jnp.bfloat16


def test_logits_of_criteria_that_are_not_chosen_cost_nothing():
    """The head stands in a branch of the loop, and outside of it."""
    made = programs(tiny(), criterion=("latent_diff", "kl"), capacity=64)
    _, params = make(tiny())
    traced = jax.make_jaxpr(made.call)(named(params), made.inputs("step"), made.empty_cache())
    assert "branches" in str(traced)
