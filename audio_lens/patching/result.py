"""What a sweep found: values by layer, head and seconds, with both baselines beside them."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor

from audio_lens.arguments import text
from audio_lens.errors import InputError
from audio_lens.results import Result, array, in_words, numbers_of
from audio_lens.timeline import Band, Span

AXES = ("layer", "head", "time", "frequency", "position", "neuron", "group")
FIELDS = {"time": "span", "frequency": "band"}  # of a Cell, for axes of stretches
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
        change: value - the metric of the run that was patched or edited, before that.
        layer, head, position, neuron, group, span, band: where, as far as the sweep had that axis.
    """

    value: float
    recovery: float
    effect: float
    change: float
    layer: int | None = None
    head: int | None = None
    position: int | None = None
    neuron: int | None = None
    group: str | None = None
    span: Span | None = None
    band: Band | None = None

    @property
    def place(self) -> str:
        """The cell in words, e.g. ``layer 3, 0.40-0.50 s "seven"``."""
        places = dict(self._numbers()) | {"time": self.span, "frequency": self.band}
        return in_words({axis: at for axis, at in places.items() if at is not None})

    def _numbers(self) -> list[tuple[str, int | str | None]]:
        return [(axis, getattr(self, axis)) for axis in AXES if axis not in FIELDS]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings for JSON; bounds of span and band, None for NaN."""
        places = dict(self._numbers())
        if self.span is not None:
            places |= {"start_s": self.span.start_s, "end_s": self.span.end_s}
            places |= {"label": self.span.label, "clip": self.span.clip}
        if self.band is not None:
            places |= {"low_hz": self.band.low_hz, "high_hz": self.band.high_hz}
            places |= {"band": self.band.label}
        told = ("value", "recovery", "effect", "change")
        numbers = {name: getattr(self, name) for name in told}
        numbers = {name: x if math.isfinite(x) else None for name, x in numbers.items()}
        return {name: at for name, at in places.items() if at is not None} | numbers

    def __repr__(self) -> str:
        if math.isnan(self.effect):
            return f"{self.place}: change {self.change:+.4g} (value {self.value:.4g})"
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


@dataclass(init=False, repr=False)
class SweepResult(Result):
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
        direction: "denoise" (clean activations into the corrupted run), "noise" (the other way),
            or "edit" (one run alone, edited: both baselines are that of the unedited run).
        report: notes, for instance about skipped work or a metric that tells nothing.
        meta: model, hashes of weights and inputs, versions, seed, in words.
        widths: of a refined sweep, shaped as ``values`` without metric and stimulus: how wide a
            window, in seconds, each value was measured with (and is exact for).
        recipe: what `patching.rerun` makes the map again from: the arguments, as JSON holds them,
            where hooks were attached, and the files of the clips, where it came from files.
        beside: what else a `Result` has: intervals, controls, counts.

    Raises:
        ValueError: if dims, coords and the shapes do not fit together.
    """

    kind: ClassVar[str] = "sweep"

    clean: Float[Tensor, "..."]
    corrupted: Float[Tensor, "..."]
    site: str
    direction: str
    widths: Float[Tensor, "..."] | None

    def __init__(
        self,
        values: Float[Tensor, "..."],
        dims: tuple[str, ...],
        coords: dict[str, list],
        clean: Float[Tensor, "..."],
        corrupted: Float[Tensor, "..."],
        site: str,
        direction: str,
        report: list[str] | None = None,
        meta: dict[str, str] | None = None,
        widths: Float[Tensor, "..."] | None = None,
        recipe: dict[str, Any] | None = None,
        **beside: Any,
    ) -> None:
        self.clean, self.corrupted, self.widths = clean, corrupted, widths
        self.site, self.direction = site, direction
        told = {"report": report or [], "meta": meta or {}, "recipe": recipe or {}}
        super().__init__(values, dims, coords, **told, **beside)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.direction == "edit":
            return
        finite = self.clean.isfinite() & self.corrupted.isfinite()
        self._note_baselines(~finite, "not finite", "the metric tells nothing")
        why = "the inputs do not differ in what the metric measures"
        self._note_baselines(alike(self.clean, self.corrupted), "alike", why)

    def _note_baselines(self, where: Bool[Tensor, "..."], what: str, why: str) -> None:
        """Report that the baselines ``where`` allow no recovery.

        Logged once: parts of a result that says so already are noted in silence.
        """
        if not where.any():
            return
        said = f"clean and corrupted metric are {what}"
        count = f"{int(where.sum())} of {where.numel()} baselines"
        note = f"{said} for {count}: {why}, so recovery is NaN there"
        if note in self.report:
            return
        if not any(earlier.startswith(said) for earlier in self.report):
            log.warning(note)
        self.report = [*self.report, note]

    def _check(self) -> None:
        if self.direction not in ("denoise", "noise", "edit"):
            raise InputError(f"direction is 'denoise', 'noise' or 'edit', got {self.direction!r}")
        unknown = [dim for dim in self.axes if dim not in AXES]
        if unknown:
            raise InputError(f"unknown axes {unknown}; a sweep has {', '.join(AXES)}")
        super()._check()

    def _arrays(self) -> dict[str, tuple[str, ...]]:
        arrays = super()._arrays() | {"clean": self._batch_dims, "corrupted": self._batch_dims}
        return arrays if self.widths is None else arrays | {"widths": self.axes}

    @property
    def quantities(self) -> Mapping[str, str]:
        """What can be drawn, with names for people; the first ranks the cells.

        "effect", "recovery" and "value"; of edits of one run alone "change" and "value".
        """
        if self.direction == "edit":
            return {"change": "change of the metric", "value": "metric"}
        return {"effect": "effect", "recovery": "recovery", "value": "metric"}

    @property
    def title(self) -> str:
        return f"{self.site}, {self.direction}"

    def baselines(self) -> dict[str, float]:
        """The metric of the clean and the corrupted run; of one metric, stimuli averaged."""
        mean = self.mean()
        return {"clean": mean.clean.item(), "corrupted": mean.corrupted.item()}

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

    @property
    def change(self) -> Float[Tensor, "..."]:
        """The metric of every run minus that of the run before it was patched or edited."""
        return self.values - self._over_axes(self._patched(self.clean, self.corrupted))

    def _patched(self, clean: Tensor, corrupted: Tensor) -> Tensor:
        """What belongs to the run that is patched."""
        return clean if self.direction == "noise" else corrupted

    def _effect(self, recovery: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return 1 - recovery if self.direction == "noise" else recovery

    def _over_axes(self, baseline: Tensor) -> Tensor:
        return baseline.reshape(*baseline.shape, *[1] * len(self.axes))

    def mean(self) -> SweepResult:
        """Mean over the stimuli; recovery is then a ratio of means, the stable aggregate.

        A cell that any stimulus lacks is NaN, for the baselines are those of all stimuli. `cells`
        and `top` take the mean over the stimuli that have the cell.
        """
        return super().mean()

    def cells(self, metric: str | None = None) -> list[Cell]:
        """Every cell, in the order of the axes, averaged over the stimuli (ratio of means).

        Stimuli whose value or baseline is NaN are left out, of the baselines too.

        Raises:
            ValueError: if there are several metrics and none is named.
        """
        return list(super().cells(metric))

    def _columns(self) -> dict[str, Float[Tensor, "..."]]:
        values, clean, corrupted = self._means()
        recovery = _recovery(values, clean, corrupted)
        change = values - self._patched(clean, corrupted)
        effect = self._effect(recovery)
        return {"value": values, "recovery": recovery, "effect": effect, "change": change}

    def _cell(self, place: dict[str, Any], numbers: dict[str, float]) -> Cell:
        return Cell(**numbers, **{FIELDS.get(axis, axis): at for axis, at in place.items()})

    def _means(self) -> Float[Tensor, " values_clean_corrupted *axes"]:
        """Values and baselines of every cell, each the mean over the stimuli that have all."""
        baselines = (
            self._over_axes(x).expand_as(self.values) for x in (self.clean, self.corrupted)
        )
        numbers = torch.stack([self.values, *baselines])
        if "stimulus" not in self.dims:
            return numbers
        lacking = numbers.isnan().any(0)
        return numbers.masked_fill(lacking, math.nan).nanmean(1)

    def top(self, n: int = 10, metric: str | None = None) -> list[Cell]:
        """The ``n`` cells of largest |effect|, strongest first, without NaN.

        Several stimuli are averaged as in `cells`.

        Raises:
            ValueError: if there are several metrics and none is named.
        """
        return super().top(n, metric)

    def to_xarray(self) -> xr.Dataset:
        """A labelled Dataset: variables value, recovery, clean, corrupted (width_s, if refined).

        Along "time" the coordinate is the window's centre in seconds, beside ``time_start``,
        ``time_end``, ``time_clip`` and ``time_label`` ("" and ``time_labelled`` False where a
        window has no label); along "frequency" the band's centre in Hz, beside ``frequency_low``,
        ``frequency_high`` and labels as of time. Site, direction, meta, report and recipe (these
        three as JSON) are attributes.
        """
        variables = {
            "recovery": (self.dims, array(self.recovery)),
            "clean": (self._batch_dims, array(self.clean)),
            "corrupted": (self._batch_dims, array(self.corrupted)),
        }
        if self.widths is not None:
            variables["width_s"] = (self.axes, array(self.widths))
        data = super().to_xarray().assign(variables)
        return data.assign_attrs(site=self.site, direction=self.direction)

    @classmethod
    def _fields(cls, data: xr.Dataset) -> dict[str, Any]:
        widths = {"widths": numbers_of(data, "width_s")} if "width_s" in data else {}
        baselines = {name: numbers_of(data, name) for name in ("clean", "corrupted")}
        told = {name: text(name, data.attrs[name]) for name in ("site", "direction")}
        return super()._fields(data) | baselines | told | widths


def load(path: str | Path) -> SweepResult:
    """Read a result that `SweepResult.save` wrote.

    Raises:
        ValueError: if the file is missing or holds something else.
    """
    return SweepResult.load(path)
