"""What a sweep found: values by layer, head and seconds, with both baselines beside them."""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor

from audio_lens.timeline import Band, Span, describe_span

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from matplotlib.figure import Figure

    from audio_lens.audio import AudioSource

BATCH_DIMS = ("metric", "stimulus")
AXES = ("layer", "head", "time", "frequency", "position", "neuron")
STRETCHES = {"time": "span", "frequency": "band"}  # axes of stretches, not numbers: field of a Cell
RELATIVE_GAP, ABSOLUTE_GAP = 1e-4, 1e-6

log = logging.getLogger(__name__)


@dataclass(frozen=True, repr=False)
class Cell:
    """One patched place and what patching it did.

    Attributes:
        value: the metric of the patched run.
        recovery: (value - corrupted) / (clean - corrupted).
        effect: 0 where the patch changed nothing, 1 where it moved the run the whole way to the
            other baseline.
        layer, head, position, neuron, span, band: where, as far as the sweep had that axis.
    """

    value: float
    recovery: float
    effect: float
    layer: int | None = None
    head: int | None = None
    position: int | None = None
    neuron: int | None = None
    span: Span | None = None
    band: Band | None = None

    @property
    def place(self) -> str:
        """The cell in words, e.g. ``layer 3, 0.40-0.50 s "seven"``."""
        parts = [f"{axis} {number}" for axis, number in self._numbers() if number is not None]
        if self.span is not None:
            parts.append(describe_span(self.span))
        if self.band is not None:
            parts.append(str(self.band))
        return ", ".join(parts)

    def _numbers(self) -> list[tuple[str, int | None]]:
        return [(axis, getattr(self, axis)) for axis in AXES if axis not in STRETCHES]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings for JSON; bounds of span and band, None for NaN."""
        places = dict(self._numbers())
        if self.span is not None:
            places |= {"start_s": self.span.start_s, "end_s": self.span.end_s}
            places |= {"label": self.span.label, "clip": self.span.clip}
        if self.band is not None:
            places |= {"low_hz": self.band.low_hz, "high_hz": self.band.high_hz}
            places |= {"band": self.band.label}
        numbers = {"value": self.value, "recovery": self.recovery, "effect": self.effect}
        numbers = {name: x if math.isfinite(x) else None for name, x in numbers.items()}
        return {name: at for name, at in places.items() if at is not None} | numbers

    def __repr__(self) -> str:
        return (
            f"{self.place}: effect {self.effect:+.3f} "
            f"(recovery {self.recovery:+.3f}, value {self.value:.4g})"
        )


def alike(clean: Float[Tensor, "..."], corrupted: Float[Tensor, "..."]) -> Bool[Tensor, "..."]:
    """Where two baselines are too close for their difference to mean anything.

    Closer than 1e-4 of the larger of the two (or 1e-6): below that, float32 rounding of a forward
    pass is a visible share of the difference.
    """
    larger = torch.maximum(clean.abs(), corrupted.abs())
    return (clean - corrupted).abs() < (RELATIVE_GAP * larger).clamp(min=ABSOLUTE_GAP)


def _recovery(values: Tensor, clean: Tensor, corrupted: Tensor) -> Float[Tensor, "..."]:
    """(value - corrupted) / (clean - corrupted); NaN where that gap is nothing or not finite."""
    gap = clean - corrupted
    useless = alike(clean, corrupted) | ~gap.isfinite()
    return (values - corrupted) / gap.masked_fill(useless, math.nan)


@dataclass
class SweepResult:
    """Metric values of every patched cell of a sweep, labelled, with both baselines.

    Attributes:
        values: metric of each patched run, ``[metric?, stimulus?, *axes]`` as ``dims`` says.
            NaN marks a cell that was not computed, or a window that the stimulus does not have.
        dims: name of every dimension of ``values``: first "metric" where several were asked,
            then "stimulus" where the batch holds several, then the axes in the order asked.
        coords: per dimension its coordinates: names of metrics, labels of stimuli, numbers of
            layers, heads, positions or neurons, a `Span` for every window of "time", a `Band` for
            every one of "frequency".
        clean, corrupted: metric of the unpatched runs, shaped as ``values`` without the axes.
        site: what was patched, as ``part.activation``.
        direction: "denoise" (clean activations into the corrupted run) or "noise" (the other way).
        report: notes, for instance about skipped work or a metric that tells nothing.
        meta: model, hashes of weights and inputs, versions, seed, in words.
        widths: of a refined sweep, shaped as ``values`` without metric and stimulus: how wide a
            window, in seconds, each value was measured with (and is exact for).
        recipe: what `patching.rerun` makes the map again from: the arguments, as JSON holds them,
            where hooks were attached, and the files of the clips, where it came from files.

    Raises:
        ValueError: if dims, coords and the shapes do not fit together.
    """

    values: Float[Tensor, "..."]
    dims: tuple[str, ...]
    coords: dict[str, list]
    clean: Float[Tensor, "..."]
    corrupted: Float[Tensor, "..."]
    site: str
    direction: str
    report: list[str] = field(default_factory=list)
    meta: dict[str, str] = field(default_factory=dict)
    widths: Float[Tensor, "..."] | None = None
    recipe: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._check()
        finite = self.clean.isfinite() & self.corrupted.isfinite()
        self._note_baselines(~finite, "not finite", "the metric tells nothing")
        why = "the inputs do not differ in what the metric measures"
        self._note_baselines(alike(self.clean, self.corrupted), "alike", why)

    def _note_baselines(self, where: Bool[Tensor, "..."], what: str, why: str) -> None:
        """Report and log that the baselines ``where`` allow no recovery."""
        if not where.any():
            return
        count = f"{int(where.sum())} of {where.numel()} baselines"
        note = f"clean and corrupted metric are {what} for {count}: {why}, so recovery is NaN there"
        if note not in self.report:
            self.report = [*self.report, note]
            log.warning(note)

    def _check(self) -> None:
        if self.direction not in ("denoise", "noise"):
            raise ValueError(f"direction is 'denoise' or 'noise', got {self.direction!r}")
        if any(dim not in BATCH_DIMS for dim in self.dims[: self._n_batch_dims]):
            raise ValueError(f"{' and '.join(BATCH_DIMS)} come before the axes, got {self.dims}")
        unknown = [dim for dim in self.axes if dim not in AXES]
        if unknown:
            raise ValueError(f"unknown axes {unknown}; a sweep has {', '.join(AXES)}")
        lengths = [len(self.coords.get(dim, [])) for dim in self.dims]
        if list(self.values.shape) != lengths:
            shape = list(self.values.shape)
            raise ValueError(f"values have shape {shape}, but coords of {self.dims} are {lengths}")
        batch_shape = self.values.shape[: self._n_batch_dims]
        for name in ("clean", "corrupted"):
            shape = getattr(self, name).shape
            if shape != batch_shape:
                raise ValueError(f"{name} has shape {list(shape)}, expected {list(batch_shape)}")
        axes_shape = self.values.shape[self._n_batch_dims :]
        if self.widths is not None and self.widths.shape != axes_shape:
            shape = list(self.widths.shape)
            raise ValueError(f"widths has shape {shape}, expected {list(axes_shape)}")

    @property
    def axes(self) -> tuple[str, ...]:
        """The patched axes: the dims without metric and stimulus."""
        return tuple(dim for dim in self.dims if dim not in BATCH_DIMS)

    @property
    def _n_batch_dims(self) -> int:
        return len(self.dims) - len(self.axes)

    @property
    def recovery(self) -> Float[Tensor, "..."]:
        """(value - corrupted) / (clean - corrupted): 0 as corrupted, 1 as clean; same shape.

        May lie below 0 or above 1. NaN where the baselines are alike or not finite (see
        ``report``), and where the value is NaN.
        """
        clean, corrupted = self._over_axes(self.clean), self._over_axes(self.corrupted)
        return _recovery(self.values, clean, corrupted)

    @property
    def effect(self) -> Float[Tensor, "..."]:
        """How far the patch moved the run towards the other baseline: 0 nothing, 1 all the way.

        Denoising: the recovery. Noising: (clean - value) / (clean - corrupted).
        """
        return self._effect(self.recovery)

    def _effect(self, recovery: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return recovery if self.direction == "denoise" else 1 - recovery

    def _over_axes(self, baseline: Tensor) -> Tensor:
        return baseline.reshape(*baseline.shape, *[1] * len(self.axes))

    def mean(self) -> SweepResult:
        """Mean over the stimuli; recovery is then a ratio of means, the stable aggregate.

        A cell that any stimulus lacks is NaN, for the baselines are those of all stimuli. `cells`
        and `top` take the mean over the stimuli that have the cell.
        """
        if "stimulus" not in self.dims:
            return self
        at = self.dims.index("stimulus")
        return replace(
            self,
            values=self.values.mean(at),
            dims=self.dims[:at] + self.dims[at + 1 :],
            coords=_without(self.coords, "stimulus"),
            clean=self.clean.mean(at),
            corrupted=self.corrupted.mean(at),
        )

    def select(self, **wanted: Any) -> SweepResult:
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

    def _select(self, dim: str, wanted: Any) -> SweepResult:
        if dim not in self.dims:
            raise ValueError(f"no dimension {dim!r}; this result has {', '.join(self.dims)}")
        many = isinstance(wanted, list)
        places = [self._place(dim, one) for one in (wanted if many else [wanted])]
        chosen = [self.coords[dim][place] for place in places]

        def pick(tensor: Tensor, dims: tuple[str, ...] = self.dims) -> Tensor:
            before = (slice(None),) * dims.index(dim)
            return tensor[(*before, places if many else places[0])]

        has_widths = self.widths is not None and dim in self.axes
        return replace(
            self,
            values=pick(self.values),
            widths=pick(self.widths, self.axes) if has_widths else self.widths,
            dims=self.dims if many else tuple(name for name in self.dims if name != dim),
            coords=self.coords | {dim: chosen} if many else _without(self.coords, dim),
            clean=pick(self.clean) if dim in BATCH_DIMS else self.clean,
            corrupted=pick(self.corrupted) if dim in BATCH_DIMS else self.corrupted,
        )

    def _place(self, dim: str, wanted: Any) -> int:
        names = self.coords[dim]
        places = [i for i, name in enumerate(names) if _names(name, wanted)]
        if len(places) == 1:
            return places[0]
        listed = ", ".join(describe_span(name) if dim == "time" else str(name) for name in names)
        if not places:
            raise ValueError(f"no {dim} {wanted!r}; there is {listed}")
        raise ValueError(f"{len(places)} of {dim} fit {wanted!r}: name one by its Span; {listed}")

    def cells(self, metric: str | None = None) -> list[Cell]:
        """Every cell, in the order of the axes, averaged over the stimuli (ratio of means).

        Stimuli whose value or baseline is NaN are left out, of the baselines too.

        Raises:
            ValueError: if there are several metrics and none is named.
        """
        one = self._of_metric(metric)
        values, clean, corrupted = one._means()
        recovery = _recovery(values, clean, corrupted)
        columns = (x.flatten().tolist() for x in (values, recovery, one._effect(recovery)))
        rows = zip(*columns, one._places(), strict=True)
        return [Cell(*numbers, **place) for *numbers, place in rows]

    def _means(self) -> Float[Tensor, "values_clean_corrupted *axes"]:
        """Values and baselines of every cell, each the mean over the stimuli that have all."""
        baselines = (
            self._over_axes(x).expand_as(self.values) for x in (self.clean, self.corrupted)
        )
        numbers = torch.stack([self.values, *baselines])
        if "stimulus" not in self.dims:
            return numbers
        lacking = numbers.isnan().any(0)
        return numbers.masked_fill(lacking, math.nan).nanmean(1)

    def _places(self) -> Iterator[dict[str, Any]]:
        names = [STRETCHES.get(axis, axis) for axis in self.axes]
        for place in itertools.product(*(self.coords[axis] for axis in self.axes)):
            yield dict(zip(names, place, strict=True))

    def _of_metric(self, metric: str | None) -> SweepResult:
        if metric is not None:
            return self.select(metric=metric)
        if "metric" in self.dims:
            raise ValueError(f"name one of the metrics: metric= {', '.join(self.coords['metric'])}")
        return self

    def top(self, n: int = 10, metric: str | None = None) -> list[Cell]:
        """The ``n`` cells of largest |effect|, strongest first, without NaN.

        Several stimuli are averaged as in `cells`.

        Raises:
            ValueError: if there are several metrics and none is named.
        """
        known = [cell for cell in self.cells(metric) if math.isfinite(cell.effect)]
        return sorted(known, key=lambda cell: -abs(cell.effect))[:n]

    def to_xarray(self) -> xr.Dataset:
        """A labelled Dataset: variables value, recovery, clean, corrupted (width_s, if refined).

        Along "time" the coordinate is the window's centre in seconds, beside ``time_start``,
        ``time_end``, ``time_clip`` and ``time_label`` ("" and ``time_labelled`` False where a
        window has no label); along "frequency" the band's centre in Hz, beside ``frequency_low``,
        ``frequency_high`` and labels as of time. Site, direction, meta, report and recipe (these
        three as JSON) are attributes.
        """
        batch_dims = self.dims[: self._n_batch_dims]
        variables = {
            "value": (self.dims, _array(self.values)),
            "recovery": (self.dims, _array(self.recovery)),
            "clean": (batch_dims, _array(self.clean)),
            "corrupted": (batch_dims, _array(self.corrupted)),
        }
        if self.widths is not None:
            variables["width_s"] = (self.axes, _array(self.widths))
        coords = {dim: self.coords[dim] for dim in self.dims if dim not in STRETCHES}
        if "time" in self.dims:
            coords |= _time_coords(self.coords["time"])
        if "frequency" in self.dims:
            coords |= _frequency_coords(self.coords["frequency"])
        attrs = {"site": self.site, "direction": self.direction}
        attrs |= {name: json.dumps(getattr(self, name)) for name in ("meta", "report", "recipe")}
        return xr.Dataset(variables, coords, attrs)

    def save(self, path: str | Path) -> Path:
        """Write the result as netCDF; `load` reads the same back (bfloat16 as float32)."""
        path = Path(path)
        self.to_xarray().to_netcdf(path, engine="h5netcdf")
        return path

    def plot(
        self,
        quantity: str = "effect",
        metric: str | None = None,
        *,
        audio: AudioSource | None = None,
        words: Sequence[Span] = (),
        phones: Sequence[Span] = (),
        sampling_rate: int = 16_000,
    ) -> go.Figure:
        """The map of one or two axes as a plotly figure; stimuli are averaged.

        Args:
            quantity: "effect", "recovery" or "value".
            metric: which metric, where there are several.
            audio: the clip, to stand above the map: a path, or samples at ``sampling_rate`` Hz.
            words, phones: labelled stretches of the clip, in seconds.

        Raises:
            ValueError: for three axes (select one first), several metrics and none named, words
                without audio, or audio that the windows do not fit.
        """
        from audio_lens.report import clips, figures  # stand above patching: a doorway only

        windows = self.coords.get("time", [])
        clip = clips.clip_above(windows, audio, words, phones, sampling_rate)
        return figures.sweep_figure(self, quantity, metric, clip)

    def figure(
        self,
        path: str | Path | None = None,
        *,
        audio: AudioSource | None = None,
        words: Sequence[Span] = (),
        phones: Sequence[Span] = (),
        sampling_rate: int = 16_000,
        quantity: str = "effect",
        metric: str | None = None,
        width_in: float = 6.0,
    ) -> Figure:
        """The map as a matplotlib figure for papers; with a clip, under its spectrogram.

        Text stays text in PDF and SVG. Needs the extra ``figures``.

        Args:
            path: where to write it; the suffix chooses PDF, SVG, PNG ...
            audio: the clip: a path, or samples at ``sampling_rate`` Hz.
            words, phones: labelled stretches of the clip, in seconds.
            quantity: "effect", "recovery" or "value".
            metric: which metric, where there are several.
            width_in: width in inches; the height follows.

        Raises:
            ImportError: without matplotlib.
            ValueError: for three axes (select one first), several metrics and none named, words
                without audio, or audio that the windows do not fit.
        """
        from audio_lens.report import paper

        return paper.map_figure(
            self,
            path,
            audio=audio,
            words=words,
            phones=phones,
            sampling_rate=sampling_rate,
            quantity=quantity,
            metric=metric,
            width_in=width_in,
        )


def load(path: str | Path) -> SweepResult:
    """Read a result that `SweepResult.save` wrote.

    Raises:
        ValueError: if the file is missing or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no saved sweep at {path}")
    try:
        data = xr.load_dataset(path, engine="h5netcdf")
        return _from_xarray(data)
    except (OSError, KeyError) as error:
        raise ValueError(f"{path} does not hold a saved sweep: {error}") from error


