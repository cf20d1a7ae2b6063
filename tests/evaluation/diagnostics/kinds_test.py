"""The hook measures on a mesh, draws every kind, and writes finite values."""

import logging as std_logging
import types

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatransformer_jax.config.build import build
from megatransformer_jax.config.loop import DIAGNOSTIC_KINDS, LoggingConfig
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.evaluation.diagnostics.kinds import (
    DiagnosticsHook,
    Moment,
    Subject,
    build_measure,
    kinds_of,
    make_subject,
    present,
)
from megatransformer_jax.models.megatransformer import build_model, init_params, param_axes
from megatransformer_jax.sharding.mesh import make_mesh
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.training.loop import Hook, is_due
from megatransformer_jax.training.writers import MultiWriter, build_writer
from megatransformer_jax.types import Batch, DTypePolicy

std_logging.getLogger("matplotlib").setLevel(std_logging.WARNING)
RUN = {
    "model": {
        "vocab_size": 16,
        "width": 8,
        "prelude_layers": 1,
        "core_layers": 1,
        "coda_layers": 1,
        "attention": {"num_heads": 2},
        "mlp": {"hidden_width": 8},
        "recurrence": {"mean_steps": 2, "max_steps": 6, "backprop_depth": 1},
    },
    "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
    "data": {"source": "reasoning", "batch_size": 4, "sequence_length": 8},
    "diagnostics": {"every_steps": 5},
}


def run_config(**changes) -> RunConfig:
    return build(RUN | changes)


@pytest.fixture(scope="module")
def run():
    """Config, subject on a mesh of eight devices, and a state to look at."""
    config = run_config()
    sharder = Sharder(make_mesh(config.mesh, jax.devices()))
    model = build_model(config.model, DTypePolicy(), sharder, "cpu")
    axes = param_axes(model)
    params = jax.tree.map(
        lambda array, names: jax.device_put(array, sharder.sharding(*names)),
        init_params(model, jax.random.key(0)),
        axes,
        is_leaf=lambda node: isinstance(node, jax.Array),
    )
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 16, (4, 8)).astype(np.int32)
    segments = np.ones((4, 8), np.int32)
    segments[1, 5:] = 0
    batch = Batch(
        tokens,
        np.roll(tokens, -1, axis=1),
        (segments > 0).astype(np.float32),
        segments,
        np.broadcast_to(np.arange(8, dtype=np.int32), (4, 8)),
    )
    rows = sharder.sharding("batch", "length")
    batch = jax.tree.map(lambda part: jax.device_put(part, rows), batch)
    key_data = jax.device_put(jax.random.key_data(jax.random.key(1)), sharder.sharding())
    state = types.SimpleNamespace(params=params, key_data=key_data)
    return config, make_subject(config, model, batch, sharder), state


@pytest.fixture(scope="module")
def written(run, tmp_path_factory):
    """What the hook wrote and returned after step 10."""
    _, subject, state = run
    folder = tmp_path_factory.mktemp("run")
    writer = build_writer(LoggingConfig(), folder, is_primary=True)
    hook = DiagnosticsHook(subject, lambda s: s.params, writer, folder / "diagnostics")
    assert isinstance(hook, Hook)
    scalars = hook(10, state, {})
    writer.close()
    return folder, scalars


def test_every_kind_has_a_figure_in_the_workdir_and_in_tensorboard(written):
    folder, _ = written
    files = {path.name: path for path in (folder / "diagnostics" / "step_000010").iterdir()}
    assert set(files) == {f"{kind}.png" for kind in DIAGNOSTIC_KINDS}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files.values())
    events = EventAccumulator(str(folder / "events"))
    events.Reload()
    assert set(events.Tags()["images"]) == {f"diagnostics/{kind}" for kind in DIAGNOSTIC_KINDS}
    names = {name.removeprefix("diagnostics/activations/") for name in events.Tags()["histograms"]}
    iterations = [f"core/layer_0/iteration_{number}" for number in (1, 2, 4)]
    assert names == {"prelude/layer_0", "coda/layer_0", *iterations}
    for name in events.Tags()["histograms"]:
        histogram = events.Histograms(name)[0].histogram_value
        # Two rows of 8 tokens of which 3 are padding, of width 8.
        assert histogram.num == 13 * 8
        assert np.isfinite([histogram.min, histogram.max]).all()


