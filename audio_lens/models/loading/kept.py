"""Effective weights of adapted linear maps, kept while nothing that they are made of changes.

Sweeps read a weight again and again, and to make one anew takes a product as large as it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

MOST_BYTES = 2**30  # of all weights that are kept; those used longest ago go first
_WORD, _RUN = 8, 16  # bytes of a word, and words that are summed together
_NO_VERSION = -1  # of tensors made in inference mode


@dataclass(frozen=True)
class _Seen:
    """A tensor as it was once.

    Attributes:
        mark: where it lies, its version and form.
        content: all its numbers, or of a large one sums over words of their bits: a write that
            versions do not tell of, through ``.data`` or numpy, changes them as good as surely.
    """

    mark: tuple
    content: Tensor

    @staticmethod
    def now(tensor: Tensor, large: bool) -> _Seen:
        """As it is now."""
        return _Seen(_mark(tensor), _sums(tensor) if large else tensor.detach().clone())

    def is_still(self, tensor: Tensor, large: bool) -> bool:
        """Whether it is the same tensor, with nothing changed."""
        if self.mark != _mark(tensor):
            return False
        return torch.equal(self.content, _sums(tensor) if large else tensor.detach())


@dataclass(frozen=True)
class _Kept:
    """A weight, and what it was made of."""

    weight: Tensor
    own: _Seen
    scale: float
    base: _Seen
    halves: tuple[_Seen, ...]

    def serves(self, base: Tensor, halves: tuple[Tensor, ...], scale: float) -> bool:
        """Whether it would be made the same now."""
        pairs = zip(self.halves, halves, strict=True)
        return (
            self.scale == scale
            and all(seen.is_still(half, large=False) for seen, half in pairs)
            and self.base.is_still(base, large=True)
            and self.own.is_still(self.weight, large=True)
        )


_kept: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()  # beside: modules pickle


def kept_or_made(
    owner: nn.Module,
    base: Float[Tensor, "d_out d_in"],
    halves: tuple[Float[Tensor, "r d_in"], Float[Tensor, "d_out r"]],
    scale: float,
    make: Callable[[], Float[Tensor, "d_out d_in"]],
) -> Float[Tensor, "d_out d_in"]:
    """The weight of base and adapter, as it would be made now.

    Where gradients flow through it, or a part is no plain parameter (as under `torch.func`), it is
    made anew. Else the last one is given again while its parts are what they were: steps of
    training, loading, moving and writes through ``.data`` are all seen.

    Args:
        owner: whose weight it is.
        make: what makes it.
    """
    parts = (base, *halves)
    flows = torch.is_grad_enabled() and any(part.requires_grad for part in parts)
    if flows or any(type(part) is not nn.Parameter or part.is_meta for part in parts):
        return make()
    found = _kept.pop(owner, None)
    if found is None or not found.serves(base, halves, scale):
        with torch.inference_mode(False), torch.no_grad():
            weight = make()
        seen = tuple(_Seen.now(half, large=False) for half in halves)
        own, of_base = (_Seen.now(one, large=True) for one in (weight, base))
        found = _Kept(weight, own, scale, of_base, seen)
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


def _mark(tensor: Tensor) -> tuple:
    version = _NO_VERSION if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.device, tensor.dtype, tensor.shape, tensor.stride()


def _sums(tensor: Tensor) -> Tensor:
    """Sums over short runs of words, so that numbers that change places are seen too."""
    flat = tensor.detach().reshape(-1)
    starts_inside = flat.storage_offset() * flat.element_size() % _WORD
    if starts_inside or flat.nbytes % (_WORD * _RUN):
        return flat.clone()
    return flat.view(torch.int64).view(-1, _RUN).sum(1)
