"""Corruptions, minimal pairs, words in time and speech."""

from __future__ import annotations

from typing import Any

from audio_lens import align, corruptions, minimal_pair, read_textgrid, speak
from bad_input.world import INF, NAN, RATE, Case, clip, model, named, shipped, written

SPAN = (0.4, 0.9)


def _spoilt(corruption: Any) -> Any:
    return corruption(clip(), RATE)


def _pair(corrupted: Any = None, **options: Any) -> Any:
    asked = {"text": shipped().question, "sampling_rate": RATE} | options
    return minimal_pair(model(), clip(), corrupted, **asked)


CORRUPTIONS = {
    "a signal-to-noise ratio of NaN": lambda: corruptions.Noise(NAN),
    "a signal-to-noise ratio of infinity": lambda: corruptions.Noise(INF),
    "a signal-to-noise ratio of -1e9": lambda: corruptions.Noise(-1e9),
    "a text for a ratio": lambda: corruptions.Noise("5"),
    "a seed of -1": lambda: corruptions.Noise(5, seed=-1),
    "a seed of NaN": lambda: corruptions.TimeShuffle(0.1, seed=NAN),
    "a fade of -1 s": lambda: corruptions.Silence(fade_s=-1),
    "a fade of infinity": lambda: corruptions.Silence(fade_s=INF),
    "a text for a fade": lambda: corruptions.Silence(fade_s="0.1"),
    "pieces of 0 s": lambda: corruptions.TimeShuffle(0),
    "pieces of 1e-300 s": lambda: _spoilt(corruptions.TimeShuffle(1e-300)),
    "pieces longer than the clip": lambda: _spoilt(corruptions.TimeShuffle(60)),
    "a span behind the clip": lambda: _spoilt(corruptions.Silence(span=(98, 99))),
    "a span that ends before it starts": lambda: corruptions.Silence(span=(0.9, 0.4)),
    "a span of texts": lambda: corruptions.Silence(span=("0", "1")),
    "a splice without its span": lambda: corruptions.Splice(shipped().corrupted),
    "a splice longer than its span": lambda: corruptions.Splice(
        shipped().corrupted, source=(0, 1), span=SPAN
    ),
    "a clip that is not there": lambda: corruptions.OtherUtterance("nothing.wav"),
    "a rate of NaN": lambda: corruptions.Noise(5, clip=clip(), sampling_rate=NAN),
    "the rate of a call of 1e300": lambda: corruptions.Silence()(clip(), 1e300),
    "noise for silence": lambda: corruptions.Noise(5)(clip() * 0, RATE),
    "a swap of nothing": lambda: corruptions.TextSwap("", "a"),
    "a swap of the same": lambda: corruptions.TextSwap("a", "a"),
    "a swap of numbers": lambda: corruptions.TextSwap(3, 4),
    "a swap of what is not there": lambda: corruptions.TextSwap("x", "y")("seven"),
    "a swap in a number": lambda: corruptions.TextSwap("x", "y")(3),
}

PAIRS = {
    "a pair that does not differ": lambda: _pair(),
    "an unknown way to fit": lambda: _pair(corruptions.Silence(), fit="stretch"),
    "a number for the other clip": lambda: _pair(3),
    "a rate of infinity": lambda: _pair(corruptions.Silence(), sampling_rate=INF),
    "a number for the other text": lambda: _pair(corruptions.Silence(), corrupted_text=3),
    "a text of another length": lambda: _pair(corrupted_text="which is it that comes first?"),
}

TIMES = {
    "a TextGrid that is not there": lambda: read_textgrid("nothing.TextGrid"),
    "a TextGrid of another kind": lambda: read_textgrid(written("a.TextGrid", "no grid")),
    "an empty TextGrid": lambda: read_textgrid(written("b.TextGrid", "")),
    "a TextGrid of bytes": lambda: read_textgrid(written("c.TextGrid", bytes(range(256)))),
    "a number for a TextGrid": lambda: read_textgrid(3),
    "a model without CTC": lambda: align(model(), clip(), "seven", RATE),
    "a speed of NaN": lambda: speak("seven", speed=NAN),
    "a pitch of 100": lambda: speak("seven", pitch=100),
    "an empty text": lambda: speak(" "),
    "a number for a text": lambda: speak(3),
    "a rate of NaN for speech": lambda: speak("seven", sampling_rate=NAN),
    "a list for a voice": lambda: speak("seven", voice=["en"]),
}

CASES: list[Case] = [
    *named("Corruptions", CORRUPTIONS),
    *named("Minimal pairs", PAIRS),
    *named("Words in time", TIMES),
]
