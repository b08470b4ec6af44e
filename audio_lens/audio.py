"""Read and resample audio; every clip becomes mono float32 at the model's sampling rate."""

from __future__ import annotations

import io
import math
import reprlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import soxr
import torch
from jaxtyping import Float

from audio_lens.arguments import path_of
from audio_lens.errors import InputError
from audio_lens.sound_files import (
    LONGEST_S,
    MOST_HZ,
    AudioError,
    decoded,
    opened,
    too_long,
)


@runtime_checkable
class Decoder(Protocol):
    """A file that is decoded when asked, as torchcodec and data sets hold it."""

    def get_all_samples(self) -> Any:
        """``data`` (``[channels, samples]``) and ``sample_rate`` in Hz."""
        ...


_Held = Mapping[str, Any] | tuple[Any, Any] | io.BufferedIOBase | Decoder
AudioSource = str | Path | np.ndarray | torch.Tensor | _Held
Rates = int | Sequence[Any] | None
_FIELDS = ("array", "bytes", "path", "sampling_rate")  # of a clip as data sets hold it
_OVERSHOOT = 1.1  # what resampling and lossy codecs may add to full scale
_16_BIT, _24_BIT = 2.0**15, 2.0**23


def read(
    path: str | Path, sampling_rate: int = 16_000, longest_s: float = math.inf
) -> Float[np.ndarray, " samples"]:
    """Read a sound file as mono float32 at ``sampling_rate`` Hz (channels are averaged).

    Args:
        longest_s: seconds that a model takes; a longer file is refused before it is decoded.

    Raises:
        AudioError: if the file is missing, empty, cut off, too long or not audio, or holds NaN or
            infinite samples.
    """
    return _decoded(_path(path), str(path), sampling_rate, longest_s)


def _decoded(
    source: Path | io.BytesIO, name: str, sampling_rate: int, longest_s: float
) -> Float[np.ndarray, " samples"]:
    check_rate(sampling_rate)
    samples, rate = decoded(source, name, longest_s)
    return resample(_checked(samples, name), rate, sampling_rate)


def _read_bytes(
    content: Any, sampling_rate: int, longest_s: float
) -> Float[np.ndarray, " samples"]:
    """The same of what a sound file holds."""
    if not isinstance(content, (bytes, bytearray, memoryview)):
        raise AudioError(f"bytes of a clip are bytes, got {type(content).__name__}")
    name = f"the clip of {len(content)} bytes"
    return _decoded(io.BytesIO(content), name, sampling_rate, longest_s)


def check(path: str | Path) -> None:
    """Raise unless there is a sound file at the path; no sample of it is read.

    Raises:
        AudioError: if the file is missing, empty, without samples, cut off or not audio.
    """
    duration(path)


def duration(path: str | Path) -> float:
    """Length of a sound file in seconds, by its head; no sample of it is read.

    Raises:
        AudioError: as `check`.
    """
    with opened(_path(path), str(path)) as file:
        if file.frames == 0:
            raise AudioError(f"{path} holds no samples")
        return file.frames / file.samplerate


def _path(path: str | Path) -> Path:
    try:
        return path_of("a clip", path)
    except InputError as error:
        raise AudioError(str(error)) from error


def check_rate(value: Any) -> None:
    """Raise unless a value can be a sampling rate.

    Raises:
        AudioError: saying what it is and could be.
    """
    is_whole = _is_number(value) and 0 < value <= MOST_HZ and value % 1 == 0
    if not is_whole:
        raise AudioError(
            f"sampling_rate must be a positive number of Hz, got {reprlib.repr(value)} (whole, up "
            f"to {MOST_HZ:,}, one per clip or one for all)"
        )


def resample(
    samples: Float[np.ndarray, " samples"], from_hz: int, to_hz: int
) -> Float[np.ndarray, " resampled"]:
    """Band-limited resampling of a mono signal (soxr, high quality); float32 out.

    Raises:
        AudioError: if the signal is too short to leave a sample, too long, or a rate is none.
    """
    check_rate(from_hz)
    check_rate(to_hz)
    samples = samples.astype(np.float32, copy=False)
    if from_hz == to_hz:
        return samples
    if len(samples) / from_hz > LONGEST_S:
        raise too_long("the clip", len(samples) / from_hz, math.inf)
    resampled = soxr.resample(samples, from_hz, to_hz)
    if len(resampled) == 0:
        raise AudioError(f"{len(samples)} sample(s) at {from_hz} Hz are none at {to_hz} Hz")
    return resampled


