"""Coarse to fine: wide windows first, and narrower ones only where those have an effect."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from audio_lens.arguments import number, whole
from audio_lens.errors import InputError
from audio_lens.patching.plan import Plan
from audio_lens.patching.result import SweepResult
from audio_lens.patching.spec import SweepSpec
from audio_lens.progress import heading
from audio_lens.results import BATCH_DIMS
from audio_lens.sites import Site
from audio_lens.timeline import Span, Timeline

if TYPE_CHECKING:
    from audio_lens.models.base import HookedAudioTransformer


def refined(
    model: HookedAudioTransformer, spec: SweepSpec, options: Mapping[str, Any]
) -> SweepResult:
    """A sweep whose windows are split in two wherever |effect| reaches ``spec.refine``.

    Down to single positions. Every value is exact for the window it was measured with, whose width
    is in ``result.widths``; a place that was not split has the value of its wide window throughout.

    Args:
        options: of `Plan.run`; every round has a checkpoint of its own beside the one named.

    Raises:
        ValueError: for a threshold that is not positive, axes without "time", or windows that
            overlap.
    """
    *_, rounds = _rounds(model, spec, options)
    return _merged(rounds)


def streamed(
    model: HookedAudioTransformer, spec: SweepSpec, together: int
) -> Iterator[SweepResult]:
    """The same, given again and again while it runs: wide windows first.

    Places that were not computed yet are NaN, or still have the value of their wide window.

    Args:
        together: how many cells are computed between two results. Between them others may use the
            model; hooks and weights stay as they were.

    Raises:
        ValueError: as `refined`.
    """
    whole("together", together, least=1)
    for rounds in _rounds(model, spec, {"progress": False}, together):
        yield _merged(rounds)


def _rounds(
    model: HookedAudioTransformer,
    spec: SweepSpec,
    options: Mapping[str, Any],
    together: int | None = None,
) -> Iterator[list[SweepResult]]:
    """The results of all rounds so far, after every round, or after so many cells."""
    planned = Plan.of(model, spec)
    threshold = number("refine", spec.refine, above=0, unit="the baseline gap")
    if "time" not in spec.axes:
        raise InputError("refine splits windows: it needs axis 'time'")
    spans = planned.table.coords["time"]
    _check_apart(spans)
    split = _Splitter(spec.timeline, planned.table.site)
    done: list[SweepResult] = []
    cells, wanted = list(range(len(planned))), None
    while cells:
        step = together or len(cells)
        for count in range(step, len(cells) + step, step):
            with heading(f"round {len(done) + 1}"):
                part = planned.run(only=cells[:count], **_numbered(options, len(done)))
            yield [*done, part]
        done.append(part)
        strong = _strong(part, threshold)
        wanted = strong if wanted is None else wanted & strong
        halves = {i: split.halves(span) for i, span in enumerate(spans) if wanted[..., i].any()}
        halves = {i: pair for i, pair in halves.items() if pair}
        if not halves:
            break
        spans, wanted = _next_cells(wanted, halves)
        planned = Plan.of(model, replace(spec, windows=spans), known=part.report)
        cells = _along_axes(wanted, spec.axes).flatten().nonzero()[:, 0].tolist()


def _numbered(options: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Options with the checkpoint of one round."""
    path = options.get("checkpoint")
    if path is None or number == 0:
        return dict(options)
    path = Path(path)
    return {**options, "checkpoint": path.with_name(f"{path.name}.{number}")}


def _check_apart(spans: Sequence[Span]) -> None:
    ordered = sorted(spans, key=lambda span: (span.clip, span.start_s))
    for one, other in itertools.pairwise(ordered):
        if one.clip == other.clip and other.start_s < one.end_s - 1e-9:
            raise InputError(
                "refine needs windows that do not overlap: give a width without a stride below it"
            )


