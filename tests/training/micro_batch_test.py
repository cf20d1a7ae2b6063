"""The micro-batch is the largest that fits, by the numbers of the compiler."""

import dataclasses
import os
import types

import jax
import numpy as np
import pytest

from megatransformer_jax.config.build import build
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.models.cost.memory import tree_bytes
from megatransformer_jax.models.megatransformer import build_model
from megatransformer_jax.runs.build import abstract_train_state
from megatransformer_jax.sharding.mesh import make_mesh
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.training.distributed import make_global_batch
from megatransformer_jax.training.micro_batch import (
    GIB,
    CompiledStep,
    StepMemory,
    budget_in_gib,
    choose_accumulation,
    compile_step,
    possible_accumulations,
    shape_of,
    step_memory,
)
from megatransformer_jax.training.optimizers import build_optimizer
from megatransformer_jax.training.state import init_state
from megatransformer_jax.training.step import make_train_step
from megatransformer_jax.types import Batch, DTypePolicy

SHORT, LONG = np.zeros((16, 8)), np.zeros((8, 16))


class Program:
    """Stands in for a compiled program."""

    def __init__(self, arguments: int, temporaries: int):
        self.memory = (arguments, temporaries)

    def __call__(self, state, batch):
        return state, {}

    def memory_analysis(self):
        arguments, temporaries = self.memory
        return types.SimpleNamespace(
            argument_size_in_bytes=arguments * GIB,
            output_size_in_bytes=arguments * GIB,
            alias_size_in_bytes=arguments * GIB,
            temp_size_in_bytes=temporaries * GIB,
        )


class Silent(Program):
    """On a device whose compiler does not count."""

    def memory_analysis(self):
        return None


def choose(temporaries: dict[int, int], budget: float, arguments: int = 2):
    """The choice among programs of these temporaries; the short rows take one GiB less."""
    tried = []

    def compile_for(parts, batch):
        tried.append((parts, len(batch)))
        return Program(arguments, temporaries[parts] - (batch is SHORT))

    parts, step = choose_accumulation(compile_for, list(temporaries), [SHORT, LONG], budget)
    return parts, step.memory, tried


@pytest.mark.parametrize(
    ("batch_size", "ways", "wanted"),
    [(8, 1, [1, 2, 4, 8]), (12, 2, [1, 2, 3, 6]), (8, 8, [1]), (7, 1, [1, 7])],
)
def test_micro_batches_can_be_cut_for_the_devices(batch_size, ways, wanted):
    assert possible_accumulations(batch_size, ways) == wanted


def test_the_smallest_that_fits_is_chosen_and_nothing_is_compiled_twice():
    parts, memory, tried = choose({1: 9, 2: 10, 4: 6, 8: 3}, budget=8.0)
    assert (parts, memory) == (4, StepMemory(2 * GIB, 0, 6 * GIB))
    assert tried == [(1, len(LONG)), (2, len(LONG)), (4, len(LONG)), (4, len(SHORT))]
    assert choose({1: 6, 2: 4}, budget=8.0)[0] == 1


def test_what_never_fits_is_an_error_with_the_least_that_is_needed():
    with pytest.raises(ConfigError, match=r"4 GiB is not enough.* 5 GiB .*accumulation=2 on") as e:
        choose({1: 6, 2: 3, 4: 5}, budget=4.0)
    assert e.value.path == "train.memory_budget_gib"


def test_a_state_that_does_not_fit_ends_the_search():
    tried = []

    def compile_for(parts, shape):
        tried.append(parts)
        return Program(5, 1)

    with pytest.raises(ConfigError, match="state and batch alone take 5 GiB") as error:
        choose_accumulation(compile_for, [1, 2, 4], [LONG], 4.0)
    assert tried == [1]
    # Not what the whole step takes, which smaller micro-batches were not tried for.
    assert "at least" not in str(error.value)


