"""Labelled values: what was measured, by named dimensions, with seconds and Hz along them."""

from __future__ import annotations

import io
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import h5netcdf
import h5py
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from xarray.backends import H5NetCDFStore

from audio_lens import arguments
from audio_lens.arguments import path_of, whole
from audio_lens.errors import InputError
from audio_lens.files import write
from audio_lens.pickles import all_alone
from audio_lens.printable import printable
from audio_lens.timeline import Band, Span, describe_span

if TYPE_CHECKING:
    from typing import Self

    import plotly.graph_objects as go
    from matplotlib.figure import Figure

    from audio_lens.audio import AudioSource

BATCH_DIMS = ("metric", "stimulus")
MOST_PACKED = 1_100  # how many bytes one of a compressed file can stand for (1,032 in deflate)
SLACK = 2**20  # bytes, for fill values that are not written
STRETCHES = ("time", "frequency")  # dims whose coordinates are spans or bands, not names


@dataclass(frozen=True, repr=False)
class LabelledValue:
    """One value and where it stands: the coordinate on every axis."""

    value: float
    at: Mapping[str, Any]

    @property
    def place(self) -> str:
        """Where it stands in words, e.g. ``layer 3, 0.40-0.50 s "seven"``."""
        return in_words(self.at)

    def __repr__(self) -> str:
        return f"{self.place}: {self.value:.4g}"


def in_words(at: Mapping[str, Any]) -> str:
    """Coordinates by axis for people; stretches of time and spectrum speak for themselves."""
    return ", ".join(_in_words(axis, one) for axis, one in at.items())


def _in_words(axis: str, coordinate: Any) -> str:
    if isinstance(coordinate, Span):
        return describe_span(coordinate)
    return str(coordinate) if isinstance(coordinate, Band) else printable(f"{axis} {coordinate}")


