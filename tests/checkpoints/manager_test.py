import asyncio
import dataclasses
import os
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint._src.path import temporary_paths

from megatransformer_jax.checkpoints.compatibility import (
    FREE_ON_RESUME,
    OPTIMIZER_OPTIONS,
    SAME_UP_TO_ROUNDING,
    TRAINING_ONLY,
    USER_CODE,
    CheckpointMismatch,
    check_model,
    check_resumable,
    flatten_config,
    resume_warnings,
)
from megatransformer_jax.checkpoints.manager import (
    CheckpointManager,
    DamagedCheckpoint,
    tree_shapes,
)
from megatransformer_jax.config.build import to_dict
from megatransformer_jax.config.data import AugmentationConfig, DataConfig
from megatransformer_jax.config.layers import AttentionConfig
from megatransformer_jax.config.loop import CheckpointConfig, TrainConfig
from megatransformer_jax.config.model import ModelConfig, NormConfig
from megatransformer_jax.config.optimizer import OptimizerConfig
from megatransformer_jax.config.recurrence import RecurrenceConfig
from megatransformer_jax.config.run import RunConfig

KEEP_ALL = CheckpointConfig(keep_last=100)


@struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: tuple
    key_data: jax.Array


OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(1e-3)))


def make_state(seed: int = 0, width: int = 8) -> State:
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "core": {"kernel": jax.random.normal(keys[0], (width, 16))},
        "norm": {"scale": jax.random.normal(keys[1], (width,))},
    }
    return State(jnp.int32(seed), params, OPTIMIZER.init(params), jax.random.key_data(keys[2]))


def abstract(state: State, sharding=None) -> State:
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state
    )


def assert_same_bits(left, right):
    def compare(path, a, b):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes(), path

    jax.tree_util.tree_map_with_path(compare, left, right)


def test_closing_waits_for_what_orbax_still_removes(tmp_path, monkeypatch):
    """Otherwise it is cut off at the exit of Python, with a traceback."""
    done = []

    async def slow(*args, **kwargs):
        await asyncio.sleep(0.3)
        done.append(True)

    monkeypatch.setattr(temporary_paths, "cleanup_temporary_paths", slow)
    manager = CheckpointManager(tmp_path, KEEP_ALL)
    assert not done
    manager.close()
    assert done == [True]


def loss_scores(loss: float | None) -> dict[str, float] | None:
    return None if loss is None else {"validation/loss": loss}


def saved_steps(tmp_path, config, losses, steps=None) -> list[int]:
    manager = CheckpointManager(tmp_path, config)
    steps = steps or range(1, len(losses) + 1)
    for step, loss in zip(steps, losses, strict=True):
        manager.save(step, make_state(), {}, {}, loss_scores(loss))
    manager.close()
    # A second look, as a resumed run has it: the rules must not depend on what is in memory.
    again = CheckpointManager(tmp_path, config)
    found = again.steps()
    again.close()
    folders = {int(name) for name in os.listdir(tmp_path) if name.isdigit()}
    assert folders == set(found)
    return found


def test_round_trip_is_exact_to_the_bit_with_iterator_state_and_run(tmp_path):
    manager = CheckpointManager(tmp_path, KEEP_ALL)
    state = make_state(3)
    assert manager.latest_step() is None
    manager.save(7, state, {"epoch": 1, "row": 12}, {"config": {"a": 1}}, loss_scores(0.5))
    manager.wait()
    restored = manager.restore(abstract(state), 7)
    assert restored.step == 7
    assert restored.iterator_state == {"epoch": 1, "row": 12}
    assert manager.run_info(7) == {"config": {"a": 1}}
    assert isinstance(restored.state, State)
    assert_same_bits(restored.state, state)
    assert_same_bits(manager.restore_params(abstract(state).params, 7), state.params)
    manager.close()


def test_saving_a_step_twice_keeps_the_first(tmp_path):
    manager = CheckpointManager(tmp_path, KEEP_ALL)
    manager.save(1, make_state(1), {}, {})
    manager.save(1, make_state(2), {}, {})
    manager.wait()
    assert_same_bits(manager.restore(abstract(make_state()), 1).state, make_state(1))
    manager.close()


def test_restores_onto_another_mesh(tmp_path):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    by_rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    whole = NamedSharding(mesh, PartitionSpec())
    state = make_state(5)
    sharded = jax.tree.map(
        lambda leaf: jax.device_put(leaf, by_rows if leaf.shape[:1] == (8,) else whole), state
    )
    manager = CheckpointManager(tmp_path, KEEP_ALL)
    manager.save(1, sharded, {}, {})
    manager.wait()
    two = jax.make_mesh(
        (2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2]
    )
    target = abstract(state, NamedSharding(two, PartitionSpec()))
    restored = manager.restore(target, 1).state
    assert restored.params["core"]["kernel"].sharding.mesh.shape == {"data": 2}
    assert_same_bits(restored, state)
    manager.close()


