"""A vocoder compared with Griffin-Lim on the same spectrograms of held-out speech, as a table.

    python -m benchmarks.vocoder_quality --workdir=runs/vocoder
    python -m benchmarks.vocoder_quality --workdir=runs/vocoder --count=8 --json=result.json

Clips are the first held-out ones of the run's data, whole, at least half a second long. Per method:

  STFT loss  multi-resolution (arXiv 1910.11480), resolutions of the run; lower is better
  PESQ       wide band, ITU-T P.862.2, 1 to 4.6; higher is better
  STOI       0 to 1; higher is better
  x real     seconds of speech per second of computing, the second time (compiled)

PESQ and STOI need 16 kHz and the extra 'eval'.
"""

import argparse
import dataclasses
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from megatransformer_jax.config.option import UserError
from megatransformer_jax.config.run_kinds import VocoderRunConfig
from megatransformer_jax.data.media.build import build_audio_source
from megatransformer_jax.data.mel import fill_hops, griffin_lim, normalized_mel
from megatransformer_jax.data.sources.record import BadRecord
from megatransformer_jax.evaluation.media.sound_scores import pesq, stoi
from megatransformer_jax.losses.sound import multi_resolution_stft_loss
from megatransformer_jax.runs.tasks.load_medium import LoadedVocoder, load_medium_run, load_vocoder
from megatransformer_jax.runs.tasks.vocoder import make_vocoder

MIN_SECONDS = 0.5
# From a mel spectrogram [F, M] to a waveform [F * hop_samples].
Method = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Quality:
    """Means over clips."""

    method: str
    stft_loss: float
    pesq: float
    stoi: float
    times_real: float


def held_out_clips(config: VocoderRunConfig, count: int) -> list[np.ndarray]:
    """Waveforms of whole frames, the first held-out ones that are long enough.

    Raises:
      UserError: if there are none.
    """
    mel = config.vocoder.mel
    clips = list(_long_clips(config, count))
    if not clips:
        raise UserError(f"no held-out clip is at least {MIN_SECONDS} s long.")
    return [fill_hops(clip, mel) for clip in clips]


def _long_clips(config: VocoderRunConfig, count: int) -> Iterator[np.ndarray]:
    mel = config.vocoder.mel
    source = build_audio_source(config.data, mel, "validation")
    found = 0
    for index in range(len(source)):
        record = source[index]
        if found == count:
            return
        if isinstance(record, BadRecord):
            continue
        if len(record.waveform) >= MIN_SECONDS * mel.sample_rate_hz:
            found += 1
            yield record.waveform


def measure(
    name: str, method: Method, clips: list[np.ndarray], config: VocoderRunConfig
) -> Quality:
    """The method's means over the clips.

    Raises:
      ValueError: if a waveform has another length than its clip.
    """
    mel, sizes = config.vocoder.mel, config.vocoder.loss.fft_samples
    losses, pesqs, stois, seconds = [], [], [], 0.0
    for clip in clips:
        spectrogram = normalized_mel(clip, mel)
        method(spectrogram)  # Compiles.
        start = time.perf_counter()
        made = method(spectrogram)
        seconds += time.perf_counter() - start
        if made.shape != clip.shape:
            raise ValueError(f"{name} made {made.shape} samples of a clip of {clip.shape}")
        length = jnp.array([len(clip)])
        distance = multi_resolution_stft_loss(
            jnp.array(made)[None], jnp.array(clip)[None], length, sizes
        )
        losses.append(float(distance[0]))
        pesqs.append(pesq(clip, made, mel.sample_rate_hz))
        stois.append(stoi(clip, made, mel.sample_rate_hz))
    speech = sum(len(clip) for clip in clips) / mel.sample_rate_hz
    loss, pesq_mean, stoi_mean = (float(np.mean(values)) for values in (losses, pesqs, stois))
    return Quality(name, loss, pesq_mean, stoi_mean, times_real=speech / seconds)


def methods(vocoder: LoadedVocoder, iterations: int) -> dict[str, Method]:
    """What is compared, by name."""
    mel = vocoder.config.mel

    def run_vocoder(spectrogram: np.ndarray) -> np.ndarray:
        return vocoder(spectrogram[None], np.array([len(spectrogram)]))[0]

    def run_griffin_lim(spectrogram: np.ndarray) -> np.ndarray:
        return griffin_lim(spectrogram, mel, num_iterations=iterations)

    return {
        f"Griffin-Lim, {iterations} iterations": run_griffin_lim,
        f"vocoder ({vocoder.config.kind})": run_vocoder,
    }


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--workdir", required=True, help="of a run with kind='vocoder'")
    parser.add_argument("--step", default="latest", help="latest, best, or a checkpoint's number")
    parser.add_argument("--count", type=int, default=24, help="held-out clips")
    parser.add_argument("--iterations", type=int, default=60, help="of Griffin-Lim")
    parser.add_argument("--json", help="file that gets the numbers")
    options = parser.parse_args()
    try:
        vocoder = load_vocoder(options.workdir, step=options.step)
        config, _ = load_medium_run(options.workdir, VocoderRunConfig, make_vocoder, options.step)
        clips = held_out_clips(config, options.count)
        rows = [
            measure(name, method, clips, config)
            for name, method in methods(vocoder, options.iterations).items()
        ]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    seconds = sum(map(len, clips)) / config.vocoder.mel.sample_rate_hz
    print(
        f"{len(clips)} held-out clips, {seconds:.1f} s, {config.vocoder.mel.num_mels} mel bins; "
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}, Python {platform.python_version()}"
    )
    print("\n| method | STFT loss | PESQ | STOI | x real |\n|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row.method} | {row.stft_loss:.3f} | {row.pesq:.2f} | {row.stoi:.3f} "
            f"| {row.times_real:.0f} |"
        )
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump([dataclasses.asdict(row) for row in rows], file, indent=2)


if __name__ == "__main__":
    main()
