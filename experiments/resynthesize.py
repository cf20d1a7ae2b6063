"""Makes held-out clips again from their spectrograms, and compares them with themselves."""

import numpy as np

from experiments.evaluate_flags import SOUND_OPTIONS, EvaluateOptions
from experiments.load_model import LoadedModel
from experiments.load_vocoder import load_vocoder
from experiments.media_measures import reject_options
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.data.media.build import build_audio_source
from megatransformer_jax.data.mel import fill_hops, griffin_lim, normalized_mel
from megatransformer_jax.data.sources.record import BadRecord
from megatransformer_jax.evaluation.media.sound_scores import ResynthesisScores, resynthesis_scores

DEFAULT_CLIPS = 8


def resynthesize(
    options: EvaluateOptions, loaded: LoadedModel, run: RunConfig
) -> ResynthesisScores | None:
    """Scores of the first held-out clips; None if the run has no sound, or none are asked for.

    Raises:
      UserError: if the vocoder cannot be used, an option would be ignored, or a library is missing.
    """
    if not run.data.media.has_audio:
        reject_options(options, SOUND_OPTIONS, f"{loaded.description} has no sound")
        return None
    count = options.resynthesized_clips
    count = DEFAULT_CLIPS if count is None else count
    if not count:
        reject_options(options, ("vocoder",), "no clips are made again")
        return None
    mel = loaded.config.audio.mel
    source = build_audio_source(run.data, mel, "validation")
    records = (source[number] for number in range(min(count, len(source))))
    waveforms = [
        fill_hops(record.waveform, mel) for record in records if not isinstance(record, BadRecord)
    ]
    mels = [normalized_mel(waveform, mel) for waveform in waveforms]
    if options.vocoder is None:
        method, made = "Griffin-Lim", [griffin_lim(one, mel) for one in mels]
    else:
        method, vocoder = f"the vocoder {options.vocoder}", load_vocoder(options.vocoder, mel)
        made = [vocoder(one[None], np.array([len(one)]))[0] for one in mels]
    return resynthesis_scores(waveforms, made, mel.sample_rate_hz, method)
