"""From the config to the kind of run that it names."""

import contextlib
import pathlib

from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.config.run_rules import RUN_KINDS
from megatransformer_jax.runs.build import MemoryPlan
from megatransformer_jax.runs.task import RunKind
from megatransformer_jax.runs.tasks.image_vae import ImageVaeRun
from megatransformer_jax.runs.tasks.transformer import TransformerRun
from megatransformer_jax.runs.tasks.vocoder import VocoderRun


def build_run(
    config: RunConfig, workdir: pathlib.Path, stack: contextlib.ExitStack, plan: MemoryPlan | None
) -> RunKind:
    """Builds model, data and judges.

    Args:
      config: of the run.
      workdir: exists.
      stack: closes the data when the run ends.
      plan: of `train.memory_budget_gib`, which transformers alone have.

    Raises:
      UserError: if model, data and devices do not fit each other.
      ValueError: if the kind is unknown.
    """
    match config.kind:
        case "transformer":
            return TransformerRun(config, workdir, stack, plan)
        case "vocoder":
            return VocoderRun(config, workdir, stack)
        case "image_vae":
            return ImageVaeRun(config, workdir, stack)
    raise ValueError(f"unknown kind of run {config.kind!r}; known: {', '.join(RUN_KINDS)}")
