"""Learning rates and weight decay by parameter."""

import jax.numpy as jnp
import numpy as np
import pytest

from megatransformer_jax.config.optimizer import OptimizerConfig, parse_groups
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.training.optimizers import (
    build_optimizer,
    decay_rates,
    learning_rate_factors,
)

PARAMS = {
    "core": {
        "mlp": {"up": jnp.ones((2, 1, 2)), "up_bias": jnp.ones(2)},
        "norm": {"scale": jnp.ones(2)},
    },
    "head": jnp.ones((2, 2)),
}
GRADIENTS = PARAMS


def test_the_first_group_that_matches_counts():
    groups = parse_groups(("up$: learning_rate=0.5", "core: learning_rate=2, weight_decay=0.3"))
    assert learning_rate_factors(groups, PARAMS) == {
        "core": {"mlp": {"up": 0.5, "up_bias": 2.0}, "norm": {"scale": 2.0}},
        "head": 1.0,
    }
    # `up` keeps the default of matrices; vectors that a group names get what it says.
    assert decay_rates(groups, 0.1, PARAMS) == {
        "core": {"mlp": {"up": 0.1, "up_bias": 0.3}, "norm": {"scale": 0.3}},
        "head": 0.1,
    }


def first_update(*groups, **options):
    values = {"name": "sgd", "schedule": "constant", "warmup_steps": 0, "learning_rate": 1.0,
              "clip_norm": None, **options}  # fmt: skip
    optimizer = build_optimizer(OptimizerConfig(groups=groups, **values), 10)
    return optimizer.update(GRADIENTS, optimizer.init(PARAMS), PARAMS)[0]


def test_a_group_changes_its_parameters_and_no_others():
    plain = first_update()
    grouped = first_update("mlp/up$: learning_rate=0.5, weight_decay=0.4")
    np.testing.assert_allclose(plain["core"]["mlp"]["up"], -(1 + 0.1), rtol=1e-6)
    np.testing.assert_allclose(grouped["core"]["mlp"]["up"], -0.5 * (1 + 0.4), rtol=1e-6)
    np.testing.assert_array_equal(
        grouped["core"]["mlp"]["up_bias"], plain["core"]["mlp"]["up_bias"]
    )
    np.testing.assert_array_equal(grouped["head"], plain["head"])


@pytest.mark.parametrize("name", ["muon", "schedule_free_sgd", "adafactor"])
def test_a_rate_of_0_holds_parameters_with_any_optimizer(name):
    options = {} if name == "adafactor" else {"beta1": 0.8}
    updates = first_update("mlp: learning_rate=0", "head: weight_decay=0", name=name, **options)
    assert not np.any(updates["core"]["mlp"]["up"])
    assert np.all(updates["head"] != 0)
    assert np.all(updates["core"]["norm"]["scale"] != 0)


@pytest.mark.parametrize(
    ("groups", "problem"),
    [
        (["absent: weight_decay=0"], "'absent' matches no parameter; .* There are core/mlp/up"),
        (
            ["core: weight_decay=0", "mlp: weight_decay=1"],
            "'mlp' matches only parameters of groups before it, such as core/mlp/up; put it before",
        ),
    ],
)
def test_a_group_without_effect_is_an_error(groups, problem):
    with pytest.raises(ConfigError, match=problem) as caught:
        first_update(*groups)
    assert caught.value.path == "optimizer.groups"
