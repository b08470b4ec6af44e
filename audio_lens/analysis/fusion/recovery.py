"""How much of the clean answer comes back where clean activations are put into a corrupted run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from audio_lens import edits, metrics
from audio_lens.analysis.fusion.groups import Groups
from audio_lens.corruptions import Silence
from audio_lens.edits import Edit
from audio_lens.errors import InputError
from audio_lens.items import ControlError, Items, Pairs, found, measured, statistics
from audio_lens.items.findings import destroyed_level
from audio_lens.items.measuring import Cell
from audio_lens.items.pairs import PairBatch
from audio_lens.metrics import Metric
from audio_lens.models import HookedAudioTransformer
from audio_lens.results import Result
from audio_lens.running import evaluating
from audio_lens.sites import Site

CONTROLS = ("identity", "other_item", "norm_matched_noise", "destroyed")
_PUT_IN = ("clean", "other_item", "norm_matched_noise")  # activations, at every place
HALF = 0.5  # recovery of a logit difference that destroying alone may reach


@dataclass(frozen=True)
class Spot:
    """A site in a block, or one of its heads."""

    site: str
    layer: int
    head: int | None = None

    def put(self, value: Tensor, where: Any) -> Edit:
        """The edit that overwrites it."""
        return Edit(self.site, edits.Put(value), layer=self.layer, head=self.head, where=where)


@dataclass(frozen=True)
class Request:
    """What is traced: activations put in at spots, at groups of positions.

    Attributes:
        axes: of the spots, which run along them in this order, with their coordinates.
        controls: names of `CONTROLS`.
        size: of the batches.

    Raises:
        InputError: a control that is none.
    """

    spots: Sequence[Spot]
    axes: Mapping[str, Sequence[Any]]
    groups: Groups
    metric: Any = None
    controls: Sequence[str] = CONTROLS
    by: str | None = None
    size: int = 16
    seed: int = 0
    progress: bool | None = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.controls if name not in CONTROLS]
        if unknown:
            raise InputError(f"no control {unknown[0]!r} here; there is {', '.join(CONTROLS)}")


def need_decoder(model: HookedAudioTransformer) -> None:
    """Raise unless the model has a decoder, which makes its output.

    Raises:
        InputError: naming the family.
    """
    if model.cfg.decoder is None or model.output_part != "decoder":
        raise InputError(
            f"fusion is traced over the positions of a decoder, and {model.cfg.family} has none"
        )


def kept_pairs(model: HookedAudioTransformer, items: Items | Pairs) -> Pairs:
    """The pairs that a model tells apart; of items, each beside silence as long as its clip.

    Raises:
        InputError: a model without a decoder.
        ItemError: answers that are not one token each, or no pair that is left.
    """
    need_decoder(model)
    pairs = items if isinstance(items, Pairs) else items.pairs(Silence())
    return pairs.kept(model)[0]


def metrics_of_part(metric: Any, items: Items | Pairs, part: Items | Pairs) -> Any:
    """A metric of all items as one of some of them.

    Raises:
        InputError: words for another number of items.
    """
    if metric is None:
        return None
    number = {item.id: row for row, item in enumerate(clean_of(items))}
    rows = [number[item.id] for item in clean_of(part)]
    return {
        name: one.of_rows(rows, len(number)) if isinstance(one, Metric) else one
        for name, one in metrics.named(metric).items()
    }


def clean_of(items: Items | Pairs) -> Items:
    """The items; of pairs, the clean side."""
    return items.clean if isinstance(items, Pairs) else items


def traced(model: HookedAudioTransformer, items: Items | Pairs, request: Request) -> Result:
    """The recovery of every cell over the kept pairs: a ratio of means, with controls.

    Raises:
        ControlError: one pair alone, where another item is asked for.
        ItemError: as `kept_pairs` and `Groups.masks`.
    """
    pairs = kept_pairs(model, items)
    if "other_item" in request.controls and len(pairs) < 2:
        raise ControlError(
            "other_item needs two kept pairs or more, here is one: leave it out of controls="
        )
    cells = _Cells(model, pairs, request)
    metric = metrics_of_part(request.metric, items, pairs)
    with evaluating(model):
        runs = measured(
            model,
            pairs,
            cells,
            metric,
            size=request.size,
            what="fusion",
            progress=request.progress,
        )
    return _Told(pairs, request, cells, runs.metrics, runs.values).result()


class _Cells:
    """The runs of a batch: both unedited, then one for each source, spot and group.

    Attributes:
        absent: of every pair, the groups that its prompt does not have.
        alone: whether no other pair could lend its activations.
    """

    def __init__(self, model: HookedAudioTransformer, pairs: Pairs, request: Request):
        self.model, self.pairs, self.request = model, pairs, request
        sites = {spot.site: Site.parse(spot.site, model) for spot in request.spots}
        self.names = [sites[spot.site].hook_name(spot.layer) for spot in request.spots]
        self.absent = torch.zeros(len(pairs), len(request.groups.names), dtype=torch.bool)
        self.alone = torch.zeros(len(pairs), dtype=torch.bool)

    @property
    def sources(self) -> list[str]:
        """What is put in."""
        return [name for name in _PUT_IN if name in ("clean", *self.request.controls)]

    def __call__(self, batch: PairBatch) -> Iterator[Cell]:
        corrupted = batch.pair.corrupted
        places = self._places(batch)
        clean = self._activations(batch.pair.clean)
        other = self._other(batch)
        yield batch.pair.clean, []
        yield corrupted, []
        for source in self.sources:
            for number, (spot, name) in enumerate(zip(self.request.spots, self.names, strict=True)):
                value = clean[name]
                if source == "other_item":
                    value = value[other]
                if source == "norm_matched_noise":
                    value = statistics.norm_matched_noise(value, self.request.seed + number)
                for place in places:
                    yield corrupted, [spot.put(value, place)] if place is not None else []
        if "identity" in self.request.controls:
            own = self._activations(corrupted)
            for spot, name in zip(self.request.spots, self.names, strict=True):
                yield corrupted, [spot.put(own[name], "all")]

    def _activations(self, inputs: Any) -> dict[str, Tensor]:
        with torch.no_grad():
            return self.model.run_with_cache(
                inputs, names_filter=list(set(self.names)), return_cache_object=False
            )[1]

    def _places(self, batch: PairBatch) -> list[Bool[Tensor, "b t"] | None]:
        """Of each group; a prompt that does not have it gets all its positions for now."""
        items = [self.pairs.clean[row] for row in batch.rows]
        found = []
        for number, mask in enumerate(
            self.request.groups.masks(self.model, batch.pair.clean, items).values()
        ):
            lacking = ~mask.any(1)
            self.absent[batch.rows, number] = lacking
            found.append(None if lacking.all() else mask | lacking[:, None])
        return found

    def _other(self, batch: PairBatch) -> Tensor:
        """Of each row another one of the batch, which has another answer."""
        answers = [self.pairs.clean[row].answer for row in batch.rows]
        try:
            return statistics.other_item(len(batch), answers, seed=self.request.seed)
        except ControlError:
            self.alone[batch.rows] = True
            return torch.arange(len(batch))


class _Told:
    """The values of all runs as a `Result`."""

    def __init__(
        self,
        pairs: Pairs,
        request: Request,
        cells: _Cells,
        names: Sequence[str],
        values: Float[Tensor, "n metrics cells"],
    ):
        self.pairs, self.request, self.cells = pairs, request, cells
        self.names = list(names)
        self.clean, self.corrupted = values[..., 0], values[..., 1]
        self.there = ~cells.absent.all(0)
        shape = (len(cells.sources), *map(len, request.axes.values()), len(self.there))
        count = torch.Size(shape).numel()
        put = (values[..., 2 : 2 + count] - self.corrupted[..., None]).unflatten(-1, shape)
        at_none = cells.absent.reshape(len(pairs), *[1] * (put.ndim - 2), -1)
        put = put.masked_fill(at_none, torch.nan)[..., self.there]
        self.put = dict(zip(cells.sources, put.unbind(2), strict=True))
        if "other_item" in self.put:
            self.put["other_item"][cells.alone] = torch.nan
        own = values[..., 2 + count :]
        self.own = own - self.corrupted[..., None] if own.numel() else None

    def result(self) -> Result:
        return self._recovered(self.put["clean"], controls=self._controls(), report=self._notes())

    def _recovered(self, gained: Float[Tensor, "n metrics *cells"], **told: Any) -> Result:
        axes: dict[str, Sequence[Any]] = {"metric": self.names, **self.request.axes}
        if gained.ndim > 2 + len(self.request.axes):
            named = zip(self.request.groups.names, self.there.tolist(), strict=True)
            axes["group"] = [name for name, is_there in named if is_there]
        return found(
            gained,
            axes,
            list(self.pairs.clean),
            denominators=self.clean - self.corrupted,
            by=self.request.by,
            seed=self.request.seed,
            dropped=self.pairs.dropped.counts,
            meta={"value": "recovery"},
            **told,
        )

    def _controls(self) -> dict[str, Result]:
        controls = {}
        for name in self.request.controls:
            if name == "destroyed":
                controls[name] = destroyed_level(
                    self.names,
                    self.clean,
                    self.corrupted,
                    list(self.pairs.clean),
                    by=self.request.by,
                    seed=self.request.seed,
                )
            elif name == "identity" and self.own is not None:
                shape = [len(along) for along in self.request.axes.values()]
                controls[name] = self._recovered(self.own.unflatten(-1, shape))
            else:
                controls[name] = self._recovered(self.put[name])
        return controls

    def _notes(self) -> list[str]:
        clean, corrupted = self.clean.mean(0).tolist(), self.corrupted.mean(0).tolist()
        levels = [
            f"{name} {a:.3g} clean, {b:.3g} corrupted"
            for name, a, b in zip(self.names, clean, corrupted, strict=True)
        ]
        dropped = self.pairs.dropped
        notes = [
            f"{len(self.pairs)} pairs are kept, {dropped.total} left out ({dropped}); on average: "
            + "; ".join(levels)
        ]
        absent = self.cells.absent.sum(0).tolist()
        lacking = [
            f"{name!r} ({count})"
            for name, count in zip(self.request.groups.names, absent, strict=True)
            if count
        ]
        if lacking:
            notes.append(f"groups that prompts do not have: {', '.join(lacking)}")
        if self.cells.model.decoder_needs_encoder:
            notes.append(
                "audio reaches this decoder by cross-attention: no position of it is audio"
            )
        if "other_item" in self.put and self.cells.alone.any():
            notes.append(
                f"other_item: {int(self.cells.alone.sum())} pairs have no other of the same layout "
                "and another answer"
            )
        return notes


def standing(result: Result, metric: str, group: str) -> list[bool]:
    """Where a curve over layers holds: its interval lies above a half and above the controls."""
    curve = result.select(metric=metric, group=group)
    least = torch.full_like(_low(curve), HALF)
    for name in ("other_item", "norm_matched_noise"):
        if name in curve.controls:
            least = least.maximum(curve.controls[name].mean().values.nan_to_num(nan=HALF))
    return (_low(curve) > least).tolist()


def _low(curve: Result) -> Tensor:
    """The lower bounds; the values themselves where one item leaves no interval."""
    values, low = curve.mean().values, curve.low
    return values if low is None else torch.where(low.isnan(), values, low)
