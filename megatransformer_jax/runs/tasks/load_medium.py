"""Reads models of one medium from finished runs: the vocoder, the image autoencoder."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from megatransformer_jax.checkpoints.manager import CheckpointManager
from megatransformer_jax.config.audio import MelConfig
from megatransformer_jax.config.image import ImageVaeRunConfig
from megatransformer_jax.config.loop import MeshConfig
from megatransformer_jax.config.option import UserError
from megatransformer_jax.config.run_kinds import VaeRunConfig, VocoderRunConfig
from megatransformer_jax.config.vocoder import VocoderConfig
from megatransformer_jax.models.vocoders import GENERATOR, build_generator
from megatransformer_jax.runs.load import RunType, find_step, parse_step, read_config
from megatransformer_jax.runs.tasks.image_vae import make_image_vae
from megatransformer_jax.runs.tasks.medium import MediumModel, abstract_state
from megatransformer_jax.runs.tasks.vocoder import make_vocoder
from megatransformer_jax.sharding.mesh import make_mesh
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.storage import CHECKPOINTS, NO_CHECKPOINTS, as_path, check_reachable
from megatransformer_jax.training.evaluation_params import restore_judged_params
from megatransformer_jax.training.optimizers import build_optimizer
from megatransformer_jax.types import DTypePolicy

# ------------------------------------------------------------------------------
# Any model of one medium.


def load_medium_run(
    workdir: str,
    run_type: type[RunType],
    make_model: Callable[[RunType], MediumModel],
    step: str | int = "latest",
) -> tuple[RunType, Any]:
    """The configuration and the parameters that the run is judged by, on the first local device.

    Args:
      workdir: of the run; nothing in it is changed.
      run_type: of its configuration, which says what it must have trained.
      make_model: from the configuration.
      step: latest, best, or the number of a checkpoint.

    Raises:
      UserError: if there is no such run or checkpoint, or it is of another kind.
    """
    folder = as_path("workdir", workdir, CHECKPOINTS, NO_CHECKPOINTS)
    check_reachable("workdir", folder)
    if not (folder / "checkpoints").is_dir():
        raise UserError(
            f"{folder} is not the workdir of a run (a folder checkpoints/ in it). Train one: "
            f"megatransformer train --config={run_type.kind}"
        )
    checkpoints = CheckpointManager(folder / "checkpoints", None)
    try:
        number = find_step(checkpoints, parse_step(step))
        where = checkpoints.directory / str(number)
        config = read_config(checkpoints.run_info(number)["config"], where, run_type)
        optimizer = build_optimizer(config.optimizer, config.train.steps, config.train.ema_decay)
        sharder = Sharder(make_mesh(MeshConfig(data=1), jax.local_devices()[:1]))
        state = abstract_state(make_model(config), optimizer, sharder)
        return config, restore_judged_params(checkpoints, number, state, config)
    finally:
        checkpoints.close()


# ------------------------------------------------------------------------------
# Image autoencoders, for decoders in latent space.


def load_image_vae(workdir: str, step: str | int = "latest") -> tuple[ImageVaeRunConfig, Any]:
    """The autoencoder of a run with kind='image_vae', and its parameters.

    Args:
      workdir: of the run; nothing in it is changed.
      step: latest, best, or the number of a checkpoint.

    Raises:
      UserError: if there is no such run or checkpoint, or it is of another kind.
    """

    config, params = load_medium_run(workdir, VaeRunConfig, make_image_vae, step)
    return config.image_vae, params


# ------------------------------------------------------------------------------
# Vocoders.

# Frames are filled up to a multiple of this, so that few lengths are compiled.
FRAME_STEP = 64


@dataclasses.dataclass(frozen=True)
class LoadedVocoder:
    """A trained vocoder: from mel spectrograms to waveforms.

    Attributes:
      config: of the vocoder.
      params: of its generator.
      policy: types.
    """

    config: VocoderConfig
    params: Any
    policy: DTypePolicy

    def __call__(
        self, mels: Float[np.ndarray, "N F M"], lengths: Int[np.ndarray, "N"]
    ) -> Float[np.ndarray, "N samples"]:
        """Waveforms of `F * hop_samples` samples in [-1, 1], 0 beyond each clip.

        Args:
          mels: normalised log-mel spectrograms; what is beyond a clip is not read.
          lengths: frames of each clip.

        Raises:
          ValueError: if the spectrograms have other bins than the vocoder reads.
        """
        mels, num_mels = np.asarray(mels, np.float32), self.config.mel.num_mels
        if mels.ndim != 3 or mels.shape[-1] != num_mels:
            raise ValueError(
                f"mel spectrograms of shape {mels.shape}; the vocoder reads [clips, frames, "
                f"{num_mels} bins]."
            )
        frames = mels.shape[1]
        filled = np.pad(mels, ((0, 0), (0, -frames % FRAME_STEP), (0, 0)))
        waveforms = self._compiled(self.params, filled, np.asarray(lengths, np.int32))
        return np.clip(np.asarray(waveforms)[:, : frames * self.config.mel.hop_samples], -1.0, 1.0)

    @functools.cached_property
    def _compiled(self) -> Any:
        generator = build_generator(self.config, self.policy)

        def run(params: Any, mels: Array, lengths: Array) -> Any:
            return generator.apply({"params": params}, mels, lengths)

        return jax.jit(run)


def load_vocoder(
    workdir: str, mel: MelConfig | None = None, step: str | int = "latest"
) -> LoadedVocoder:
    """Reads the vocoder of a run with kind='vocoder'.

    Args:
      workdir: of the run; nothing in it is changed.
      mel: the spectrograms that it will be given. None: its own, `config.mel`.
      step: latest, best, or the number of a checkpoint.

    Raises:
      UserError: if there is no such run, it is of another kind, or it was trained with other
        spectrograms; names what differs.
    """
    config, params = load_medium_run(workdir, VocoderRunConfig, make_vocoder, step)
    check_mel(config.vocoder.mel, mel, workdir)
    return LoadedVocoder(config.vocoder, params[GENERATOR], make_vocoder(config).policy)


def check_mel(own: MelConfig, wanted: MelConfig | None, workdir: str) -> None:
    """Checks that a vocoder reads the spectrograms that it will be given.

    Raises:
      UserError: naming the options that differ.
    """
    if wanted is None or wanted == own:
        return
    names = [field.name for field in dataclasses.fields(MelConfig)]
    differences = ", ".join(
        f"{name} ({getattr(own, name)} and {getattr(wanted, name)})"
        for name in names
        if getattr(own, name) != getattr(wanted, name)
    )
    raise UserError(
        f"the vocoder of {workdir} was trained with other spectrograms than it would be given; "
        f"they differ in {differences}. Train one with vocoder.mel as model.audio.mel is, or leave "
        "the vocoder out, for Griffin-Lim."
    )
