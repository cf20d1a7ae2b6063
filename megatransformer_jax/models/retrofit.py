"""Depth recurrence for a plain causal model (retrofitting, McLeish et al., arXiv 2511.07384).

The first layers of the plain model become the prelude, its last the coda, and a run of layers
between them the core; the layers left over are dropped. Everything else (embedding, final norm,
head) is taken as it is.

The adapter starts so that the core's input is the injected embedding, whatever the state: then the
model computes the same at every depth, namely what the plain one does without the dropped layers
(with `recurrence.output_norm=False`; otherwise the core's last state is normalised as well).
`linear`: W_e is the identity and W_s zero. W_s still learns, as its gradient is the state times
that of the core's input, and no state but the first is zero. `diagonal`: dt B is the identity; the
decayed state is added from the second iteration on. `sum`: likewise with all of the state. `none`:
each iteration reads what the one before it made, so the model is the plain one at depth 1.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from megatransformer_jax.config.build import to_dict
from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.nn.adapters import diagonal_gain


@dataclasses.dataclass(frozen=True)
class RetrofitPlan:
    """Layers of the plain model, counted from 0 through its prelude and coda."""

    prelude: tuple[int, ...]
    core: tuple[int, ...]
    coda: tuple[int, ...]
    dropped: tuple[int, ...]


def retrofit_options(source: ModelConfig) -> dict[str, Any]:
    """Options of a recurrent model that keeps all layers of a plain one, the rest being its.

    A quarter of the layers are the prelude, a quarter the coda, and at least one each.

    Args:
      source: the plain model.

    Returns:
      prelude_layers, core_layers and coda_layers, and 'attention' with the windows of the layers.

    Raises:
      ConfigError: if the source has a core already, or fewer than three layers.
    """
    if source.is_recurrent:
        raise _has_a_core(source)
    windows = _layer_windows(source)
    if len(windows) < 3:
        raise ConfigError(
            "fine_tuning.retrofit",
            f"True needs a plain model of at least 3 layers, for prelude, core and coda, but that "
            f"of fine_tuning.init_from has {len(windows)}; choose a deeper one.",
        )
    outer = max(1, len(windows) // 4)
    parts = {
        "prelude": windows[:outer],
        "core": windows[outer:-outer],
        "coda": windows[-outer:],
    }
    attention = to_dict(source.attention)
    for stack, of_layers in parts.items():
        is_uniform = len(set(windows)) == 1
        attention[f"{stack}_windows"] = [] if is_uniform else [size or 0 for size in of_layers]
    attention["window"] = windows[0] if len(set(windows)) == 1 else None
    layers = {f"{stack}_layers": len(of_layers) for stack, of_layers in parts.items()}
    return {**layers, "attention": attention}


def plan_retrofit(source: ModelConfig, target: ModelConfig, core_start: int | None) -> RetrofitPlan:
    """Which layer goes where.

    Args:
      source: the plain model.
      target: the recurrent one.
      core_start: `fine_tuning.core_start`.

    Raises:
      ConfigError: if the source has a core, or too few layers, if layers share weights, or if some
        would be dropped of a source with value embeddings.
    """
    for name, config in (("that of fine_tuning.init_from", source), ("this one", target)):
        if config.sharing.scheme != "none":
            raise ConfigError(
                "fine_tuning.retrofit",
                f"True needs models whose layers have weights of their own, but {name} has "
                f"sharing.scheme={config.sharing.scheme!r}; use models with scheme='none'.",
            )
    if source.is_recurrent:
        raise _has_a_core(source)
    num_layers = source.prelude_layers + source.coda_layers
    last = num_layers - target.coda_layers
    start = last - target.core_layers if core_start is None else core_start
    end = start + target.core_layers
    if start < target.prelude_layers or end > last:
        wanted = (
            f"prelude_layers={target.prelude_layers}, core_layers={target.core_layers} and "
            f"coda_layers={target.coda_layers}"
        )
        if core_start is None:
            raise ConfigError(
                "fine_tuning.retrofit",
                f"{wanted} need more than the {num_layers} layers of fine_tuning.init_from; take "
                "fewer.",
            )
        raise ConfigError(
            "fine_tuning.core_start",
            f"{core_start}: with {wanted} of {num_layers} layers, the core must start at "
            f"{target.prelude_layers} or later and at {last - target.core_layers} or earlier.",
        )
    kept = (range(target.prelude_layers), range(start, end), range(last, num_layers))
    used = {layer for part in kept for layer in part}
    dropped = tuple(layer for layer in range(num_layers) if layer not in used)
    if dropped and source.value_embedding.layers:
        raise ConfigError(
            "fine_tuning.retrofit",
            f"True would drop the layers {list(dropped)} of fine_tuning.init_from, whose value "
            f"embeddings are of layers {list(source.value_embedding.layers)} by number; give the "
            f"recurrent model all of its {num_layers} layers.",
        )
    prelude, core, coda = map(tuple, kept)
    plan = RetrofitPlan(prelude, core, coda, dropped)
    _check_windows(source, target, plan)
    return plan


def _has_a_core(source: ModelConfig) -> ConfigError:
    return ConfigError(
        "fine_tuning.retrofit",
        f"True needs a plain model, but that of fine_tuning.init_from has core_layers="
        f"{source.core_layers}; set retrofit=False to go on training it.",
    )


def _layer_windows(source: ModelConfig) -> tuple[int | None, ...]:
    """The sliding window of each layer of a plain model; None: no limit."""
    return source.windows("prelude") + source.windows("coda")


def _check_windows(source: ModelConfig, target: ModelConfig, plan: RetrofitPlan) -> None:
    """Every layer must see as far as it did in the plain model."""
    of_layers = _layer_windows(source)
    for stack, layers in (("prelude", plan.prelude), ("core", plan.core), ("coda", plan.coda)):
        wanted = tuple(of_layers[layer] for layer in layers)
        if target.windows(stack) != wanted:
            written = tuple(size or 0 for size in wanted)
            raise ConfigError(
                f"model.attention.{stack}_windows",
                f"with {target.windows(stack)!r} the layers {layers} would see otherwise than in "
                f"fine_tuning.init_from; set it to {written!r} (0 is no limit).",
            )


def retrofit_params(
    source: ModelConfig, params: Any, target: ModelConfig, fresh: Any, plan: RetrofitPlan
) -> Any:
    """The recurrent model's parameters.

    Args:
      source: the plain model.
      params: its parameters.
      target: the recurrent model.
      fresh: drawn parameters of it, for what the plain model does not have.
      plan: from `plan_retrofit`.
    """
    old, new = flatten_dict(params, sep="/"), flatten_dict(fresh, sep="/")
    places = {"prelude": plan.prelude, "core/layers": plan.core, "coda": plan.coda}
    for place, layers in places.items():
        for index, layer in enumerate(layers):
            there, here = f"{_path_of(source, layer)}/", f"{place}/layer_{index}/"
            for path, leaf in old.items():
                if path.startswith(there):
                    new[here + path.removeprefix(there)] = leaf
    new |= {path: leaf for path, leaf in old.items() if not path.startswith(("prelude/", "coda/"))}
    new |= _passing_adapter(target, new)
    return unflatten_dict(new, sep="/")


def _path_of(source: ModelConfig, layer: int) -> str:
    if layer < source.prelude_layers:
        return f"prelude/layer_{layer}"
    return f"coda/layer_{layer - source.prelude_layers}"


def _passing_adapter(target: ModelConfig, params: dict[str, Any]) -> dict[str, Any]:
    """Adapter weights that pass the injected embedding on."""
    identity = jnp.eye(target.core_width)
    match target.recurrence.adapter:
        case "linear":
            return {
                "core/adapter/embedding_kernel": identity,
                "core/adapter/state_kernel": jnp.zeros_like(identity),
            }
        case "diagonal":
            gain = diagonal_gain(
                params["core/adapter/a_log"],
                params["core/adapter/dt_bias"],
                target.recurrence.zero_order_hold,
            )
            return {"core/adapter/b_matrix": identity / gain}
        case "sum" | "none":
            return {}
    raise ValueError(f"the adapter {target.recurrence.adapter!r} cannot pass the injection on")
