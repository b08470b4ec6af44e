"""The audio language model that comes with the package, and its clips."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from audio_lens.timeline import Span

CHECKPOINT = Path(__file__).parent / "checkpoint"
CLIPS = Path(__file__).parent / "clips"
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
"""The words it knows, in order of their values; it also answers yes and no."""


@dataclass(frozen=True)
class ShippedPair:
    """Two shipped clips that differ in one spoken digit, and the question that digit decides.

    Attributes:
        clean, corrupted: sound files of equal length and layout.
        question: what is asked; ``answer`` is right for the clean clip, ``against`` for the other.
        words, corrupted_words: what is said when in either clip.
        voice: who says it.
    """

    clean: Path
    corrupted: Path
    question: str
    answer: str
    against: str
    words: tuple[Span, ...]
    corrupted_words: tuple[Span, ...]
    voice: str = ""

    @property
    def swapped(self) -> Span:
        """The word of the clean clip that the corrupted clip has another digit for."""
        pairs = zip(self.words, self.corrupted_words, strict=True)
        return next(word for word, other in pairs if word.label != other.label)


ClipPair = ShippedPair  # its former name


def clip_pairs() -> list[ShippedPair]:
    """Every minimal pair that is shipped."""
    index = json.loads((CLIPS / "clips.json").read_text())

    def words(name: str) -> tuple[Span, ...]:
        said = index["clips"][name]["words"]
        return tuple(Span(word["start_s"], word["end_s"], word["word"]) for word in said)

    return [
        ShippedPair(
            clean=CLIPS / pair["clean"],
            corrupted=CLIPS / pair["corrupted"],
            question=pair["question"],
            answer=pair["answer"],
            against=pair["against"],
            words=words(pair["clean"]),
            corrupted_words=words(pair["corrupted"]),
            voice=index["clips"][pair["clean"]]["voice"],
        )
        for pair in index["pairs"]
    ]


def default_pair() -> ShippedPair:
    """The pair that `audio-lens map` shows when nothing else is asked."""
    return clip_pairs()[0]
