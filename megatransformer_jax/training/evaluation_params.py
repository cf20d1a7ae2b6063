"""Which parameters a state is judged by, in validation, samples and tables."""

from typing import Any

from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.training.state import TrainState


def evaluation_params(state: TrainState, config: RunConfig) -> Any:
    """The tree that `model.apply` takes for evaluation.

    Everything that looks at a state from outside the step asks here, so that what training keeps
    (averages of weights, adapters beside them) has one place where it becomes a model.
    """
    del config
    return state.params
