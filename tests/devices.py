"""Devices made up where there is one: tensors that refuse to meet tensors of any other device.

They say they lie on a device of a kind no machine has, and hold their numbers on the CPU. Torch
walks gradients back over them where it lets Python stand in for a device; see `HAVE_GRADIENTS`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

HAVE_GRADIENTS = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")


def _kind() -> str:
    """A kind of device; of one that no backward can leave, where torch lets none be made."""
    if not HAVE_GRADIENTS:
        return "maia"

    backend_registration._setup_privateuseone_for_python_backend("madeup")
    return "madeup"


CPU, TWO = torch.device("cpu"), torch.device("maia:2")
ONE = torch.device(_kind(), 0)  # the only one of its kind that gradients can pass


class Elsewhere(Tensor):
    """A tensor on a made-up device; `numbers` holds its values."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, real: Tensor, device: torch.device) -> Elsewhere:
        made = Tensor._make_wrapper_subclass(
            cls, real.shape, strides=real.stride(), dtype=real.dtype, device=device
        )
        made.numbers = real
        return made

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(op, args, kwargs or {})

    def __getitem__(self, index: Any) -> Tensor:
        if not (torch.is_grad_enabled() and self.requires_grad):
            return _run(_at, (self, index), {})
        _one_device("an index", [self, index])  # torch would bring an index of the CPU over
        return super().__getitem__(index)

    def __invert__(self) -> Tensor:
        return torch.bitwise_not(self)

    def tolist(self) -> Any:
        return self.numbers.tolist()

    def data_ptr(self) -> int:
        return self.numbers.data_ptr()


class Machine(TorchDispatchMode):
    """Makes tensors on made-up devices, and counts what moves between devices."""

    def __init__(self) -> None:
        super().__init__()
        self.moves: list[tuple[torch.device, torch.device, int]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        to = _target(op, args, kwargs)
        if op.name() in _MOVES and to not in (None, args[0].device):
            self.moves.append((args[0].device, to, args[0].numel()))
        return _run(op, args, kwargs)


_MOVES = ("aten::_to_copy", "aten::to.device", "aten::to.dtype_layout", "aten::to.other")


def _target(op: Any, args: Any, kwargs: dict[str, Any]) -> torch.device | None:
    """The device that an operation is told to write to."""
    if op is torch.ops.aten.to.other:
        return args[1].device
    named = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.device)]
    return named[0] if named else None


def _plain(x: Any) -> Any:
    if isinstance(x, torch.device):
        return x if x.type == "meta" else CPU
    return x.numbers if isinstance(x, Elsewhere) else x


def _at(x: Tensor, index: Any) -> Tensor:
    return x[index]


def _one_device(op: Any, given: Any) -> torch.device:
    """The device of tensors that meet; numbers of the CPU may meet any.

    Raises:
        RuntimeError: where there are several.
    """
    tensors = [x for x in tree_flatten(given)[0] if isinstance(x, Tensor)]
    devices = {x.device for x in tensors if x.ndim or x.device != CPU}
    if len(devices) > 1:
        raise RuntimeError(f"{op} on tensors of several devices: {devices}")
    return (devices or {CPU}).pop()


def _run(op: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation on the numbers of its arguments, if those lie on one device."""
    given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    to = _target(op, args, kwargs)
    if to is not None:
        device = to
    elif op is torch.ops.aten.copy_.default:
        device = given[0].device
    else:
        device = _one_device(op, given)
    held = {id(x.numbers): x for x in given if isinstance(x, Elsewhere)}
    args, kwargs = tree_map(_plain, (args, kwargs))
    with torch._C._DisableTorchDispatch():
        out = op(*args, **kwargs)

    def wrapped(x: Any) -> Any:
        if not isinstance(x, Tensor) or device.type in ("cpu", "meta"):
            return x
        return held[id(x)] if id(x) in held else Elsewhere(x, device)

    return tree_map(wrapped, out)


def on_cpu(x: Any) -> Any:
    return x.numbers if isinstance(x, Elsewhere) else x
