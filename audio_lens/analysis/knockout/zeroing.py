"""Value zeroing: what a block takes from some positions (context mixing; Mohebbi et al., 2023)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens.analysis.knockout import sentences
from audio_lens.analysis.knockout.attending import (
    IDENTITY,
    RANDOM_KEYS,
    Attention,
    OtherKeys,
    Spot,
    of_items,
)
from audio_lens.arguments import names
from audio_lens.edits import Edit, Scale, intervene
from audio_lens.errors import InputError
from audio_lens.items import Batch, Items, found, measured, method
from audio_lens.models import HookedAudioTransformer
from audio_lens.places import Where
from audio_lens.progress import track
from audio_lens.results import Result
from audio_lens.running import evaluating

CONTROLS = (RANDOM_KEYS, IDENTITY)
GROUPS, DISTANCE, SHARE = "groups", "distance", "share"


@method("knockout.value_zeroing")
def value_zeroing(
    model: HookedAudioTransformer,
    items: Items,
    *,
    queries: Where = "last",
    keys: Any = None,
    layers: int | Sequence[int] | None = None,
    metric: Any = None,
    attention: str | None = None,
    controls: Sequence[str] = CONTROLS,
    by: str | None = None,
    size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """What every block takes from some positions, by zeroing their values in it.

    Patterns stay as they are. "distance" is 1 minus the cosine between what leaves the block at the
    queries and what left it unedited, the mean over the queries; "share" is a group's part in the
    distances of all groups (the context-mixing score); the other metrics are what is lost of them,
    as in `knock_out`.

    Args:
        model: a model that attends to audio.
        items: with answers, unless there is a ``metric``.
        queries: where the representation is compared. Zeroed values are so for all queries.
        keys: groups of positions, a mapping of names to places; one place is a group alone. None is
            audio and text, in cross-attention audio. ``{n: n for n in range(count)}`` gives the
            published score, position by position.
        layers: which blocks; None takes all.
        metric: as in `knock_out`.
        attention: as in `knock_out`.
        controls: "random_keys" and "identity".
        by: a label whose values are drawn in place of items, for intervals.
        size: of the batches.
        seed: of all that is drawn.
        progress: as in `patching.sweep`.

    Returns:
        A result with the axes "group" and "layer".

    Raises:
        InputError: no attention to audio; blocks or controls that are not there; no group, or one
            that selects nothing.
        ControlError: a control that cannot be drawn.
        ItemError: items without answers of one token, where there is no ``metric``.
    """
    read = Attention.of(model, attention)
    groups = _groups(keys, read, items)
    asked = names("controls", controls)
    if unknown := [name for name in asked if name not in CONTROLS]:
        raise InputError(f"no control {unknown[0]!r}; there are {', '.join(CONTROLS)}")
    zeroing = Zeroing(
        read, items, Spot.of(queries, items), groups, read.layers(layers), asked, seed
    )
    metrics, values = zeroing.measure(metric, size, progress)
    axes = {"group": list(groups), "layer": zeroing.layers}

    def of(name: str) -> Result:
        own = axes if name != IDENTITY else {"layer": zeroing.layers}
        cells = values[name].unflatten(2, [len(along) for along in own.values()])
        if len(groups) > 1:  # an edit by nothing has no groups to share between
            one = cells[:, :1]
            part = one / one.sum(2, keepdim=True) if name != IDENTITY else one * torch.nan
            cells = torch.cat([one, part, cells[:, 1:]], dim=1)
        return found(cells, {"metric": metrics, **own}, items, by=by, seed=seed)

    result = of(GROUPS)
    result.controls |= {name: of(name) for name in asked}
    result.meta |= {"title": f"values zeroed in {read.name}", "value": "change"}
    result.report += _told(result, zeroing)
    return result


def _groups(keys: Any, attention: Attention, items: Items) -> dict[Any, Spot]:
    """The groups of positions by name.

    Raises:
        InputError: no group.
    """
    if keys is None:
        keys = {name: name for name in (["audio"] if attention.is_cross else ["audio", "text"])}
    if not isinstance(keys, Mapping):
        keys = {str(Spot.of(keys, items)): keys}
    if not keys:
        raise InputError("keys name at least one group of positions")
    return {name: Spot.of(where, items) for name, where in keys.items()}


@dataclass(frozen=True)
class Zeroing:
    """Values of groups of positions zeroed, in one block after the other.

    Attributes:
        groups: the groups by name.
        asked: controls that run beside.
    """

    attention: Attention
    items: Items
    queries: Spot
    groups: dict[Any, Spot]
    layers: list[int]
    asked: list[str]
    seed: int

    def runs(self, batch: Batch) -> dict[str, list[Edit]]:
        """One edit for every cell in a batch, by what the cells are of."""
        spots = self.groups.values()
        runs = {GROUPS: [edit for spot in spots for edit in self._edits(spot.at(batch.rows))]}
        for control in self.asked:
            if control == IDENTITY:
                runs[control] = self._edits("all", 1.0)
                continue
            others = (OtherKeys(self.attention, spot, self.seed) for spot in spots)
            drawn = [other.draw(control, batch) for other in others]
            runs[control] = [edit for keys in drawn for edit in self._edits(keys)]
        return runs

    def _edits(self, keys: Where, g: float = 0.0) -> list[Edit]:
        site = self.attention.site("v")
        return [Edit(site, Scale(g), layer=layer, where=keys) for layer in self.layers]

    def measure(
        self, metric: Any, size: int, progress: bool | None
    ) -> tuple[list[str], dict[str, Float[Tensor, "n m cells"]]]:
        """The metrics, the first of which is the distance, and their values by what they are of."""
        counts: dict[str, int] = {}

        def cells(batch: Batch) -> list[tuple[Any, list[Edit]]]:
            runs = self.runs(batch)
            counts.update({name: len(edits) for name, edits in runs.items()})
            edited = [(batch.inputs, [edit]) for edits in runs.values() for edit in edits]
            return [(batch.inputs, []), *edited]

        model = self.attention.model
        told = measured(
            model, self.items, cells, metric, size=size, what="zeroing", progress=progress
        )
        lost = told.values[..., :1] - told.values[..., 1:]
        values = torch.cat([self._distances(size, progress)[:, None], lost], dim=1)
        own = [DISTANCE, SHARE] if len(self.groups) > 1 else [DISTANCE]
        parts = dict(zip(counts, values.split(list(counts.values()), dim=-1), strict=True))
        return [*own, *told.metrics], parts

    @torch.no_grad()
    def _distances(self, size: int, progress: bool | None) -> Float[Tensor, "n cells"]:
        """How far every edit moves what leaves its block."""
        model, rows, done = self.attention.model, {}, 0
        with track("distances", len(self.items), "items", show=progress) as advance:
            for batch in self.items.batches(model, size):
                with evaluating(model):
                    rows |= dict(zip(batch.rows, self._of_batch(batch), strict=True))
                done += len(batch)
                advance(len(batch), done)
        return torch.stack([rows[row] for row in range(len(self.items))])

    def _of_batch(self, batch: Batch) -> Float[Tensor, "b cells"]:
        model, part = self.attention.model, self.attention.part
        ground = self.attention.ground_of_queries(batch.inputs)
        queries = ground.held(self.queries.at(batch.rows))
        entering = [f"{part}.blocks.{layer}.hook_resid_pre" for layer in self.layers]
        _, cache = model.run_with_cache(batch.inputs, names_filter=entering)
        heard = model.encode(batch.inputs) if self.attention.is_cross else None

        def left(layer: int) -> Float[Tensor, "b t d"]:
            return model(
                cache[f"{part}.blocks.{layer}.hook_resid_pre"],
                start_at_layer=f"{part}.{layer}",
                stop_at_layer=f"{part}.{layer + 1}",
                inputs=batch.inputs,
                encoder_out=heard,
            )

        before, found = {layer: left(layer) for layer in self.layers}, []
        for edits in self.runs(batch).values():  # each holds the layers in order, over and over
            for edit, layer in zip(edits, itertools.cycle(self.layers), strict=False):
                with intervene(model, edit):
                    found.append(_apart(before[layer], left(layer), queries))
        return of_items(torch.stack(found, dim=1), ground, len(batch))


def _apart(
    one: Float[Tensor, "b t d"], other: Float[Tensor, "b t d"], queries: Tensor
) -> Float[Tensor, " b"]:
    """1 minus the cosine, the mean over the queries."""
    alike = torch.cosine_similarity(one.double(), other.double(), dim=-1).cpu()
    asked = queries[:, : alike.shape[1]].double()
    return ((1 - alike) * asked).sum(1) / asked.sum(1)


def _told(result: Result, zeroing: Zeroing) -> Iterator[str]:
    for name in zeroing.groups:
        one = result.select(group=name)
        top = one.top(1, DISTANCE)[0]
        yield (
            f"Without the values of {name}, what leaves a block at {zeroing.queries} moves most in "
            f"{sentences.place_of(top)}: by {sentences.amount(top)} (1 minus the cosine)."
        )
    for name, control in result.controls.items():
        others = [metric for metric in result.coords["metric"] if metric != SHARE]
        yield f"Control {name}: {sentences.largest(control, others)}."
    yield (
        "A change of the representation need not reach the answer, and what other positions took "
        "from the zeroed ones in earlier blocks stays."
    )
