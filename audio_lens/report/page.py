"""The page of maps: see a clip and what patching it did on one seconds axis, and listen."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from audio_lens.arguments import listed, text
from audio_lens.audio import AudioSource
from audio_lens.drawing.clips import Clip
from audio_lens.drawing.figures import MARKED, Map, draw_map
from audio_lens.drawing.rows import Rows
from audio_lens.errors import InputError
from audio_lens.patching.result import Cell, SweepResult
from audio_lens.report.html import traces_json, write_page
from audio_lens.timeline import Span

SENTENCES = {
    "denoise": (
        "Activations of the clean run were put into the corrupted run. Effect 0: still answers as "
        "for the corrupted clip; effect 1: answers as for the clean one."
    ),
    "noise": (
        "Activations of the corrupted run were put into the clean run. Effect 0: still answers as "
        "for the clean clip; effect 1: answers as for the corrupted one."
    ),
    "edit": "One run was edited, a place at a time; change is the metric minus that without edit.",
}

LARGE = 1000  # from which on a number is written in four digits
MOST_NUMBERS = 50_000  # of a batch, up to which each item has its own map

Results = SweepResult | Sequence[SweepResult] | Mapping[str, SweepResult]


def map_page(
    results: Results,
    audio: AudioSource,
    path: str | Path,
    *,
    words: Sequence[Span] = (),
    phones: Sequence[Span] = (),
    corrupted_audio: AudioSource | None = None,
    corrupted_words: Sequence[Span] = (),
    corrupted_phones: Sequence[Span] = (),
    title: str = "Where the model listens",
    sampling_rate: int = 16_000,
    quantity: str | None = None,
    metric: str | None = None,
) -> Path:
    """Write the maps of sweeps under their clip's waveform and spectrogram, with sound.

    The file needs no network: plotly.js (compressed), sound and data are inside. Clicking a cell
    plays its stretch of audio (and of the spectrum, where it has one). The page switches between
    all sites, directions and metrics of the results, between effect, recovery and metric, and
    between the clips and their difference. Several stimuli are averaged; select one to see it
    alone.

    Args:
        results: a sweep of one or two axes, several of the same clips, or a mapping from names
            to these, which the page then shows in place of site and direction.
        audio: the clean clip: a path, or samples at ``sampling_rate`` Hz.
        path: the HTML file to write.
        words, phones: labelled stretches of the clean clip, in seconds.
        corrupted_audio: the other clip of the pair.
        corrupted_words, corrupted_phones: labelled stretches of the other clip.
        title: headline of the page.
        sampling_rate: rate in Hz of the samples and of the sound in the page.
        quantity: what the colours show at first: "effect" (None), "recovery" or "value"; of edits
            "change" (None) or "value".
        metric: the metric shown first, where the sweeps had several.

    Returns:
        The path written.

    Raises:
        ValueError: for three axes (select one), no results, results that the page could not tell
            apart or that are of different clips, a metric that none has, unreadable audio, or
            windows that lie beyond its end.
    """
    text("title", title)
    views = _views(results, quantity)
    first = _first(views, metric)
    said = {"words": words, "phones": phones}
    clips = [Clip.load("clean", audio, sampling_rate, said)]
    if corrupted_audio is not None:
        said = {"words": corrupted_words, "phones": corrupted_phones}
        clips.append(Clip.load("corrupted", corrupted_audio, sampling_rate, said))
    for view in views:
        clips[0].check_windows(view.result.coords.get("time", ()))
    rows = Rows(clips)
    known = views[0].result.quantities
    unsaid = [name for name in known if not any(name in view.columns for view in views)]
    drawn = [view.to_json(rows) for view in views]
    return write_page(
        path,
        "map.html",
        rows,
        {"views": drawn, "first": first, "quantities": list(known), "unsaid": unsaid},
        height=drawn[first]["layout"]["height"],
        title=title,
        views=views,
        first=first,
        facets=_choices(views),
        quantities={name: label for name, label in known.items() if name not in unsaid},
        quantity=quantity or next(iter(known)),
        has_shares="effect" in known,
        seconds=rows.seconds,
    )


@dataclass(frozen=True)
class View:
    """One map of the page: a result with one metric, and the choices that lead to it."""

    facets: dict[str, str]
    result: SweepResult
    drawn: Map

    @property
    def sentence(self) -> str:
        said = SENTENCES[self.result.direction]
        if "stimulus" not in self.result.dims:
            return said
        count = len(self.result.coords["stimulus"])
        return f"{said} The sound is that of one clip, the values are means over {count}."

    @property
    def columns(self) -> dict[str, str]:
        """What the table says of a cell, by name: an effect is said once where it is a recovery."""
        told = {**self.result.quantities, "value": "metric"}
        if self.result.direction == "denoise":
            del told["recovery"]
        return told

    @property
    def format(self) -> str:
        """As many decimals in every row, unless a number is too large for that."""
        largest = max(
            (abs(getattr(c, name)) for c in self.cells for name in self.columns), default=0
        )
        return "%+.3f" if largest < LARGE else "%+.4g"

    @property
    def metric(self) -> str:
        return self.facets["metric"]

    @property
    def cells(self) -> list[Cell]:
        return self.result.top(MARKED)

    @property
    def notes(self) -> list[str]:
        return self.result.report

    @property
    def facts(self) -> dict[str, str]:
        """What the page says about the sweep, in the order shown."""
        mean = self.result.mean()
        facts = {
            "site": self.result.site,
            "direction": self.result.direction,
            "axes": " by ".join(self.result.axes),
            "metric, clean run": f"{mean.clean.item():.4g}",
            "metric, corrupted run": f"{mean.corrupted.item():.4g}",
        }
        if "stimulus" in self.result.dims:
            facts["mean of"] = f"{len(self.result.coords['stimulus'])} stimuli"
        return facts | self.result.meta

    def to_json(self, rows: Rows) -> dict[str, Any]:
        """The view for map.js, which colours it: the numbers stand in ``customdata`` alone."""
        (trace,) = traces_json([self.drawn.trace.update(rows.axes())])
        trace.pop("z" if self.drawn.y else "y")
        drawn = rows.layout([self.drawn.panel])
        layout = drawn.to_plotly_json()
        layout["meta"]["bar"] = rows.beside(drawn)
        return {
            "facets": self.facets,
            "trace": trace,
            "layout": layout,
            "limits": self.drawn.limits,
            "shades": self.drawn.shades,
        }


def _views(results: Results, quantity: str | None) -> list[View]:
    views = [
        View(facets, each, draw_map(each, quantity))
        for name, result in _named(results)
        for of_metric, one in _metrics(name, result)
        for facets, each in _items(of_metric, one)
    ]
    _check_distinct(views)
    return views


def _named(results: Results) -> list[tuple[str | None, SweepResult]]:
    """Results with their names, None for those without."""
    named: list[tuple[str | None, SweepResult]]
    if isinstance(results, Mapping):
        listed("results", results.values(), SweepResult, "results")
        named = [(text("a name", name), result) for name, result in results.items()]
    else:
        one = isinstance(results, SweepResult)
        several = [results] if one else listed("results", results, SweepResult, "results")
        named = [(None, result) for result in several]
    if not named:
        raise InputError("no results: a page needs at least one")
    return named


def _metrics(name: str | None, result: SweepResult) -> list[tuple[dict[str, str], SweepResult]]:
    """A result of one metric for each it has, with the choices that lead there."""
    if name is None:
        facets = {"site": result.site, "axes": " by ".join(result.axes)}
        facets["direction"] = result.direction
    else:
        facets = {"map": name}
    metrics = result.coords["metric"] if "metric" in result.dims else [None]
    several = [result.of_metric(metric) for metric in metrics]
    return [(facets | {"metric": one.meta.get("metric", "metric")}, one) for one in several]


def _items(
    facets: dict[str, str], result: SweepResult
) -> Iterator[tuple[dict[str, str], SweepResult]]:
    """The mean over a batch and, while the page stays small, each of its items."""
    if "stimulus" not in result.dims:
        yield facets, result
        return
    labels = result.coords["stimulus"]
    yield facets | {"item": f"mean of {len(labels)}"}, result
    if result.values.numel() <= MOST_NUMBERS:
        for label in labels:
            yield facets | {"item": str(label)}, result.select(stimulus=label)


def _check_distinct(views: Sequence[View]) -> None:
    """Raise unless the page can tell the views apart and all are of the same clips."""
    for one, two in itertools.combinations(views, 2):
        if one.facets == two.facets:
            raise InputError(
                f"two results are alike in {', '.join(one.facets)}, so that the page could not "
                "tell them apart: name them, as in map_page({'first': a, 'second': b}, ...)"
            )
        if one.result.quantities != two.result.quantities:
            raise InputError(
                "maps of edits and of patches measure different things: write two pages"
            )
        for clip in ("clean_hash", "corrupted_hash"):
            hashes = {view.result.meta.get(clip) for view in (one, two)} - {None}
            if len(hashes) > 1:
                raise InputError(
                    "the results are of different clips: a page shows one pair, write several"
                )


def _first(views: Sequence[View], metric: str | None) -> int:
    """The view shown first."""
    names = [view.metric for view in views]
    if metric is None:
        return 0
    if metric not in names:
        raise InputError(f"no metric {metric!r}; there is {', '.join(dict.fromkeys(names))}")
    return names.index(metric)


def _choices(views: Sequence[View]) -> dict[str, list[str]]:
    """What can be chosen: the facets in which the views differ, and their names."""
    facets = {
        facet: list(dict.fromkeys(view.facets[facet] for view in views))
        for facet in views[0].facets
    }
    return {facet: names for facet, names in facets.items() if len(names) > 1}
