"""Positions of a model and seconds of audio, both ways.

A `Timeline` is made by `model.timeline(inputs)` from the real feature masks and token ids, and
answers where each position of each part lies in its clip. Everything else in the library that
speaks of time (windows of a sweep, pictures, alignments) asks it.
"""

from __future__ import annotations

import itertools
import math
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from audio_lens.arguments import number, text, whole
from audio_lens.combining import Combinable
from audio_lens.errors import InputError, RangeError
from audio_lens.printable import printable

NO_CLIP = -1
MOST_WINDOWS = 100_000  # of a clip
_EDGE = 1e-9  # seconds; keeps 3 * 0.1 s from taking in the frame centred at 0.3 s

Answer = TypeVar("Answer")
Seconds = float | int
Hertz = float | int


@dataclass(frozen=True)
class Span(Combinable):
    """A stretch of one clip, ``[start_s, end_s)`` in seconds, with an optional label.

    A place, too: ``|``, ``-`` and ``~`` join it with others (`audio_lens.places`).

    Raises:
        ValueError: if a bound is not finite or the end does not come after the start.
    """

    start_s: Seconds
    end_s: Seconds
    label: str | None = None
    clip: int = 0

    def __post_init__(self) -> None:
        number("the start of a span", self.start_s, unit="seconds")
        number("the end of a span", self.end_s, unit="seconds")
        whole("the clip of a span", self.clip, least=0)
        _check_label(self.label)
        if self.end_s <= self.start_s:
            raise InputError(f"a span must end after it starts: {self.start_s} to {self.end_s} s")

    @property
    def centre_s(self) -> float:
        return (self.start_s + self.end_s) / 2

    @staticmethod
    def of(window: Span | tuple[Seconds, Seconds] | tuple[Seconds, Seconds, str]) -> Span:
        """The window as a Span; tuples are ``(start_s, end_s)`` or ``(start_s, end_s, label)``.

        Raises:
            ValueError: if it is neither.
        """
        if isinstance(window, Span):
            return window
        try:
            start_s, end_s, label = window if len(window) == 3 else (*window, None)
            start, end = (number("a bound", at, unit="seconds") for at in (start_s, end_s))
            return Span(float(start), float(end), label)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"a window is a Span, (start_s, end_s) or (start_s, end_s, label), got {window!r}: "
                f"{error}"
            ) from error


def _check_label(label: object) -> None:
    if not (label is None or isinstance(label, str)):
        raise InputError(f"a label is a text or None, got {reprlib.repr(label)}")


def describe_span(span: Span) -> str:
    """A span for people, e.g. ``0.40-0.50 s "seven"``; later clips are named."""
    clip = f" of clip {span.clip}" if span.clip else ""
    label = f' "{printable(span.label)}"' if span.label else ""
    return f"{span.start_s:.2f}\N{EN DASH}{span.end_s:.2f} s{clip}{label}"


@dataclass(frozen=True)
class Band:
    """A stretch of the spectrum, ``[low_hz, high_hz)`` in Hz, with an optional label.

    Raises:
        ValueError: if a bound is not finite, or the upper does not lie above the lower.
    """

    low_hz: Hertz
    high_hz: Hertz
    label: str | None = None

    def __post_init__(self) -> None:
        number("the lower bound of a band", self.low_hz, unit="Hz")
        number("the upper bound of a band", self.high_hz, unit="Hz")
        _check_label(self.label)
        if self.high_hz <= self.low_hz:
            raise InputError(f"a band must end above its start: {self.low_hz} to {self.high_hz} Hz")

    def __str__(self) -> str:
        label = f' "{printable(self.label)}"' if self.label else ""
        return f"{self.low_hz:.0f}\N{EN DASH}{self.high_hz:.0f} Hz{label}"

    @property
    def centre_hz(self) -> float:
        return (self.low_hz + self.high_hz) / 2

    @staticmethod
    def of(band: Band | tuple[Hertz, Hertz] | tuple[Hertz, Hertz, str]) -> Band:
        """The band as a Band; tuples are ``(low_hz, high_hz)`` or ``(low_hz, high_hz, label)``.

        Raises:
            ValueError: if it is neither.
        """
        if isinstance(band, Band):
            return band
        try:
            low_hz, high_hz, label = band if len(band) == 3 else (*band, None)
            low, high = (number("a bound", at, unit="Hz") for at in (low_hz, high_hz))
            return Band(float(low), float(high), label)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"a band is a Band, (low_hz, high_hz) or (low_hz, high_hz, label), got {band!r}: "
                f"{error}"
            ) from error


