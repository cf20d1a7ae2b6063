"""From the configuration to a task."""

from megatransformer_jax.config.data import REASONING_TASKS, ReasoningConfig
from megatransformer_jax.data.reasoning.addition import Addition
from megatransformer_jax.data.reasoning.hop import Hop
from megatransformer_jax.data.reasoning.parity import Parity
from megatransformer_jax.data.reasoning.permutation import Permutation
from megatransformer_jax.data.reasoning.task import Task


def build_task(config: ReasoningConfig) -> Task:
    """The task that `config.task` names.

    Raises:
      ValueError: for a name that the configuration allows but this function does not know.
    """
    match config.task:
        case "parity":
            return Parity()
        case "permutation":
            return Permutation(config.num_symbols)
        case "addition":
            return Addition()
        case "hop":
            return Hop(config.num_symbols)
        case unknown:
            raise ValueError(f"no task {unknown!r}; known: {', '.join(REASONING_TASKS)}")
