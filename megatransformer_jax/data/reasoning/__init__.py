"""Generated problems, easy to hard, on which more depth provably helps."""

from megatransformer_jax.data.reasoning.problems import ProblemSet
from megatransformer_jax.data.reasoning.tasks import Problem, Task, build_task

__all__ = ["Problem", "ProblemSet", "Task", "build_task"]