@dataclass(frozen=True)
class Track:
    """Where the positions of one part lie.

    Attributes:
        seconds: centre of each position in seconds of its clip; NaN where it has no time.
        clip: which clip of the prompt the position belongs to; -1 for none.
        valid: True where the position holds audio or an attended token, False for padding.
        hertz: lowest, middle and highest frequency that each position reads, NaN where it has no
            frequency; None in parts whose positions read the whole spectrum.
    """

    seconds: Float[Tensor, " t"]
    clip: Int[Tensor, " t"]
    valid: Bool[Tensor, " t"]
    hertz: Float[Tensor, "t 3"] | None = None

    @staticmethod
    def of_clip(seconds: Float[Tensor, " t"], n_valid: int, clip: int) -> Track:
        """A part whose positions are the frames of one clip, padded at the end."""
        index = torch.arange(len(seconds))
        return Track(seconds.double(), torch.full_like(index, clip), index < n_valid)

    @staticmethod
    def of_segment(
        seconds: Float[Tensor, " t"], n_valid: int, clip: int, start_s: Seconds
    ) -> Track:
        """The frames of one segment of a clip, which begins ``start_s`` seconds into it."""
        return Track.of_clip(seconds + start_s, n_valid, clip)

    @staticmethod
    def joined(tracks: Sequence[Track]) -> Track:
        """Several tracks of one clip, one after the other."""
        if len(tracks) == 1:
            return tracks[0]
        columns = zip(*((t.seconds, t.clip, t.valid) for t in tracks), strict=True)
        bands = [t.hertz for t in tracks if t.hertz is not None]
        return Track(*map(torch.cat, columns), hertz=torch.cat(bands) if bands else None)

    @staticmethod
    def of_tokens(valid: Bool[Tensor, " t"]) -> Track:
        """A part whose positions are text tokens, which have no time."""
        seconds = torch.full((len(valid),), math.nan, dtype=torch.float64)
        return Track(seconds, torch.full((len(valid),), NO_CLIP), valid)

    def inside(self, span: Span) -> Bool[Tensor, " t"]:
        """Which positions lie in the span; False for padding and other clips."""
        here = self.valid & (self.clip == span.clip)
        return here & (self.seconds >= span.start_s - _EDGE) & (self.seconds < span.end_s - _EDGE)

    def within(self, band: Band) -> Bool[Tensor, " t"]:
        """Which positions lie in the band by their middle frequency; False for padding.

        Raises:
            ValueError: if the part has no frequencies.
        """
        middle = self.read_hertz()[:, 1]
        return self.valid & (middle >= band.low_hz) & (middle < band.high_hz)

    def read_hertz(self) -> Float[Tensor, "t 3"]:
        """Lowest, middle and highest frequency of every position.

        Raises:
            ValueError: if the part has none.
        """
        if self.hertz is None:
            raise InputError("positions of this part read the whole spectrum: it has no bands")
        return self.hertz

    def same_as(self, other: Track) -> bool:
        return len(self.clip) == len(other.clip) and (
            torch.equal(self.clip, other.clip)
            and torch.equal(self.valid, other.valid)
            and torch.allclose(self.seconds, other.seconds, equal_nan=True)
            and _same_or_none(self.hertz, other.hertz)
        )