def test_scalars_are_finite_and_named(written):
    scalars = written[1]
    assert all(np.isfinite(value) for value in scalars.values())
    assert {f"diagnostics/{name}" for name in (
        "gradient_norm/core/layers/layer_0", "weight_norm/prelude/layer_0", "residual",
        "contraction", "state_norm", "spectral_radius", "mean_drawn_steps",
        "token_correlation/core/layer_0", "activation_rms/coda/layer_0",
    )} <= scalars.keys()  # fmt: skip
    assert 1 <= scalars["diagnostics/mean_drawn_steps"] <= 6
    assert scalars["diagnostics/gradient_norm/core/layers/layer_0"] > 0


def test_a_mesh_changes_nothing(run, written):
    config, subject, state = run
    alone = Subject(
        config,
        subject.model,
        jax.tree.map(np.asarray, subject.rows),
        subject.mean_steps,
        subject.num_steps,
        Sharder(),
    )
    moment = Moment(jax.device_get(state.params), np.asarray(state.key_data), 10, 5)
    measured = jax.device_get(build_measure("recurrence", alone)(moment))
    for name, value in present("recurrence", measured, alone, moment).scalars.items():
        np.testing.assert_allclose(value, written[1][f"diagnostics/{name}"], rtol=1e-4)


@pytest.mark.parametrize("kinds", [("depth_draws",), ("attention_maps", "depth_draws")])
def test_only_the_chosen_kinds_are_made(run, tmp_path, kinds):
    _, subject, state = run
    config = run_config(diagnostics={"every_steps": 5, "kinds": kinds})
    hook = DiagnosticsHook(
        Subject(config, subject.model, subject.rows, 2, 4, subject.sharder),
        lambda s: s.params,
        build_writer(LoggingConfig(writers=()), tmp_path, is_primary=True),
        tmp_path,
    )
    hook(5, state, {})
    assert {path.stem for path in (tmp_path / "step_000005").iterdir()} == set(kinds)


def test_other_processes_measure_and_write_nothing(run, tmp_path):
    _, subject, state = run
    config = run_config(diagnostics={"every_steps": 5, "kinds": ("depth_draws",)})
    writer = build_writer(LoggingConfig(), tmp_path, is_primary=False)
    subject = Subject(config, subject.model, subject.rows, 2, 4, subject.sharder)
    assert DiagnosticsHook(subject, lambda s: s.params, writer, None)(5, state, {}) == {}
    assert not list(tmp_path.iterdir())


def test_values_that_are_not_finite_do_not_stop_a_run(run, tmp_path):
    """A model may overflow although its parameters are finite."""
    _, subject, state = run
    params = jax.tree.map(lambda array: array * np.float32(np.inf), state.params)
    config = run_config(diagnostics={"every_steps": 5, "kinds": ("activations", "recurrence")})
    writer = build_writer(LoggingConfig(), tmp_path, is_primary=True)
    subject = Subject(config, subject.model, subject.rows, 2, 4, subject.sharder)
    hook = DiagnosticsHook(subject, lambda s: params, writer, tmp_path / "diagnostics")
    assert hook(5, state, {}) == {}
    writer.close()
    assert (tmp_path / "diagnostics" / "step_000005" / "activations.png").exists()


def test_schedule(run):
    _, subject, _ = run
    hook = DiagnosticsHook(subject, lambda s: s.params, MultiWriter(()), None)
    due = [
        step for step in range(1, 13) if is_due(hook, step, is_last=step == 12, is_stopping=False)
    ]
    assert due == [5, 10, 12]
    assert not is_due(hook, 7, is_last=False, is_stopping=True)


def test_a_plain_model_has_no_recurrent_kinds(run):
    _, subject, _ = run
    config = run_config(model={"core_layers": 0, "vocab_size": 16})
    plain = Subject(config, subject.model, subject.rows, 0, 0, subject.sharder)
    assert kinds_of(plain) == (
        "gradient_norms", "activations", "attention_maps", "token_correlation",
    )  # fmt: skip


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_the_first_rows_are_taken(run, rows):
    config, subject, _ = run
    config = run_config(diagnostics={"every_steps": 5, "num_rows": rows})
    batch = Batch(*(np.arange(32).reshape(4, 8) + n for n in range(5)))
    taken = make_subject(config, subject.model, batch, Sharder()).rows
    assert taken.media is None
    for part, whole in zip(taken[:-1], batch[:-1], strict=True):
        np.testing.assert_array_equal(part, whole[:rows])