@pytest.mark.parametrize("is_sharded", [False, True])
def test_a_donated_state_does_not_change_what_is_being_saved(tmp_path, is_sharded):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("fsdp") if is_sharded else PartitionSpec()
    shape = (512, 512)
    sharding = NamedSharding(mesh, spec) if is_sharded else jax.devices()[0]
    state = {f"w{i}": jax.device_put(jnp.zeros(shape), sharding) for i in range(16)}
    add = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
    state = add(state)
    manager = CheckpointManager(tmp_path, KEEP_ALL)
    wanted = {}
    for step in range(1, 5):
        wanted[step] = float(state["w0"][0, 0])
        manager.save(step, state, {}, {})
        for _ in range(10):  # Overwrites the donated buffers while the save goes on.
            state = add(state)
    manager.wait()
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )
    for step, value in wanted.items():
        restored = manager.restore(target, step).state
        assert all(np.all(np.asarray(leaf) == value) for leaf in restored.values())
    manager.close()


def test_keeps_the_last(tmp_path):
    config = CheckpointConfig(keep_last=2, keep_best=0)
    assert saved_steps(tmp_path, config, [None] * 5) == [4, 5]


def test_keeps_the_best_by_validation_loss(tmp_path):
    config = CheckpointConfig(keep_last=1, keep_best=2)
    losses = [3.0, 1.0, None, 0.5, float("nan"), 2.0, None]
    assert saved_steps(tmp_path, config, losses) == [2, 4, 7]


def test_keeps_multiples(tmp_path):
    config = CheckpointConfig(every_steps=5, keep_last=1, keep_best=0, keep_every_steps=10)
    steps = [5, 10, 15, 20, 25]
    assert saved_steps(tmp_path, config, [None] * 5, steps) == [10, 20, 25]


def test_best_step_survives_a_restart(tmp_path):
    config = CheckpointConfig(keep_last=1, keep_best=1)
    saved_steps(tmp_path, config, [0.5, 0.25, 1.0, 2.0])
    manager = CheckpointManager(tmp_path, config)
    assert manager.best_step() == 2 and manager.latest_step() == 4
    # The next save must still know the loss of an earlier process's checkpoint.
    manager.save(5, make_state(), {}, {}, loss_scores(3.0))
    manager.close()
    assert sorted(int(n) for n in os.listdir(tmp_path) if n.isdigit()) == [2, 5]


def test_half_written_and_half_deleted_checkpoints_are_ignored_and_removed(tmp_path):
    manager = CheckpointManager(tmp_path, KEEP_ALL)
    manager.save(1, make_state(1), {}, {})
    manager.close()
    # What a kill leaves: a save that did not end, and a deletion that did not.
    partial = tmp_path / "2.orbax-checkpoint-tmp"
    (partial / "state").mkdir(parents=True)
    (partial / "state" / "data").write_text("half")
    (tmp_path / "deleted" / "0").mkdir(parents=True)
    manager = CheckpointManager(tmp_path, KEEP_ALL)
    assert manager.steps() == [1]
    manager.save(2, make_state(2), {}, {})
    manager.wait()
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]
    assert_same_bits(manager.restore(abstract(make_state()), 2).state, make_state(2))
    manager.close()


def test_for_reading_only_the_folder_stays_as_it_is(tmp_path):
    checkpoints = CheckpointManager(tmp_path, CheckpointConfig())
    state = make_state()
    checkpoints.save(1, state, {}, {}, loss_scores(0.5))
    checkpoints.close()
    # A save and a deletion of another process.
    (tmp_path / "2.orbax-checkpoint-tmp-7").mkdir()
    (tmp_path / "deleted").mkdir()
    before = sorted(tmp_path.rglob("*"))
    reader = CheckpointManager(tmp_path, None)
    assert reader.steps() == [1] and reader.best_step() == 1
    assert_same_bits(reader.restore_params(abstract(state).params, 1), state.params)
    with pytest.raises(ValueError, match="for reading only"):
        reader.save(3, state, {}, {})
    reader.close()
    assert sorted(tmp_path.rglob("*")) == before