@dataclass(frozen=True)
class Row:
    """The tracks of one prompt, by part: one, or one per segment where segments run apart."""

    tracks: dict[str, list[Track]]
    durations_s: list[float]

    def segments(self, part: str) -> list[Track]:
        """The positions of a part, row by row of its batch.

        Raises:
            ValueError: if there is no such part.
        """
        if text("part", part) not in self.tracks:
            raise InputError(f"no part named {part!r}; this model has {', '.join(self.tracks)}")
        return self.tracks[part]

    def track(self, part: str, clip: int) -> Track:
        """The positions of a part; of one clip, where clips run through it one by one."""
        tracks = self.segments(part)
        if self.durations_s or len(tracks) != 1:  # of text alone, the tokens have their places
            self.duration_s(clip)
        own = tracks if len(tracks) == 1 else [t for t in tracks if t.clip[0] == clip]
        return Track.joined(own)

    def duration_s(self, clip: int) -> float:
        """Length of a clip in seconds, without padding."""
        n_clips = len(self.durations_s)
        whole("clip", clip)
        if not 0 <= clip < n_clips:
            raise InputError(f"clip {clip} does not exist; the prompt holds {n_clips} clip(s)")
        return self.durations_s[clip]


class Timeline:
    """Positions and seconds of a batch of inputs.

    Every question is answered for the whole batch where all rows agree; where they differ
    (left padding, clips of unequal length) it raises and asks for one row: ``timeline[0]``.
    Seconds count from the start of each clip.
    """

    def __init__(self, rows: list[Row]):
        self.rows = rows

    def __repr__(self) -> str:
        seconds = ", ".join(f"{x:.2f}" for row in self.rows for x in row.durations_s)
        clips = f"clips of {seconds} s" if seconds else "no clips"
        parts = "; ".join(map(self._told, self.rows[0].tracks)) if self.rows else "no parts"
        return f"Timeline of {len(self)} prompt{'s' * (len(self) != 1)} with {clips}: {parts}"

    def _told(self, part: str) -> str:
        """The positions of a part in the first row, and how far apart they lie."""
        track = Track.joined(self.rows[0].segments(part))
        seconds = track.seconds[track.seconds.isfinite()].unique()
        apart = f" every {seconds.diff().median().item():.3g} s" if len(seconds) > 1 else ""
        timed = int(track.seconds.isfinite().sum())
        of_audio = f", {timed} of audio" if 0 < timed < len(track.seconds) else ""
        return f"{part} {len(track.seconds)} positions{of_audio}{apart}"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Timeline:
        if not -len(self.rows) <= whole("row", row) < len(self.rows):
            raise RangeError(f"there is no row {row}: the batch holds {len(self.rows)}")
        return Timeline([self.rows[row]])

    def corresponds_to(self, other: Timeline) -> bool:
        """Whether every position of every part holds the same moment in both."""
        tracks = [
            [track for row in timeline.rows for part in row.tracks.values() for track in part]
            for timeline in (self, other)
        ]
        return len(tracks[0]) == len(tracks[1]) and all(map(Track.same_as, *tracks))

    def _agreed(self, what: str, ask: Callable[[Row], Answer], same: Callable) -> Answer:
        first, *others = [ask(row) for row in self.rows]
        if not all(same(first, other) for other in others):
            raise InputError(f"the rows of this batch differ in {what}; ask one: timeline[row]")
        return first

    def _track(self, part: str, clip: int) -> Track:
        return self._agreed(f"the {part}", lambda row: row.track(part, clip), Track.same_as)

    @property
    def n_clips(self) -> int:
        """Clips per prompt."""
        return self._agreed("clips", lambda row: len(row.durations_s), int.__eq__)

    def duration_s(self, clip: int = 0) -> float:
        """Length of the clip in seconds, without padding."""
        return self._agreed("duration", lambda row: row.duration_s(clip), math.isclose)

    def has_time(self, part: str) -> bool:
        """Whether positions of the part lie in time (Whisper's decoder positions do not)."""
        tracks = (track for row in self.rows for track in row.segments(part))
        return any(bool(torch.isfinite(track.seconds).any()) for track in tracks)

    def seconds(self, part: str, clip: int = 0) -> Float[Tensor, " t"]:
        """Centre of every position of the part in seconds of its clip; NaN for text.

        ``clip`` matters where clips run through the part one by one (encoder, connector).
        """
        return self._track(part, clip).seconds

    def valid(self, part: str, clip: int = 0) -> Bool[Tensor, " t"]:
        """True at positions that hold audio or an attended token, False at padding."""
        return self._track(part, clip).valid

    def clips(self, part: str, clip: int = 0) -> Int[Tensor, " t"]:
        """Which clip of the prompt each position of the part belongs to; -1 for none."""
        return self._track(part, clip).clip

    def has_frequency(self, part: str) -> bool:
        """Whether positions of the part lie in frequency too (patches of a spectrogram)."""
        return any(t.hertz is not None for row in self.rows for t in row.segments(part))

    def hertz(self, part: str, clip: int = 0) -> Float[Tensor, " t"]:
        """Middle frequency of what every position reads, in Hz; NaN for those without.

        Raises:
            ValueError: if positions of the part have no frequency, as in most models.
        """
        return self._track(part, clip).read_hertz()[:, 1]

    def hertz_range(self, part: str, clip: int = 0) -> Float[Tensor, "t 2"]:
        """Lowest and highest frequency that every position reads, in Hz; NaN for those without.

        Raises:
            ValueError: if positions of the part have no frequency, as in most models.
        """
        return self._track(part, clip).read_hertz()[:, [0, 2]]

    def bands(self, part: str) -> list[Band]:
        """One band for every frequency at which the part has positions, from low to high.

        They meet halfway between the middles of neighbouring positions, so that each holds the
        positions of one frequency; the outermost end where the positions there do.

        Raises:
            ValueError: if positions of the part have no frequency, as in most models.
        """
        known = self.rows[0].track(part, 0).read_hertz()
        read = known[known.isfinite().all(1)].unique(dim=0)
        between = (read[1:, 1] + read[:-1, 1]) / 2
        edges = [float(read[0, 0]), *between.tolist(), float(read[-1, 2])]
        return [Band(low, high) for low, high in itertools.pairwise(edges)]

    def positions(
        self, part: str, start_s: Seconds | Span, end_s: Seconds | None = None, clip: int = 0
    ) -> slice | Int[Tensor, " n"]:
        """The positions whose centres lie in ``[start_s, end_s)`` seconds of the clip.

        Bounds outside the clip are clipped. A `Span` may stand for both bounds and the clip.
        Indices where the positions do not follow each other (patches of a spectrogram).

        Raises:
            ValueError: if the part has no time, or no position lies in the window.
        """
        if isinstance(start_s, Span):
            span = start_s
        elif end_s is None:
            raise InputError("positions needs start_s and end_s, or a Span")
        else:
            span = Span(start_s, end_s, clip=clip)
        index = self.inside(part, span).nonzero().flatten()
        if len(index) == 0:
            raise InputError(
                f"no position of the {part} lies between {span.start_s:g} and {span.end_s:g} s of "
                f"clip {span.clip} ({self.duration_s(span.clip):g} s long)"
            )
        whole = slice(int(index[0]), int(index[-1]) + 1)
        return whole if whole.stop - whole.start == len(index) else index

    def inside(self, part: str, span: Span) -> Bool[Tensor, " t"]:
        """Which positions lie in the span; False for padding and other clips.

        Raises:
            ValueError: if the part has no time.
        """
        track = self._track(part, span.clip)
        if not torch.isfinite(track.seconds).any():
            raise InputError(
                f"positions of the {part} are tokens and have no time; address them by position "
                f"(axes 'position'), or use a part with time: {', '.join(self._timed_parts())}"
                + self._profile_hint()
            )
        return track.inside(span)

    def mask(
        self, part: str, start_s: Seconds | None = None, end_s: Seconds | None = None, clip: int = 0
    ) -> Bool[Tensor, "b t"]:
        """The positions of every row that hold something; rows may be unequal.

        One entry per prompt; where clips or segments of clips run through the part one by one
        (encoders), one per segment, in order.

        Args:
            start_s, end_s: only those whose centres lie in ``[start_s, end_s)`` seconds of the
                clip; None is its start or end. A row may then hold none.

        Raises:
            ValueError: no such part, bounds that are no seconds, or bounds of a part without time.
        """
        tracks = [track for row in self.rows for track in row.segments(part)]
        if start_s is None and end_s is None:
            return torch.stack([track.valid for track in tracks])
        if not any(torch.isfinite(track.seconds).any() for track in tracks):
            raise InputError(
                f"positions of the {part} have no time{self._profile_hint()}; parts with time: "
                f"{', '.join(self._timed_parts())}"
            )
        longest = max(max(row.durations_s, default=0.0) for row in self.rows) + 1.0
        span = Span(
            0.0 if start_s is None else start_s, longest if end_s is None else end_s, clip=clip
        )
        return torch.stack([track.inside(span) for track in tracks])

    def _profile_hint(self) -> str:
        """What to do where audio enters a language model in no order of time."""
        if "connector" not in self.rows[0].tracks or self.has_time("connector"):
            return ""
        return ". When each audio token listens, audio_lens.analysis.time_profile.time_profile says"

    def _timed_parts(self) -> list[str]:
        return [part for part in self.rows[0].tracks if self.has_time(part)]

    def windows(
        self, part: str, width_s: Seconds, stride_s: Seconds | None = None, clip: int = 0
    ) -> list[Span]:
        """Windows of ``width_s`` seconds every ``stride_s`` (default: the width) over the clip.

        Windows narrower than the part's frame spacing that hold no position are left out.

        Raises:
            ValueError: if width or stride is not positive, or the part has no time.
        """
        stride_s = width_s if stride_s is None else stride_s
        number("the width of windows", width_s, above=0, unit="seconds")
        number("the stride of windows", stride_s, above=0, unit="seconds")
        duration = self.duration_s(clip)
        if duration / stride_s > MOST_WINDOWS:
            raise InputError(
                f"a window every {stride_s:g} s is more than {MOST_WINDOWS:,} in a clip of "
                f"{duration:g} s: take a longer stride, or 'position' for every position"
            )
        count = max(1, math.ceil(duration / stride_s - _EDGE))
        spans = [
            Span(round(i * stride_s, 9), round(min(i * stride_s + width_s, duration), 9), clip=clip)
            for i in range(count)
        ]
        return [span for span in spans if self.inside(part, span).any()]

    @property
    def audio_span(self) -> slice:
        """The decoder positions that hold the first clip (audio LLMs)."""
        return self.clip_span(0)

    def clip_span(self, clip: int) -> slice:
        """The decoder positions that hold the given clip (audio LLMs).

        Raises:
            ValueError: if there are none, or they do not follow each other.
        """
        own = (self._track("decoder", clip).clip == clip).nonzero().flatten()
        if self.has_time("decoder") or not len(own):
            found = self.positions("decoder", Span(0, self.duration_s(clip), clip=clip))
            if isinstance(found, slice):
                return found
            raise InputError(f"clip {clip} lies in several pieces; timeline.positions finds them")
        return slice(int(own[0]), int(own[-1]) + 1)

    @property
    def text_span(self) -> Int[Tensor, " n"]:
        """Indices of the attended decoder positions that hold text."""
        track = self._track("decoder", 0)
        return (track.valid & (track.clip == NO_CLIP)).nonzero().flatten()


def _same_or_none(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.allclose(one, other, equal_nan=True)