def test_a_compiler_that_gives_up_or_says_nothing():
    def gives_up(parts, shape):
        if parts == 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of HBM")
        return Program(1, 1)

    assert choose_accumulation(gives_up, [1, 2], [LONG], 4.0)[0] == 2
    with pytest.raises(ConfigError, match="more memory than the device has"):
        choose_accumulation(gives_up, [1], [LONG], 4.0)
    with pytest.raises(ConfigError, match="does not tell how much memory"):
        step_memory(Silent(1, 1))


def test_an_automatic_budget_is_a_share_of_the_smallest_device(monkeypatch):
    assert budget_in_gib(3.0) == 3.0
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    assert budget_in_gib("auto") == pytest.approx(memory / 2 / jax.local_device_count())

    def device(limit):
        statistics = limit and {"bytes_limit": limit * GIB}
        return types.SimpleNamespace(
            memory_stats=lambda: statistics, platform="gpu", device_kind="a GPU"
        )

    devices = [device(80), device(40)]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert budget_in_gib("auto") == pytest.approx(36)
    devices = [device(None)]
    with pytest.raises(ConfigError, match="'a GPU' does not; give a number of GiB"):
        budget_in_gib("auto")


@pytest.fixture(scope="module")
def parts():
    """A small run over 4 x 2 devices, its state and its batch."""
    config = build(
        {
            "model": {
                "vocab_size": 64,
                "width": 16,
                "core_layers": 1,
                "prelude_layers": 0,
                "coda_layers": 0,
                "attention": {"num_heads": 2},
                "mlp": {"hidden_width": 16},
                "recurrence": {"state_init": "zero", "sampling": "fixed", "mean_steps": 2,
                               "backprop_depth": 2},
            },
            "data": {"source": "reasoning", "batch_size": 16, "sequence_length": 16},
        }
    )  # fmt: skip
    sharder = Sharder(make_mesh(dataclasses.replace(config.mesh, data=2, fsdp=4), jax.devices()))
    model = build_model(config.model, DTypePolicy(), sharder, "cpu")
    optimizer = build_optimizer(config.optimizer, config.train.steps)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 64, (16, 16)).astype(np.int32)
    ones = np.ones_like(tokens)
    positions = np.broadcast_to(np.arange(16, dtype=np.int32), tokens.shape)
    batch = Batch(tokens, np.roll(tokens, -1, 1), ones.astype(np.float32), ones, positions)
    return config, sharder, model, optimizer, batch


def test_the_compiled_step_is_measured_per_device_and_trains_the_same(parts):
    config, sharder, model, optimizer, batch = parts
    abstract = abstract_train_state(model, optimizer, sharder, config.fine_tuning)
    placed = make_global_batch(batch, sharder)

    def step_of(accumulation: int):
        train = dataclasses.replace(config.train, accumulation=accumulation)
        return make_train_step(model, optimizer, dataclasses.replace(config, train=train))

    programs = {count: compile_step(step_of(count), abstract, placed) for count in (1, 2)}
    memories = {count: step_memory(program) for count, program in programs.items()}
    batch_bytes = sum(array.nbytes for array in jax.tree.leaves(batch)) // 8
    assert memories[1].arguments == tree_bytes(abstract) + batch_bytes
    assert memories[1].outputs < 1024
    # Half the rows; the rest of the temporaries is of the parameters.
    assert memories[2].temporaries < memories[1].temporaries
    between = (memories[1].total + memories[2].total) / 2 / GIB
    chosen, step = choose_accumulation(
        lambda count, batch: programs[count], [1, 2], [placed], between
    )
    assert chosen == 2 and step.memory == memories[2]

    def state():
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        make = jax.jit(lambda key: init_state(model, optimizer, key), out_shardings=shardings)
        return make(jax.random.key(0))

    whole, metrics = CompiledStep({shape_of(batch): programs[1]}, memories[1])(state(), placed)
    in_parts, other = step(state(), placed)
    in_parts, _ = step(in_parts, placed)  # The new state is placed as the old one.
    np.testing.assert_allclose(metrics["loss"], other["loss"], rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], other["grad_norm"], rtol=1e-5)
    assert int(whole.step) == 1 and int(in_parts.step) == 2
