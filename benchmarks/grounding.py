"""What a study of conflict items costs: share, residence and hand-over, with all controls.

    python -m benchmarks.grounding
    python -m benchmarks.grounding --items 20

Real clips of three digits by unseen speakers (of AUDIO_LENS_DATA or ../shared/data) under a
transcript that says another second digit, in the shipped model: all layers of the decoder, three
groups of positions, three controls, both streams. What counts is the CPU time of one thread.
Exit code 1: more than the limit.
"""

from __future__ import annotations

import sys
import time
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console

from audio_lens import HookedAudioTransformer, Item, Items
from audio_lens.analysis import grounding
from audio_lens.models.embedded import DIGITS
from audio_lens.models.embedded.training import material, questions, scenes

STARTS, LENGTH, LONGEST = (0.2, 0.88, 1.56), 2.32, 0.6  # seconds
QUESTION, TRUST = "Which digit is second?", "text"
LIMIT_S = 300


def conflict_items(count: int, seed: int = 0) -> Items:
    """Items on one grid, with counterparts of both streams."""
    draw, rate = np.random.default_rng(seed), 16_000
    said = material.fsdd_words(list(material.UNSEEN_SPEAKERS), range(20))
    items: list[Item] = []
    while len(items) < count:
        speaker = str(draw.choice(list(said)))
        first, heard, last, other, read, unread = draw.choice(DIGITS, 6, replace=False).tolist()
        fitting = {
            digit: [u for u in said[speaker] if u.word == digit and len(u.wave) < LONGEST * rate]
            for digit in (first, heard, last, other)
        }
        if not all(fitting.values()):
            continue
        words = {digit: takes[draw.integers(len(takes))] for digit, takes in fitting.items()}
        clip, swapped = (
            scenes.compose([words[first], words[second], words[last]], STARTS, LENGTH).wave
            for second in (heard, other)
        )
        text, other_text = (
            questions.written(QUESTION, [first, second, last], TRUST) for second in (read, unread)
        )
        items.append(
            Item(
                clip,
                text,
                answer=heard,
                against=read,
                labels={"other": other},
                group=speaker,
                other_audio=swapped,
                other_text=other_text,
                sampling_rate=rate,
            )
        )
    return Items(items)


def plain_items(count: int, seed: int = 0) -> Items:
    """The same clips and counterparts without a transcript."""
    return Items(
        item.replaced(text=QUESTION, against=item.labels["other"], other_text=None)
        for item in conflict_items(count, seed)
    )


def main(items: Annotated[int, typer.Option(help="how many items")] = 200) -> None:
    torch.set_num_threads(1)
    console = Console()
    model = HookedAudioTransformer.from_pretrained("embedded")
    made = conflict_items(items)
    start = time.process_time()
    found = grounding.grounding(model, made, progress=False)
    taken = time.process_time() - start
    for name, result in found.items():
        console.print(f"{name}: {result.report[0]}", highlight=False)
    console.print(f"{items} items: {taken:.0f} CPU s of one thread", highlight=False)
    if taken > LIMIT_S * max(1, items / 200):
        sys.exit(f"more than {LIMIT_S} s for 200 items")


if __name__ == "__main__":
    typer.run(main)