def _from_xarray(data: xr.Dataset) -> SweepResult:
    dims = tuple(str(dim) for dim in data["value"].dims)
    coords = {dim: data[dim].values.tolist() for dim in dims if dim not in STRETCHES}

    def rows(dim: str, *columns: str) -> Iterator[tuple]:
        named = (data[f"{dim}_{column}"].values.tolist() for column in columns)
        return zip(*named, strict=True)

    if "time" in dims:
        coords["time"] = [
            Span(start, end, label if labelled else None, clip)
            for start, end, label, labelled, clip in rows(
                "time", "start", "end", "label", "labelled", "clip"
            )
        ]
    if "frequency" in dims:
        coords["frequency"] = [
            Band(low, high, label if labelled else None)
            for low, high, label, labelled in rows("frequency", "low", "high", "label", "labelled")
        ]
    tensors = {name: torch.tensor(data[name].values) for name in ("value", "clean", "corrupted")}
    return SweepResult(
        values=tensors["value"],
        dims=dims,
        coords=coords,
        clean=tensors["clean"],
        corrupted=tensors["corrupted"],
        site=data.attrs["site"],
        direction=data.attrs["direction"],
        report=json.loads(data.attrs["report"]),
        meta=json.loads(data.attrs["meta"]),
        widths=torch.tensor(data["width_s"].values) if "width_s" in data else None,
        recipe=json.loads(data.attrs.get("recipe", "{}")),
    )


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


def _array(tensor: Tensor):
    """The tensor for numpy, which has no bfloat16."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _names(name: Any, wanted: Any) -> bool:
    """Whether ``wanted`` means the coordinate ``name``; windows and bands have several names."""
    if not isinstance(name, (Span, Band)) or isinstance(wanted, (Span, Band)):
        return name == wanted
    if isinstance(wanted, str):
        return name.label == wanted
    if isinstance(name, Band):
        return name.low_hz <= wanted < name.high_hz
    return name.start_s <= wanted < name.end_s


def _without(coords: dict[str, list], dim: str) -> dict[str, list]:
    return {name: values for name, values in coords.items() if name != dim}
