"""What happens to a clip on its way to the model: room, noise, channel, log-mel features."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from scipy.signal import fftconvolve
from torch import Tensor
from transformers.audio_utils import mel_filter_bank

from audio_lens.audio import read
from audio_lens.models.embedded.training.material import RATE, Wave, data_root

FFT, HOP, MELS = 400, 160, 80
BINS = FFT // 2 + 1
WARPS = np.linspace(0.88, 1.14, 9)
TRAIN_ROOMS, TEST_ROOMS = ("rir1", "rir2", "rir3"), ("rir4",)
TRAIN_NOISES, TEST_NOISES = ("noise2",), ("noise3",)


def room_response(path: Path, length_s: float = 0.4) -> Wave:
    """An impulse response from its direct path on, of unit energy."""
    response = read(path)
    start = int(np.abs(response).argmax())
    response = response[start : start + int(length_s * RATE)]
    return response / np.sqrt(np.square(response).sum())


def rooms(names: Sequence[str]) -> list[Wave]:
    """The named room responses of the data folder."""
    return [room_response(data_root() / "rir" / f"{name}.wav") for name in names]


def in_room(wave: Wave, response: Wave) -> Wave:
    """The clip as heard in a room; words stay where they are."""
    return fftconvolve(wave, response)[: len(wave)].astype(np.float32)


def coloured_noise(draw: np.random.Generator, samples: int, slope: float) -> Wave:
    """Noise of unit power whose spectrum falls as frequency to the ``-slope / 2``."""
    spectrum = np.fft.rfft(draw.standard_normal(samples))
    spectrum /= np.maximum(np.arange(len(spectrum)), 1) ** (slope / 2)
    wave = np.fft.irfft(spectrum, samples)
    return (wave / wave.std()).astype(np.float32)


def noises(names: Sequence[str], draw: np.random.Generator, coloured: int = 8) -> list[Wave]:
    """The named recordings of noise and some coloured ones, of unit power, 8 s or so each."""
    recorded = [read(data_root() / "rir" / f"{name}.wav") for name in names]
    made = [coloured_noise(draw, 8 * RATE, slope) for slope in draw.uniform(0, 2, coloured)]
    return [wave / wave.std() for wave in recorded] + made


def with_noise(wave: Wave, noise: Wave, ratio_db: float, draw: np.random.Generator) -> Wave:
    """Add a random stretch of ``noise``, ``ratio_db`` below the words.

    The ratio is to the loudest half of the clip's samples, so that silence does not count.
    """
    power = np.square(wave)
    words = power[power > np.median(power)].mean()
    start = draw.integers(len(noise) - len(wave))
    gain = np.sqrt(words) * 10 ** (-ratio_db / 20)
    return wave + gain.astype(np.float32) * noise[start : start + len(wave)]


@cache
def _filters() -> Float[Tensor, "warps bins mels"]:
    """Whisper's mel filters for stretched frequency axes (the middle one unstretched)."""
    plain = mel_filter_bank(BINS, MELS, 0.0, RATE / 2, RATE, norm="slaney", mel_scale="slaney")
    bins = np.arange(BINS)
    stretch = [
        np.stack([np.interp(bins / warp, bins, unit, right=0) for unit in np.eye(BINS)])
        for warp in [1.0, *WARPS]
    ]
    return torch.tensor(np.stack([s @ plain for s in stretch]), dtype=torch.float32)


def log_mel(
    waves: Float[Tensor, "batch samples"],
    channel: Float[Tensor, "batch bins"] | None = None,
    warps: Sequence[int] | None = None,
) -> Float[Tensor, "batch 80 frames"]:
    """Whisper's log-mel features, optionally through a channel and a changed vocal tract.

    Args:
        waves: clips at 16 kHz, padded with zeros behind; a frame per 160 samples.
        channel: gain of power per frequency bin and clip.
        warps: per clip a factor's index in :data:`WARPS` by which frequencies are stretched.
    """
    window = torch.hann_window(FFT)
    spectrum = torch.stft(waves, FFT, HOP, window=window, return_complex=True)[..., :-1]
    power = spectrum.abs().square()
    if channel is not None:
        power = power * channel[:, :, None]
    filters = _filters()[[0] * len(waves) if warps is None else [1 + warp for warp in warps]]
    mel = torch.einsum("bft,bfm->bmt", power, filters).clamp(min=1e-10).log10()
    mel = torch.maximum(mel, mel.amax(dim=(1, 2), keepdim=True) - 8.0)
    return (mel + 4.0) / 4.0


def draw_channel(draw: np.random.Generator) -> Float[np.ndarray, " bins"]:
    """A random channel: smooth coloration of some dB, and often a cut near 4 kHz."""
    knots = draw.normal(0, draw.uniform(0, 5), 5)
    gain = 10 ** (np.interp(np.linspace(0, 4, BINS), np.arange(5), knots) / 10)
    if draw.random() < 0.4:
        gain[int(BINS * draw.uniform(0.42, 0.5)) :] = 0
    return gain
