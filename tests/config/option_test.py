import dataclasses

import pytest

from megatransformer_jax.config.data import DataConfig
from megatransformer_jax.config.layers import AttentionConfig
from megatransformer_jax.config.loop import EvaluationConfig, TrainConfig
from megatransformer_jax.config.model import NormConfig
from megatransformer_jax.config.optimizer import OptimizerConfig
from megatransformer_jax.config.option import ConfigError, UserError, check_options, option, rule


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
def test_a_probability_out_of_range_is_rejected(rate: float) -> None:
    with pytest.raises(ConfigError, match="dropout_rate") as caught:
        AttentionConfig(dropout_rate=rate)
    assert str(rate) in str(caught.value)


def test_zero_is_a_dropout_rate_and_one_is_not() -> None:
    assert AttentionConfig(dropout_rate=0.0).dropout_rate == 0.0
    with pytest.raises(ConfigError, match="at least 0 and below 1"):
        AttentionConfig(dropout_rate=1.0)


@pytest.mark.parametrize("value", ["4", 4.0, True, None, (4,)])
def test_a_wrong_type_is_named(value: object) -> None:
    with pytest.raises(ConfigError, match=r"num_heads: .* allowed: int") as caught:
        AttentionConfig(num_heads=value)  # type: ignore[arg-type]
    assert type(value).__name__ in str(caught.value)


def test_a_choice_lists_what_is_allowed() -> None:
    with pytest.raises(ConfigError, match="one of 'rmsnorm', 'layernorm'"):
        NormConfig(kind="batchnorm")


def test_items_of_a_tuple_are_checked_one_by_one() -> None:
    with pytest.raises(ConfigError, match="each item must be at least 1"):
        EvaluationConfig(final_depths=(1, 0))


def test_a_whole_number_is_stored_as_a_float_where_a_float_is_declared() -> None:
    config = OptimizerConfig(learning_rate=1, clip_norm=2)
    assert type(config.learning_rate) is float
    assert type(config.clip_norm) is float


def test_a_list_is_no_tuple() -> None:
    with pytest.raises(ConfigError, match=r"files: .*allowed: tuple of str"):
        DataConfig(source="text", files=["a.txt"])  # type: ignore[arg-type]


def test_errors_of_a_section_are_seen_from_above() -> None:
    error = ConfigError("width", "is odd").below("model").below("")
    assert (error.path, str(error)) == ("model.width", "model.width: is odd")
    assert isinstance(error, UserError)


def test_rules_run_after_types_in_their_order() -> None:
    ran = []

    @dataclasses.dataclass(frozen=True)
    class Pair:
        left: int = option(1, "Left.")

        def __post_init__(self) -> None:
            check_options(self)

        @rule("left")
        def _first(self) -> None:
            """First."""
            ran.append("first")

        @rule("left")
        def _second(self) -> None:
            """Second."""
            ran.append("second")

    Pair()
    assert ran == ["first", "second"]
    with pytest.raises(ConfigError, match="left"):
        Pair(left="no")  # type: ignore[arg-type]
    assert ran == ["first", "second"]


@pytest.mark.parametrize("config_class", [DataConfig, TrainConfig])
def test_a_seed_has_32_bits(config_class: type) -> None:
    assert config_class(seed=2**32 - 1).seed == 2**32 - 1
    with pytest.raises(ConfigError, match=r"at least 0 and at most 2\^32 - 1"):
        config_class(seed=2**32)
