"""Methods that compare forms and measures, and attack: what they are given and cannot use."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from audio_lens.analysis import convergence, defence, modality_gap
from audio_lens.items import Item, Items, demo_items
from bad_input.world import NAN, Case, model, named

DEPTHS = [0.0, 0.25, 0.5, 0.75, 1.0]


def _asked(count: int = 2, **known: Any) -> Items:
    """Items of the shipped clips, with some fields changed."""
    return Items(item.replaced(**known) for item in demo_items()[:count])


def _measure(name: str = "a", part: str = "encoder", **options: Any) -> convergence.Measure:
    given = {"curves": torch.arange(10.0).reshape(2, 5), "depths": DEPTHS} | options
    return convergence.Measure(name, part, **given)


GAP = {
    "a gap at an encoder": lambda: modality_gap.gap(
        model(), _asked(), site="encoder.resid_post"
    ),
    "a gap in layer 6 of 6": lambda: modality_gap.gap(model(), _asked(), layers=[6]),
    "a gap of items without words": lambda: modality_gap.gap(model(), _asked(words=())),
    "a gap of one item": lambda: modality_gap.gap(model(), _asked(1)),
    "a template without words": lambda: modality_gap.gap(model(), _asked(), template="{text}"),
    "a projection that is none": lambda: modality_gap.project(model(), _asked(), kinds=["turn"]),
    "a projection of 0 tokens": lambda: modality_gap.project(model(), _asked(), worst=0),
    "a path of vectors of other lengths": lambda: modality_gap.align(
        torch.ones(2, 4), torch.ones(3, 5)
    ),
    "one condition": lambda: modality_gap.cross_patch(model(), {"clean": _asked()}),
    "conditions of other items": lambda: modality_gap.cross_patch(
        model(), {"clean": _asked(), "noisy": _asked(1)}
    ),
    "mixtures in 0 steps": lambda: modality_gap.interpolate(
        model(), {"clean": _asked(), "noisy": _asked()}, steps=0
    ),
}  # fmt: skip

CONVERGENCE = {
    "curves of NaN": lambda: _measure(curves=torch.full((2, 5), NAN)),
    "depths beyond 1": lambda: _measure(depths=[0.0, 0.5, 1.0, 1.5, 2.0]),
    "a curve of two steps": lambda: _measure(curves=torch.ones(2, 2), depths=[0.0, 1.0]),
    "measures of one name": lambda: convergence.agreement([_measure(), _measure()]),
    "measures of different parts alone": lambda: convergence.agreement(
        [_measure(), _measure("b", "decoder")]
    ),
    "a measure that is none": lambda: convergence.converge(model(), _asked(), ["lens_infomation"]),
}

DEFENCE = {
    "a target that is no answer of the items": lambda: defence.attack(
        model(), _asked(), targets=["how", "to"]
    ),
    "an attack of no size": lambda: defence.attack(model(), _asked(), eps=0),
    "an attack on a clip of NaN": lambda: defence.attack(
        model(),
        Items([Item(np.full(16_000, NAN), "Which digit is first?", "two", "one",
                    sampling_rate=16_000)]),
    ),
    "a defence of a stream": lambda: defence.robustness(
        model(), _asked(), site="encoder.resid_post"
    ),
}  # fmt: skip

CASES: list[Case] = [
    *named("The modality gap and conditions", GAP),
    *named("Convergence", CONVERGENCE),
    *named("Attack and defence", DEFENCE),
]
