"""A clip to draw and to play: its samples, what is said when, waveform and spectrogram."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import soundfile
from jaxtyping import Float, Int8
from transformers.audio_utils import hertz_to_mel, mel_filter_bank, spectrogram

from audio_lens import audio
from audio_lens.arguments import listed
from audio_lens.audio import AudioSource
from audio_lens.errors import InputError
from audio_lens.timeline import Span

N_MELS, DB_RANGE, TICKS_HZ = 80, 80, np.array([500.0, 1000.0, 2000.0, 4000.0, 8000.0])
QUIETEST_DB = -20  # clips without anything louder are drawn faint, not scaled up
ROUNDING_S = 0.05  # windows end on frames, a little after the audio
MOST_FRAMES, ENVELOPE_BINS = 2000, 1500


@dataclass(frozen=True)
class Clip:
    """A named piece of audio, with labelled stretches of it.

    Attributes:
        tiers: rows of labelled spans in seconds, by name: "words", "phones" ...
    """

    name: str
    samples: Float[np.ndarray, " samples"]
    sampling_rate: int
    tiers: Mapping[str, Sequence[Span]] = field(default_factory=dict)

    @staticmethod
    def load(
        name: str, source: AudioSource, sampling_rate: int, tiers: Mapping[str, Sequence[Span]]
    ) -> Clip:
        """A clip from a file, resampled to the rate, or from samples that have it; no empty tier.

        Raises:
            AudioError: for audio that cannot be read.
        """
        samples = audio.load(source, sampling_rate, sampling_rate)
        given = {tier: listed(tier, spans, Span, "Spans") for tier, spans in tiers.items()}
        said = {tier: tuple(spans) for tier, spans in given.items() if spans}
        return Clip(name, samples, sampling_rate, said)

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.sampling_rate

    @property
    def bounds(self) -> list[float]:
        """Seconds at which what its first tier holds begins or ends."""
        spans = next(iter(self.tiers.values()), ())
        return sorted({float(at) for span in spans for at in (span.start_s, span.end_s)})

    def check_windows(self, spans: Sequence[Span]) -> None:
        """Raise if windows of a sweep lie beyond the end: it was of another clip, or rate.

        Raises:
            ValueError: saying how far they reach.
        """
        last = max((span.end_s for span in spans if not span.clip), default=0.0)
        if last > self.seconds + ROUNDING_S:
            raise InputError(
                f"the windows of the map reach to {last:.2f} s, but the audio is "
                f"{self.seconds:.2f} s long at {self.sampling_rate} Hz: pass the clip of the "
                "sweep, and sampling_rate= of its samples"
            )

    def minus(self, other: Clip, name: str = "difference") -> Clip:
        """What is in this clip and not in the other; both labels where they say different things.

        The shorter clip is taken to end in silence.
        """
        length = max(len(self.samples), len(other.samples))
        one, two = (np.pad(c.samples, (0, length - len(c.samples))) for c in (self, other))
        tiers = {
            tier: _both(self.tiers.get(tier, ()), other.tiers.get(tier, ()))
            for tier in tier_names([self, other])
        }
        return Clip(name, one - two, self.sampling_rate, tiers)


def clip_above(
    windows: Sequence[Span],
    audio: AudioSource | None,
    words: Sequence[Span],
    phones: Sequence[Span],
    sampling_rate: int,
) -> Clip | None:
    """The clip to draw above a map of these windows; None without audio.

    Raises:
        ValueError: for words or phones without audio, or audio that the windows do not fit.
    """
    tiers = {"words": words, "phones": phones}
    if audio is None:
        if any(spans is None or len(spans) for spans in tiers.values()):
            raise InputError("words and phones are drawn above a clip: pass audio= too")
        return None
    clip = Clip.load("clip", audio, sampling_rate, tiers)
    clip.check_windows(windows)
    return clip


def tier_names(clips: Sequence[Clip]) -> list[str]:
    """The tiers that any of the clips has, in order."""
    return list(dict.fromkeys(tier for clip in clips for tier in clip.tiers))


def _both(one: Sequence[Span], two: Sequence[Span]) -> Sequence[Span]:
    """The spans of the first, ``seven / two`` where the second says something else."""
    if len(one) != len(two):
        return one
    return [
        a if a.label == b.label else Span(a.start_s, a.end_s, f"{a.label} / {b.label}", a.clip)
        for a, b in zip(one, two, strict=True)
    ]


def flac(clip: Clip) -> str:
    """The clip as a 16-bit FLAC file in base64: exact to the sample, half the size of a wav."""
    file = io.BytesIO()
    samples = np.clip(clip.samples, -1, 1)
    soundfile.write(file, samples, clip.sampling_rate, format="FLAC", subtype="PCM_16")
    return base64.b64encode(file.getvalue()).decode()


def envelope(
    samples: Float[np.ndarray, " samples"], sampling_rate: int
) -> tuple[float, Float[np.ndarray, " points"]]:
    """Seconds between the points to draw a waveform by, and their levels, the first at 0 s.

    Lowest and highest sample of short stretches, by turns.
    """
    size = math.ceil(len(samples) / ENVELOPE_BINS)
    padded = np.pad(samples, (0, -len(samples) % size), mode="edge").reshape(-1, size)
    levels = np.stack([padded.min(axis=1), padded.max(axis=1)], axis=1).ravel()
    return size / sampling_rate / 2, levels.astype(np.float32)


def hop_of(clips: Sequence[Clip]) -> int:
    """Samples between the frames of spectrograms: 10 ms, more where the longest clip is long."""
    rate, longest = clips[0].sampling_rate, max(len(clip.samples) for clip in clips)
    return max(rate // 100, math.ceil(longest / MOST_FRAMES))


def log_mels(clips: Sequence[Clip], hop: int) -> list[Int8[np.ndarray, "mels frames"]]:
    """Log-mel spectrograms in whole dB below the loudest point of all, from 0 to -80.

    25 ms windows every ``hop`` samples; clips of one sampling rate.
    """
    mels = [_mel_db(clip, hop) for clip in clips]
    loudest = max(QUIETEST_DB, *(mel.max() for mel in mels))
    return [np.clip(mel - loudest, -DB_RANGE, 0).round().astype(np.int8) for mel in mels]


def _mel_db(clip: Clip, hop: int) -> Float[np.ndarray, "mels frames"]:
    length = clip.sampling_rate // 40
    return spectrogram(
        np.pad(clip.samples, (0, max(0, length - len(clip.samples)))),
        np.hanning(length + 1)[:-1],
        frame_length=length,
        hop_length=hop,
        power=2.0,
        mel_filters=mel_filter_bank(
            num_frequency_bins=length // 2 + 1,
            num_mel_filters=N_MELS,
            min_frequency=0.0,
            max_frequency=clip.sampling_rate / 2,
            sampling_rate=clip.sampling_rate,
            norm="slaney",
            mel_scale="slaney",
        ),
        log_mel="dB",
    )


def mel_of(hertz: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Where frequencies lie on the axis of the spectrogram."""
    return np.asarray(hertz_to_mel(hertz, mel_scale="slaney"))


def mel_centres(sampling_rate: int) -> Float[np.ndarray, " mels"]:
    """Where the bands of `log_mels` lie on the axis of the spectrogram."""
    low, high = mel_of(np.array([0.0, sampling_rate / 2]))
    return np.linspace(low, high, N_MELS + 2)[1:-1]
