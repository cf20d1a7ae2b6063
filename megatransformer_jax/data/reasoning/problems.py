"""From the configuration to a task, and a numbered set of its problems as padded rows."""

import dataclasses

import numpy as np

from megatransformer_jax.config.data import REASONING_TASKS, ReasoningConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.data.reasoning.puzzles import Maze, Sudoku
from megatransformer_jax.data.reasoning.tasks import (
    PAD,
    Addition,
    Hop,
    Mano,
    Parity,
    Permutation,
    Pointers,
    Problem,
    Task,
)
from megatransformer_jax.types import Batch


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
        case "pointers":
            return Pointers(config.num_symbols)
        case "mano":
            return Mano(config.modulus)
        case "sudoku":
            return Sudoku()
        case "maze":
            return Maze()
        case unknown:
            raise ValueError(f"no task {unknown!r}; known: {', '.join(REASONING_TASKS)}")


@dataclasses.dataclass(frozen=True)
class ProblemSet:
    """Random access to problems; number i is a function of (seed, held_out, i) alone.

    Lengths are uniform in min_length..max_length. Training and held-out sets use different
    random streams whatever the seed.
    """

    task: Task
    min_length: int
    max_length: int
    size: int
    sequence_length: int
    seed: int
    held_out: bool = False

    @classmethod
    def from_config(
        cls, config: ReasoningConfig, *, sequence_length: int, seed: int, held_out: bool
    ) -> "ProblemSet":
        """The training or the held-out set.

        Raises:
          ConfigError: if the longest problem of either set does not fit in a row.
        """
        task = build_task(config)
        longest = max(config.max_length, config.eval_max_length)
        if task.row_length(longest) > sequence_length:
            raise ConfigError(
                "data.sequence_length",
                f"{sequence_length} is too short: a {config.task} problem of length {longest} "
                f"takes {task.row_length(longest)} positions; raise it to that or lower "
                "data.reasoning.max_length and eval_max_length.",
            )
        return cls(
            task=task,
            min_length=config.eval_min_length if held_out else config.min_length,
            max_length=config.eval_max_length if held_out else config.max_length,
            size=config.num_eval if held_out else config.num_train,
            sequence_length=sequence_length,
            seed=seed,
            held_out=held_out,
        )

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Problem:
        if not 0 <= index < self.size:
            raise IndexError(f"no problem {index}: the set has {self.size}")
        # Philox is counter-based: a stream per key, without hashing a seed for each problem.
        key = np.array([2 * self.seed + self.held_out, index], np.uint64)
        rng = np.random.Generator(np.random.Philox(key=key))
        length = int(rng.integers(self.min_length, self.max_length + 1))
        return self.task.generate(rng, length)

    def batch(self, indices: list[int], num_rows: int | None = None) -> Batch:
        """The problems with these numbers as rows; missing rows up to `num_rows` are padding."""
        shape = (num_rows or len(indices), self.sequence_length)
        tokens = np.full(shape, PAD, np.int32)
        targets = np.full(shape, PAD, np.int32)
        loss_mask = np.zeros(shape, np.float32)
        segment_ids = np.zeros(shape, np.int32)
        positions = np.zeros(shape, np.int32)
        for row, index in enumerate(indices):
            problem = self[index]
            length = len(problem.tokens)
            tokens[row, :length] = problem.tokens
            targets[row, :length] = problem.targets
            loss_mask[row, :length] = problem.loss_mask
            segment_ids[row, :length] = 1
            positions[row, :length] = np.arange(length)
        return Batch(tokens, targets, loss_mask, segment_ids, positions)
