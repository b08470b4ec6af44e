"""Shrinking a sequence by its labels: of every run of equal labels, one frame goes on.

The labels are usually the likeliest ones of a CTC head. How many frames are kept depends on what is
heard, so which ones are is written down as indices, `FILLER` behind the last of a row.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

FILLER = -1


def change_points(labels: Int[Tensor, "b t"], blank: int | None = None) -> Bool[Tensor, "b t"]:
    """True at the first frame of every run of equal labels.

    Args:
        labels: one per frame.
        blank: the label whose runs are dropped; None keeps a frame of these as of any other.
    """
    starts = torch.ones_like(labels, dtype=torch.bool)
    starts[:, 1:] = labels[:, 1:] != labels[:, :-1]
    return starts if blank is None else starts & (labels != blank)


def indices_of(mask: Bool[Tensor, "b t"]) -> Int[Tensor, "b n"]:
    """Where a mask is True, row by row, filled up with `FILLER` to the longest row."""
    counts = mask.sum(1)
    index = mask.new_full((len(mask), int(counts.max())), FILLER, dtype=torch.long)
    index[torch.arange(index.shape[1], device=mask.device) < counts[:, None]] = mask.nonzero()[:, 1]
    return index


def frames_at(x: Float[Tensor, "b t d"], index: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
    """The frames that `indices_of` names; zeros where it is filled up."""
    chosen = x.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, x.shape[-1]))
    return chosen.masked_fill((index == FILLER)[..., None], 0.0)


def mask_of(index: Int[Tensor, "b n"], n_frames: int) -> Bool[Tensor, "b t"]:
    """The mask that `indices_of` was made from."""
    frames = torch.arange(n_frames, device=index.device)
    return (index[..., None] == frames).any(1)
