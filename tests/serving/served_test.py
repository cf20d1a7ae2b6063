import dataclasses
import types
from typing import Any

import jax
import pytest
from served_bytes import MODEL, with_tokenizer
from tiny_model import PLAIN, TINY, make, tiny

from megatransformer_jax.config.loop import MeshConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.config.sampling import EXIT_CRITERIA, CacheConfig
from megatransformer_jax.config.serving import ServingConfig
from megatransformer_jax.data.media_tokenizer import MediaTokenizer
from megatransformer_jax.data.tokenizer import BytesTokenizer
from megatransformer_jax.serving.served import (
    cache_config,
    free_memory,
    served_model,
    settle,
)
from megatransformer_jax.sharding.mesh import make_mesh
from megatransformer_jax.sharding.rules import Sharder

PLENTY = 2**40


def lm(config: Any = TINY, depth: int | None = 3, tokenizer: Any = None) -> Any:
    """What `settle` reads of a model."""
    return types.SimpleNamespace(
        config=config,
        module=make(TINY)[0],
        tokenizer=tokenizer,
        trained_depth=depth,
        num_parameters=7,
        calibration=None,
    )


def test_what_is_left_to_the_model_is_filled_in() -> None:
    settled = settle(ServingConfig(), lm(), default_name="tiny", free_bytes=PLENTY)
    assert (settled.name, settled.capacity) == ("tiny", 128)  # 80, in whole blocks
    assert (settled.cache_slots, settled.max_depth) == (32, 32)
    assert settled.criteria == EXIT_CRITERIA[:-1]  # There is no gate.
    deep = settle(ServingConfig(), lm(depth=40), free_bytes=PLENTY)
    assert (deep.cache_slots, deep.max_depth) == (40, 160)
    shallow = settle(ServingConfig(max_depth=8), lm(), free_bytes=PLENTY)
    assert (shallow.cache_slots, shallow.max_depth) == (8, 8)
    assert cache_config(shallow) == CacheConfig(slots=8)


def test_what_was_given_stays() -> None:
    given = ServingConfig(
        name="a", capacity=64, cache_slots=2, max_depth=9, criteria=("kl",), cache_sharing="last"
    )
    settled = settle(given, lm(), default_name="b", free_bytes=PLENTY)
    assert dataclasses.replace(settled, capacity=64) == given
    assert settle(settled, lm(), free_bytes=PLENTY) == settled


def test_a_model_without_a_core_has_one_slot() -> None:
    settled = settle(ServingConfig(), lm(PLAIN, None), free_bytes=PLENTY)
    assert (settled.cache_slots, settled.criteria) == (1, ("fixed",))
    with pytest.raises(ConfigError, match="cache_slots: 4 would be ignored"):
        settle(ServingConfig(cache_slots=4), lm(PLAIN, None), free_bytes=PLENTY)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"criteria": ("learned_gate",)}, "^criteria: 'learned_gate' needs a model"),
        ({"max_depth": 2}, "max_depth: 2 is below the trained mean depth 3"),
        ({"max_tokens": 80}, "max_tokens: 80 leaves no room"),
        ({"capacity": 129}, "capacity: 129 tokens are more than the model's max_length=80"),
    ],
)
def test_options_that_do_not_fit_the_model_are_refused(
    options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        settle(ServingConfig(**options), lm(), free_bytes=PLENTY)
    gated = tiny(exit_gate={"enabled": True})
    assert "learned_gate" in settle(ServingConfig(), lm(gated), free_bytes=PLENTY).criteria


def test_a_cache_that_does_not_fit_says_what_to_lower() -> None:
    config = ServingConfig(rows=8, capacity=128, cache_slots=4)
    # Keys and values of 4 slots of one core layer, of prelude and coda: width 16, float32.
    per_token = 2 * 16 * 4 * (4 + TINY.prelude_layers + TINY.coda_layers)
    settle(config, lm(), free_bytes=8 * 128 * per_token)
    with pytest.raises(ConfigError) as caught:
        settle(config, lm(), free_bytes=8 * 128 * per_token - 1)
    assert caught.value.path == "rows"
    assert "rows to 7 or capacity to 127 or cache_slots to 3" in str(caught.value)
    with pytest.raises(ConfigError, match="lower rows, capacity and cache_slots"):
        settle(config, lm(), free_bytes=100)


def test_each_accelerator_of_a_mesh_holds_a_part_of_the_cache() -> None:
    config = ServingConfig(rows=8, capacity=128, cache_slots=4)
    model = lm()
    # On a TPU key and value of each of the four heads fill 128 lanes together.
    per_token = 4 * 128 * 4 * (4 + TINY.prelude_layers + TINY.coda_layers)
    sharder = Sharder(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()))
    model.module = model.module.copy(sharder=sharder, platform="tpu")
    of_each = 8 * 256 * per_token // 8  # 256 rows: the blocks of an accelerator's cache.
    settle(config, model, free_bytes=of_each)
    with pytest.raises(ConfigError, match="of each device"):
        settle(config, model, free_bytes=of_each - 1)


def test_a_device_has_memory() -> None:
    assert 2**26 < free_memory(jax.local_devices()[0]) < 2**50

    class Accelerator:
        def memory_stats(self) -> dict[str, int]:
            return {"bytes_limit": 1000, "bytes_in_use": 400}

    assert free_memory(Accelerator()) == 540


def test_the_facts_of_a_model() -> None:
    config = settle(ServingConfig(name="a"), lm(), free_bytes=PLENTY)
    facts = served_model(lm(), config, 5)
    assert (facts.capacity, facts.vocab_size, facts.has_lens) == (80, 32, True)
    # No marker is text, and rows without a token have learned nothing.
    media = MediaTokenizer(BytesTokenizer())
    wide = tiny(vocab_size=512)
    assert served_model(lm(wide, tokenizer=media), config, 5).vocab_size == 259
    assert served_model(lm(wide, tokenizer=media), config, 5).has_lens is False
    assert MODEL.end_ids == (2,) and with_tokenizer(None).end_ids == ()


def test_every_token_has_a_text_of_its_own() -> None:
    texts = [MODEL.token_text(token) for token in range(MODEL.vocab_size)]
    assert len(set(texts)) == len(texts)
    assert (texts[2], texts[3 + 0x41], texts[3 + 0xC3]) == ("token_id:2", "A", "bytes:\\xc3")