@dataclass
class Result:
    """Values of named dimensions, with what they were made from.

    Attributes:
        values: ``[metric?, stimulus?, *axes]`` as ``dims`` says; NaN marks what was not measured.
        dims: name of every dimension of ``values``: first "metric" where there are several, then
            "stimulus" where there are several, then the axes.
        coords: per dimension its coordinates: names or numbers, a `Span` for every window of
            "time", a `Band` for every one of "frequency".
        report: notes for people.
        meta: model, hashes of weights and inputs, versions, seed, in words.
        recipe: what the result can be made from again, as JSON holds it.

    Raises:
        ValueError: if dims, coords and the shapes do not fit together.
    """

    kind: ClassVar[str] = "result"

    values: Float[Tensor, "..."]
    dims: tuple[str, ...]
    coords: dict[str, list]
    report: list[str] = field(default_factory=list, kw_only=True)
    meta: dict[str, str] = field(default_factory=dict, kw_only=True)
    recipe: dict[str, Any] = field(default_factory=dict, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        self._check()

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles hold: of a selection, no more than it."""
        return all_alone(vars(self))

    def _check(self) -> None:
        if any(dim not in BATCH_DIMS for dim in self._batch_dims):
            raise InputError(f"{' and '.join(BATCH_DIMS)} come before the axes, got {self.dims}")
        lengths = [len(self.coords.get(dim, [])) for dim in self.dims]
        if list(self.values.shape) != lengths:
            shape = list(self.values.shape)
            raise InputError(f"values have shape {shape}, but coords of {self.dims} are {lengths}")
        for name, dims in self._arrays().items():
            shape, expected = list(getattr(self, name).shape), [len(self.coords[d]) for d in dims]
            if shape != expected:
                raise InputError(f"{name} has shape {shape}, expected {expected}")

    def _arrays(self) -> dict[str, tuple[str, ...]]:
        """Every array by the name of its field, and the dims that it has."""
        return {"values": self.dims}

    @property
    def quantities(self) -> Mapping[str, str]:
        """What every cell has that can be drawn, with names for people; the first ranks cells."""
        return {"value": "metric"}

    @property
    def axes(self) -> tuple[str, ...]:
        """The dims without metric and stimulus."""
        return tuple(dim for dim in self.dims if dim not in BATCH_DIMS)

    @property
    def _batch_dims(self) -> tuple[str, ...]:
        return self.dims[: len(self.dims) - len(self.axes)]

    @property
    def title(self) -> str:
        """What a figure of the result is called."""
        return " by ".join(self.axes)

    def baselines(self) -> dict[str, float]:
        """Numbers that values are read against, by name; of one metric, stimuli averaged."""
        return {}

    # ---------------------------------------------------------------- parts

    def mean(self) -> Self:
        """Mean over the stimuli; what any stimulus lacks is NaN."""
        if "stimulus" not in self.dims:
            return self
        means = {
            name: getattr(self, name).mean(dims.index("stimulus"))
            for name, dims in self._arrays().items()
            if "stimulus" in dims
        }
        return replace(self, **self._without("stimulus"), **means)

    def select(self, **wanted: Any) -> Self:
        """The part of the result at given coordinates: ``select(layer=3, time="seven")``.

        One coordinate drops its dimension; a list of them keeps it. A window of "time" is named
        by its Span, by its label, or by a number of seconds inside it; a band of "frequency" by
        its Band, its label, or a number of Hz.

        Raises:
            ValueError: for a dimension or coordinate the result does not have, or one that
                names several windows.
        """
        result = self
        for dim, at in wanted.items():
            result = result._select(dim, at)
        return result

    def _select(self, dim: str, wanted: Any) -> Self:
        if dim not in self.dims:
            raise InputError(f"no dimension {dim!r}; this result has {', '.join(self.dims)}")
        many = isinstance(wanted, list)
        places = [self._place(dim, one) for one in (wanted if many else [wanted])]
        at = places if many else places[0]
        parts = {
            name: getattr(self, name)[(*[slice(None)] * dims.index(dim), at)]
            for name, dims in self._arrays().items()
            if dim in dims
        }
        if not many:
            return replace(self, **self._without(dim), **parts)
        chosen = [self.coords[dim][place] for place in places]
        return replace(self, coords=self.coords | {dim: chosen}, **parts)

    def _without(self, dim: str) -> dict[str, Any]:
        """Dims and coords that lack one dimension."""
        return {
            "dims": tuple(name for name in self.dims if name != dim),
            "coords": {name: along for name, along in self.coords.items() if name != dim},
        }

    def _place(self, dim: str, wanted: Any) -> int:
        names = self.coords[dim]
        places = [i for i, name in enumerate(names) if _names(name, wanted)]
        if len(places) == 1:
            return places[0]
        listed = ", ".join(describe_span(name) if dim == "time" else str(name) for name in names)
        if not places:
            raise InputError(f"no {dim} {wanted!r}; there is {listed}")
        raise InputError(f"{len(places)} of {dim} fit {wanted!r}: name one by its Span; {listed}")

    def of_metric(self, metric: str | None) -> Self:
        """The result of one metric, which its ``meta`` then names.

        Raises:
            ValueError: if there are several and none is named, or there is no such metric.
        """
        if metric is not None:
            return replace(self.select(metric=metric), meta=self.meta | {"metric": metric})
        if "metric" in self.dims:
            raise InputError(f"name one of the metrics: metric= {', '.join(self.coords['metric'])}")
        return self

    def cells(self, metric: str | None = None) -> Sequence[Any]:
        """Every value with its place, in the order of the axes, averaged over the stimuli.

        Raises:
            ValueError: if there are several metrics and none is named.
        """
        one = self.of_metric(metric)
        values = one.values.nanmean(0) if "stimulus" in one.dims else one.values
        places = zip(values.flatten().tolist(), one._places(), strict=True)
        return [LabelledValue(value, at) for value, at in places]

    def _places(self) -> Iterator[dict[str, Any]]:
        for place in itertools.product(*(self.coords[axis] for axis in self.axes)):
            yield dict(zip(self.axes, place, strict=True))

    def top(self, n: int = 10, metric: str | None = None) -> list[Any]:
        """The ``n`` cells that are largest in size in the first of ``quantities``, without NaN.

        Several stimuli are averaged as in `cells`.

        Raises:
            ValueError: if there are several metrics and none is named.
        """
        whole("n", n, least=0)
        first = next(iter(self.quantities))
        sizes = [(abs(getattr(cell, first)), cell) for cell in self.cells(metric)]
        known = [(size, cell) for size, cell in sizes if math.isfinite(size)]
        return [cell for _, cell in sorted(known, key=lambda pair: -pair[0])[:n]]

    # ---------------------------------------------------------------- files

    def to_xarray(self) -> xr.Dataset:
        """A labelled Dataset with the variable value.

        Along "time" the coordinate is the window's centre in seconds, beside ``time_start``,
        ``time_end``, ``time_clip`` and ``time_label`` ("" and ``time_labelled`` False where a
        window has no label); along "frequency" the band's centre in Hz, beside ``frequency_low``,
        ``frequency_high`` and labels as of time. Meta, report and recipe are attributes, as JSON.
        """
        coords = {dim: self.coords[dim] for dim in self.dims if dim not in STRETCHES}
        if "time" in self.dims:
            coords |= _time_coords(self.coords["time"])
        if "frequency" in self.dims:
            coords |= _frequency_coords(self.coords["frequency"])
        attrs = {name: json.dumps(getattr(self, name)) for name in ("meta", "report", "recipe")}
        return xr.Dataset({"value": (self.dims, array(self.values))}, coords, attrs)

    def save(self, path: str | Path) -> Path:
        """Write the result as netCDF; `load` reads the same back (bfloat16 as float32).

        An old file stays until the new one is whole.

        Raises:
            OutputError: a path that cannot be written, or a full disk; the old file stays.
            ValueError: for a label that netCDF cannot hold, such as one with a zero byte.
        """
        try:
            data = _netcdf(self.to_xarray())
        except (ValueError, TypeError) as error:
            raise InputError(f"netCDF cannot hold this {self.kind}: {error}") from error
        return write(path, data)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a result that `save` wrote.

        Raises:
            ValueError: if the file is missing or holds something else.
        """
        path = path_of("path", path)
        if not path.is_file():
            raise InputError(f"no saved {cls.kind} at {path}")
        try:
            check_whole(path)
            data = xr.load_dataset(path, engine="h5netcdf")
            result = cls(**cls._fields(data))
            known = result.to_xarray().data_vars
        except Exception as error:  # of HDF5, netCDF, JSON and what the numbers must be
            raise InputError(f"{path} does not hold a saved {cls.kind}: {error}") from error
        more = sorted(map(str, set(data.data_vars) - set(known)))
        if more:
            raise InputError(f"{path} holds more than a {cls.kind}: {', '.join(more)}")
        return result

    @classmethod
    def _fields(cls, data: xr.Dataset) -> dict[str, Any]:
        """The fields of a result that `to_xarray` wrote; a KeyError tells what is missing."""
        dims = tuple(str(dim) for dim in data["value"].dims)
        report, meta = (json.loads(data.attrs[name]) for name in ("report", "meta"))
        recipe = json.loads(data.attrs.get("recipe", "{}"))
        if not (isinstance(meta, dict) and isinstance(recipe, dict)):
            raise InputError("its notes are no mappings")
        return {
            "values": numbers_of(data, "value"),
            "dims": dims,
            "coords": {dim: _coords_of(data, dim) for dim in dims},
            "recipe": recipe,
            "report": arguments.listed("report", report, str, "texts"),
            "meta": {name: arguments.text(name, said) for name, said in meta.items()},
        }

    # ---------------------------------------------------------------- figures

    def plot(
        self,
        quantity: str | None = None,
        metric: str | None = None,
        *,
        audio: AudioSource | None = None,
        words: Sequence[Span] = (),
        phones: Sequence[Span] = (),
        sampling_rate: int = 16_000,
    ) -> go.Figure:
        """The map of one or two axes as a plotly figure; stimuli are averaged.

        Args:
            quantity: one of ``quantities``; None is the first.
            metric: which metric, where there are several.
            audio: the clip, to stand above the map: a path, or samples at ``sampling_rate`` Hz.
            words, phones: labelled stretches of the clip, in seconds.

        Raises:
            ValueError: for three axes (select one first), several metrics and none named, words
                without audio, or audio that the windows do not fit.
        """
        from audio_lens.drawing import clips, figures  # plotly takes long to import

        windows = self.coords.get("time", [])
        clip = clips.clip_above(windows, audio, words, phones, sampling_rate)
        return figures.map_figure(self.of_metric(metric), quantity, clip)

    def figure(
        self,
        path: str | Path | None = None,
        *,
        audio: AudioSource | None = None,
        words: Sequence[Span] = (),
        phones: Sequence[Span] = (),
        sampling_rate: int = 16_000,
        quantity: str | None = None,
        metric: str | None = None,
        width_in: float = 6.0,
    ) -> Figure:
        """The map as a matplotlib figure for papers; with a clip, under its spectrogram.

        Text stays text in PDF and SVG. Needs the extra ``figures``.

        Args:
            path: where to write it; the suffix chooses PDF, SVG, PNG ...
            audio: the clip: a path, or samples at ``sampling_rate`` Hz.
            words, phones: labelled stretches of the clip, in seconds.
            quantity: one of ``quantities``; None is the first.
            metric: which metric, where there are several.
            width_in: width in inches; the height follows.

        Raises:
            ImportError: without matplotlib.
            OutputError: a path that cannot be written; the old file stays.
            ValueError: for three axes (select one first), several metrics and none named, words
                without audio, or audio that the windows do not fit.
        """
        from audio_lens.drawing import clips, paper

        windows = self.coords.get("time", [])
        clip = clips.clip_above(windows, audio, words, phones, sampling_rate)
        return paper.map_figure(self.of_metric(metric), path, quantity, clip, width_in)


# -------------------------------------------------------------------------------- files


def _netcdf(data: xr.Dataset) -> bytes:
    """The Dataset as a netCDF file holds it, made in memory: HDF5 does not survive a full disk."""
    memory = io.BytesIO()
    with h5netcdf.File(memory, "w") as file:
        data.dump_to_store(H5NetCDFStore(file))
    return memory.getvalue()


def check_whole(path: Path) -> None:
    """Raise unless a file of HDF5 holds by itself what it declares, so that reading it is safe.

    Raises:
        InputError: numbers of more bytes than the file can hold, or that lie in other files.
        OSError: a file of another kind.
    """
    size, declared = path.stat().st_size, 0
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


# -------------------------------------------------------------------------------- coordinates


def _time_coords(spans: list[Span]) -> dict[str, tuple[str, list]]:
    columns = {
        "time": [span.centre_s for span in spans],
        "time_start": [span.start_s for span in spans],
        "time_end": [span.end_s for span in spans],
        "time_clip": [span.clip for span in spans],
    }
    return _along("time", columns, spans)


def _frequency_coords(bands: list[Band]) -> dict[str, tuple[str, list]]:
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


def _coords_of(data: xr.Dataset, dim: str) -> list:
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


def _names(name: Any, wanted: Any) -> bool:
    """Whether ``wanted`` means the coordinate ``name``; windows and bands have several names."""
    if not isinstance(name, (Span, Band)) or isinstance(wanted, (Span, Band)):
        return name == wanted
    if isinstance(wanted, str):
        return name.label == wanted
    if not isinstance(wanted, Real):
        return False
    if isinstance(name, Band):
        return name.low_hz <= wanted < name.high_hz
    return name.start_s <= wanted < name.end_s
