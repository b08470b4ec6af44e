"""Ways to spoil a clip or a text, as objects: the counterpart that a clean run is compared with.

A corruption is called with samples and their rate, keeps the length, gives the same result at every
call, and tells what it changed:

    noisy, changed = Noise(snr_db=5, span=(0.4, 0.9))(samples, 16_000)

Samples outside ``changed`` stay bit for bit what they were. Results depend on the corruption, so
use two kinds at least, and prefer another word or utterance to noise, which takes a model to where
it was never trained. No corruption clips samples: what is added may reach beyond 1.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from audio_lens import arguments
from audio_lens.arguments import number, whole
from audio_lens.audio import AudioError, AudioSource, check, load
from audio_lens.errors import InputError
from audio_lens.sound_files import LONGEST_S
from audio_lens.timeline import Seconds, Span

Stretch = Float[np.ndarray, " n"]
Decibels = float | int
MOST_DB = 300.0  # beyond, float64 holds nothing of the quieter one


@dataclass(frozen=True, eq=False, repr=False)
class Corruption(ABC):
    """A change of a clip, or of a stretch of it, that keeps its length.

    Attributes:
        span: the stretch to change, a `Span` or ``(start_s, end_s)``; None for the whole clip.
        fade_s: over how many seconds, within the span and at either end of it, the old samples
            fade into the new ones. The ends of the clip itself need no fade and get none.

    Raises:
        ValueError: options that cannot be meant.
        AudioError: a clip to take samples from that cannot be used.
    """

    span: Span | tuple[Seconds, Seconds] | None = field(default=None, kw_only=True)
    fade_s: Seconds = field(default=0.005, kw_only=True)

    def __post_init__(self) -> None:
        if self.span is not None:
            Span.of(self.span)
        number("fade_s", self.fade_s, least=0, most=LONGEST_S, unit="seconds")

    def __call__(
        self, samples: AudioSource, sampling_rate: int
    ) -> tuple[Float[np.ndarray, " samples"], list[Span]]:
        """The changed clip, mono float32 at ``sampling_rate`` Hz, and the stretches that changed.

        Args:
            samples: as `audio.load` takes them: mono samples, channels, or a path.
            sampling_rate: of the samples, in Hz; a file is resampled to it.

        Raises:
            AudioError: a clip that cannot be used, a span that lies outside it or holds no sample,
                or a stretch that this corruption cannot change.
        """
        clean = load(samples, sampling_rate, sampling_rate)
        start, stop = _bounds(self.span, len(clean), sampling_rate)
        stretch = clean[start:stop].astype(np.float64)
        changed = self.change(stretch, start, sampling_rate)
        n_faded = round(self.fade_s * sampling_rate)
        share = _fades(len(stretch), n_faded if start else 0, n_faded if stop < len(clean) else 0)
        result = clean.copy()
        result[start:stop] = stretch + share * (changed - stretch)
        clip = 0 if self.span is None else Span.of(self.span).clip
        name = type(self).__name__
        return result, [Span(start / sampling_rate, stop / sampling_rate, name, clip)]

    @abstractmethod
    def change(self, stretch: Stretch, start: int, sampling_rate: int) -> Stretch:
        """The stretch changed; it begins at sample ``start`` of its clip."""

    def describe(self) -> str:
        """All that it takes to make this corruption again; given samples appear as a hash."""
        options = [f"{each.name}={_told(getattr(self, each.name))}" for each in fields(self)]
        return f"{type(self).__name__}({', '.join(options)})"

    def __repr__(self) -> str:
        return self.describe()


# -------------------------------------------------------------------------------- kinds


@dataclass(frozen=True, eq=False, repr=False)
class Silence(Corruption):
    """Zeros. A log-mel front end turns them into its floor, which is not zero."""

    def change(self, stretch: Stretch, start: int, sampling_rate: int) -> Stretch:
        return np.zeros_like(stretch)


@dataclass(frozen=True, eq=False, repr=False)
class Noise(Corruption):
    """Noise added, so loud that the changed stretch has the signal-to-noise ratio asked for.

    Attributes:
        snr_db: power of the stretch over that of the noise, in dB (before fades).
        clip: take the noise from here, from a random place on and again from the beginning where
            it ends; None makes white noise.
        sampling_rate: of a ``clip`` given as samples, in Hz; files know their own.
        seed: of the noise, or of the place.
    """

    snr_db: Decibels
    clip: AudioSource | None = None
    sampling_rate: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        number("snr_db", self.snr_db, least=-MOST_DB, most=MOST_DB, unit="dB")
        whole("seed", self.seed, least=0)
        if self.clip is not None:
            _check_clip(self.clip, self.sampling_rate)

    def change(self, stretch: Stretch, start: int, sampling_rate: int) -> Stretch:
        noise = self._noise(len(stretch), sampling_rate)
        loudness, noise_loudness = _rms(stretch), _rms(noise)
        if loudness == 0:
            raise AudioError("the stretch is silent: no noise has a ratio to it")
        if noise_loudness == 0:
            raise AudioError("the clip to take noise from is silent where it was taken")
        return stretch + noise * loudness / noise_loudness * 10 ** (-self.snr_db / 20)

    def _noise(self, length: int, sampling_rate: int) -> Stretch:
        draw = np.random.default_rng(self.seed)
        if self.clip is None:
            return draw.standard_normal(length)
        noise = load(self.clip, sampling_rate, self.sampling_rate).astype(np.float64)
        return np.take(noise, draw.integers(len(noise)) + np.arange(length), mode="wrap")


@dataclass(frozen=True, eq=False, repr=False)
class OtherUtterance(Corruption):
    """What another clip holds at the same seconds; silence where that one is over.

    Attributes:
        clip: the other clip.
        sampling_rate: of a ``clip`` given as samples, in Hz; files know their own.
    """

    clip: AudioSource
    sampling_rate: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_clip(self.clip, self.sampling_rate)

    def change(self, stretch: Stretch, start: int, sampling_rate: int) -> Stretch:
        other = load(self.clip, sampling_rate, self.sampling_rate)
        if len(other) <= start:
            raise AudioError(f"the other clip is over at {len(other) / sampling_rate:g} s already")
        return _of_length(other[start:], len(stretch))


@dataclass(frozen=True, eq=False, repr=False)
class Splice(Corruption):
    """A stretch of another clip in place of the span: another word, say.

    Attributes:
        clip: the other clip.
        source: which stretch of it, a `Span` or ``(start_s, end_s)``; None takes the same seconds.
            Silence follows where it is shorter than ``span``.
        sampling_rate: of a ``clip`` given as samples, in Hz; files know their own.

    Raises:
        ValueError: without a span, or with a source that is longer than it.
    """

    clip: AudioSource
    source: Span | tuple[Seconds, Seconds] | None = None
    sampling_rate: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_clip(self.clip, self.sampling_rate)
        span, source = self._replaced, self._source
        if _duration(source) > _duration(span) + 1e-3:
            raise InputError(
                f"the source lasts {_duration(source):.3f} s and the span {_duration(span):.3f} s: "
                "widen the span, or take less of the source"
            )

    @property
    def _replaced(self) -> Span:
        if self.span is None:
            raise InputError(
                "Splice needs span=: the stretch to replace (OtherUtterance needs none)"
            )
        return Span.of(self.span)

    @property
    def _source(self) -> Span:
        return self._replaced if self.source is None else Span.of(self.source)

    def change(self, stretch: Stretch, start: int, sampling_rate: int) -> Stretch:
        other = load(self.clip, sampling_rate, self.sampling_rate)
        first, last = _bounds(self._source, len(other), sampling_rate, "the other clip")
        return _of_length(other[first:last], len(stretch))


@dataclass(frozen=True, eq=False, repr=False)
class TimeShuffle(Corruption):
    """The same sounds in another order; none of the pieces stays where it was.

    Attributes:
        width_s: about how long a piece is, in seconds: the stretch is cut into equal ones.
        seed: of the order.
    """

    width_s: Seconds
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        number("width_s", self.width_s, above=0, unit="seconds")
        whole("seed", self.seed, least=0)

    def change(self, stretch: Stretch, start: int, sampling_rate: int) -> Stretch:
        count = round(min(len(stretch) / sampling_rate / self.width_s, len(stretch) + 1.0))
        if not 2 <= count <= len(stretch):
            raise AudioError(
                f"a stretch of {len(stretch) / sampling_rate:g} s makes {count} pieces of "
                f"{self.width_s:g} s: shuffling takes two or more, of a sample at least"
            )
        n_faded = round(self.fade_s * sampling_rate)
        pieces = np.array_split(stretch, count)
        order = _derangement(count, np.random.default_rng(self.seed))
        return np.concatenate([pieces[i] * _fades(len(pieces[i]), n_faded, n_faded) for i in order])


@dataclass(frozen=True, eq=False, repr=False)
class ReverberatedBy(Corruption):
    """The clip as heard in a room, as loud as before; what is said stays where it is.

    Attributes:
        response: the room's impulse response. What comes before its strongest sample, the direct
            sound, is left out.
        sampling_rate: of a ``response`` given as samples, in Hz; files know their own.
    """

    response: AudioSource
    sampling_rate: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_clip(self.response, self.sampling_rate)

    def change(self, stretch: Stretch, start: int, sampling_rate: int) -> Stretch:
        response = load(self.response, sampling_rate, self.sampling_rate)
        response = response[np.abs(response).argmax() :]
        length = len(stretch) + len(response) - 1
        heard = np.fft.irfft(np.fft.rfft(stretch, length) * np.fft.rfft(response, length), length)
        heard = heard[: len(stretch)]
        loudness = _rms(heard)
        if loudness == 0:
            raise AudioError("the stretch or the impulse response is silent")
        return heard * _rms(stretch) / loudness


@dataclass(frozen=True)
class TextSwap:
    """Other words in a text, for a transcript that contradicts the audio.

    Attributes:
        old: what to replace; it occurs in the text exactly once.
        new: what stands there instead, of as many tokens where shapes must stay equal.

    Raises:
        ValueError: nothing to replace, or nothing that changes.
    """

    old: str
    new: str

    def __post_init__(self) -> None:
        arguments.text("old", self.old)
        arguments.text("new", self.new)
        if not self.old or self.old == self.new:
            raise InputError(f"a swap needs two different texts, got {self}")

    def __call__(self, text: str) -> str:
        """The text with the swap made.

        Raises:
            ValueError: if ``old`` does not occur exactly once.
        """
        count = arguments.text("what a swap is made in", text).count(self.old)
        if count != 1:
            raise InputError(
                f"{self.old!r} occurs {count} times in {text!r}: name what occurs exactly once"
            )
        return text.replace(self.old, self.new)

    def describe(self) -> str:
        """All that it takes to make this swap again."""
        return repr(self)


# -------------------------------------------------------------------------------- pieces


def _bounds(
    span: Span | tuple | None, n_samples: int, sampling_rate: int, of: str = "the clip"
) -> tuple[int, int]:
    """First sample of the span and the first behind it; what lies outside the clip is cut off."""
    if span is None:
        return 0, n_samples
    span = Span.of(span)
    start = max(0, round(span.start_s * sampling_rate))
    stop = min(n_samples, round(span.end_s * sampling_rate))
    if stop <= start:
        raise AudioError(
            f"{span.start_s:g} to {span.end_s:g} s holds no sample of {of}, which is "
            f"{n_samples / sampling_rate:g} s long"
        )
    return start, stop


def _fades(length: int, rising: int, falling: int) -> Stretch:
    """Weights that rise over the first samples and fall over the last; never 0 or beyond 1."""
    steps = np.arange(length)
    up = (steps + 1) / (min(rising, length // 2) + 1)
    down = (length - steps) / (min(falling, length // 2) + 1)
    return np.minimum(np.minimum(up, down), 1.0)


def _derangement(count: int, draw: np.random.Generator) -> np.ndarray:
    """A random order that leaves nothing in its place; one try in three finds one."""
    while True:
        order = draw.permutation(count)
        if (order != np.arange(count)).all():
            return order


def _of_length(samples: Float[np.ndarray, " m"], length: int) -> Stretch:
    """Cut at the end, or followed by silence."""
    kept = samples[:length].astype(np.float64)
    return np.pad(kept, (0, length - len(kept)))


def _rms(samples: Stretch) -> float:
    return float(np.sqrt(np.square(samples).mean()))


def _duration(span: Span) -> float:
    return span.end_s - span.start_s


def _check_clip(clip: AudioSource, rate: int | None) -> None:
    """Raise unless the clip can be used; nothing of a file but its head is read."""
    if isinstance(clip, (str, Path)):
        check(clip)
    else:
        load(clip, 16_000 if rate is None else rate, rate)


def _told(value: Any) -> str:
    if isinstance(value, Path):
        return repr(str(value))
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().float().numpy()
    if isinstance(value, np.ndarray):
        digest = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        return f"<samples {value.shape}, sha256 {digest[:16]}>"
    if isinstance(value, Span):
        return repr((value.start_s, value.end_s))
    return repr(value)
