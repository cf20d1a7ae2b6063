"""Weight initialisation by role: input matrices, outputs into the residual stream, embeddings."""

import dataclasses
import math

import jax
from flax import linen as nn

from megatransformer_jax.config.model import ModelConfig

# Normal draws are cut here, in standard deviations, as Huginn does.
TRUNCATION = 3.0


@dataclasses.dataclass(frozen=True)
class WeightInit:
    """Standard deviations of a model's matrices. See `InitConfig.scheme` for the rules."""

    input_std: float
    residual_std: float
    embedding_std: float

    @property
    def input(self) -> jax.nn.initializers.Initializer:
        """Matrices that read the residual stream."""
        return truncated_normal(self.input_std)

    @property
    def residual(self) -> jax.nn.initializers.Initializer:
        """Matrices that write into the residual stream."""
        return truncated_normal(self.residual_std)

    @property
    def embedding(self) -> jax.nn.initializers.Initializer:
        """Token and learned position embeddings, and an untied head."""
        return truncated_normal(self.embedding_std)


def weight_init(config: ModelConfig, width: int) -> WeightInit:
    """The standard deviations for layers of `width`.

    Depth counts every layer that a token passes at the mean number of iterations, because that is
    how often a shared core writes into the stream (Huginn's `takase`).
    """
    recurrent_layers = config.core_layers * config.recurrence.mean_steps
    depth = config.prelude_layers + recurrent_layers + config.coda_layers
    scale = 1.0 / math.sqrt(2 * depth)
    scheme = config.init.scheme
    if scheme == "takase":
        std = math.sqrt(2 / (5 * width))
        return WeightInit(std, std * scale, std)
    std = config.init.std
    return WeightInit(std, std * scale if scheme == "scaled" else std, std)


def truncated_normal(std: float) -> jax.nn.initializers.Initializer:
    """Normal with this standard deviation before the cut at `TRUNCATION` of them."""
    return nn.initializers.truncated_normal(std, lower=-TRUNCATION, upper=TRUNCATION)
