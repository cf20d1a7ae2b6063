"""STOI in NumPy as its authors describe it (Taal et al., 2011), for sound at 10 kHz."""

import itertools

import numpy as np

WINDOW, HOP, FFT, BANDS, LOWEST_HZ, PIECE = 256, 128, 512, 15, 150, 30


def frames_of(wave):
    # The last whole frame is left out, as in the authors' program.
    starts = range(0, len(wave) - WINDOW, HOP)
    return np.stack([wave[start : start + WINDOW] for start in starts])


def without_silence(clean, heard):
    window = np.hanning(WINDOW + 2)[1:-1]
    frames = frames_of(clean) * window, frames_of(heard) * window
    level = 20 * np.log10(np.linalg.norm(frames[0], axis=1) + 1e-12)
    kept = level > level.max() - 40
    waves = []
    for rows in frames:
        wave = np.zeros(HOP * (kept.sum() - 1) + WINDOW)
        for number, row in enumerate(rows[kept]):
            wave[number * HOP :][:WINDOW] += row
        waves.append(wave)
    return waves


def bands_of(wave):
    spectrum = np.abs(np.fft.rfft(frames_of(wave) * np.hanning(WINDOW + 2)[1:-1], FFT)) ** 2
    bins = np.arange(FFT // 2 + 1) * 10_000 / FFT
    edges = LOWEST_HZ * 2 ** ((2 * np.arange(BANDS + 1) - 1) / 6)
    nearest = np.abs(bins[None] - edges[:, None]).argmin(axis=1)
    pairs = itertools.pairwise(nearest)
    return np.sqrt(np.stack([spectrum[:, low:high].sum(axis=1) for low, high in pairs]))


def stoi(clean, heard):
    clean, heard = (bands_of(wave) for wave in without_silence(clean, heard))
    correlations = []
    for end in range(PIECE, clean.shape[1] + 1):
        for x, y in zip(clean[:, end - PIECE : end], heard[:, end - PIECE : end], strict=True):
            scaled = y * np.linalg.norm(x) / np.linalg.norm(y)
            clipped = np.minimum(scaled, x * (1 + 10 ** (15 / 20)))
            correlations.append(np.corrcoef(x, clipped)[0, 1])
    return np.mean(correlations)
