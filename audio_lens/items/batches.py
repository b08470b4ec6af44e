"""Batches of items of equal layout, so that nothing is padded and no answer changes by company."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from audio_lens.errors import AudioLensError, InputError
from audio_lens.inputs import AudioInputs
from audio_lens.items.item import Item, ItemError
from audio_lens.models.base import HookedAudioTransformer

Entry = TypeVar("Entry")
WAITING = 8  # times the size of a batch: so many prepared items wait for others of their layout


@dataclass(frozen=True)
class Batch:
    """Some items, prepared.

    Attributes:
        rows: which of all items they are, in the order of the inputs.
        inputs: of these items.
    """

    rows: list[int]
    inputs: AudioInputs = field(repr=False)

    def __len__(self) -> int:
        return len(self.rows)


def batches(items: Iterable[Item], model: HookedAudioTransformer, size: int) -> Iterator[Batch]:
    """Batches of up to ``size`` items whose layouts are equal; each is given as it fills up.

    Raises:
        ItemError: naming an item that cannot be prepared.
        ValueError: a size below 1.
    """
    entries = ((row, prepared(item, model)) for row, item in enumerate(items))
    for held in by_layout(((layout_of(x, model), (row, x)) for row, x in entries), size):
        rows, inputs = zip(*held, strict=True)
        yield Batch(list(rows), AudioInputs.joined(inputs))


def by_layout(entries: Iterable[tuple[Hashable, Entry]], size: int) -> Iterator[list[Entry]]:
    """Entries of equal layout, up to ``size`` at a time; each list is given as it fills up.

    Not more than `WAITING` times ``size`` of them wait for company.

    Raises:
        ValueError: a size below 1.
    """
    if size < 1:
        raise InputError(f"a batch holds 1 or more, got {size}")
    waiting: dict[Hashable, list[Entry]] = {}
    for layout, entry in entries:
        waiting.setdefault(layout, []).append(entry)
        if len(waiting[layout]) == size:
            yield waiting.pop(layout)
        elif sum(map(len, waiting.values())) > WAITING * size:
            yield waiting.pop(max(waiting, key=lambda layout: len(waiting[layout])))
    yield from waiting.values()


def prepared(item: Item, model: HookedAudioTransformer) -> AudioInputs:
    """One item as a batch of its own.

    Raises:
        ItemError: naming the item, and why the model cannot take it.
    """
    try:
        return model.prepare([item.clip], *([] if item.text is None else [[item.text]]))
    except AudioLensError as error:
        raise ItemError(f"{item.name} cannot be prepared: {error}") from error


def layout_of(inputs: AudioInputs, model: HookedAudioTransformer) -> Hashable:
    """What rows must share to stand in one batch unpadded: shapes, and where audio stands."""
    row = model.timeline(inputs).rows[0]
    places = [
        tuple(track.clip.tolist()) for track in row.tracks.get("decoder", []) if len(row.tracks) > 1
    ]
    further = {name: tuple(x.shape) for name, x in inputs.extra.items()}
    return (
        tuple(inputs.tokens.shape),
        tuple(inputs.features.shape),
        tuple(inputs.attended[0].tolist()),
        inputs.segments_per_clip,
        tuple(sorted(further.items())),
        tuple(places),
    )
