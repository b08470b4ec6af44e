"""What files hold of a result beside its arrays, and how they hold its controls."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import h5py
import torch
import xarray as xr
from torch import Tensor

from audio_lens.errors import InputError

CONTROL = "control."  # begins the names of variables that belong to a control
MOST_PACKED = 1_100  # how many bytes one of a compressed file can stand for (1,032 in deflate)
SLACK = 2**20  # bytes, for fill values that are not written
_SEAL = b"\naudio_lens sha256 "  # and 64 digits: of all bytes before it, which HDF5 does not read
_TOLD = ("meta", "report", "recipe")
OPTIONAL = ("weights", "estimate", "low", "high")
_ARRAYS = ("value", *OPTIONAL)


def attributes(result: Any) -> dict[str, str]:
    """What is no array of a `Result`, as JSON; counts and controls where there are any."""
    told = _told(result)
    if result.controls:
        told["controls"] = {name: _told(control) for name, control in result.controls.items()}
    return {name: json.dumps(held) for name, held in told.items()}


def _told(result: Any) -> dict[str, Any]:
    told = {name: getattr(result, name) for name in _TOLD}
    kept = {} if result.n_kept is None else {"n_kept": result.n_kept}
    return told | kept | ({"dropped": result.dropped} if result.dropped else {})


def counts_in(data: xr.Dataset) -> dict[str, Any]:
    """How many items a file says there were, where it does."""
    counts = (name for name in ("n_kept", "dropped") if name in data.attrs)
    return {name: json.loads(data.attrs[name]) for name in counts}


def name_of(control: str, array: str) -> str:
    """What an array of a control is called in files."""
    return f"{CONTROL}{control}{'' if array == 'value' else f'.{array}'}"


def controls_in(data: xr.Dataset) -> dict[str, xr.Dataset]:
    """The controls of a file, each as if it were in a file of its own."""
    found = {}
    for control, told in json.loads(data.attrs.get("controls", "{}")).items():
        names = {name_of(control, array): array for array in _ARRAYS}
        names = {name: array for name, array in names.items() if name in data}
        found[control] = data[list(names)].rename(names)
        found[control].attrs = {name: json.dumps(held) for name, held in told.items()}
    return found


# -------------------------------------------------------------------------------- damage


def sealed(data: bytes) -> bytes:
    """A file with a hash of itself behind it."""
    return data + _SEAL + hashlib.sha256(data).hexdigest().encode()


def check_whole(path: Path) -> None:
    """Raise unless a file is as it was written, and safe to read.

    HDF5 may read a damaged file for ever, so the hash comes first. Files of others have none.

    Raises:
        InputError: another hash; numbers of more bytes than the file can hold, or that lie in
            other files.
        OSError: a file of another kind.
    """
    held = path.read_bytes()
    seal = held[-len(_SEAL) - 64 :][: len(_SEAL)]
    if sum(map(int.__eq__, seal, _SEAL)) > len(_SEAL) // 2:  # a damaged one is one, too
        end = len(held) - len(_SEAL) - 64
        if sealed(held[:end]) != held:
            raise InputError("it is damaged: its bytes are not those that were written")
    _check_declared(path, len(held))


def _check_declared(path: Path, size: int) -> None:
    declared = 0
    with h5py.File(path) as file:
        for name in file:
            link = file.get(name, getlink=True)
            held = file[name] if isinstance(link, h5py.HardLink) else None
            if not isinstance(held, h5py.Dataset) or held.is_virtual or held.external:
                raise InputError(f"{name} does not lie in it")
            packed = MOST_PACKED if held.compression or held.scaleoffset is not None else 1
            declared += held.size * held.dtype.itemsize // packed
    if declared > size + SLACK:
        raise InputError(f"it declares more than {declared:,} bytes of numbers, and has {size:,}")


def numbers_of(data: xr.Dataset, name: str) -> Tensor:
    """A variable of a Dataset, whose values have a fraction.

    Raises:
        InputError: values of another kind.
    """
    values = data[name].values
    if values.dtype.kind != "f":
        raise InputError(f"{name} is of {values.dtype}, not of numbers with a fraction")
    return torch.tensor(values)
