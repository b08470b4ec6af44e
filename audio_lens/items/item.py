"""One item of a study: a clip, what is asked about it, what is right, and what is known of it."""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from jaxtyping import Float

from audio_lens.arguments import suggest
from audio_lens.audio import AudioError, check, duration, load
from audio_lens.corruptions import Corruption
from audio_lens.errors import AudioLensError
from audio_lens.sound_files import opened
from audio_lens.timeline import Span

Label = str | int | float | bool
SHOWN = 5  # of many things that are wrong, those that an error names
OWN_FIELDS = ("group", "answer", "against", "text", "id")  # what `value` finds beside labels
SLACK_S = 0.1  # by which words may end behind the clip: aligners round, and hear its padding


class ItemError(AudioLensError, ValueError):
    """An item or a table that cannot be used; the message names the item, or file and line."""


@dataclass(frozen=True, eq=False)
class Item:
    """A clip with its question, the right answer, and what else is known of it.

    Attributes:
        audio: the clip: a path, or samples (with ``sampling_rate``), or anything else that
            ``model.prepare`` takes for one clip.
        text: what is asked, as ``model.prepare`` takes it; None for models that take no text.
        answer: what is right; of an item whose text contradicts its clip, what the clip says.
        against: a wrong answer to compare with; of such an item, what the text says.
        options: all answers there are to choose from; empty where any may be given.
        labels: facts by name (speaker, emotion, digit ...).
        words: what is said when, in seconds.
        group: whom or what the item belongs to, such as its speaker: items of one group are
            never on both sides of a split, and are drawn together by `statistics.bootstrap`.
        id: its name, different for every item; `Items` numbers those without.
        other_audio, other_text: counterparts that move one stream alone, for pairs.
        sampling_rate: of clips given as samples, in Hz.
        place: where its row stands, as errors name it: "items.jsonl line 3".

    Raises:
        ItemError: an answer that is not among the options, or is the same as ``against``; options
            that repeat; a label that is neither text nor a number.
    """

    audio: Any = field(repr=False)
    text: str | None = None
    answer: str | None = None
    against: str | None = None
    options: Sequence[str] = ()
    labels: Mapping[str, Any] = field(default_factory=dict)
    words: Sequence[Span | tuple] = ()
    group: str | None = None
    id: str = ""
    other_audio: Any = field(default=None, kw_only=True, repr=False)
    other_text: str | None = field(default=None, kw_only=True)
    sampling_rate: int | None = field(default=None, kw_only=True)
    place: str = field(default="", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        if self.audio is None:
            raise ItemError(f"{self.name} has no audio")
        if isinstance(self.options, str):
            raise ItemError(f"{self.name}: options are a list of texts, got {self.options!r}")
        object.__setattr__(self, "options", tuple(self.options))
        object.__setattr__(self, "words", tuple(map(Span.of, self.words)))
        object.__setattr__(self, "labels", dict(self.labels))
        self._check_answers()
        for name, value in self.labels.items():
            if not isinstance(value, Label) or (
                isinstance(value, float) and not math.isfinite(value)
            ):
                raise ItemError(f"{self.name}: label {name!r} is text or a number, got {value!r}")

    def _check_answers(self) -> None:
        if self.answer is not None and self.answer == self.against:
            raise ItemError(f"{self.name}: answer and against are both {self.answer!r}")
        if len(set(self.options)) < len(self.options):
            raise ItemError(f"{self.name}: options repeat: {list(self.options)}")
        for what, said in (("answer", self.answer), ("against", self.against)):
            if said is not None and self.options and said not in self.options:
                raise ItemError(
                    f"{self.name}: {what} {said!r} is none of the options {list(self.options)}"
                )

    @property
    def name(self) -> str:
        """What errors call the item."""
        called = f"item {self.id!r}" if self.id else "an item"
        return f"{called} ({self.place})" if self.place else called

    @property
    def clip(self) -> Any:
        """The clip as ``model.prepare`` takes it, with its own rate."""
        return rated(self.audio, self.sampling_rate)

    @property
    def duration_s(self) -> float:
        """Length of the clip in seconds; of a file, by its head.

        Raises:
            AudioError: a clip that cannot be read.
        """
        if isinstance(self.audio, (str, Path)):
            return duration(self.audio)
        samples, rate = heard(self.clip)
        return len(samples) / rate

    @property
    def counterpart(self) -> Item | None:
        """The item with whatever it brings of ``other_audio`` and ``other_text``; else None."""
        there = {"audio": self.other_audio, "text": self.other_text}
        brought = {name: other for name, other in there.items() if other is not None}
        return self.replaced(**brought) if brought else None

    def value(self, label: str) -> Label | None:
        """One of the labels, or else of the item's own fields: group, answer, against, text, id.

        Raises:
            ItemError: for a label that the item does not have.
        """
        if label in self.labels:
            return self.labels[label]
        if label in OWN_FIELDS:
            return getattr(self, label)
        known = suggest(label, [*self.labels, *OWN_FIELDS])
        raise ItemError(f"{self.name} has no label {label!r}; {known}")

    def check(self) -> None:
        """Raise unless there is a sound file wherever the item names one, and its words lie in it.

        No sample is read.

        Raises:
            AudioError: naming the path.
            ItemError: a word that begins before the clip, or ends after it.
        """
        clips = (self.audio, self.other_audio)
        lengths = [duration(x) if isinstance(x, (str, Path)) else None for x in clips]
        words = [word for word in map(Span.of, self.words) if word.clip == 0]
        seconds = self.duration_s if words and lengths[0] is None else lengths[0] or 0.0
        for word in words:
            if word.start_s < 0 or word.end_s > seconds + SLACK_S:
                raise ItemError(
                    f"the word {word.label!r} lies at {word.start_s:.2f} to {word.end_s:.2f} s, "
                    f"and the clip lasts {seconds:.2f} s"
                )

    def digest(self) -> str:
        """A hash of the samples that are heard, and of all that is said of them.

        The same for a clip in memory, in a file, and in a file elsewhere.

        Raises:
            AudioError: a clip that cannot be read.
        """
        digest = hashlib.sha256()
        for audio in (self.audio, self.other_audio):
            if audio is not None:
                samples, rate = heard(rated(audio, self.sampling_rate))
                digest.update(f"{rate}".encode())
                digest.update(samples.tobytes())
        digest.update(json.dumps(self.told(), sort_keys=True).encode())
        return digest.hexdigest()[:16]

    def told(self) -> dict[str, Any]:
        """Everything but the clips, as JSON holds it; what is missing is left out."""
        fields = {
            "id": self.id,
            **{name: getattr(self, name) for name in ("text", "answer", "against")},
            "options": list(self.options),
            "other_text": self.other_text,
            "group": self.group,
            "labels": dict(self.labels),
            "words": [_word(span) for span in map(Span.of, self.words)],
        }
        return {name: value for name, value in fields.items() if value not in (None, [], {}, "")}

    def replaced(self, **changes: Any) -> Item:
        """The item with some fields changed."""
        return replace(self, **changes)


@dataclass(frozen=True, eq=False)
class Spoiled:
    """A clip that a corruption changes whenever it is heard, so that its samples are never kept."""

    clip: Any = field(repr=False)
    corruption: Corruption

    def __call__(self) -> dict[str, Any]:
        """The changed samples with their rate.

        Raises:
            AudioError: a clip that cannot be read, or that the corruption cannot change.
        """
        samples, rate = heard(self.clip)
        changed, _ = self.corruption(samples, rate)
        return {"array": changed, "sampling_rate": rate}


@dataclass(frozen=True, eq=False)
class Excerpt:
    """A stretch of a sound file, read whenever it is heard.

    Attributes:
        path: the file.
        start_s, end_s: seconds in it.

    Raises:
        AudioError: no sound file, or a stretch that lies beyond its end.
    """

    path: Path
    start_s: float
    end_s: float

    def __post_init__(self) -> None:
        if not 0 <= self.start_s < self.end_s <= self.file_s + SLACK_S:
            raise AudioError(
                f"{self.start_s:.2f} to {self.end_s:.2f} s is no stretch of {self.path}, which "
                f"lasts {self.file_s:.2f} s"
            )

    @property
    def file_s(self) -> float:
        """How long the whole file lasts, in seconds."""
        with opened(self.path, str(self.path)) as file:
            return file.frames / file.samplerate

    def __call__(self) -> dict[str, Any]:
        """Its samples, channels averaged, with their rate.

        Raises:
            AudioError: a file that cannot be read.
        """
        with opened(self.path, str(self.path)) as file:
            rate = file.samplerate
            file.seek(round(self.start_s * rate))
            frames = round((self.end_s - self.start_s) * rate)
            samples = file.read(frames, dtype="float32", always_2d=True).mean(1)
        return {"array": samples, "sampling_rate": rate}


def rated(audio: Any, sampling_rate: int | None) -> Any:
    """A clip with its rate beside it, where samples have none of their own."""
    if isinstance(audio, (Spoiled, Excerpt)):
        return audio()
    if isinstance(audio, list):
        audio = np.asarray(audio)
    if isinstance(audio, (np.ndarray, torch.Tensor)):
        return {"array": audio, "sampling_rate": sampling_rate}
    return audio


def heard(clip: Any) -> tuple[Float[np.ndarray, " samples"], int]:
    """The samples of a clip at its own rate in Hz, mono float32.

    Raises:
        AudioError: a clip that cannot be read, or samples without a rate.
    """
    rate = _rate_of(clip)
    return load(clip, rate, rate), rate


def _rate_of(clip: Any) -> int:
    if isinstance(clip, Mapping):
        if clip.get("array") is None:
            content = clip.get("bytes")
            return _rate_of(clip.get("path") if content is None else io.BytesIO(content))
        clip = (clip["array"], clip.get("sampling_rate"))
    if isinstance(clip, tuple):
        if clip[1] is None:
            raise AudioError(
                "samples without a sampling rate: pass sampling_rate= (Hz) beside them"
            )
        return int(clip[1])
    if isinstance(clip, (str, Path)):
        check(clip)
    try:
        return int(soundfile.info(clip).samplerate)
    except (soundfile.LibsndfileError, TypeError) as error:
        raise AudioError(f"the clip cannot be read as audio: {error}") from error


def _word(span: Span) -> dict[str, Any]:
    return {name: at for name, at in vars(span).items() if name != "clip" or at}


def listed(what: str, whys: Sequence[str]) -> str:
    """A message that names the first few of many."""
    more = [f"... and {len(whys) - SHOWN} more"] if len(whys) > SHOWN else []
    return "\n  ".join([f"{what}:", *whys[:SHOWN], *more])
