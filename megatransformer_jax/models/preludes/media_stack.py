"""The layers of an encoder of media."""

import dataclasses

from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.models.codas.coda import side_stack_config
from megatransformer_jax.nn.block import Stack
from megatransformer_jax.nn.parameters import weight_init
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy


def media_stack(
    config: ModelConfig, num_layers: int, policy: DTypePolicy, sharder: Sharder, platform: str
) -> Stack:
    """Layers of the model's width that see a whole medium, see `side_context`; named `layers`.

    A medium is not cut over devices: it is short, and of any number of places.
    """
    side = side_stack_config(config)
    whole = dataclasses.replace(sharder, rules=sharder.rules.without("sequence"))
    owners, init = tuple(range(num_layers)), weight_init(config, config.width)
    return Stack(side, owners, init, policy, whole, platform, config.remat, name="layers")
