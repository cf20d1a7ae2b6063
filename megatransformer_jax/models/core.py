"""One iteration of the recurrent core."""

import jax
from flax import linen as nn
from jaxtyping import Array, Float

from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.nn.adapters import build_adapter
from megatransformer_jax.nn.block import Stack
from megatransformer_jax.nn.context import LayerContext
from megatransformer_jax.nn.layer_sharing import stack_owners
from megatransformer_jax.nn.norms import Norm
from megatransformer_jax.nn.parameters import weight_init
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy


class RecurrentCore(nn.Module):
    """Adapter, layers, and the optional norm at the end of an iteration."""

    config: ModelConfig
    policy: DTypePolicy
    sharder: Sharder
    platform: str

    def setup(self) -> None:
        """Builds the parts at the core's width."""
        config = self.config
        init = weight_init(config, config.core_width)
        self.adapter = build_adapter(config, init, self.policy)
        owners = stack_owners(config, "core")
        self.layers = Stack(config, owners, init, self.policy, self.sharder, self.platform)
        if config.recurrence.iteration_norm:
            self.iteration_norm = Norm(config.norm)

    def prepare(self, injected: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """What the adapter needs of the injected embedding, the same for all iterations."""
        return self.adapter.prepare(injected)

    def __call__(
        self, state: Float[Array, "B T D"], prepared: Float[Array, "B T D"], context: LayerContext
    ) -> Float[Array, "B T D"]:
        """The next state."""
        state = self.layers(self.adapter(state, prepared), context)
        if self.config.recurrence.iteration_norm:
            state = self.iteration_norm(state)
        return self.sharder.constrain(state, "batch", "length", None)

    def prepare_and_call(
        self, state: Float[Array, "B T D"], injected: Float[Array, "B T D"], context: LayerContext
    ) -> jax.Array:
        """Touches every parameter once; used to initialise them."""
        return self(state, self.prepare(injected), context)
