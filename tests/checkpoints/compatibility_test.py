"""Which options of the optimiser a resumed run may change, and reading parts of its state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from megatransformer_jax.checkpoints.compatibility import (
    OPTIMIZER_OPTIONS,
    STATE_SHAPING,
    CheckpointMismatch,
    check_resumable,
    flatten_config,
    resume_warnings,
)
from megatransformer_jax.checkpoints.manager import UNREAD, CheckpointManager
from megatransformer_jax.config.build import to_dict
from megatransformer_jax.config.loop import CheckpointConfig, TrainConfig
from megatransformer_jax.config.optimizer import (
    AdafactorConfig,
    GrokfastConfig,
    MuonConfig,
    OptimizerConfig,
    SgdConfig,
)
from megatransformer_jax.config.run import RunConfig


def run_with(train=None, **optimizer):
    return RunConfig(optimizer=OptimizerConfig(**optimizer), train=train or TrainConfig())


FREE = {"name": "schedule_free_sgd", "schedule": "constant"}


@pytest.mark.parametrize(
    ("saved", "current", "named"),
    [
        (run_with(), run_with(name="muon"), "optimizer.name: saved 'adamw', now 'muon'"),
        (
            run_with(name="sgd"),
            run_with(name="sgd", sgd=SgdConfig(momentum=0.0)),
            "optimizer.sgd.momentum: saved 0.9, now 0.0",
        ),
        (
            run_with(name="adafactor"),
            run_with(name="adafactor", adafactor=AdafactorConfig(min_factored_size=8)),
            "optimizer.adafactor.min_factored_size: saved 128, now 8",
        ),
        (
            run_with(),
            run_with(grokfast=GrokfastConfig(filter="ema")),
            "optimizer.grokfast.filter: saved 'none', now 'ema'",
        ),
        (
            run_with(grokfast=GrokfastConfig(filter="ma", window=5)),
            run_with(grokfast=GrokfastConfig(filter="ma", window=6)),
            "optimizer.grokfast.window: saved 5, now 6",
        ),
        (run_with(**FREE), run_with(**FREE, beta1=0.8), "optimizer.beta1: saved 0.9, now 0.8"),
        (
            run_with(),
            run_with(train=TrainConfig(ema_decay=0.9)),
            "train.ema_decay: saved None, now 0.9",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_state_depends_on_may_not_change(saved, current, named):
    with pytest.raises(CheckpointMismatch, match=named):
        check_resumable(to_dict(saved), current, "x")


@pytest.mark.parametrize(
    ("saved", "current", "named"),
    [
        (run_with(), run_with(beta1=0.8), "optimizer.beta1"),
        (run_with(), run_with(groups=("mlp: weight_decay=0",)), "optimizer.groups"),
        (
            run_with(name="muon"),
            run_with(name="muon", muon=MuonConfig(newton_schulz_steps=3)),
            "optimizer.muon.newton_schulz_steps",
        ),
        (
            run_with(grokfast=GrokfastConfig(filter="ema")),
            run_with(grokfast=GrokfastConfig(filter="ema", lamb=1.0)),
            "optimizer.grokfast.lamb",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_it_does_not_depend_on_may_and_is_warned_of(saved, current, named):
    check_resumable(to_dict(saved), current, "x")
    (message,) = resume_warnings(to_dict(saved), current, "x")
    assert f"{named}: saved" in message


def test_every_option_of_the_optimizer_is_one_or_the_other():
    options = {
        path for path in flatten_config(to_dict(RunConfig())) if path.startswith("optimizer.")
    }
    assert options == {*OPTIMIZER_OPTIONS, *STATE_SHAPING}
    assert not {*OPTIMIZER_OPTIONS} & {*STATE_SHAPING}


def test_a_part_of_a_state_is_read(tmp_path):
    params = {"a": {"w": jnp.arange(6.0).reshape(2, 3)}, "b": jnp.ones(4)}
    state = {"params": params, "opt_state": optax.adam(0.1).init(params)}
    checkpoints = CheckpointManager(tmp_path, CheckpointConfig())
    checkpoints.save(1, state, {}, {})
    checkpoints.wait()
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(lambda _: UNREAD, state)
    wanted["params"]["a"]["w"] = jax.ShapeDtypeStruct((2, 3), jnp.float32, sharding=here)
    part = checkpoints.restore_parts(wanted, 1)
    np.testing.assert_array_equal(part["params"]["a"]["w"], params["a"]["w"])
    assert part["params"]["b"] is UNREAD
    assert all(leaf is UNREAD for leaf in jax.tree.leaves(part["opt_state"]))

    wanted["params"]["a"]["w"] = jax.ShapeDtypeStruct((2, 4), jnp.float32, sharding=here)
    with pytest.raises(CheckpointMismatch, match=r"params/a/w: saved \(2, 3\), now \(2, 4\)"):
        checkpoints.restore_parts(wanted, 1)
    checkpoints.close()
