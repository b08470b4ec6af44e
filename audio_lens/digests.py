"""Hashes of tensors and of the state of modules, whole, and quick to ask for again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

_THREADS = 4
_SMALL = 1 << 16  # bytes that are hashed as quickly as glanced at
_WORD = 8  # bytes of the words that a glance adds up
_SETTINGS = (bool, int, float, str)
_PASSING = ("training", "attn_mode", "context_level")  # of a run, not of the model
_known: WeakIdKeyDictionary = WeakIdKeyDictionary()  # by tensor: the state it was seen in, its hash


@torch.no_grad()
def of_tensor(tensor: Tensor) -> str:
    """A hash of shape, dtype and every byte; the same on every device."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    digest = hashlib.sha256(f"{list(tensor.shape)} {tensor.dtype}".encode())
    digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def of_state(module: nn.Module) -> str:
    """A hash of all parameters and of the buffers that are saved, with their names."""
    state = module.state_dict(keep_vars=True)
    named = {name: x for name, x in state.items() if isinstance(x, Tensor)}
    hashes = _of_each(named.values())
    digest = hashlib.sha256()
    for name, one in zip(named, hashes, strict=True):
        digest.update(f"{name} {one}\n".encode())
    return digest.hexdigest()


def settings_of(module: nn.Module) -> str:
    """A hash of the plain settings that modules keep beside their weights: scales, switches ..."""
    digest = hashlib.sha256()
    for name, one in module.named_modules():
        kept = {
            key: value
            for key, value in vars(one).items()
            if type(value) in _SETTINGS and not (key in _PASSING or key[0] == "_" or "cache" in key)
        }
        digest.update(f"{name} {type(one).__qualname__} {sorted(kept.items())}\n".encode())
    return digest.hexdigest()


def _of_each(tensors: Iterable[Tensor]) -> list[str]:
    with ThreadPoolExecutor(_THREADS) as pool:  # hashing holds no lock of Python's
        return list(pool.map(_remembered, tensors))


def _remembered(tensor: Tensor) -> str:
    """The hash of a tensor; of a large one, from memory while the tensor is as it was.

    Its version says so of everything torch does to it, but not of writes through ``.data`` or
    numpy: a glance over all numbers says so of these, as good as surely. It takes a fifth of the
    time of hashing, and runs on the tensor's own device.
    """
    if tensor.nbytes <= _SMALL:
        return of_tensor(tensor)
    seen = (tensor.data_ptr(), _version(tensor), tensor.dtype, tensor.shape, _glance(tensor))
    held = _known.get(tensor)
    if held is None or held[0] != seen:
        held = (seen, of_tensor(tensor))
        _known[tensor] = held
    return held[1]


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


@torch.no_grad()
def _glance(tensor: Tensor) -> str:
    """Sums of rows and columns, as words of bits, and of the numbers themselves."""
    rows = tensor.detach().reshape(len(tensor) if tensor.ndim else 1, -1)
    if rows.numel() == 0 or rows.shape[1] * rows.element_size() % _WORD:
        return of_tensor(tensor)
    words = rows.contiguous().view(torch.int64)
    sums = torch.cat([words.sum(0), words.sum(1)])
    signs = rows.sum(1) if rows.is_floating_point() else sums[:0]
    return of_tensor(sums) + of_tensor(signs)
