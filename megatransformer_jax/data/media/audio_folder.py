"""Clips in a folder of one's own."""

from megatransformer_jax.data.media.folders import AUDIO_FOLDER, item_text, list_folder
from megatransformer_jax.data.media.records import AudioRecord
from megatransformer_jax.data.media.sound_files import read_sound
from megatransformer_jax.data.media.waveform_fitting import WaveformFitter
from megatransformer_jax.data.sources.record import BadRecord


class AudioFolder:
    """The WAV and FLAC files that transcripts.jsonl lists, or those with a .txt beside them.

    Raises:
      UserError: see `list_folder`.
    """

    def __init__(self, folder: str, fitter: WaveformFitter, sample_rate_hz: int, is_voice: bool):
        self._items = list_folder(folder, AUDIO_FOLDER)
        self._fitter = fitter
        self._rate = sample_rate_hz
        self._is_voice = is_voice

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> AudioRecord | BadRecord:
        item = self._items[index]
        where = item.path if item.text is None else f"{item.path} ({item.where})"
        try:
            text = item_text(item)
            samples, rate_hz = read_sound(item.path)
        except ValueError as error:
            return BadRecord(where, str(error))
        waveform = self._fitter.fit(samples, rate_hz, where)
        if isinstance(waveform, BadRecord):
            return waveform
        return AudioRecord(waveform, self._rate, text, self._is_voice, where)
