"""Activations of neurons, logged where the model answers rightly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from audio_lens.arguments import suggest
from audio_lens.errors import InputError
from audio_lens.items import Activations, ItemError, Items, collect
from audio_lens.items.collect import Place, by_item
from audio_lens.items.pairs import answered
from audio_lens.models import HookedAudioTransformer
from audio_lens.sites import Site, sites_of

NOT_RIGHT = "not answered rightly"
_LAST = ("mlp.gate", "mlp.post")  # the gate where there is one, else what follows the nonlinearity


def site_of(model: HookedAudioTransformer, part: str = "encoder") -> str:
    """The site of a part's neurons: the gate of gated MLPs, else the output of the nonlinearity.

    Raises:
        InputError: a part without MLPs that have neurons.
    """
    known = [str(site) for site in sites_of(model)]
    found = [f"{part}.{name}" for name in _LAST if f"{part}.{name}" in known]
    if not found:
        parts = {site.partition(".")[0] for site in known if site.endswith(_LAST)}
        raise InputError(f"{part!r} has no neurons; {suggest(part, sorted(parts))}")
    return found[0]


@torch.no_grad()
def right(model: HookedAudioTransformer, items: Items, size: int = 16) -> Items:
    """The items whose answer is the model's likeliest token.

    Raises:
        ItemError: answers that are not one token, or no item that is left.
    """
    items.check_answers(model)
    rows: list[int] = []
    for batch in items.batches(model, size):
        answers = [str(items[row].answer) for row in batch.rows]
        says = answered(model, batch.inputs, answers)
        rows += [row for row, is_right in zip(batch.rows, says, strict=True) if is_right]
    if not rows:
        raise ItemError(f"none of the {len(items)} items is answered rightly")
    return items[sorted(rows)]


def logged(
    model: HookedAudioTransformer,
    items: Items,
    part: str = "encoder",
    *,
    where: Place = "audio",
    layers: Sequence[int] | None = None,
    to: str | Path | None = None,
    size: int = 16,
    progress: bool | None = None,
) -> Activations:
    """Activations of a part's neurons in the items that the model answers rightly.

    Every position counts, so that how often a neuron fires can be told.

    Args:
        model: the model.
        items: with answers of one token.
        part: whose neurons; or a whole site, such as "encoder.mlp.post".
        where: which positions, as `collect` takes them.
        layers, to, size, progress: as of `collect`.

    Raises:
        InputError: a part or site without neurons, or a place that selects nothing.
        ItemError: answers that are not one token, or no item that is answered rightly.
    """
    site = Site.parse(part, model) if "." in part else Site.parse(site_of(model, part), model)
    if site.unit != "neuron":
        raise InputError(f"{site} has no neurons: name a site such as {site_of(model, site.part)}")
    kept = right(model, items, size)
    places = by_item(where, items)
    if places is not None:  # one for each item
        rows = {item.id: row for row, item in enumerate(items)}
        where = [places[rows[item.id]] for item in kept]
    found = collect(
        model, kept, str(site), where, to=to, layers=layers, size=size, progress=progress
    )
    found.index["meta"] = found.meta | {NOT_RIGHT: str(len(items) - len(kept))}
    return found