def is_clip(source: Any) -> bool:
    """Whether this is one clip: not a list of clips, but maybe a list of samples.

    A tuple of samples and their rate, as torchaudio gives it, is one clip.
    """
    if not isinstance(source, (list, tuple)):
        return True
    return bool(source) and (_is_number(source[0]) or _is_rated(source))


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_rated(source: Any) -> bool:
    is_pair = isinstance(source, tuple) and len(source) == 2
    return is_pair and isinstance(source[0], (np.ndarray, torch.Tensor)) and _is_number(source[1])


def sources_of(audio: Any) -> list[Any]:
    """The clips of a batch; of one clip, itself alone."""
    return [audio] if is_clip(audio) else list(audio)


def with_rates(sources: Sequence[Any], sampling_rate: Any) -> Iterable[tuple[Any, Any]]:
    """Each of the sources with its sampling rate, of which a single one serves all.

    Raises:
        AudioError: if there are not as many rates as sources.
    """
    if sampling_rate is None or isinstance(sampling_rate, Real):
        return [(source, sampling_rate) for source in sources]
    rates = list(sampling_rate)
    if len(rates) != len(sources):
        raise AudioError(
            f"{len(sources)} clip(s) need one sampling rate, or as many, got {len(rates)}"
        )
    return zip(sources, rates, strict=True)


def load(
    source: Any, sampling_rate: int, source_rate: Any = None, longest_s: float = math.inf
) -> Float[np.ndarray, " samples"]:
    """A clip from a path, array, tensor or mapping as mono float32 at ``sampling_rate`` Hz.

    Whole numbers within 16 bits are taken as 16-bit samples whatever their dtype, with a warning
    where it is another than int16. Other samples beyond full scale are refused.

    Args:
        source: path to a sound file, or the open file (binary); or samples: ``[samples]`` or
            ``[samples, 2]``, whose two channels are averaged; or a clip as data sets hold it, a
            mapping of ``array`` and ``sampling_rate``, of ``bytes`` (a sound file's) or of
            ``path``; or a tuple of samples and their rate; or a decoder (torchcodec). In the last
            three, samples may also be ``[2, samples]``: alone, such two rows may be two clips.
        sampling_rate: the rate wanted, in Hz.
        source_rate: the rate of samples given as an array, in whole Hz. Files and mappings know
            their own, so it does not concern them: a list of clips may mix both.
        longest_s: seconds that a model takes; a longer clip is refused before it is decoded.

    Raises:
        AudioError: empty, NaN or oddly shaped audio, a file that is cut off, samples beyond full
            scale, a clip that is too long, or an array without ``source_rate``.
    """
    if isinstance(source, (str, Path)):
        return read(source, sampling_rate, longest_s)
    if isinstance(source, Mapping):
        return _load_mapping(source, sampling_rate, source_rate, longest_s)
    if isinstance(source, io.BufferedIOBase):
        source.seek(0)
        return _read_bytes(source.read(), sampling_rate, longest_s)
    if isinstance(source, Decoder):
        source = _decoded_all(source)
    is_one = _is_rated(source)
    if is_one:
        source, source_rate = source
    if not isinstance(source, (np.ndarray, torch.Tensor)):
        raise AudioError(
            f"a clip is a path, an array or a tensor, got {type(source).__name__} (a mapping of "
            "array and sampling_rate, of bytes, or of path will do too)"
        )
    if source_rate is None:
        raise AudioError(
            "samples without a sampling rate: pass sampling_rate= (Hz) of the array; "
            f"it is resampled to {sampling_rate} Hz where they differ"
        )
    check_rate(source_rate)
    seconds = max(source.shape, default=0) / source_rate
    if seconds > min(longest_s, LONGEST_S) + 1 / source_rate:
        raise too_long("the clip", seconds, longest_s)
    array = _as_array(source) if isinstance(source, torch.Tensor) else source
    samples = _checked(_mono(_scaled(array), is_one), "the clip")
    return resample(samples, int(source_rate), sampling_rate)


def _decoded_all(source: Decoder) -> tuple[Any, Any]:
    """The samples of a decoder, its channels averaged, and their rate."""
    try:
        made = source.get_all_samples()
    except (RuntimeError, ValueError, OSError) as error:
        raise AudioError(f"the clip cannot be decoded: {error}") from error
    data = torch.as_tensor(made.data)
    return (data if data.ndim == 1 else data.float().mean(0)), made.sample_rate


