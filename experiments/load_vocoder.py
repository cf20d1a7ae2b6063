"""Reads the vocoder of a run, for whatever has mel spectrograms and wants sound."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from experiments.load_medium_run import load_medium_run
from experiments.run_kinds.vocoder import make_vocoder
from megatransformer_jax.config.audio import MelConfig
from megatransformer_jax.config.option import UserError
from megatransformer_jax.config.vocoder import VocoderConfig
from megatransformer_jax.models.vocoders import GENERATOR, build_generator
from megatransformer_jax.types import DTypePolicy

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
    config, params = load_medium_run(workdir, "vocoder", make_vocoder, step)
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
