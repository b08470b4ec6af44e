"""Effective weights of adapted linear maps, kept while nothing that they are made of changes.

Sweeps read a weight once for every cell, and to make one anew takes a product as large as it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from audio_lens.digests import seen

MOST_BYTES = 2**30  # of all weights that are kept; those used longest ago go first


@dataclass(frozen=True)
class _Kept:
    """A weight with the states in which it, and what it is made of, were seen."""

    weight: Tensor
    own: Any
    made_of: Any


_kept: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()  # beside: modules pickle


def kept_or_made(
    owner: nn.Module, parts: Sequence[Tensor], scale: float, make: Callable[[], Tensor]
) -> Tensor:
    """A weight made of some tensors and a scale, as it would be made now.

    Where gradients flow through it, or a part is no plain parameter (as under `torch.func`), it is
    made anew. Else it is remembered by the places, versions and contents of its parts, so that
    steps of training, loading, moving and writes through ``.data`` are all seen; contents are
    glanced at, which takes a small part of the time of making it.

    Args:
        owner: whose weight it is.
        make: what makes it.
    """
    flows = torch.is_grad_enabled() and any(part.requires_grad for part in parts)
    if flows or any(type(part) is not nn.Parameter for part in parts):
        return make()
    made_of = (scale, *map(seen, parts))
    found = _kept.pop(owner, None)
    if found is None or found.made_of != made_of or found.own != seen(found.weight):
        with torch.inference_mode(False), torch.no_grad():
            weight = make()
        found = _Kept(weight, seen(weight), made_of)
    _keep(owner, found)
    return found.weight.detach()  # so that nobody's requires_grad_() stays


def _keep(owner: nn.Module, one: _Kept) -> None:
    """Remember a weight as the one that was used last, and forget old ones beyond the bound."""
    room = MOST_BYTES - one.weight.nbytes
    if room < 0:
        return
    for other, held in reversed(list(_kept.items())):
        room -= held.weight.nbytes
        if room < 0:
            _kept.pop(other, None)
    _kept[owner] = one