def _load_mapping(
    clip: Mapping[str, Any], sampling_rate: int, source_rate: Any, longest_s: float
) -> Float[np.ndarray, " samples"]:
    """A clip as data sets hold it: decoded samples, else the bytes of a file, else its path."""
    unknown = [str(key) for key in clip if key not in _FIELDS]
    if unknown:
        raise AudioError(
            f"a clip as a mapping holds {', '.join(_FIELDS)}; got unknown {', '.join(unknown)}"
        )
    if clip.get("array") is not None:
        array = clip["array"]
        samples = array if isinstance(array, torch.Tensor) else _numbers(array)
        rate = clip.get("sampling_rate")
        rate = source_rate if rate is None else rate
        rated = (samples, rate)  # one clip, of which two rows are two channels
        return load(rated if _is_rated(rated) else samples, sampling_rate, rate, longest_s)
    if clip.get("bytes") is not None:
        return _read_bytes(clip["bytes"], sampling_rate, longest_s)
    if isinstance(clip.get("path"), (str, Path)):
        return read(clip["path"], sampling_rate, longest_s)
    raise AudioError("the mapping holds no audio: array and sampling_rate, bytes, or path")


def _numbers(samples: Any) -> np.ndarray:
    try:
        return np.asarray(samples)
    except ValueError as error:
        raise AudioError(f"the samples are no array of numbers: {error}") from error


def _as_array(samples: torch.Tensor) -> np.ndarray:
    samples = samples.detach().cpu()
    return (samples.float() if samples.is_floating_point() else samples).numpy()  # bfloat16 too


def _scaled(array: np.ndarray) -> np.ndarray:
    """Samples whose full scale is 1.

    Raises:
        AudioError: for what is no number, or of a scale that cannot be told.
    """
    is_whole = np.issubdtype(array.dtype, np.integer)
    if not (np.issubdtype(array.dtype, np.floating) or is_whole):
        raise AudioError(f"samples must be real numbers, got an array of {array.dtype}")
    if array.size == 0:
        raise AudioError("the clip holds no samples")
    if np.issubdtype(array.dtype, np.unsignedinteger):
        raise AudioError(f"unsigned samples ({array.dtype}) have no agreed zero; convert to float")
    if array.dtype in (np.int8, np.int16):
        return array / (np.iinfo(array.dtype).max + 1.0)
    if not is_whole and not np.isfinite(array).all():
        return array  # refused with its name, later
    peak = float(np.abs(array.astype(np.float64)).max())
    if peak == 0 or (not is_whole and peak <= _OVERSHOOT):
        return array
    if peak <= _16_BIT and (is_whole or (array == np.round(array)).all()):
        warnings.warn(
            f"samples of {array.dtype} reach {peak:.0f}: taken as 16-bit values and divided by "
            "32768. Divide them by their full scale to say so",
            stacklevel=2,
        )
        return array / _16_BIT
    if array.dtype == np.int32 and peak > _24_BIT:
        return array / 2.0**31
    raise AudioError(
        f"samples of {array.dtype} reach {peak:g}, and full scale is 1 (int16 and int32: their "
        "own): divide them by their full scale"
    )


def _mono(array: np.ndarray, is_one: bool) -> Float[np.ndarray, " samples"]:
    """The mean of the channels.

    Args:
        is_one: whether this is known to be one clip, so that two rows are its channels.
    """
    if array.ndim == 2 and len(array) == 2 and array.shape[1] > 1 and not is_one:
        raise AudioError(
            f"2 rows of {array.shape[1]} samples may be two channels or two clips. Of channels, "
            "pass array.T ([samples, 2]), array.mean(0) or (array, sampling_rate); of clips, "
            "list(array): a batch is a list of clips"
        )
    if array.ndim == 2 and min(array.shape) <= 2:
        array = array.mean(axis=int(np.argmin(array.shape)))
    if array.ndim == 2:
        n, length = min(array.shape), max(array.shape)
        raise AudioError(
            f"a clip is [samples] or [channels, samples], got shape {array.shape}: average the "
            f"{n} channels first, array.mean({int(np.argmin(array.shape))}); if these are {n} "
            f"clips of {length} samples, pass a list of them: a batch is a list of clips"
        )
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
