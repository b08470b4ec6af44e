"""Speech sounds that cannot be compared."""

from __future__ import annotations

from typing import Any

import torch

from audio_lens.analysis import phonology
from bad_input.world import NAN, Case, named

FEATURES = {"p": (-1, 1), "b": (1, 1), "t": (-1, -1), "d": (1, -1)}


def _said(**changed: Any) -> phonology.Sounds:
    told = {"labels": list(FEATURES), "values": torch.eye(4)[:, None], "layers": [0]} | changed
    return phonology.Sounds(**told)


def _asked(known: Any = FEATURES, **options: Any) -> Any:
    return phonology.analogies(_said(), known, **({"least": 1} | options))


PHONOLOGY = {
    "sounds of fewer rows than labels": lambda: _said(labels=["p"]),
    "sounds of NaN": lambda: _said(values=torch.full((4, 1, 4), NAN)),
    "sounds with too few samples": lambda: _asked(least=50),
    "no draws": lambda: _asked(draws=0),
    "three pairs where there are two": lambda: phonology.consistency(_said(), FEATURES, least=1),
    "features of half a sound": lambda: _asked({"p": (-0.5,), "b": (0.5,)}),
    "two sounds of the same features": lambda: _asked({"p": (1,), "b": (1,)}),
}

CASES: list[Case] = named("Phonetic arithmetic", PHONOLOGY)
