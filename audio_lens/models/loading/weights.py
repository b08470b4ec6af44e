"""Weights from files and state dicts into modules: by name tables, strictly, and without copies."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from audio_lens.models.config import LoadingError
from audio_lens.models.loading.stored import check_numbers, first_line, opened

_PICKLES = (".pt", ".pth", ".bin", ".ckpt")
_UNREADABLE = (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError)


def read_weights(path: str | Path, key: str | None = None) -> dict[str, Tensor]:
    """The tensors of a published checkpoint, by the names they have there.

    Args:
        path: a directory of safetensors, one such file, or a ``.pt`` or ``.pth`` of tensors, which
            is read without running any code of it.
        key: where in a ``.pt`` the tensors are, such as "model".

    Returns:
        Tensors that lie in the file until they are used, where the file can be mapped.

    Raises:
        LoadingError: nothing there, a corrupt file, one that holds more than tensors, or tensors
            that are NaN or infinite.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise LoadingError(f"{path} holds no safetensors")
        held = {name: x for file in files for name, x in _from_safetensors(file).items()}
    elif not path.is_file():
        raise LoadingError(f"no such file or directory: {path}")
    else:
        held = _from_pickle(path, key) if path.suffix in _PICKLES else _from_safetensors(path)
    check_finite(held, path)
    return held


def _from_safetensors(path: Path) -> dict[str, Tensor]:
    with opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def check_finite(tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Raise if weights are NaN or infinite, which would make all that is computed so.

    Raises:
        LoadingError: naming them.
    """
    if wrong := infinite(tensors):
        raise LoadingError(
            f"{source} holds weights that are NaN or infinite: {', '.join(wrong[:10])}"
        )


def infinite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors with a NaN or an infinite number in them; shared memory counts once."""
    own = {(x.data_ptr(), x.shape): name for name, x in reversed(list(tensors.items()))}
    return [name for name in tensors if name in {*own.values()} and _is_wrong(tensors[name])]


def _is_wrong(tensor: Tensor) -> bool:
    """One pass without a copy: the least and the greatest number carry any NaN."""
    if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
        return False
    least, greatest = torch.aminmax(tensor.detach())
    return not (least.isfinite() and greatest.isfinite())


def read_pickle(path: str | Path) -> Any:
    """What a ``.pt`` or ``.pth`` holds (tensors, numbers and words), without running code of it.

    Raises:
        LoadingError: nothing there, what would need code to be read, or a number of layers or the
            like that no model has.
    """
    path = Path(path)
    if not path.is_file():
        raise LoadingError(f"no such file: {path}")
    try:
        mappable = zipfile.is_zipfile(path)  # older files cannot be mapped
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
    except _UNREADABLE as error:
        said = first_line(error)
        raise LoadingError(f"{path} cannot be read as plain tensors: {said}") from error
    check_numbers(held, path)
    return held


def _from_pickle(path: Path, key: str | None) -> dict[str, Tensor]:
    held = read_pickle(path)
    if key is not None:
        if not isinstance(held, Mapping) or key not in held:
            there = ", ".join(map(str, held)) if isinstance(held, Mapping) else type(held).__name__
            raise LoadingError(f"{path} holds no {key!r}, but {there[:200]}")
        held = held[key]
    others = [name for name, x in held.items() if not isinstance(x, Tensor)]
    if others:
        raise LoadingError(f"{path} holds more than tensors: {', '.join(map(str, others[:5]))}")
    return dict(held)


def renamed(state: Mapping[str, Tensor], table: Mapping[str, str | None]) -> dict[str, Tensor]:
    """Tensors under our names.

    Args:
        table: their names to ours, without the last piece (``.weight``) or with it; ``{l}`` stands
            for a layer number, None for what is known and left out.

    Raises:
        LoadingError: if a tensor has no entry in the table.
    """
    patterns = [
        (re.compile(re.escape(theirs).replace(r"\{l\}", r"(\d+)")), ours)
        for theirs, ours in table.items()
    ]
    found, unknown = {}, []
    for key, tensor in state.items():
        stem, _, kind = key.rpartition(".")
        for pattern, ours in patterns:
            if match := pattern.fullmatch(stem) or pattern.fullmatch(key):
                layer = (*match.groups(), "")[0]
                is_whole = match.string == key
                if ours is not None:
                    name = ours.format(l=layer)
                    found[name if is_whole else f"{name}.{kind}"] = tensor
                break
        else:
            unknown.append(key)
    if unknown:
        raise LoadingError(f"weights without a place in this model: {', '.join(unknown[:10])}")
    return found


def fill(
    model: nn.Module, tensors: Mapping[str, Tensor], parts: Iterable[str] | None = None
) -> None:
    """Make the tensors the model's parameters, every one of them and nothing else.

    Args:
        tensors: by the names they have in the model.
        parts: the children whose parameters they are; None for the whole model.

    Raises:
        LoadingError: naming what is missing, unexpected or of another shape.
    """
    chosen = None if parts is None else tuple(f"{part}." for part in parts)
    state = model.state_dict()
    wanted = {name: x for name, x in state.items() if chosen is None or name.startswith(chosen)}
    missing, unexpected = wanted.keys() - tensors.keys(), tensors.keys() - wanted.keys()
    if missing or unexpected:
        raise LoadingError(
            f"missing weights: {', '.join(sorted(missing)[:10]) or 'none'}; unexpected weights: "
            f"{', '.join(sorted(unexpected)[:10]) or 'none'}"
        )
    misfits = [
        f"{name} is {tuple(tensors[name].shape)}, not {tuple(own.shape)}"
        for name, own in wanted.items()
        if own.shape != tensors[name].shape
    ]
    if misfits:
        raise LoadingError(f"weights of another shape: {'; '.join(misfits[:10])}")
    model.load_state_dict(dict(tensors), assign=True, strict=parts is None)
    _tie_shared(model)


def _tie_shared(model: nn.Module) -> None:
    """Make parameters that share their memory one parameter, so that moving keeps them tied."""
    by_memory: dict[tuple[int, torch.Size], nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.is_meta:
                key = (parameter.data_ptr(), parameter.shape)
                setattr(module, name, by_memory.setdefault(key, parameter))
