"""What files hold of a result beside its arrays, and how they hold its controls."""

from __future__ import annotations

import json
from typing import Any

import xarray as xr

CONTROL = "control."  # begins the names of variables that belong to a control
_TOLD = ("meta", "report", "recipe")
_ARRAYS = ("value", "estimate", "low", "high")


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
