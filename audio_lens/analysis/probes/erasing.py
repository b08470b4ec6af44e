"""LEACE: the least change of activations after which no linear probe tells a label."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens import edits
from audio_lens.analysis.learning import numbered
from audio_lens.analysis.probes.rows import Given, Labels, are_numbers, rows_of
from audio_lens.errors import ExtraError, InputError
from audio_lens.items import ItemError


def erase(
    activations: Given, label: Labels, *, site: str | None = None, layer: int | None = None
) -> edits.Erase:
    """The affine map after which no linear probe of these rows tells the label (LEACE, 2306.03819).

    Of all maps that leave the label's classes one mean, it is the one that moves activations
    least. The unconstrained map of concept-erasure, with its shrunk covariance, so that
    the covariance with the label is 0 afterwards. As an edit::

        Edit("connector.out", probes.erase(acts, "digit"), where=Span(0.4, 0.9))

    Args:
        activations: `Activations`, or ``n d``; rows at which it is put in force.
        label: of the items, or one for every row: classes, or numbers.
        site, layer: of `Activations`; None takes the first, and its only layer.

    Raises:
        ExtraError: without concept-erasure (extra ``probe``).
        ItemError: a label of one value.
        InputError: labels that are not as many as the rows; several layers, or a site of heads.
        ActivationsError: a site, layer or label that was not collected.
    """
    leace = concept_erasure()
    x, labels = vectors_of(activations, label, site, layer)
    z = targets(labels)
    fitter = leace.LeaceFitter.fit(x, z, constrain_cov_trace=False)
    eraser = fitter.eraser
    held = eraser.proj_right.norm(dim=1) > 0
    if not held.any():
        raise ItemError("no linear probe tells the label as it is: there is nothing to erase")
    read, write = eraser.proj_right[held].mT, eraser.proj_left[:, held]
    return edits.Erase(read.contiguous(), write.contiguous(), eraser.bias)


def vectors_of(
    activations: Given, label: Labels, site: str | None, layer: int | None
) -> tuple[Float[Tensor, "n d"], list[Any]]:
    """The rows of one layer and their labels.

    Raises:
        ItemError: a label of one value.
        InputError: several layers, or a site of heads.
    """
    rows = rows_of(activations, label, site=site, layers=None if layer is None else [layer])
    if "head" in rows.axes:
        raise InputError("a site of heads: name one without, such as attn_out")
    if (layers := rows.axes.get("layer")) and len(layers) > 1:
        raise InputError(f"several layers were collected, {layers}: name one, layer=")
    if len(set(rows.labels)) < 2:
        raise ItemError("all labels have one value")
    return rows.cells((0,) * len(rows.axes)), rows.labels


def targets(labels: Sequence[Any]) -> Float[Tensor, "n k"]:
    """Labels as numbers: of classes, 1 in the column of each."""
    if are_numbers(labels):
        return torch.as_tensor(np.array(labels, dtype=float))[:, None]
    return torch.nn.functional.one_hot(torch.as_tensor(numbered(labels))).double()


def concept_erasure() -> Any:
    """The library that fits LEACE.

    Raises:
        ExtraError: where it is not installed.
    """
    try:
        return importlib.import_module("concept_erasure")
    except ImportError as error:
        raise ExtraError("LEACE needs concept-erasure: pip install 'audio_lens[probe]'") from error
