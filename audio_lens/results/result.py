"""Labelled values: what was measured, by named dimensions, with seconds and Hz along them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from audio_lens import arguments
from audio_lens.arguments import path_of, whole
from audio_lens.errors import InputError
from audio_lens.files import write
from audio_lens.pickles import all_alone
from audio_lens.results.labels import (
    BATCH_DIMS,
    STRETCHES,
    LabelledValue,
    array,
    coords_of,
    frequency_coords,
    names,
    netcdf,
    time_coords,
)
from audio_lens.results.plain import coordinate, plain
from audio_lens.results.shown import as_table, in_a_line
from audio_lens.results.stored import (
    OPTIONAL,
    attributes,
    check_whole,
    controls_in,
    counts_in,
    name_of,
    numbers_of,
    sealed,
)
from audio_lens.timeline import Span, describe_span

if TYPE_CHECKING:
    from typing import Self

    import plotly.graph_objects as go
    from matplotlib.figure import Figure

    from audio_lens.audio import AudioSource


@dataclass(repr=False)
class Result:
    """Values of named dimensions, with what they were made from.

    Attributes:
        values: ``[metric?, stimulus?, *axes]`` as ``dims`` says; NaN marks what was not measured.
        dims: name of every dimension of ``values``: first "metric" where there are several, then
            "stimulus" where there are several, then the axes.
        coords: per dimension its coordinates: names or numbers, a `Span` for every window of
            "time", a `Band` for every one of "frequency".
        report: notes for people.
        meta: model, hashes of weights and inputs, versions, seed, in words; "title" is a figure's
            headline, and "value" what its values are called.
        recipe: what the result can be made from again, as JSON holds it.
        estimate: what all stimuli give together, shaped as ``values`` without them, where this is
            not their mean (a ratio of means, a layer).
        low, high: bounds of the interval of that, of the same shape.
        weights: of every value, where what stimuli give together is a ratio of means: the values
            are the stimuli's own ratios, and these what they are ratios to.
        controls: what must show nothing, or a known amount, by name: each a result with some of
            the dims, and the same coordinates.
        n_kept: of how many items the values are.
        dropped: how many were left out, by why.

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
    estimate: Float[Tensor, "..."] | None = field(default=None, kw_only=True)
    low: Float[Tensor, "..."] | None = field(default=None, kw_only=True)
    high: Float[Tensor, "..."] | None = field(default=None, kw_only=True)
    weights: Float[Tensor, "..."] | None = field(default=None, kw_only=True)
    controls: dict[str, Result] = field(default_factory=dict, kw_only=True, repr=False)
    n_kept: int | None = field(default=None, kw_only=True)
    dropped: dict[str, int] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        self._check()

    def __repr__(self) -> str:
        return in_a_line(self)

    def _repr_html_(self) -> str:
        return as_table(self)

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
        if (self.low is None) != (self.high is None):
            raise InputError("an interval has both bounds, low and high")
        for name, control in self.controls.items():
            self._check_control(name, control)

    def _check_control(self, name: str, control: Result) -> None:
        odd = [d for d in control.dims if d not in self.dims or control.coords[d] != self.coords[d]]
        if odd or control.controls:
            what = f"its {', '.join(odd)} is its own" if odd else "it has controls itself"
            raise InputError(f"control {name!r} does not stand beside these values: {what}")

    def _arrays(self) -> dict[str, tuple[str, ...]]:
        """Every array by the name of its field, and the dims that it has."""
        together = tuple(dim for dim in self.dims if dim != "stimulus")
        optional = (name for name in ("estimate", "low", "high") if getattr(self, name) is not None)
        weights = {} if self.weights is None else {"weights": self.dims}
        return {"values": self.dims, **weights, **dict.fromkeys(optional, together)}

    @property
    def quantities(self) -> Mapping[str, str]:
        """What every cell has that can be drawn, with names for people; the first ranks cells."""
        return {"value": self.meta.get("value", "metric")}

    @property
    def axes(self) -> tuple[str, ...]:
        """The dims without metric and stimulus."""
        return tuple(dim for dim in self.dims if dim not in BATCH_DIMS)

    @property
    def _batch_dims(self) -> tuple[str, ...]:
        return self.dims[: len(self.dims) - len(self.axes)]

    @property
    def title(self) -> str:
        """What a figure of the result is called: by its ``meta``, or else by its axes."""
        return self.meta.get("title") or " by ".join(self.axes)

    def baselines(self) -> dict[str, float]:
        """Numbers that values are read against, by name; of one metric, stimuli averaged."""
        return {}

    @property
    def interval(self) -> Float[Tensor, " 2 ..."] | None:
        """Both bounds of every cell's interval; None where there is none."""
        return None if self.low is None or self.high is None else torch.stack([self.low, self.high])

    @property
    def n_dropped(self) -> int:
        """How many items were left out."""
        return sum(self.dropped.values())

    # ---------------------------------------------------------------- parts

    def mean(self) -> Self:
        """What the stimuli give together: the estimate, else their mean.

        Of a mean, what any stimulus lacks is NaN.
        """
        if "stimulus" not in self.dims:
            return self
        together = {name: control.mean() for name, control in self.controls.items()}
        means = {
            name: getattr(self, name).mean(dims.index("stimulus"))
            for name, dims in self._arrays().items()
            if "stimulus" in dims
        }
        if self.estimate is not None:
            means |= {"values": self.estimate, "estimate": None}
        return replace(self, **self._without("stimulus"), **means, controls=together)

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
        parts: dict[str, Any] = {
            name: getattr(self, name)[(*[slice(None)] * dims.index(dim), at)]
            for name, dims in self._arrays().items()
            if dim in dims
        }
        parts["controls"] = {
            name: control._select(dim, wanted) if dim in control.dims else control
            for name, control in self.controls.items()
        }
        if dim == "stimulus":  # what all gave together is not what these give
            parts |= dict.fromkeys(("estimate", "low", "high"))
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
        there = self.coords[dim]
        places = [i for i, name in enumerate(there) if names(name, wanted)]
        if len(places) == 1:
            return places[0]
        listed = ", ".join(describe_span(name) if dim == "time" else str(name) for name in there)
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
        columns = one._columns()
        every = torch.arange(columns[next(iter(columns))].numel())
        return one._cells_at(every, columns)

    def _columns(self) -> dict[str, Float[Tensor, "..."]]:
        """What a cell has, of all cells, the stimuli averaged."""
        values = self.values.nanmean(0) if "stimulus" in self.dims else self.values
        values = values if self.estimate is None else self.estimate
        bounds = (
            {} if self.low is None or self.high is None else {"low": self.low, "high": self.high}
        )
        return {"value": values} | bounds

    def _cell(self, place: dict[str, Any], numbers: dict[str, float]) -> Any:
        """One cell, of what `_columns` has of it."""
        return LabelledValue(at=place, **numbers)

    def _cells_at(
        self, chosen: Int[Tensor, " n"], columns: Mapping[str, Float[Tensor, "..."]]
    ) -> list[Any]:
        """The cells of these numbers, in the order of the axes."""
        sizes = [len(self.coords[axis]) for axis in self.axes]
        at = [along.tolist() for along in torch.unravel_index(chosen, sizes)] if sizes else []
        coords = [[self.coords[axis][i] for i in x] for axis, x in zip(self.axes, at, strict=True)]
        numbers = [column.flatten()[chosen].tolist() for column in columns.values()]
        return [
            self._cell(
                {axis: along[i] for axis, along in zip(self.axes, coords, strict=True)},
                {name: column[i] for name, column in zip(columns, numbers, strict=True)},
            )
            for i in range(len(chosen))
        ]

    def top(self, n: int = 10, metric: str | None = None) -> list[Any]:
        """The ``n`` cells that are largest in size in the first of ``quantities``, without NaN.

        Several stimuli are averaged as in `cells`.

        Raises:
            ValueError: if there are several metrics and none is named.
        """
        whole("n", n, least=0)
        one = self.of_metric(metric)
        columns = one._columns()
        sizes = columns[next(iter(one.quantities))].flatten().abs()
        known = sizes.isfinite().nonzero().flatten()
        strongest = known[sizes[known].argsort(descending=True, stable=True)[:n]]
        return one._cells_at(strongest, columns)

    # ---------------------------------------------------------------- files

    def to_xarray(self) -> xr.Dataset:
        """A labelled Dataset with the variable value.

        Beside it stand weights, estimate, low and high where they are known, and of every control
        its ``control.NAME``, ``control.NAME.low`` and so on.

        Along "time" the coordinate is the window's centre in seconds, beside ``time_start``,
        ``time_end``, ``time_clip`` and ``time_label`` ("" and ``time_labelled`` False where a
        window has no label); along "frequency" the band's centre in Hz, beside ``frequency_low``,
        ``frequency_high`` and labels as of time. Meta, report and recipe are attributes, as JSON.
        """
        coords = {dim: self.coords[dim] for dim in self.dims if dim not in STRETCHES}
        if "time" in self.dims:
            coords |= time_coords(self.coords["time"])
        if "frequency" in self.dims:
            coords |= frequency_coords(self.coords["frequency"])
        return xr.Dataset(self._variables(), coords, attributes(self))

    def _variables(self) -> dict[str, tuple[tuple[str, ...], Any]]:
        """The arrays of `Result` itself and of its controls, by the names that files have."""
        own = {
            "value" if name == "values" else name: (dims, array(getattr(self, name)))
            for name, dims in Result._arrays(self).items()
        }
        for control, result in self.controls.items():
            own |= {name_of(control, name): held for name, held in result._variables().items()}
        return own

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings for JSON: what the stimuli give together, as nested lists.

        ``axes`` name the lists from the outside in, ``coords`` what stands along them; ``interval``
        is both bounds, None where there are none, as NaN is. Controls are told likewise.
        """
        together = self.mean()
        told: dict[str, Any] = {
            "axes": list(together.dims),
            "coords": {dim: [coordinate(at) for at in self.coords[dim]] for dim in together.dims},
            **plain(together.values, together.low, together.high),
        }
        if self.controls:
            told["controls"] = {name: one.to_dict() for name, one in self.controls.items()}
        if self.n_kept is not None:
            told |= {"n_kept": self.n_kept, "n_dropped": self.n_dropped, "dropped": self.dropped}
        return told | {name: self.meta[name] for name in ("model", "seed") if name in self.meta}

    def save(self, path: str | Path) -> Path:
        """Write the result as netCDF; `load` reads the same back (bfloat16 as float32).

        An old file stays until the new one is whole.

        Raises:
            OutputError: a path that cannot be written, or a full disk; the old file stays.
            ValueError: for a label that netCDF cannot hold, such as one with a zero byte.
        """
        try:
            data = netcdf(self.to_xarray())
        except (ValueError, TypeError) as error:
            raise InputError(f"netCDF cannot hold this {self.kind}: {error}") from error
        return write(path, sealed(data))

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
        together = {n: data[n].values for n in OPTIONAL if n in data}
        return {
            "values": numbers_of(data, "value"),
            "dims": dims,
            "coords": {dim: coords_of(data, dim) for dim in dims},
            "recipe": recipe,
            "report": arguments.listed("report", report, str, "texts"),
            "meta": {name: arguments.text(name, said) for name, said in meta.items()},
            **{name: torch.tensor(held) for name, held in together.items()},
            "controls": {n: Result(**Result._fields(x)) for n, x in controls_in(data).items()},
            **counts_in(data),
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

        Three axes with intervals are drawn as curves in panels. What was found is said below the
        title: the first note of a result that has intervals.

        Args:
            quantity: one of ``quantities``; None is the first.
            metric: which metric, where there are several.
            audio: the clip, to stand above the map: a path, or samples at ``sampling_rate`` Hz.
            words, phones: labelled stretches of the clip, in seconds.

        Raises:
            ValueError: for three axes without intervals, or four (select one first), several
                metrics and none named, words without audio, or audio that the windows do not fit.
        """
        from audio_lens.drawing import clips, curves, figures  # plotly takes long to import

        windows, one = self.coords.get("time", []), self.of_metric(metric)
        clip = clips.clip_above(windows, audio, words, phones, sampling_rate)
        is_found = self.low is not None
        if is_found and len(one.axes) == 3 and clip is None:
            figure = curves.curves_figure(one, quantity)
        else:
            figure = figures.map_figure(one, quantity, clip)
        return figures.say_below(figure, self.report[0]) if is_found and self.report else figure

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
