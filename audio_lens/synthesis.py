"""Speech from text with the times of its words and phones, by espeak-ng where it is installed."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile
from jaxtyping import Float

from audio_lens import arguments, espeak
from audio_lens.audio import check_rate, read
from audio_lens.errors import AudioLensError, InputError
from audio_lens.timeline import Span

SPEEDS, PITCHES = range(80, 451), range(100)


class SynthesisError(AudioLensError, RuntimeError):
    """Speech that could not be made; the message says what is missing."""


@dataclass(frozen=True, eq=False)
class Spoken:
    """A synthetic clip that knows what it says when.

    Attributes:
        samples: mono float32.
        sampling_rate: in Hz.
        words: the words of the text; what the voice runs together is one.
        phones: as espeak-ng names them, or in IPA. A stop (p, t, k) begins at its release; phones
            that take no time are left out, and so are pauses.
    """

    samples: Float[np.ndarray, " samples"] = field(repr=False)
    sampling_rate: int
    words: list[Span]
    phones: list[Span]


def can_speak() -> bool:
    """Whether espeak-ng's library is installed."""
    try:
        espeak.library()
    except SystemExit:
        return False
    return True


def speak(
    text: str,
    voice: str = "en-us",
    *,
    speed: int = 175,
    pitch: int = 50,
    ipa: bool = False,
    sampling_rate: int = 16_000,
) -> Spoken:
    """Say a text. The same call gives the same samples.

    Args:
        text: what to say; ``[[...]]`` holds phones, as espeak-ng names them.
        voice: a language, maybe with a variant as its file is called: "en-us", "de", "en-us+f2".
        speed: words per minute, 80 to 450.
        pitch: 0 to 99.
        ipa: name phones in the International Phonetic Alphabet.
        sampling_rate: of the samples, in Hz.

    Raises:
        SynthesisError: if espeak-ng is not installed, or does not have the voice or variant.
        AudioError: a sampling rate that is no positive number.
        ValueError: an empty text, or a speed or pitch that it does not know.
    """
    for name, given in {"text": text, "voice": voice}.items():
        arguments.text(name, given)
    check_rate(sampling_rate)
    if speed not in SPEEDS or pitch not in PITCHES:
        raise InputError(f"speed must lie in 80 to 450 and pitch in 0 to 99: {speed}, {pitch}")
    if not text.strip():
        raise InputError("an empty text is not said")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spoken.wav"
        events = _in_child(path, text=text, voice=voice, speed=speed, pitch=pitch, ipa=ipa)
        file = soundfile.info(path)
        samples = read(path, sampling_rate)

    def seconds(starts: list[tuple[str, int]]) -> list[tuple[str, float]]:
        return [(label, sample / file.samplerate) for label, sample in starts]

    phones = _spans(seconds(events["phones"]), file.duration)
    pauses = [("", span.start_s) for span in phones if _is_pause(span)]
    words = sorted(pauses + seconds(_words(text, events["words"])), key=lambda start: start[1])
    return Spoken(
        samples=samples,
        sampling_rate=sampling_rate,
        words=[span for span in _spans(words, file.duration) if span.label],
        phones=[span for span in phones if not _is_pause(span)],
    )


def _in_child(path: Path, **wanted: str | int | bool) -> dict[str, list[tuple]]:
    """Run `espeak.synthesise` in a process of its own; its words and phones."""
    done = subprocess.run(
        [sys.executable, "-I", espeak.__file__],
        input=json.dumps({"path": str(path), **wanted}),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SynthesisError(done.stderr.strip() or f"espeak-ng ended with {done.returncode}")
    return {kind: [*map(tuple, starts)] for kind, starts in json.loads(done.stdout).items()}


def _words(text: str, events: list[tuple[int, int]]) -> list[tuple[str, int]]:
    """Each stretch of the text that espeak-ng says as a word, and the sample where it begins.

    The library counts several words in "42" and one in "of the", and may point at the space before
    a word: words here are divided by spaces, and one belongs to the last that has a beginning.
    """
    tokens = list(re.finditer(r"\S+", text))
    starts: dict[int, int] = {}
    for character, sample in events:
        token = next((token for token in tokens if token.end() > character), tokens[-1])
        starts.setdefault(token.start(), sample)
    pairs = itertools.pairwise([*sorted(starts.items()), (len(text), 0)])
    return [(_bare(text[first:stop]), sample) for (first, sample), (stop, _) in pairs]


def _bare(word: str) -> str:
    """Without spaces and punctuation about it."""
    return re.sub(r"^\W+|\W+$", "", word) or word.strip()


def _spans(starts: list[tuple[str, float]], end_s: float) -> list[Span]:
    """From each start to the next; what takes no time is left out."""
    pairs = itertools.pairwise([*starts, ("", end_s)])
    return [Span(start, stop, label) for (label, start), (_, stop) in pairs if stop > start]


def _is_pause(span: Span) -> bool:
    return not span.label or span.label.startswith("_")
