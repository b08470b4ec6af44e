"""Toys that take items: a clip says one of four classes, or nothing, and a question asks which."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import toys
from audio_lens import Item, Items
from audio_lens.inputs import AudioInputs
from toys import ANSWER, AUDIO_CLASS, MARKER, N_CLASSES, QUERY

NAMES = [f"c{number}" for number in range(N_CLASSES)]
RATE, SAMPLES = 16_000, 1600


class Words:
    """A tokenizer of class names, spaced or not."""

    unk_token_id = None

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [NAMES.index(text.strip())]

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [NAMES[i] for i in ids]

    def batch_decode(self, rows: torch.Tensor, skip_special_tokens: bool = True) -> list[str]:
        return [" ".join(NAMES[i] for i in row.tolist()) for row in rows]


class AnsweringToy(toys.Toy):
    """A toy that prepares clips of `item`; its blocks are planted by hand."""

    def __init__(self, n_layers: int = 5):
        super().__init__(n_layers)
        self.tokenizer = Words()

    def prepare(self, audio: Any, text: Any = None, sampling_rate: Any = None) -> AudioInputs:
        prompts = []
        for clip in audio:
            said = np.asarray(clip["array"])
            prompt = toys.prompt(toys.Cue(heard=int(said.argmax())))
            if not said.any():
                prompt.features.zero_()
            prompts.append(prompt)
        return AudioInputs.joined(prompts)


def copying(n_layers: int = 5, layer: int = 2) -> AnsweringToy:
    """METHODS toy A, as a model that answers items."""
    toy = AnsweringToy(n_layers)
    toy.copy_head(layer, 1, MARKER, AUDIO_CLASS, gain=1.0)
    return toy


def forgetting(attenuated: float = 0.9, claimed: float = 0.5) -> AnsweringToy:
    """A toy that copies in block 1, forgets most of it in block 3, and claims "c0" in block 4."""
    toy = copying(n_layers=6, layer=1)
    for number in range(N_CLASSES):
        answer = ANSWER.start + number
        toy.neuron(3, number, {QUERY: 1.0}, {answer: 1.0}, {answer: -attenuated})
    toy.neuron(4, 0, {QUERY: 1.0}, {QUERY: 1.0}, {ANSWER.start: claimed})
    return toy


def item(heard: int, number: int) -> Item:
    """A clip that says a class."""
    clip = np.zeros(SAMPLES, np.float32)
    clip[heard] = 1.0
    return Item(
        clip,
        "which?",
        answer=NAMES[heard],
        options=NAMES,
        group=f"speaker {number % 3}",
        sampling_rate=RATE,
    )


def items(each: int = 3) -> Items:
    """As many clips of every class."""
    return Items(item(number % N_CLASSES, number) for number in range(each * N_CLASSES))
