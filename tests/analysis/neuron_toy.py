"""METHODS toy H: neurons of a gated MLP that are planted for a class, for none, and for noise."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from audio_lens import Item, Items
from audio_lens.inputs import AudioInputs
from toys import (
    ANSWER,
    AUDIO_CLASS,
    AUDIO_TOKENS,
    MARKER,
    N_CLASSES,
    QUERY,
    QUESTION,
    SHARP,
    TEXT_MARKER,
    WIDTH,
    Cue,
    Toy,
    prompt,
)

LAYER = 2  # in which the planted neurons are; those of all others never fire
ALWAYS, NOISE = N_CLASSES, N_CLASSES + 1
RATE, SAMPLES = 16_000, 1600
PLAIN, LOUD = 0.5, 1.0  # samples of a clip; half of them is heard as 1
GATE = "decoder.mlp.gate"
CUE_AND_QUESTION = [-2, -1]


class NeuronToy(Toy):
    """Neuron c of block 2 writes answer c where class c was heard; one always fires, one rarely.

    The first block brings what was heard to the last position. A clip's sample c is how loud class
    c is heard there; the rare neuron fires for loud clips only. What always fires, at the text cue
    too, asks for no answer at all. Blocks but the third have neurons of weight 0.
    """

    n_neurons = 40
    width = WIDTH + N_CLASSES

    def __init__(self):
        super().__init__(n_layers=4)
        self.attend(0, 0, QUERY, MARKER, SHARP)
        heard = range(WIDTH, self.width)
        for c, dim in enumerate(heard):
            self.carry(0, 0, AUDIO_CLASS.start + c, dim)
            gate = {dim: 1.0, TEXT_MARKER: -1.0}  # the cue hears a little of everything
            self.neuron(LAYER, c, gate, {QUERY: 1.0}, {ANSWER.start + c: 1.0})
        fires = {QUERY: 1.0, TEXT_MARKER: 1.0}
        self.neuron(LAYER, ALWAYS, fires, {QUERY: 1.0}, {MARKER: 0.5})
        self.decoder.unembed.weight[QUESTION, MARKER] = 1.0  # said where there is no answer
        loud = dict.fromkeys(heard, 1.0) | {QUERY: -1.5, TEXT_MARKER: -1.0}
        self.neuron(LAYER, NOISE, loud, {QUERY: 1.0}, {MARKER: 0.1})

    def prepare(self, audio: Any, text: Any = None, sampling_rate: Any = None) -> AudioInputs:
        made = []
        for clip in audio:
            said = np.asarray(clip["array"])
            heard, frame = int(said.argmax()), 4 * Cue(0).at_token
            features = torch.zeros(1, self.width, 4 * AUDIO_TOKENS, dtype=torch.float64)
            features[0, MARKER, frame] = 1.0
            features[0, AUDIO_CLASS.start + heard, frame] = float(said.max()) / PLAIN
            made.append(AudioInputs(features, prompt(Cue(heard)).tokens, clips_per_row=(1,)))
        return AudioInputs.joined(made)

    def to_single_token(self, text: Any) -> int:
        return int(text)


def heard(c: int, number: int, loud: float = PLAIN, answer: int | None = None) -> Item:
    """A clip in which a class is heard; the answer is that, unless another one is claimed."""
    clip = np.zeros(SAMPLES, np.float32)
    clip[c] = loud
    right = c if answer is None else answer
    labels = {"class": f"class {right}"}
    return Item(clip, "0", answer=str(right), labels=labels, id=f"{number}", sampling_rate=RATE)


def heard_items(each: int) -> Items:
    """As many clips of every class; the first one is loud."""
    return Items(
        heard(number % N_CLASSES, number, loud=LOUD if number == 0 else PLAIN)
        for number in range(each * N_CLASSES)
    )
