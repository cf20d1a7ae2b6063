"""Runs that train a vocoder."""

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from megatransformer_jax.config.run_kinds import VocoderRunConfig
from megatransformer_jax.config.vocoder import VocoderConfig
from megatransformer_jax.data.media.batches import waveform_pipeline
from megatransformer_jax.data.mel import normalized_mel
from megatransformer_jax.evaluation.diagnostics.figures import to_image
from megatransformer_jax.evaluation.media.table import draw_mels
from megatransformer_jax.losses.sound import resynthesize, spectral_losses, vocoder_loss
from megatransformer_jax.models.vocoders import init_vocoder, vocoder_axes
from megatransformer_jax.runs.build import MemoryPlan
from megatransformer_jax.runs.tasks.medium import MediumTask
from megatransformer_jax.runs.workdir import Workdir
from megatransformer_jax.training.media_hook import MediaSamples
from megatransformer_jax.types import DTypePolicy, WaveformBatch

NUM_SAMPLES = 2


@dataclasses.dataclass(frozen=True)
class VocoderModel:
    """A `MediumModel`."""

    config: VocoderConfig
    policy: DTypePolicy

    def init(self, key: jax.Array) -> Any:
        """See `MediumModel`."""
        return init_vocoder(self.config, self.policy, key)

    def axes(self) -> Any:
        """See `MediumModel`."""
        return vocoder_axes(self.config, self.policy)

    def loss(
        self, params: Any, batch: WaveformBatch, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """See `MediumModel`; nothing is drawn at random."""
        del key
        return vocoder_loss(self.config, self.policy, params, batch)

    def judge(self, params: Any, batch: WaveformBatch) -> dict[str, jax.Array]:
        """The spectral losses; loss is their weighted sum, without discriminators."""
        generated = resynthesize(self.config, self.policy, params, batch)
        loss, terms = spectral_losses(self.config, generated, batch)
        return {"loss": loss, **terms}


def make_vocoder(config: VocoderRunConfig) -> VocoderModel:
    """The model of a run, with the types of this machine's kind of device."""
    policy = DTypePolicy.from_precision(config.train.precision, jax.default_backend())
    return VocoderModel(config.vocoder, policy)


class VocoderTask(MediumTask):
    """A `Task`: to make waveforms from spectrograms."""

    def __init__(
        self,
        config: VocoderRunConfig,
        workdir: Workdir,
        stack: contextlib.ExitStack,
        plan: MemoryPlan | None = None,
    ):
        model = make_vocoder(config)
        super().__init__(
            config,
            workdir,
            stack,
            model,
            functools.partial(waveform_pipeline, config.data, config.vocoder),
            lambda batch: int((batch.lengths > 0).sum()),
            plan,
        )
        self._mel = config.vocoder.mel
        self._resynthesize = jax.jit(functools.partial(resynthesize, config.vocoder, model.policy))

    def samples(self, params: Any) -> MediaSamples:
        """Held-out pieces as recorded and as made from their spectrograms, with spectrograms."""
        batch, mel = self.validation.batches[0], self._mel
        lengths = _first_rows(batch.lengths)
        pairs = {"recorded": batch.waveforms, "generated": self._resynthesize(params, batch)}
        clips = {
            f"{name}_{index}": np.clip(row[: length * mel.hop_samples], -1.0, 1.0)
            for name, waveforms in pairs.items()
            for index, (row, length) in enumerate(zip(_first_rows(waveforms), lengths, strict=True))
            if length
        }
        mels = [(name, normalized_mel(clip, mel)) for name, clip in clips.items()]
        return MediaSamples(
            images={"spectrograms": to_image(draw_mels(mels, mel))},
            clips=clips,
            sample_rate_hz=mel.sample_rate_hz,
        )


def _first_rows(array: jax.Array) -> np.ndarray:
    """The first rows, on every process."""
    return np.asarray(array.addressable_data(0))[:NUM_SAMPLES]