def test_arrays_of_another_model_are_named(tmp_path):
    manager = CheckpointManager(tmp_path, KEEP_ALL)
    manager.save(1, make_state(width=8), {}, {})
    manager.wait()
    for restore in (
        lambda: manager.restore(abstract(make_state(width=4)), 1),
        lambda: manager.restore_params(abstract(make_state(width=4)).params, 1),
    ):
        with pytest.raises(
            CheckpointMismatch, match=r"params/core/kernel: saved \(8, 16\), now \(4, 16\)"
        ):
            restore()
    other = make_state()
    other = other.replace(params={**other.params, "head": jnp.ones(3)})
    with pytest.raises(CheckpointMismatch, match=r"params/head: not in the checkpoint, now \(3,\)"):
        manager.restore(abstract(other), 1)
    manager.close()


def _cut_arrays(step: pathlib.Path) -> None:
    for path in (step / "state" / "d").iterdir():
        path.write_bytes(path.read_bytes()[:10])


def _empty(step: pathlib.Path) -> None:
    shutil.rmtree(step)
    step.mkdir()


@pytest.mark.parametrize(
    "damage",
    [
        _empty,
        _cut_arrays,
        lambda step: shutil.rmtree(step / "run"),
        lambda step: shutil.rmtree(step / "data"),
        lambda step: shutil.rmtree(step / "state"),
        lambda step: (step / "state" / "_sharding").write_text('{"a'),
        lambda step: (step / "state" / "_METADATA").write_text("{"),
    ],
)
def test_a_damaged_checkpoint_is_named_with_the_way_out(tmp_path, damage):
    manager = CheckpointManager(tmp_path, KEEP_ALL)
    manager.save(1, make_state(1), {}, {"config": {}})
    manager.save(2, make_state(2), {}, {"config": {}})
    manager.close()
    damage(tmp_path / "2")
    manager = CheckpointManager(tmp_path, KEEP_ALL)
    with pytest.raises(
        DamagedCheckpoint,
        match=rf"{tmp_path}/2 is damaged \(.+\); delete that folder to resume from step 1\.",
    ):
        manager.run_info(2)
        manager.restore(abstract(make_state()), 2)
    manager.close()
    shutil.rmtree(tmp_path / "1")
    manager = CheckpointManager(tmp_path, KEEP_ALL)
    with pytest.raises(DamagedCheckpoint, match="delete that folder to start afresh"):
        manager.run_info(2)
        manager.restore(abstract(make_state()), 2)
    manager.close()


def test_shapes_have_the_same_names_in_memory_and_on_disk(tmp_path):
    manager = CheckpointManager(tmp_path, KEEP_ALL)
    manager.save(1, make_state(), {}, {})
    manager.wait()
    assert manager._saved_shapes(1) == tree_shapes(make_state())
    manager.close()


RUN = RunConfig()


def test_another_architecture_is_refused_by_option():
    model = ModelConfig(width=128, recurrence=RecurrenceConfig(adapter="sum"))
    other = dataclasses.replace(RUN, model=model)
    with pytest.raises(CheckpointMismatch) as error:
        check_model(to_dict(RUN), other, "runs/a/checkpoints/5")
    message = str(error.value)
    assert "runs/a/checkpoints/5 is of another architecture" in message
    assert "model.width: saved 256, now 128" in message
    assert "model.recurrence.adapter: saved 'linear', now 'sum'" in message
    assert "choose another workdir" in message
    assert len(message.splitlines()) < 24  # One screen.


def test_many_differences_still_fit_one_screen():
    saved = to_dict(RUN)
    with pytest.raises(CheckpointMismatch, match=r"and \d+ more") as error:
        check_resumable(saved, _with_everything_changed(RUN), "x")
    assert len(str(error.value).splitlines()) < 24


def _with_everything_changed(config: RunConfig) -> RunConfig:
    return dataclasses.replace(
        config,
        model=ModelConfig(
            vocab_size=4096, width=64, max_length=512, prelude_layers=2, core_layers=3,
            coda_layers=4, tie_embeddings=False, scale_embeddings=True, head_bias=True,
            embedding_dropout_rate=0.1, residual_dropout_rate=0.1, logit_softcap=30.0,
            remat="full", recurrence=RecurrenceConfig(adapter="sum", state_init="zero"),
            norm=NormConfig(kind="layernorm"),
        ),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"data": DataConfig(batch_size=16)}, "data.batch_size: saved 8, now 16"),
        ({"train": TrainConfig(seed=3)}, "train.seed: saved 0, now 3"),
    ],
)
def test_what_would_break_an_exact_resume_is_refused(change, named):
    with pytest.raises(CheckpointMismatch, match=named):
        check_resumable(to_dict(RUN), dataclasses.replace(RUN, **change), "x")


