"""Values with their places, and coordinates as files hold them."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import h5netcdf
import torch
import xarray as xr
from torch import Tensor
from xarray.backends import H5NetCDFStore

from audio_lens.printable import printable
from audio_lens.timeline import Band, Span, describe_span

BATCH_DIMS = ("metric", "stimulus")
STRETCHES = ("time", "frequency")  # dims whose coordinates are spans or bands, not names


@dataclass(frozen=True, repr=False)
class LabelledValue:
    """One value and where it stands: the coordinate on every axis.

    Attributes:
        value: the number.
        at: where it stands.
        low, high: bounds between which it lies, where an interval is known.
    """

    value: float
    at: Mapping[str, Any]
    low: float | None = None
    high: float | None = None

    @property
    def place(self) -> str:
        """Where it stands in words, e.g. ``layer 3, 0.40-0.50 s "seven"``."""
        return in_words(self.at)

    def __repr__(self) -> str:
        known = None not in (self.low, self.high)
        bounds = f" [{self.low:.4g}, {self.high:.4g}]" if known else ""
        return f"{self.place}: {self.value:.4g}{bounds}"


def in_words(at: Mapping[str, Any]) -> str:
    """Coordinates by axis for people; stretches of time and spectrum speak for themselves."""
    return ", ".join(_in_words(axis, one) for axis, one in at.items())


def _in_words(axis: str, coordinate: Any) -> str:
    if isinstance(coordinate, Span):
        return describe_span(coordinate)
    return str(coordinate) if isinstance(coordinate, Band) else printable(f"{axis} {coordinate}")


# -------------------------------------------------------------------------------- files


def netcdf(data: xr.Dataset) -> bytes:
    """The Dataset as a netCDF file holds it, made in memory: HDF5 does not survive a full disk."""
    memory = io.BytesIO()
    with h5netcdf.File(memory, "w") as file:
        data.dump_to_store(H5NetCDFStore(file))
    return memory.getvalue()


# -------------------------------------------------------------------------------- coordinates


def time_coords(spans: list[Span]) -> dict[str, tuple[str, list]]:
    columns = {
        "time": [span.centre_s for span in spans],
        "time_start": [span.start_s for span in spans],
        "time_end": [span.end_s for span in spans],
        "time_clip": [span.clip for span in spans],
    }
    return _along("time", columns, spans)


def frequency_coords(bands: list[Band]) -> dict[str, tuple[str, list]]:
    columns = {
        "frequency": [band.centre_hz for band in bands],
        "frequency_low": [band.low_hz for band in bands],
        "frequency_high": [band.high_hz for band in bands],
    }
    return _along("frequency", columns, bands)


def _along(
    dim: str, columns: dict[str, list], named: list[Span] | list[Band]
) -> dict[str, tuple[str, list]]:
    """Coordinates along a dimension, with the labels."""
    columns[f"{dim}_label"] = [one.label or "" for one in named]
    columns[f"{dim}_labelled"] = [one.label is not None for one in named]
    return {name: (dim, column) for name, column in columns.items()}


def coords_of(data: xr.Dataset, dim: str) -> list:
    """The coordinates along a dimension of a Dataset."""

    def rows(*columns: str) -> Iterator[tuple]:
        named = (data[f"{dim}_{column}"].values.tolist() for column in columns)
        return zip(*named, strict=True)

    if dim == "time":
        return [
            Span(start, end, label if labelled else None, clip)
            for start, end, label, labelled, clip in rows(
                "start", "end", "label", "labelled", "clip"
            )
        ]
    if dim == "frequency":
        return [
            Band(low, high, label if labelled else None)
            for low, high, label, labelled in rows("low", "high", "label", "labelled")
        ]
    return data[dim].values.tolist()


def array(tensor: Tensor):
    """The tensor for numpy, which has no bfloat16."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def names(name: Any, wanted: Any) -> bool:
    """Whether ``wanted`` means the coordinate ``name``; windows and bands have several names."""
    if not isinstance(name, (Span, Band)) or isinstance(wanted, (Span, Band)):
        return name == wanted
    if isinstance(wanted, str):
        return name.label == wanted
    if not isinstance(wanted, Real):
        return False
    if isinstance(name, Band):
        return name.low_hz <= float(wanted) < name.high_hz
    return name.start_s <= float(wanted) < name.end_s
