"""Generated problems, easy to hard, on which more depth provably helps."""

from megatransformer_jax.data.reasoning.build import build_task
from megatransformer_jax.data.reasoning.problems import ProblemSet
from megatransformer_jax.data.reasoning.task import Problem, Task

__all__ = ["Problem", "ProblemSet", "Task", "build_task"]
