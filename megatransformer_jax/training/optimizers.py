"""Builds the optimiser: clip by global norm, then AdamW with decay on matrices only."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from megatransformer_jax.config.optimizer import OptimizerConfig
from megatransformer_jax.training.schedules import build_schedule

# Leaf names of parameters without weight decay. Rank does not tell: a fused norm scale or a bias
# per head is a matrix by shape, and a fused kernel has three or four axes.
UNDECAYED_NAMES = ("scale", "bias", "embedding", "a_log", "dt_bias", "b_matrix")


def build_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """The configured optimiser with its learning-rate schedule.

    Its state is float32 whatever the gradients are. Each learning rate is the schedule's value at
    the number of updates applied so far.

    Raises:
      ValueError: if the optimiser's name is unknown.

    Example:
      >>> optimizer = build_optimizer(OptimizerConfig(learning_rate=1e-3), total_steps=1000)
      >>> state = optimizer.init({"kernel": jnp.ones((2, 2))})
    """
    schedule = build_schedule(config, total_steps)
    match config.name:
        case "adamw":
            update = optax.adamw(
                schedule,
                b1=config.beta1,
                b2=config.beta2,
                eps=config.eps,
                weight_decay=config.weight_decay,
                mask=decay_mask,
                mu_dtype=jnp.float32,
            )
        case _:
            raise ValueError(f"unknown optimiser {config.name!r}; known: adamw")
    # The state has the same structure with and without clipping: a resumed run may change it.
    clip = (
        optax.identity()
        if config.clip_norm is None
        else optax.clip_by_global_norm(config.clip_norm)
    )
    return optax.chain(clip, update)


def decay_mask(params: Any) -> Any:
    """A tree of bools: True where weight decay applies, which is on matrices.

    Vectors have none, nor has any parameter whose name is or ends in one of `UNDECAYED_NAMES`
    (`bias`, `qk_bias`, `scale`, ...).
    """
    return jax.tree_util.tree_map_with_path(_is_decayed, params)


def _is_decayed(path: tuple[Any, ...], leaf: Any) -> bool:
    name = str(getattr(path[-1], "key", getattr(path[-1], "name", path[-1])))
    undecayed = any(name == plain or name.endswith("_" + plain) for plain in UNDECAYED_NAMES)
    return not undecayed and jnp.ndim(leaf) > 1
