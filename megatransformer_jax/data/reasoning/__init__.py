"""Generated problems, easy to hard, on which more depth provably helps."""

from megatransformer_jax.data.reasoning.problems import ProblemSet, build_task
from megatransformer_jax.data.reasoning.tasks import Problem, Task

__all__ = ["Problem", "ProblemSet", "Task", "build_task"]
