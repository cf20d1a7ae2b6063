"""Learning rate and weight decay of each parameter: by its name, or by the group it is in."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from megatransformer_jax.config.optimizer import ParameterGroup
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.training.parameter_paths import map_named, path_text
from megatransformer_jax.training.weight_decay import decay_mask

_SHOWN = 12


def group_of(groups: Sequence[ParameterGroup], path: str) -> ParameterGroup | None:
    """The first group whose expression is found in the path, or None."""
    return next((group for group in groups if group.pattern.search(path)), None)


def decay_rates(groups: Sequence[ParameterGroup], weight_decay: float, params: Any) -> Any:
    """A tree of floats: the group's weight decay, or `weight_decay` on matrices and 0 elsewhere."""

    def rate(path: str, is_decayed: bool) -> float:
        group = group_of(groups, path)
        if group is not None and group.weight_decay is not None:
            return group.weight_decay
        return weight_decay if is_decayed else 0.0

    return map_named(rate, decay_mask(params))


def learning_rate_factors(groups: Sequence[ParameterGroup], params: Any) -> Any:
    """A tree of floats: the group's factor on the schedule, or 1."""

    def factor(path: str, _: Any) -> float:
        group = group_of(groups, path)
        return 1.0 if group is None or group.learning_rate is None else group.learning_rate

    return map_named(factor, params)


def check_groups(groups: Sequence[ParameterGroup], params: Any) -> None:
    """Checks that each group decides for some parameter.

    Raises:
      ConfigError: naming the group, with paths that there are.
    """
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    paths = [path_text(path) for path, _ in leaves]
    deciding = [group_of(groups, path) for path in paths]
    for group in groups:
        if any(group is decider for decider in deciding):
            continue
        matched = [path for path in paths if group.pattern.search(path)]
        reason = (
            f"matches only parameters of groups before it, such as {matched[0]}; put it before them"
            if matched
            else "matches no parameter; mend it. There are " + _some(paths)
        )
        raise ConfigError("optimizer.groups", f"{group.pattern.pattern!r} {reason}.")


def scale_by_learning_rate(
    schedule: optax.Schedule, factors: Callable[[Any], Any], check: Callable[[Any], None]
) -> optax.GradientTransformation:
    """Multiplies each update by -schedule(updates so far) times a factor of its own.

    The state is that of `optax.scale_by_learning_rate` with a schedule.

    Args:
      schedule: from the number of updates, int32 [], to a rate.
      factors: from a tree of parameters to a tree of floats.
      check: called with the whole tree of parameters when the state is made.

    Example:
      >>> ones = lambda params: jax.tree.map(lambda p: 1.0, params)
      >>> rate = scale_by_learning_rate(optax.constant_schedule(0.1), ones, lambda params: None)
    """

    def init(params: Any) -> optax.ScaleByScheduleState:
        check(params)
        return optax.ScaleByScheduleState(count=jnp.zeros([], jnp.int32))

    def update(
        updates: Any, state: optax.ScaleByScheduleState, params: Any = None
    ) -> tuple[Any, optax.ScaleByScheduleState]:
        del params
        step_size = -schedule(state.count)
        scaled = jax.tree.map(
            lambda u, factor: u * jnp.asarray(step_size * factor, u.dtype),
            updates,
            factors(updates),
        )
        return scaled, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def _some(paths: Sequence[str]) -> str:
    """A path for each last name, so that they show what kinds there are."""
    by_name: dict[str, str] = {}
    for path in paths:
        by_name.setdefault(path.rpartition("/")[2], path)
    shown = list(by_name.values())[:_SHOWN]
    return ", ".join(shown) + (" and others" if len(shown) < len(paths) else "")
