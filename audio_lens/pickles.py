"""What copies on disk hold: what a thing is, and nothing that merely hangs on it."""

from __future__ import annotations

from torch import Tensor


def alone(tensor: Tensor) -> Tensor:
    """The tensor without the rest of what its memory holds, which pickles would hold too."""
    held = tensor.untyped_storage().nbytes()
    return tensor.clone() if held > tensor.numel() * tensor.element_size() else tensor


def all_alone(fields: dict) -> dict:
    """Fields of an object with every tensor `alone`."""
    return {name: alone(x) if isinstance(x, Tensor) else x for name, x in fields.items()}
