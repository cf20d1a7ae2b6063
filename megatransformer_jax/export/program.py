"""A model's two passes with a cache as pure functions of named arrays: what an export writes.

`prefill` reads `chunk` tokens per row, `step` one. But for that number both are one function: from
tokens, keys, how deep, and every array of the cache to the logits of each row's last token, its
iterations, and every array of the cache again. So a loop in any language can call them.

    programs = build_programs(model, params, trained_depth, ProgramConfig(batch=2, capacity=256))
    outputs, cache = jax.jit(programs.call)(named(params), inputs, programs.empty_cache())

The passes are those of generation (`models.passes.cached`), so they give its numbers. They are laid
out for a CPU: attention in plain operations, and blocks of a CPU's cache, which every platform can
run.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from megatransformer_jax.config.exporting import DEFAULT_CAPACITY, ProgramConfig
from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.config.sampling import GATE_THRESHOLD, slots_of_any_depth
from megatransformer_jax.models.exit_criteria import DepthRule, exit_criterion, one_of
from megatransformer_jax.models.gate_readout import make_readout
from megatransformer_jax.models.megatransformer import MegaTransformer, off_mesh
from megatransformer_jax.models.passes.cached import NewTokens, cached_forward, last_token
from megatransformer_jax.nn.kv_cache import CacheShape, KVCache, init_cache

# What the rows of a cache are laid out for, and their keys drawn by, on every platform.
PLATFORM = "cpu"
KEY_IMPL = "threefry2x32"
# Of a cache with more rows onnxruntime, whose loops are slow, reads blocks too.
WHOLE_ROWS = 2048
_FIXED = "fixed"

Arrays = dict[str, jax.Array]
Shapes = dict[str, jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True)
class Programs:
    """Both passes of a model, and what a loop around them must know.

    Attributes:
      model: laid out for export.
      shape: of the cache.
      config: what was asked for, with no option left at None.
      structure: the tree of the parameters, whose leaves `named` gives in the same order.
    """

    model: MegaTransformer
    shape: CacheShape
    config: ProgramConfig
    structure: Any

    @property
    def columns(self) -> dict[str, int]:
        """Tokens per row by the program's name."""
        return {"prefill": self.config.chunk, "step": 1}

    @property
    def draws_states(self) -> bool:
        """Whether the core's first states are drawn, so that rows need keys."""
        recurrence = self.model.config.recurrence
        return self.model.config.is_recurrent and recurrence.state_init not in ("zero", "none")

    def call(self, params: Arrays, inputs: Arrays, cache: Arrays) -> tuple[Arrays, Arrays]:
        """A pass over the tokens of `inputs`; pure, to be traced.

        Args:
          params: by name, in the order of `named`.
          inputs: by name, see `inputs`.
          cache: by name, see `cache`.

        Returns:
          Logits of each row's last token, float32 [B, V], with its iterations, int32 [B], if there
          is a core; and the cache with the tokens.
        """
        keys = None
        if self.draws_states:
            keys = jax.random.wrap_key_data(inputs["keys"], impl=KEY_IMPL)
        output = cached_forward(
            self.model,
            self._tree(params),
            NewTokens(inputs["tokens"], inputs["is_token"], state_keys=keys),
            self._cache_of(cache),
            self._rule(inputs),
            last_logits_only=True,
        )
        results = {"logits": output.logits[:, 0].astype(jnp.float32)}
        if self.model.config.is_recurrent:
            steps = output.num_steps[..., None].astype(jnp.float32)
            results["num_steps"] = last_token(steps, inputs["is_token"])[:, 0].astype(jnp.int32)
        return results, _cache_arrays(output.cache)

    def inputs(self, name: str) -> Shapes:
        """Names, shapes and types of what a program is given, in its order."""
        size = (self.shape.batch_size, self.columns[name])
        found = {"tokens": _shape(size, jnp.int32), "is_token": _shape(size, jnp.bool_)}
        if self.draws_states:
            found["keys"] = _shape((self.shape.batch_size, 2), jnp.uint32)
        if self.model.config.is_recurrent:
            found["depth"] = _shape((), jnp.int32)
            if self.config.criterion != (_FIXED,):
                found |= {"threshold": _shape((), jnp.float32), "min_depth": _shape((), jnp.int32)}
            if self.config.gate_readout == "threshold":
                found["gate_threshold"] = _shape((), jnp.float32)
            if len(self.config.criterion) > 1:
                found["criterion"] = _shape((), jnp.int32)
        return found

    def outputs(self, params: Shapes, name: str) -> Shapes:
        """Names, shapes and types of what a program returns besides the cache, in its order."""
        found, _ = jax.eval_shape(self.call, params, self.inputs(name), self.cache)
        return {key: found[key] for key in ("logits", "num_steps") if key in found}

    @property
    def cache(self) -> Shapes:
        """Names, shapes and types of the cache's arrays."""
        found: Shapes = jax.eval_shape(self.empty_cache)
        return {name: found[name] for name in self._cache_order}

    def empty_cache(self) -> Arrays:
        """The arrays of a cache without tokens, by name."""
        return _cache_arrays(self._new_cache())

    def _new_cache(self) -> KVCache:
        cache = init_cache(self.model.config, self.shape)
        if self.config.format == "onnx" and self.shape.rows <= WHOLE_ROWS:
            cache = cache.replace(block_rows=0)  # type: ignore[attr-defined]
        return cache

    @functools.cached_property
    def _cache_order(self) -> tuple[str, ...]:
        # Results of traced functions have sorted names.
        order: list[str] = []
        jax.eval_shape(lambda: order.extend(self.empty_cache()))
        return tuple(order)

    def _cache_of(self, arrays: Arrays) -> KVCache:
        def take(path: Any, empty: jax.Array) -> jax.Array:
            return arrays.get(_cache_name(path), empty)

        cache: KVCache = jax.tree_util.tree_map_with_path(take, self._new_cache())
        return cache

    def _tree(self, params: Arrays) -> Any:
        # The names of traced functions come sorted.
        places = jax.tree.unflatten(self.structure, range(self.structure.num_leaves))
        order = {place: name for name, place in named(places).items()}
        return jax.tree.map(lambda place: params[order[place]], places)

    def _rule(self, inputs: Arrays) -> DepthRule:
        names = self.config.criterion
        criterion = exit_criterion(names[0])
        if "criterion" in inputs:
            criterion = one_of(names, inputs["criterion"])
        # The number is one of the inputs, or none is read.
        readout = make_readout(self.config.gate_readout, GATE_THRESHOLD)
        if "gate_threshold" in inputs:
            readout = readout.replace(threshold=inputs["gate_threshold"])  # type: ignore[union-attr]
        return DepthRule(
            depth=inputs.get("depth", jnp.int32(1)),
            threshold=inputs.get("threshold", jnp.float32(0)),
            min_depth=inputs.get("min_depth", jnp.int32(1)),
            criterion=criterion,
            readout=readout,
        )


