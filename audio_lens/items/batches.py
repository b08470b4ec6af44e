"""Batches of items of equal layout, so that nothing is padded and no answer changes by company."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from audio_lens.errors import AudioLensError
from audio_lens.inputs import AudioInputs
from audio_lens.items.item import Item, ItemError
from audio_lens.models.base import HookedAudioTransformer

WAITING = 8  # times the size of a batch: so many prepared items wait for others of their layout


@runtime_checkable
class SomeItems(Protocol):
    """What batches ask of `Items`."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Item]: ...


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


def batches(items: SomeItems, model: HookedAudioTransformer, size: int) -> Iterator[Batch]:
    """Batches of up to ``size`` items whose layouts are equal; each is given as it fills up.

    Raises:
        ItemError: naming an item that cannot be prepared.
        ValueError: a size below 1.
    """
    if size < 1:
        raise ValueError(f"a batch holds 1 item or more, got {size}")
    waiting: dict[Hashable, list[tuple[int, AudioInputs]]] = {}
    for row, item in enumerate(items):
        inputs = prepared(item, model)
        layout = layout_of(inputs, model)
        waiting.setdefault(layout, []).append((row, inputs))
        if len(waiting[layout]) == size:
            yield _batch(waiting.pop(layout))
        elif sum(map(len, waiting.values())) > WAITING * size:
            fullest = max(waiting, key=lambda layout: len(waiting[layout]))
            yield _batch(waiting.pop(fullest))
    for held in waiting.values():
        yield _batch(held)


def _batch(held: list[tuple[int, AudioInputs]]) -> Batch:
    rows, inputs = zip(*held, strict=True)
    return Batch(list(rows), AudioInputs.joined(inputs))


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
