"""Directions that tell one class from another, in the units of the activations, for edits."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens import edits
from audio_lens.analysis.learning import learner, sklearn
from audio_lens.analysis.probes.erasing import vectors_of
from audio_lens.analysis.probes.rows import Given, Labels
from audio_lens.errors import InputError
from audio_lens.items import ItemError

KINDS = ("means", "mass_mean", "logistic")


def direction(
    activations: Given,
    label: Labels,
    value: Any,
    against: Any = None,
    *,
    kind: str = "means",
    strength: float | int = 10.0,
    site: str | None = None,
    layer: int | None = None,
) -> Float[Tensor, " d"]:
    """A direction that tells one value of a label from another, or from all others.

    "means" points from the mean of the others to that of the value, as far as they are apart:
    ``edits.Add(direction)`` moves the one mean onto the other. "mass_mean" is that times the
    inverse of the common covariance (shrunk after Ledoit and Wolf), "logistic" the weights of a
    logistic regression; both read better than they write, and their length says nothing of how far
    to go.

    Args:
        activations: `Activations`, or ``n d``.
        label: of the items, or one for every row.
        value: towards which it points.
        against: from which; None takes all others.
        kind: see above.
        strength: of the logistic regression's penalty.
        site, layer: of `Activations`; None takes the first, and its only layer.

    Raises:
        ExtraError: without scikit-learn (extra ``probe``), for other kinds than "means".
        ItemError: values that no row has.
        InputError: another kind, or what `erase` refuses.
    """
    if kind not in KINDS:
        raise InputError(f"kind is one of {', '.join(KINDS)}, got {kind!r}")
    x, labels = vectors_of(activations, label, site, layer)
    ours = torch.tensor([one == value for one in labels])
    others = torch.tensor([one != value and against in (None, one) for one in labels])
    for name, held in ((value, ours), (against, others)):
        if not held.any():
            known = ", ".join(sorted({repr(one) for one in labels}))
            raise ItemError(f"no row has the value {name!r}; there are {known}")
    if kind == "means":
        return x[ours].mean(0) - x[others].mean(0)
    either = ours | others
    return _weights(x[either].numpy(), ours[either].numpy(), kind, strength)


def reflection(
    vector: Float[Tensor, " d"], centre: Float[Tensor, " d"], strength: float | int = 2.0
) -> edits.Erase:
    """The reflection of activations at the hyperplane across a direction: h - 2 ((h - c)·ŵ) ŵ.

    Args:
        vector: the direction, of any length.
        centre: a vector on the hyperplane, such as the middle of two means.
        strength: 1 erases the component in place of reflecting it.

    Raises:
        InputError: a vector of no length.
    """
    if not vector.norm() > 0:
        raise InputError("a vector of no length has no direction")
    unit = (vector / vector.norm())[:, None]
    return edits.Erase(unit, unit, centre, strength)


def _weights(
    x: Float[np.ndarray, "n d"], ours: Any, kind: str, strength: float | int
) -> Float[Tensor, " d"]:
    if kind == "mass_mean":
        covariance, _ = sklearn("covariance").ledoit_wolf(x - _own_means(x, ours))
        apart = x[ours].mean(0) - x[~ours].mean(0)
        return torch.as_tensor(np.linalg.solve(covariance, apart))
    scaler, regression = learner("logistic", strength, 1).fit(x, ours)
    return torch.as_tensor(regression.coef_[0] / scaler.scale_)


def _own_means(x: Float[np.ndarray, "n d"], ours: Any) -> Float[np.ndarray, "n d"]:
    """Of every row the mean of its side."""
    return np.where(ours[:, None], x[ours].mean(0), x[~ours].mean(0))
