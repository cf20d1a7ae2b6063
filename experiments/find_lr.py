"""Suggests a learning rate: trains for some steps while the rate rises, and shows the losses.

Starts as a new run with this configuration would, with its optimiser, and keeps nothing of what it
trains. Writes find_lr.json and find_lr.png into the workdir; checkpoints there are left alone.
"""

from absl import flags

from experiments import launch
from experiments.workdir import quiet_libraries
from megatransformer_jax.config.run import RunConfig

START = flags.DEFINE_float("start", 1e-6, "First learning rate.")
END = flags.DEFINE_float("end", 1.0, "Last learning rate.")
STEPS = flags.DEFINE_integer("steps", 100, "Steps between them, if the loss does not blow up.")


def main(config: RunConfig) -> None:
    """Runs the test on `config`."""
    with quiet_libraries(config.logging.level):
        # JAX reads its environment when it is imported, and `launch` sets it just before.
        from experiments.run_find_lr import find_learning_rate  # noqa: PLC0415

        find_learning_rate(config, START.value, END.value, STEPS.value)


if __name__ == "__main__":
    launch.run(main)
