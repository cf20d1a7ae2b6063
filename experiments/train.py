"""Trains a model, resuming if the workdir has a checkpoint.

Writes into the workdir: config.json, train.log, metrics.jsonl (every step, exact), events/
(TensorBoard), checkpoints/, tokenizer.model and .json, depth_table.json and .png.
Ctrl-C or SIGTERM saves and leaves; the same command goes on.
"""

from experiments import launch
from experiments.workdir import quiet_libraries
from megatransformer_jax.config.run import RunConfig


def main(config: RunConfig) -> None:
    """Runs the training that `config` describes."""
    with quiet_libraries(config.logging.level):
        # JAX reads its environment when it is imported, and `launch` sets it just before.
        from experiments.run_training import train  # noqa: PLC0415

        train(config)


if __name__ == "__main__":
    launch.run(main)
