"""The programs of training and generation for slices that need not be here, lowered from shapes.

They are those that a run, `Model.generate` and a server compile on the slice itself: the same
functions, with the shapes, types and shardings of their arguments in place of arrays.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding

from megatransformer_jax.config.compiling import CRITERIA, DEFAULT_CAPACITY, CompileConfig
from megatransformer_jax.config.generation import GenerationConfig, for_model
from megatransformer_jax.config.loop import DataMeshConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.config.sampling import slots_of_any_depth
from megatransformer_jax.config.serving import MAX_END_IDS, MAX_LOGIT_BIAS, MAX_LOGPROBS
from megatransformer_jax.generation.continuous import programs
from megatransformer_jax.generation.continuous.batcher import DONATED, program_of
from megatransformer_jax.generation.continuous.lanes import BatchShape
from megatransformer_jax.generation.decode_loop import DecodeSettings, DecodeState, decode, start
from megatransformer_jax.generation.endings import Ending
from megatransformer_jax.generation.generator import depth_rule
from megatransformer_jax.generation.history import History
from megatransformer_jax.generation.placement import constrain_rows, for_rows
from megatransformer_jax.generation.prefill import Prefilled, left_padded, prefill
from megatransformer_jax.generation.processors.build import build_chain
from megatransformer_jax.generation.request import plan_cache
from megatransformer_jax.models.attention_kernels import KernelChoice, kernel_choices
from megatransformer_jax.models.cost.memory import tree_bytes
from megatransformer_jax.models.exit_criteria import DepthRule
from megatransformer_jax.models.megatransformer import (
    MegaTransformer,
    build_model,
    param_axes,
)
from megatransformer_jax.models.passes.cached import NewTokens
from megatransformer_jax.models.weights import computed_types, read_format
from megatransformer_jax.nn.kv_cache import KVCache, constrain_cache, init_cache, rows_to_blocks
from megatransformer_jax.runs.build import (
    abstract_batches,
    abstract_train_state,
    build_sharded_model,
    trained_depth,
    training_kernels,
)
from megatransformer_jax.sharding.mesh import make_mesh, make_sharder
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.training.micro_batch import lower_step
from megatransformer_jax.training.optimizers import build_optimizer
from megatransformer_jax.training.step import make_train_step
from megatransformer_jax.types import DTypePolicy

Lowered = jax.stages.Lowered


@dataclasses.dataclass(frozen=True)
class PhasePrograms:
    """What a phase compiles.

    Attributes:
      lower: by the program's name.
      mesh: that the programs are laid over. None: they run on one device.
      kernels: attention of passes over whole rows; empty where the phase makes none.
      cache_bytes: keys and values on one device; 0 without a cache.
      held_bytes: weights and cache on one device, before any program runs; 0 of a train step.
      rows: of the batch, over all devices.
      row_step: rows can be changed by multiples of this.
    """

    lower: dict[str, Callable[[], Lowered]]
    mesh: Mesh | None
    kernels: tuple[KernelChoice, ...]
    cache_bytes: int
    held_bytes: int
    rows: int
    row_step: int


def phase_programs(
    config: RunConfig, compiling: CompileConfig, devices: Sequence[Any]
) -> PhasePrograms:
    """The programs of a phase; nothing is traced yet.

    Args:
      config: of the run.
      compiling: which phase, and its sizes.
      devices: of the topology.

    Raises:
      ConfigError: if mesh, model and sizes do not fit each other.
    """
    if compiling.phase == "train":
        return _train_programs(config, devices)
    place = _Placement.of(config, devices)
    if compiling.phase == "serve":
        return _server_programs(config, compiling, place)
    return _generation_programs(config, compiling, place)


# ------------------------------------------------------------------------------
# Training.


def _train_programs(config: RunConfig, devices: Sequence[Any]) -> PhasePrograms:
    if config.train.memory_budget_gib is not None:
        raise ConfigError(
            "train.memory_budget_gib",
            f"{config.train.memory_budget_gib!r} lets a run choose train.accumulation on its own "
            "devices; leave it None here and set accumulation, or let --search choose it.",
        )
    model, sharder = build_sharded_model(config, devices)
    optimizer = build_optimizer(config.optimizer, config.train.steps, config.train.ema_decay)

    def lower() -> Lowered:
        state = abstract_train_state(model, optimizer, sharder, config.fine_tuning)
        # Of several lengths of rows the longest take the most.
        batch = abstract_batches(config, sharder)[-1]
        return lower_step(make_train_step(model, optimizer, config), state, batch)

    return PhasePrograms(
        {"train step": lower},
        sharder.mesh,
        training_kernels(config, model),
        cache_bytes=0,
        held_bytes=0,
        rows=config.data.batch_size,
        row_step=sharder.ways("batch") * config.train.accumulation,
    )


# ------------------------------------------------------------------------------
# Where the arrays of a generation are.


class _Shapes(Sharder):
    """Gives shapes the shardings that a `Sharder` asks the compiler to give arrays."""

    def constrain(self, array: Any, *logical_axes: str | None) -> Any:
        """The shape with the sharding of the table."""
        sharding = self.sharding(*logical_axes)
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


@dataclasses.dataclass(frozen=True)
class _Placement:
    """A model for generation, on one device without a mesh or on a mesh over all of them."""

    model: MegaTransformer
    device: Any

    @classmethod
    def of(cls, config: RunConfig, devices: Sequence[Any]) -> "_Placement":
        sharder = Sharder()
        if _asks_for_mesh(config.mesh):
            sharder = make_sharder(config.model, make_mesh(config.mesh, devices))
        platform = devices[0].platform
        attention = dataclasses.replace(config.model.attention, kernel="auto")
        model_config = dataclasses.replace(config.model, attention=attention)
        policy = DTypePolicy.from_precision(config.train.precision, platform)
        return cls(build_model(model_config, policy, sharder, platform), devices[0])

    def params(self) -> Any:
        """Of the model, as `load_model` places them."""
        shapes = computed_types(self.model)
        if self.model.sharder.mesh is None:
            placed = self.replicated(shapes)
        else:
            sharder = _Shapes(self.model.sharder.mesh, self.model.sharder.rules)
            placed = jax.tree.map(
                lambda leaf, axes: sharder.constrain(leaf, *axes), shapes, param_axes(self.model)
            )

        def in_order(leaf: Any) -> Any:
            place = read_format(self.model, leaf.ndim, leaf.sharding)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

        return jax.tree.map(in_order, placed)

    def rows(self, count: int, tree: Any) -> Any:
        """Arrays that are cut as rows; single numbers are everywhere."""
        sharder = for_rows(self.model, count).sharder
        if sharder.mesh is None:
            return self.replicated(tree)
        shapes = _Shapes(sharder.mesh, sharder.rules)

        def place(leaf: Any) -> Any:
            return constrain_rows(shapes, leaf) if leaf.ndim else shapes.constrain(leaf)

        return jax.tree.map(place, tree)

    def cache(self, count: int, cache: KVCache) -> KVCache:
        """Keys and values, cut as rows and heads."""
        sharder = for_rows(self.model, count).sharder
        if sharder.mesh is None:
            return self.replicated(cache)
        placed = constrain_cache(_Shapes(sharder.mesh, sharder.rules), cache)
        return jax.tree.map(
            lambda leaf: leaf if leaf.sharding is not None else self.replicated(leaf), placed
        )

    def replicated(self, tree: Any) -> Any:
        """Arrays that are whole on every device of the mesh, or on the one device."""
        mesh = self.model.sharder.mesh
        sharding: Any = SingleDeviceSharding(self.device)
        if mesh is not None:
            sharding = self.model.sharder.sharding()
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype, sharding=sharding), tree
        )

    def cache_bytes(self, cache: KVCache) -> int:
        """Keys and values on one device."""
        entries = jax.tree.leaves((cache.prelude, cache.core, cache.coda))
        return sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in entries
        )


def _asks_for_mesh(config: DataMeshConfig) -> bool:
    return config.data > 1 or math.prod(config.inner.values()) > 1


# ------------------------------------------------------------------------------
# A generation: its prompts, and its loop over new tokens.


@dataclasses.dataclass(frozen=True)
class _Generation:
    """Shapes of what a generation computes with."""

    model: MegaTransformer
    params: Any
    settings: DecodeSettings
    prompts: NewTokens
    history: History
    cache: KVCache

    def read(self, params: Any, prompts: NewTokens, cache: KVCache, rule: DepthRule) -> Prefilled:
        """All columns of the prompts in one pass, as generation does by default."""
        return prefill(self.model, params, prompts, cache, rule)

    def lower_prefill(self) -> Lowered:
        """The pass over the prompts."""
        step = jax.jit(self.read, donate_argnums=2)
        return step.lower(self.params, self.prompts, self.cache, self.settings.rule)

    def state(self) -> DecodeState:
        """Shapes of what the loop over new tokens starts with, not placed."""
        args = (self.params, self.prompts, self.cache, self.settings.rule)
        prefilled = jax.eval_shape(self.read, *args)
        state: DecodeState = jax.eval_shape(start, self.settings, prefilled, self.history)
        return state


def _generation_programs(
    config: RunConfig, compiling: CompileConfig, place: _Placement
) -> PhasePrograms:
    rows = compiling.num_rows
    generation, columns = _generation(config, compiling, place)

    def lower_decode() -> Lowered:
        state: Any = generation.state()
        cache = place.cache(rows, state.cache)
        state = place.rows(rows, state.replace(cache=None)).replace(cache=cache)
        count = place.replicated(jax.ShapeDtypeStruct((), jnp.int32))
        return decode.lower(generation.model, generation.params, generation.settings, state, count)

    kernels: tuple[KernelChoice, ...] = ()
    lower = {"decode": lower_decode}
    if compiling.phase == "prefill":
        lower = {"prefill": generation.lower_prefill}
        kernels = kernel_choices(generation.model, [columns], is_training=False)
    cache_bytes = place.cache_bytes(generation.cache)
    return PhasePrograms(
        lower,
        place.model.sharder.mesh,
        kernels,
        cache_bytes,
        tree_bytes(generation.params) + cache_bytes,
        rows,
        generation.model.sharder.ways("batch"),
    )


def _generation(
    config: RunConfig, compiling: CompileConfig, place: _Placement
) -> tuple[_Generation, int]:
    """The shapes; and columns of the prompts."""
    total = compiling.prompt_tokens + compiling.new_tokens
    if total > config.model.max_length:
        raise ConfigError(
            "prompt_tokens",
            f"{compiling.prompt_tokens}, with new_tokens={compiling.new_tokens}, is more than the "
            f"model's max_length={config.model.max_length}; lower prompt_tokens or new_tokens.",
        )
    rows, depth = compiling.num_rows, trained_depth(config)
    options = {
        "strategy": "greedy",
        "max_new_tokens": compiling.new_tokens,
        "depth": compiling.depth,
        "exit_criterion": compiling.exit_criterion,
        "cache_slots": compiling.cache_slots,
    }
    has_gate = config.model.exit_gate.enabled
    request = for_model(GenerationConfig.of(**options), depth, has_exit_gate=has_gate)
    model = for_rows(place.model, rows)
    longest = compiling.prompt_tokens
    plan = plan_cache(config.model, request, depth, longest, request.max_new_tokens, model.platform)
    shape = plan.shape(model, request.cache, rows)
    cache = place.cache(rows, jax.eval_shape(lambda: init_cache(model.config, shape)))
    ints = jax.ShapeDtypeStruct((rows,), jnp.int32)
    tokens = jax.ShapeDtypeStruct((rows, plan.capacity), jnp.int32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    history, keys = place.rows(rows, (History(tokens, ints, ints), keys))
    prompts = jax.eval_shape(lambda *given: left_padded(*given, plan.num_columns), history, keys)
    numbers = (
        depth_rule(request),
        build_chain(request, None, config.model.vocab_size),
        Ending(jnp.zeros(1, jnp.int32), jnp.int32(1), None),
    )
    rule, chain, ending = place.replicated(numbers)
    settings = DecodeSettings(rule, chain, ending, keys, sharder=model.sharder)
    params = place.params()
    generation = _Generation(model, params, settings, place.rows(rows, prompts), history, cache)
    return generation, plan.num_columns


# ------------------------------------------------------------------------------
# A server's batch.


def _server_programs(
    config: RunConfig, compiling: CompileConfig, place: _Placement
) -> PhasePrograms:
    model, params = place.model, place.params()
    shape = _batch_shape(config, compiling, model.platform)
    batch = jax.eval_shape(lambda params: programs.empty_batch(model, shape, params), params)
    batch = programs.Batch(
        place.rows(shape.rows, batch.lanes), place.cache(shape.rows, batch.cache)
    )
    number = place.replicated(jax.ShapeDtypeStruct((), jnp.int32))
    allowed = place.replicated(jax.ShapeDtypeStruct((config.model.vocab_size,), bool))
    arguments: dict[str, tuple[Any, ...]] = {
        "prefill": (params, batch, number),
        "turn": (params, allowed, batch),
    }
    if config.model.is_recurrent:
        limits = place.replicated(jax.ShapeDtypeStruct((4,), jnp.int32))
        arguments["step"] = (params, allowed, batch, limits)

    def lowering(name: str) -> Callable[[], Lowered]:
        sizes = (shape.chunk,) if name == "prefill" else ()
        function = functools.partial(program_of(name), model, shape, *sizes)
        # A batcher flattens the arguments. The program is the same; here they keep their names.
        program = jax.jit(function, donate_argnums=DONATED[name])
        return lambda: program.lower(*arguments[name])

    cache_bytes = place.cache_bytes(batch.cache)
    return PhasePrograms(
        {name: lowering(name) for name in arguments},
        model.sharder.mesh,
        (),
        cache_bytes,
        tree_bytes(params) + cache_bytes,
        shape.rows,
        model.sharder.ways("batch"),
    )


def _batch_shape(config: RunConfig, compiling: CompileConfig, platform: str) -> BatchShape:
    """As a server chooses it, unless the options say otherwise."""
    longest, depth = config.model.max_length, trained_depth(config)
    capacity = compiling.capacity or min(DEFAULT_CAPACITY, longest)
    if capacity > rows_to_blocks(longest, platform):
        raise ConfigError(
            "capacity",
            f"{capacity} tokens are more than the model's max_length={longest}; lower it.",
        )
    criteria: tuple[str, ...] = ("fixed",)
    slots = 1
    if depth is not None:
        has_gate = config.model.exit_gate.enabled
        criteria = tuple(name for name in CRITERIA if has_gate or name != "learned_gate")
        slots = slots_of_any_depth(compiling.cache_slots, depth)
    return BatchShape(
        rows=compiling.num_rows,
        capacity=min(rows_to_blocks(capacity, platform), longest),
        num_slots=slots,
        criteria=criteria,
        num_top=MAX_LOGPROBS,
        num_bias=MAX_LOGIT_BIAS,
        num_ends=MAX_END_IDS,
    )
