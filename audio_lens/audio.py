"""Read and resample audio; every clip becomes mono float32 at the model's sampling rate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
import torch
from jaxtyping import Float

from audio_lens.errors import AudioLensError

AudioSource = str | Path | np.ndarray | torch.Tensor
_MOST_CHANNELS = 8


class AudioError(AudioLensError, ValueError):
    """Audio that cannot be used; the message names the clip and what to do."""


def read(path: str | Path, sampling_rate: int = 16_000) -> Float[np.ndarray, " samples"]:
    """Read a sound file as mono float32 at ``sampling_rate`` Hz (channels are averaged).

    Raises:
        AudioError: if the file is missing, empty, not audio, or holds NaN or infinite samples.
    """
    with _opened(path) as file:
        samples = file.read(dtype="float32", always_2d=True).mean(axis=1)
        return resample(_checked(samples, str(path)), file.samplerate, sampling_rate)


def check(path: str | Path) -> None:
    """Raise unless there is a sound file at the path; no sample of it is read.

    Raises:
        AudioError: if the file is missing, empty or not audio.
    """
    with _opened(path):
        pass


@contextmanager
def _opened(path: str | Path) -> Iterator[soundfile.SoundFile]:
    path = Path(path)
    if not path.is_file():
        raise AudioError(f"no audio file at {path}")
    if path.stat().st_size == 0:
        raise AudioError(f"{path} is empty (0 bytes)")
    try:
        with soundfile.SoundFile(path) as file:
            yield file
    except soundfile.LibsndfileError as error:
        raise AudioError(f"{path} cannot be read as audio: {error}") from error


def resample(
    samples: Float[np.ndarray, " samples"], from_hz: int, to_hz: int
) -> Float[np.ndarray, " resampled"]:
    """Band-limited resampling of a mono signal (soxr, high quality); float32 out.

    Raises:
        AudioError: if the signal is too short to leave a sample.
    """
    samples = samples.astype(np.float32, copy=False)
    if from_hz == to_hz:
        return samples
    resampled = soxr.resample(samples, from_hz, to_hz)
    if len(resampled) == 0:
        raise AudioError(f"{len(samples)} sample(s) at {from_hz} Hz are none at {to_hz} Hz")
    return resampled


def load(
    source: Any, sampling_rate: int, source_rate: int | None = None
) -> Float[np.ndarray, " samples"]:
    """A clip from a path, array or tensor as mono float32 at ``sampling_rate`` Hz.

    Args:
        source: path to a sound file, or samples: ``[samples]``, ``[channels, samples]`` or
            ``[samples, channels]`` (the short axis, at most 8, is taken as channels and averaged:
            clips stacked into one array are not a batch).
        sampling_rate: the rate wanted, in Hz.
        source_rate: the rate of samples given as an array, in Hz. Files know their own, so it
            does not concern them: a list of clips may mix both.

    Raises:
        AudioError: empty, NaN or oddly shaped audio, or an array without ``source_rate``.
    """
    if isinstance(source, (str, Path)):
        return read(source, sampling_rate)
    if not isinstance(source, (np.ndarray, torch.Tensor)):
        raise AudioError(f"a clip is a path, an array or a tensor, got {type(source).__name__}")
    if source_rate is None:
        raise AudioError(
            "samples without a sampling rate: pass sampling_rate= (Hz) of the array; "
            f"it is resampled to {sampling_rate} Hz where they differ"
        )
    if source_rate <= 0:
        raise AudioError(f"sampling_rate must be a positive number of Hz, got {source_rate}")
    array = _as_array(source) if isinstance(source, torch.Tensor) else source
    return resample(_checked(_mono(array), "the clip"), source_rate, sampling_rate)


def _as_array(samples: torch.Tensor) -> np.ndarray:
    samples = samples.detach().cpu()
    return (samples.float() if samples.is_floating_point() else samples).numpy()  # bfloat16 too


def _mono(array: np.ndarray) -> Float[np.ndarray, " samples"]:
    if not (np.issubdtype(array.dtype, np.floating) or np.issubdtype(array.dtype, np.integer)):
        raise AudioError(f"samples must be real numbers, got an array of {array.dtype}")
    if array.size == 0:
        raise AudioError("the clip holds no samples")
    if np.issubdtype(array.dtype, np.unsignedinteger):
        raise AudioError(f"unsigned samples ({array.dtype}) have no agreed zero; convert to float")
    if np.issubdtype(array.dtype, np.integer):
        array = array / (np.iinfo(array.dtype).max + 1.0)
    if array.ndim == 2 and min(array.shape) <= _MOST_CHANNELS:
        array = array.mean(axis=int(np.argmin(array.shape)))
    if array.ndim != 1:
        raise AudioError(
            f"a clip is [samples] or [channels, samples], got shape {array.shape}; a batch is a "
            "list of clips"
        )
    return array.astype(np.float32)


def _checked(samples: Float[np.ndarray, " samples"], name: str) -> Float[np.ndarray, " samples"]:
    if len(samples) == 0:
        raise AudioError(f"{name} holds no samples")
    if not np.isfinite(samples).all():
        raise AudioError(f"{name} holds NaN or infinite samples")
    return samples