class _Splitter:
    """Cuts windows in two between positions."""

    def __init__(self, timeline: Timeline, site: Site):
        self.part = site.positions_of
        self.rows = [timeline[row] for row in range(len(timeline))]

    def halves(self, span: Span) -> list[Span]:
        """Both halves of a window; none of a window that holds a single position."""
        having = [row for row in self.rows if span.clip < row.n_clips]
        centres = max((self._centres(row, span) for row in having), key=len)
        if len(centres) < 2:
            return []
        middle = len(centres) // 2
        cut = float(centres[middle - 1] + centres[middle]) / 2
        first = replace(span, end_s=cut)
        return [first, replace(span, start_s=cut)]

    def _centres(self, row: Timeline, span: Span) -> Float[Tensor, " n"]:
        return row.seconds(self.part, span.clip)[row.inside(self.part, span)].unique()


def _strong(result: SweepResult, threshold: float | int) -> Bool[Tensor, "*others time"]:
    """Where any stimulus and metric shows an effect, "time" last."""
    effect = result.effect.abs().nan_to_num()
    batch = [i for i, dim in enumerate(result.dims) if dim in BATCH_DIMS]
    strong = (effect >= threshold).any(batch) if batch else effect >= threshold
    return strong.movedim(result.axes.index("time"), -1)


def _next_cells(
    wanted: Bool[Tensor, "*others time"], halves: Mapping[int, Sequence[Span]]
) -> tuple[list[Span], Bool[Tensor, "*others time2"]]:
    """The windows of the next round, and in which places each is computed."""
    spans = [span for pair in halves.values() for span in pair]
    parents = torch.tensor([i for i, pair in halves.items() for _ in pair])
    return spans, wanted[..., parents]


def _along_axes(cells: Bool[Tensor, "*others time"], axes: Sequence[str]) -> Bool[Tensor, "..."]:
    return cells.movedim(-1, list(axes).index("time"))


def _merged(rounds: Sequence[SweepResult]) -> SweepResult:
    """One map on the narrowest windows; each place shows the narrowest window computed there."""
    leaves = _leaves([span for result in rounds for span in result.coords["time"]])
    first = rounds[0]
    at, n_batch = first.dims.index("time"), len(first.dims) - len(first.axes)
    values, widths = _spread(first, leaves, at)
    for result in rounds[1:]:
        own, own_widths = _spread(result, leaves, at)
        known = own.isfinite()
        computed = known.any(tuple(range(n_batch))) if n_batch else known
        values = torch.where(computed, own, values)
        widths = torch.where(computed, own_widths, widths)
    notes = [note for result in rounds for note in result.report]
    notes.append(
        f"refined in {len(rounds)} rounds: widths says how wide a window each value was measured "
        "with"
    )
    return replace(
        first,
        values=values,
        coords=first.coords | {"time": leaves},
        report=list(dict.fromkeys(notes)),
        widths=widths,
    )


def _leaves(spans: Sequence[Span]) -> list[Span]:
    """The windows that hold no other."""
    by_clip: dict[int, list[Span]] = {}
    for span in spans:
        by_clip.setdefault(span.clip, []).append(span)
    return [
        span
        for clip in sorted(by_clip)
        for span in sorted(by_clip[clip], key=lambda s: s.start_s)
        if not any(_inside(other, span) for other in by_clip[clip] if other is not span)
    ]


def _inside(inner: Span, outer: Span) -> bool:
    return (
        inner.clip == outer.clip
        and outer.start_s <= inner.start_s
        and inner.end_s <= outer.end_s
        and inner != outer
    )


def _spread(
    result: SweepResult, leaves: Sequence[Span], at: int
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """Values of a round on the narrowest windows, and the widths they were measured with."""
    spans = result.coords["time"]
    index, widths = [], []
    for leaf in leaves:
        holding = [i for i, s in enumerate(spans) if s == leaf or _inside(leaf, s)]
        index.append(holding[0] if holding else -1)
        widths.append(spans[holding[0]].end_s - spans[holding[0]].start_s if holding else 0.0)
    chosen: Int[Tensor, " leaves"] = torch.tensor(index)
    values = result.values.index_select(at, chosen.clamp(min=0))
    absent = torch.nan * torch.ones_like(values)
    shape = [1] * values.ndim
    shape[at] = len(leaves)
    values = torch.where((chosen >= 0).view(shape), values, absent)
    n_batch = len(result.dims) - len(result.axes)
    wide = torch.tensor(widths, dtype=torch.float64).view(shape[n_batch:])
    return values, wide.expand(values.shape[n_batch:])
