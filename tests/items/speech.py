"""Items of real speech: three digits of one unseen speaker in a clip, and the second one asked."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np

import tiny
from audio_lens import Item, Items
from audio_lens.models.embedded import DIGITS
from audio_lens.models.embedded.training import material, questions, scenes
from audio_lens.timeline import Span

STARTS, LENGTH, SLOT = (0.2, 0.88, 1.56), 2.32, 0.60  # seconds
QUESTION = "Which digit is second?"


@functools.cache
def _spoken(takes: range) -> dict[str, dict[str, list]]:
    tiny.data_dir()
    said = material.fsdd_words(list(material.UNSEEN_SPEAKERS), takes)
    return {
        speaker: {
            digit: [u for u in words if u.word == digit and 0.2 < len(u.wave) / 16_000 < SLOT]
            for digit in DIGITS
        }
        for speaker, words in said.items()
    }


def _scenes(
    count: int, n_digits: int, seed: int, takes: range
) -> Iterator[tuple[str, list[str], scenes.Scene, scenes.Scene]]:
    """Speakers, different digits, a clip of the first three, and one with the fourth as second."""
    draw, said = np.random.default_rng(seed), _spoken(takes)
    made = 0
    while made < count:
        speaker = str(draw.choice(list(said)))
        digits = [str(digit) for digit in draw.choice(DIGITS, n_digits, replace=False)]
        if not all(said[speaker][digit] for digit in digits[:4]):
            continue
        words = [said[speaker][d][draw.integers(len(said[speaker][d]))] for d in digits[:4]]
        clean = scenes.compose(words[:3], STARTS, LENGTH)
        other = scenes.compose([words[0], words[3], words[2]], STARTS, LENGTH)
        made += 1
        yield speaker, digits, clean, other


def spoken_items(count: int, seed: int = 0, takes: range = range(3)) -> Items:
    """Clips of three different digits on one grid; the counterpart says another second digit."""
    return Items(
        Item(
            clean.wave,
            QUESTION,
            answer=digits[1],
            against=digits[3],
            labels={"digit": digits[1], "speaker": speaker},
            words=[Span(w.start_s, w.end_s, w.word) for w in clean.words],
            group=speaker,
            id=f"{speaker}-{number}",
            other_audio=other.wave,
            sampling_rate=16_000,
        )
        for number, (speaker, digits, clean, other) in enumerate(_scenes(count, 4, seed, takes))
    )


def conflict_items(
    count: int,
    trust: questions.Trust | None = None,
    seed: int = 0,
    takes: range = range(3),
) -> Items:
    """Clips that say one second digit under a transcript that says another.

    The counterparts say a third (``other_audio``) and a fourth one (``other_text``), which the
    labels ``other_answer`` and ``other_against`` name.

    Args:
        trust: what the text tells the model to go by; None tells it nothing.
    """
    return Items(
        Item(
            clean.wave,
            questions.written(QUESTION, [digits[0], digits[4], digits[2]], trust),
            answer=digits[1],
            against=digits[4],
            labels={
                "digit": digits[1],
                "speaker": speaker,
                "other_answer": digits[3],
                "other_against": digits[5],
            },
            words=[Span(w.start_s, w.end_s, w.word) for w in clean.words],
            group=speaker,
            id=f"{speaker}-{number}",
            other_audio=other.wave,
            other_text=questions.written(QUESTION, [digits[0], digits[5], digits[2]], trust),
            sampling_rate=16_000,
        )
        for number, (speaker, digits, clean, other) in enumerate(_scenes(count, 6, seed, takes))
    )
