"""espeak-ng's speech: the same at every call, with the times of what is said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from audio_lens import Span, Spoken, SynthesisError, can_speak, espeak, speak
from audio_lens.synthesis import _words

needs_espeak = pytest.mark.skipif(not can_speak(), reason="espeak-ng is not installed")


def labels(spans: list[Span]) -> list[str | None]:
    return [span.label for span in spans]


def crossings(spoken: Spoken, span: Span) -> float:
    """How often a stretch crosses zero: often in s, seldom in vowels."""
    rate = spoken.sampling_rate
    inside = spoken.samples[round(span.start_s * rate) : round(span.end_s * rate)]
    return float((np.diff(np.sign(inside)) != 0).mean())


@needs_espeak
def test_words_and_phones() -> None:
    spoken = speak("say pat now")
    assert labels(spoken.words) == ["say", "pat", "now"]
    assert labels(spoken.phones) == ["s", "eI", "p", "a", "t", "n", "aU"]
    assert spoken.samples.dtype == np.float32 and spoken.sampling_rate == 16_000
    ends = [s for span in spoken.phones for s in (span.start_s, span.end_s)]
    assert ends == sorted(ends)
    assert spoken.words[-1].end_s == spoken.phones[-1].end_s < len(spoken.samples) / 16_000


@needs_espeak
def test_phones_sound_where_they_are_said_to() -> None:
    spoken = speak("see sap as ease", "en-us")
    is_hiss = {label: label in ("s", "z") for label in labels(spoken.phones)}
    hiss = [crossings(spoken, p) for p in spoken.phones if p.label == "s"]
    rest = [crossings(spoken, p) for p in spoken.phones if not is_hiss[p.label]]
    assert min(hiss) > 2 * max(rest)


@needs_espeak
def test_nothing_is_heard_outside_the_words() -> None:
    spoken = speak("one, two. three")
    heard = np.abs(spoken.samples) > 0.01
    for word in spoken.words:
        inside = slice(round(word.start_s * 16_000), round(word.end_s * 16_000))
        assert heard[inside].mean() > 0.3
        heard[inside] = False
    assert heard.mean() < 0.02  # but the last of its sound
    assert labels(spoken.words) == ["one", "two", "three"]


@needs_espeak
def test_words_of_the_text() -> None:
    text = "I have 42 cats, café olé. Don't stop on top of the hill - yes!"
    assert labels(speak("Mr. Smith is 10.5. hello").words) == ["Mr", "Smith", "is", "10.5", "hello"]
    assert labels(speak(text).words) == [
        *("I", "have", "42", "cats", "café", "olé", "Don't", "stop", "on", "top", "of the"),
        *("hill", "yes"),
    ]


def test_words_that_are_said_as_one_or_several() -> None:
    events = [(0, 10), (3, 40), (4, 50), (6, 90)]  # "42" is said as two; a space is pointed at
    assert _words("So 42. of the", events) == [("So", 10), ("42", 40), ("of the", 90)]
    assert _words("  yes ", [(9, 10)]) == [("yes", 10)]


@needs_espeak
def test_the_same_at_every_call() -> None:
    one, two = speak("putty"), speak("putty")
    assert (one.samples == two.samples).all() and one.phones == two.phones


@needs_espeak
def test_settings_take_effect() -> None:
    plain = speak("hello there")
    slow = speak("hello there", speed=90)
    assert len(slow.samples) > 1.4 * len(plain.samples)
    for other in (
        speak("hello there", pitch=90),
        speak("hello there", "en-us+f2"),
        speak("hello there", "en-gb-scotland"),
    ):
        same = min(len(other.samples), len(plain.samples))
        assert not (other.samples[:same] == plain.samples[:same]).all()
    twice = speak("hello there", sampling_rate=32_000)
    assert len(twice.samples) == pytest.approx(2 * len(plain.samples), abs=2)
    assert twice.phones == plain.phones


@needs_espeak
def test_ipa() -> None:
    assert labels(speak("cheese", ipa=True).phones) == [
        "t\N{LATIN SMALL LETTER ESH}",
        "i\N{MODIFIER LETTER TRIANGULAR COLON}",
        "z",
    ]


@needs_espeak
def test_phones_as_text() -> None:
    said, written = speak("putty").phones, speak("[[p'Vt#i]]").phones
    assert labels(said) == labels(written)


@needs_espeak
@pytest.mark.parametrize("word", ["bat", "seat", "light", "ship"])
@pytest.mark.real
def test_phones_of_the_minimal_pairs(data_dir: Path, word: str) -> None:
    """Another use of the same library gave these times; its clips have no pause at the end."""
    folder = data_dir / "espeak_minimal_pairs"
    clips = json.loads((folder / "alignments.json").read_text())
    clip = next(c for c in clips if c["word"] == word and c["condition"] == "base")
    spoken = speak(clip["text"], clip["voice"])
    known = [phone for phone in clip["phones"] if not phone[0].startswith("_")]
    assert labels(spoken.phones) == [name for name, *_ in known]
    scale = spoken.phones[-1].end_s / known[-1][-1]  # they speak at another rate
    for span, (_, start_s, end_s) in zip(spoken.phones, known, strict=True):
        assert span.start_s == pytest.approx(scale * start_s, abs=0.02)
        assert span.end_s == pytest.approx(scale * end_s, abs=0.02)


@needs_espeak
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"voice": "xx-yy"}, SynthesisError, "no voice 'xx-yy'"),
        ({"voice": "en-us+nobody"}, SynthesisError, "no variant 'nobody'"),
        ({"text": " "}, ValueError, "empty text"),
        ({"speed": 10}, ValueError, "speed must lie in 80 to 450"),
        ({"pitch": 100}, ValueError, "pitch in 0 to 99"),
    ],
)
def test_what_it_cannot_say(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        speak(**{"text": "hello", **options})


def test_without_espeak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that speaks ends as it does where the library is missing."""
    child = tmp_path / "espeak.py"
    source = Path(espeak.__file__).read_text()
    child.write_text(source.replace("espeak-ng", "missing-ng"))
    monkeypatch.setattr(espeak, "__file__", str(child))
    with pytest.raises(SynthesisError, match="is not installed"):
        speak("hello")
