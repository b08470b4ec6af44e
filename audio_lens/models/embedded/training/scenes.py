"""Clips composed of single words, so that every word's time is known exactly.

Words start on a grid of 20 ms (one encoder position), clips last a multiple of 40 ms (one audio
token of the language model).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from audio_lens.models.embedded.training.material import RATE, Utterance, Wave

GRID = RATE // 50
TOKEN = RATE // 25
SHORTEST_S, LONGEST_S = 1.0, 4.0


@dataclass(frozen=True)
class PlacedWord:
    """A word in a clip: its text, first and one-past-last sample in seconds."""

    start_s: float
    end_s: float
    word: str


@dataclass(frozen=True)
class Scene:
    """A clip and what is said in it.

    Attributes:
        wave: float32 samples at 16 kHz.
        words: in order of time.
    """

    wave: Wave
    words: tuple[PlacedWord, ...]

    @property
    def digits(self) -> tuple[str, ...]:
        return tuple(placed.word for placed in self.words)


def compose(utterances: Sequence[Utterance], starts_s: Sequence[float], length_s: float) -> Scene:
    """Lay words on silence.

    Args:
        utterances: words in order of time.
        starts_s: onset of each in seconds; rounded to a sample.
        length_s: length of the clip in seconds.

    Raises:
        ValueError: words of several speakers, or words that overlap or leave the clip.
    """
    if len({utterance.speaker for utterance in utterances}) > 1:
        raise ValueError("the words of a clip must be of one speaker")
    wave = np.zeros(round(length_s * RATE), np.float32)
    words, free = [], 0
    for utterance, start_s in zip(utterances, starts_s, strict=True):
        start = round(start_s * RATE)
        stop = start + len(utterance.wave)
        if start < free or stop > len(wave):
            raise ValueError(f"'{utterance.word}' at {start_s:.2f} s overlaps or leaves the clip")
        wave[start:stop] = utterance.wave
        words.append(PlacedWord(start / RATE, stop / RATE, utterance.word))
        free = stop
    return Scene(wave, tuple(words))


def lay_out(slots_s: Sequence[float], gaps_s: Sequence[float]) -> tuple[list[float], float]:
    """Onsets and clip length for words of the given lengths with silences around them.

    Args:
        slots_s: room for each word, in seconds.
        gaps_s: silence before each word, and after the last: one more than slots.

    Returns:
        Onsets in seconds on the 20 ms grid, and the clip's length, a multiple of 40 ms.
    """
    starts, now = [], 0
    for slot, gap in zip(slots_s, gaps_s[:-1], strict=True):
        now = math.ceil((now + gap * RATE) / GRID) * GRID
        starts.append(now / RATE)
        now += round(slot * RATE)
    return starts, math.ceil((now + gaps_s[-1] * RATE) / TOKEN) * TOKEN / RATE


def draw_gaps(slots_s: Sequence[float], draw: np.random.Generator) -> list[float]:
    """Random silences for :func:`lay_out`, such that the clip lasts one to four seconds.

    Raises:
        ValueError: the words alone are too long for a clip.
    """
    room = LONGEST_S - sum(slots_s) - (len(slots_s) + 2) * TOKEN / RATE
    if room < 0:
        raise ValueError(f"words of {sum(slots_s):.2f} s do not fit a clip of {LONGEST_S} s")
    gaps = draw.uniform(0.04, 0.5, len(slots_s) + 1)
    gaps *= min(1.0, room / gaps.sum())
    return _long_enough(slots_s, gaps)


def _long_enough(slots_s: Sequence[float], gaps_s: np.ndarray) -> list[float]:
    missing = max(0.0, SHORTEST_S - gaps_s.sum() - sum(slots_s))
    return [*gaps_s[:-1].tolist(), float(gaps_s[-1] + missing)]


def draw_room(
    slots_s: Sequence[float], gaps_s: Sequence[float], draw: np.random.Generator
) -> list[float]:
    """Silences for :func:`lay_out` with more of it, such that the clip lasts one to four seconds.

    Long clips are more probable than short ones. Most of what is added is in one place: more often
    behind the last word than before the first, and there more often than in between.

    Args:
        slots_s: room for each word, in seconds.
        gaps_s: silences to add to, as :func:`draw_gaps` gives them.
        draw: decides how much is added where.
    """
    gaps = np.array(gaps_s) * draw.uniform(0.4, 1)
    left = LONGEST_S - sum(slots_s) - gaps.sum() - (len(slots_s) + 2) * TOKEN / RATE
    more = max(0.0, left) * draw.random() ** 0.25
    share = draw.dirichlet([0.4, *[0.05] * (len(slots_s) - 1), 0.6])
    return _long_enough(slots_s, gaps + more * share)


def seconds(utterance: Utterance) -> float:
    """Length of a word."""
    return len(utterance.wave) / RATE


def minimal_pair(
    utterances: Sequence[Utterance], index: int, other: Utterance, gaps_s: Sequence[float]
) -> tuple[Scene, Scene]:
    """Two clips of one layout and length that differ in one word.

    The slot of the swapped word is as long as the longer of both.

    Args:
        utterances: words of the clean clip in order.
        index: which of them is swapped.
        other: the word of the same speaker that replaces it.
        gaps_s: silence before each slot, and after the last, in seconds.

    Returns:
        The clean and the corrupted clip.

    Raises:
        IndexError: no such word.
        ValueError: another speaker's word.
    """
    swapped = list(utterances)
    swapped[index] = other
    slots = [max(seconds(a), seconds(b)) for a, b in zip(utterances, swapped, strict=True)]
    starts, length = lay_out(slots, gaps_s)
    return compose(utterances, starts, length), compose(swapped, starts, length)
