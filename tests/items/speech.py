"""Items of real speech: three digits of one unseen speaker in a clip, and the second one asked."""

from __future__ import annotations

import functools

import numpy as np

import tiny
from audio_lens import Item, Items
from audio_lens.models.embedded import DIGITS
from audio_lens.models.embedded.training import material, scenes
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


def spoken_items(count: int, seed: int = 0, takes: range = range(3)) -> Items:
    """Clips of three different digits on one grid; the counterpart says another second digit."""
    draw, said = np.random.default_rng(seed), _spoken(takes)
    items: list[Item] = []
    while len(items) < count:
        speaker = str(draw.choice(list(said)))
        digits = [str(digit) for digit in draw.choice(DIGITS, 4, replace=False)]
        if not all(said[speaker][digit] for digit in digits):
            continue
        words = [said[speaker][d][draw.integers(len(said[speaker][d]))] for d in digits]
        clean = scenes.compose(words[:3], STARTS, LENGTH)
        other = scenes.compose([words[0], words[3], words[2]], STARTS, LENGTH)
        items.append(
            Item(
                clean.wave,
                QUESTION,
                answer=digits[1],
                against=digits[3],
                labels={"digit": digits[1], "speaker": speaker},
                words=[Span(w.start_s, w.end_s, w.word) for w in clean.words],
                group=speaker,
                id=f"{speaker}-{len(items)}",
                other_audio=other.wave,
                sampling_rate=16_000,
            )
        )
    return Items(items)