def build_programs(
    model: MegaTransformer, params: Any, trained_depth: int | None, config: ProgramConfig
) -> Programs:
    """The programs of a model.

    Args:
      model: any model of text.
      params: its parameters; only their tree is looked at.
      trained_depth: mean iterations in training; None without a core.
      config: what is asked for.

    Raises:
      ConfigError: if the model cannot be exported, or an option does not fit it.
    """
    _check(model, config)
    of_model = model.config
    capacity = config.capacity or min(of_model.max_length, DEFAULT_CAPACITY)
    slots = slots_of_any_depth(config.cache_slots, trained_depth)
    shape = CacheShape(
        config.batch,
        capacity,
        slots if of_model.is_recurrent else 1,
        model.policy.compute,
        PLATFORM,
        config.cache_sharing,
        config.cache_exited_reads,
    )
    config = dataclasses.replace(
        config,
        capacity=shape.rows,
        cache_slots=shape.num_slots,
        chunk=min(config.chunk, shape.rows),
    )
    model = off_mesh(model).copy(platform=PLATFORM)
    return Programs(model, shape, config, jax.tree.structure(params))


def named(tree: Any) -> Arrays:
    """A tree of parameters as one dict, with names as 'core/layers/layer_0/mlp/up/kernel'."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return {name(path): leaf for path, leaf in leaves}


def _check(model: MegaTransformer, config: ProgramConfig) -> None:
    of_model: ModelConfig = model.config
    if of_model.has_media:
        kind = "image" if of_model.image.enabled else "audio"
        raise ConfigError(
            f"model.{kind}.enabled",
            "is True, and a program reads and writes text alone; export a model without media.",
        )
    if not of_model.is_recurrent:
        config.check_model_without_core()
    elif not of_model.exit_gate.enabled:
        reads_gate = "learned_gate" in config.criterion or config.gate_readout != "last"
        if reads_gate:
            name = "criterion" if "learned_gate" in config.criterion else "gate_readout"
            raise ConfigError(
                name,
                "reads an exit gate, and the model has none (model.exit_gate.enabled); choose "
                "another.",
            )
    if config.capacity is not None and config.capacity > of_model.max_length:
        raise ConfigError(
            "capacity",
            f"{config.capacity} exceeds the {of_model.max_length} tokens that the model reads "
            "(max_length); lower it.",
        )
    if config.format == "onnx" and model.policy.compute != jnp.float32:
        raise ConfigError(
            "precision",
            f"activations are {model.policy.compute}, and onnxruntime computes in float32 on "
            "every machine; give precision='float32'.",
        )


def _shape(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _cache_name(path: Any) -> str:
    return f"cache{jax.tree_util.keystr(path)}"


def _cache_arrays(cache: Any) -> dict[str, Any]:
    """Arrays of a cache by name, without those of stacks that have no layers."""
    leaves = jax.tree_util.tree_leaves_with_path(cache)
    return {_cache_name(path): leaf for path, leaf in leaves if 0 not in leaf.shape}
