"""Planted toys (`toys`) as models of items: a clip is the toy's frames, a text the class read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from audio_lens import Item, Items
from audio_lens.inputs import AudioInputs
from toys import AUDIO_CLASS, AUDIO_TOKENS, MARKER, N_CLASSES, Cue, Toy, prompt


def hearing(toy: Toy) -> Toy:
    """The toy, able to prepare items."""
    toy.prepare = _prepared
    toy.to_single_token = int
    return toy


def item_of(cue: Cue, **known) -> Item:
    """An item of a toy: what is heard is the answer, what is read is ``against``."""
    frames = np.zeros((AUDIO_TOKENS, 1 + N_CLASSES), dtype=np.float32)
    frames[cue.at_token, 0] = cue.loud
    frames[cue.at_token, 1 + cue.heard] = 1.0
    against = {} if cue.read == cue.heard else {"against": str(cue.read)}
    said = {"answer": str(cue.heard), **against, **known}
    return Item(frames.flatten(), str(cue.read), sampling_rate=16_000, **said)


def items_of(cues: Sequence[Cue]) -> Items:
    return Items(item_of(cue) for cue in cues)


def _prepared(clips: Sequence[dict], texts: Sequence[Sequence[str]]) -> AudioInputs:
    return AudioInputs.joined(
        [_one(clip["array"], int(text[0])) for clip, text in zip(clips, texts, strict=True)]
    )


def _one(samples: np.ndarray, read: int) -> AudioInputs:
    made = prompt(Cue(heard=0, read=read))
    frames = torch.as_tensor(samples).reshape(AUDIO_TOKENS, 1 + N_CLASSES).double().T
    made.features.zero_()
    made.features[0, MARKER, ::4] = frames[0]
    made.features[0, AUDIO_CLASS, ::4] = frames[1:]
    return made
