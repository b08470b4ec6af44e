"""Activations of every sound that is said, by what it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens.errors import InputError
from audio_lens.items import Activations
from audio_lens.timeline import Span


@dataclass(frozen=True, eq=False)
class Sounds:
    """What was said, one row a sound.

    Attributes:
        labels: what each is.
        values: the mean activation over its time, by layer.
        layers: their numbers.

    Raises:
        InputError: numbers that do not fit together, NaN, or infinite ones.
    """

    labels: Sequence[str]
    values: Float[Tensor, "n layers d"] = field(repr=False)
    layers: Sequence[int]

    def __post_init__(self) -> None:
        shape = (len(self.labels), len(self.layers))
        if self.values.ndim != 3 or tuple(self.values.shape[:2]) != shape:
            raise InputError(
                f"values of {shape[0]} sounds at {shape[1]} layers have that shape and a third "
                f"axis, got {list(self.values.shape)}"
            )
        if not bool(self.values.isfinite().all()):
            raise InputError("activations of sounds are NaN or infinite")

    def of(self, label: str) -> list[int]:
        """The rows of a sound."""
        return [row for row, one in enumerate(self.labels) if one == label]


def sounds(
    acts: Activations, said: Mapping[str, Sequence[Span]], *, site: str | None = None
) -> Sounds:
    """The mean activation of every sound, at all layers of a site.

    Args:
        acts: every position of clips, as `collect` gives them.
        said: for the name of every item, its sounds and when they are said; spans without a label
            are silence.
        site: of the activations; None takes the first.

    Raises:
        InputError: an item of which nothing is known, positions without seconds, or no sound that
            lasts long enough to have a position.
    """
    table, layers = acts.table(site), acts.layers(site)
    seconds = np.asarray(table["second"], dtype=float)
    if np.isnan(seconds).any():
        raise InputError("sounds are found by time, which positions of text do not have")
    names = np.asarray(table["id"], dtype=str)
    labels: list[str] = []
    frames: list[np.ndarray] = []
    for name in dict.fromkeys(names.tolist()):
        if name not in said:
            raise InputError(f"nothing is known of what is said in {name!r}")
        rows = np.flatnonzero(names == name)
        for span in said[name]:
            inside = rows[(seconds[rows] >= span.start_s) & (seconds[rows] < span.end_s)]
            if span.label and len(inside):
                labels.append(span.label)
                frames.append(inside)
    if not labels:
        raise InputError("no sound has a position: they are shorter than the positions are apart")
    by_layer = []
    for layer in layers:
        rows = acts.array(site, layer).double()
        by_layer.append(torch.stack([rows[torch.as_tensor(at)].mean(0) for at in frames]))
    return Sounds(labels, torch.stack(by_layer, dim=1), layers)