def test_what_does_not_matter_to_a_resume_may_change():
    current = dataclasses.replace(
        RUN,
        workdir="elsewhere",
        train=TrainConfig(max_bad_steps=3),
        data=DataConfig(num_workers=2, prefetch_batches=5),
        checkpoint=CheckpointConfig(every_steps=50),
    )
    check_resumable(to_dict(RUN), current, "x")
    assert resume_warnings(to_dict(RUN), current, "x") == []


def test_moved_files_may_be_resumed():
    old = dataclasses.replace(RUN, data=DataConfig(source="text", files=("a.txt",)))
    new = dataclasses.replace(RUN, data=DataConfig(source="text", files=("/new/a.txt",)))
    check_resumable(to_dict(old), new, "x")
    assert resume_warnings(to_dict(old), new, "x") == []


def test_a_corrected_function_is_resumed_with_a_warning_but_another_rate_is_refused():
    def augmented(name: str, rate: float) -> RunConfig:
        augmentation = AugmentationConfig(back_translation=name, back_translation_rate=rate)
        return dataclasses.replace(RUN, data=DataConfig(augmentation=augmentation))

    old, new = augmented("hooks:broken", 0.5), augmented("hooks:corrected", 0.5)
    check_resumable(to_dict(old), new, "x")
    (message,) = resume_warnings(to_dict(old), new, "x")
    assert re.search(r"saved 'hooks:broken', now 'hooks:corrected'.*no longer the run", message)
    assert resume_warnings(to_dict(old), old, "x") == []
    with pytest.raises(CheckpointMismatch, match=r"back_translation_rate: saved 0\.5, now 0\.25"):
        check_resumable(to_dict(old), augmented("hooks:corrected", 0.25), "x")
    with pytest.raises(CheckpointMismatch, match=r"back_translation_rate: saved 0\.0, now 0\.5"):
        check_resumable(to_dict(RUN), new, "x")


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        (
            {"optimizer": OptimizerConfig(learning_rate=1e-4, clip_norm=None, warmup_steps=9)},
            r"optimizer.learning_rate: saved 0.003, now 0.0001.*no longer the run",
        ),
        ({"model": ModelConfig(remat="full")}, r"model.remat: saved 'none', now 'full'.*bits"),
        (
            {"model": ModelConfig(attention=AttentionConfig(kernel="xla"))},
            r"model.attention.kernel: saved 'auto', now 'xla'.*bits",
        ),
        (
            {"model": ModelConfig(recurrence=RecurrenceConfig(unroll=2))},
            r"model.recurrence.unroll: saved 1, now 2.*bits",
        ),
        ({"train": TrainConfig(steps=9000)}, r"train.steps: saved 600, now 9000.*schedule"),
    ],
)
def test_what_may_change_but_makes_a_difference_is_warned_of(change, warning):
    current = dataclasses.replace(RUN, **change)
    check_resumable(to_dict(RUN), current, "x")
    (message,) = resume_warnings(to_dict(RUN), current, "x")
    assert re.search(warning, message)


@pytest.mark.parametrize(
    "change",
    [
        {"residual_dropout_rate": 0.1},
        {"recurrence": RecurrenceConfig(mean_steps=4)},
        {"recurrence": RecurrenceConfig(sampling="fixed")},
        {"recurrence": RecurrenceConfig(ramp="linear", ramp_steps=9)},
    ],
)
def test_options_of_training_alone_make_another_run_not_another_architecture(change):
    current = dataclasses.replace(RUN, model=ModelConfig(**change))
    check_model(to_dict(RUN), current, "x")
    with pytest.raises(CheckpointMismatch, match="x is of another run") as error:
        check_resumable(to_dict(RUN), current, "x")
    assert "architecture" not in str(error.value)


def test_every_listed_option_exists():
    known = flatten_config(to_dict(RUN)).keys()
    listed = {*FREE_ON_RESUME, *SAME_UP_TO_ROUNDING, *OPTIMIZER_OPTIONS, *TRAINING_ONLY, *USER_CODE}
    assert listed <= known
    assert "optimizer.name" not in listed


def test_a_config_of_another_version_is_one_clear_error():
    saved = to_dict(RUN)
    saved["model"]["flux_capacitor"] = 1
    with pytest.raises(CheckpointMismatch, match=r"flux_capacitor.*use the version that wrote"):
        check_resumable(saved, RUN, "x")


def test_an_option_added_since_has_its_default():
    saved = to_dict(RUN)
    del saved["model"]["logit_softcap"]
    check_resumable(saved, RUN, "x")
    capped = dataclasses.replace(RUN, model=ModelConfig(logit_softcap=30.0))
    with pytest.raises(CheckpointMismatch, match=r"logit_softcap: saved None, now 30\.0"):
        check_resumable(saved, capped, "x")
