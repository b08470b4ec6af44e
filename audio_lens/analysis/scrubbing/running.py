"""Scrubbed runs: items that lend activations to each other, and whose answers those keep.

Every run starts from that of another item, drawn at random. What the hypothesis names is put into
it; all else stays the other item's: no position, and no layer, is left out. Which item a run
answers for is a matter of reading, so that nothing in front of a node ever runs again.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from audio_lens.analysis.scrubbing.lending import Lenders, Rows, ring
from audio_lens.analysis.scrubbing.tree import Placed, Tree
from audio_lens.edits import Edit
from audio_lens.inputs import AudioInputs
from audio_lens.items import Batch, Items, measured
from audio_lens.items.batches import layout_of
from audio_lens.items.collect import by_item
from audio_lens.models import HookedAudioTransformer
from audio_lens.models.layers import needed
from audio_lens.places import Ground

Masks = list[Bool[Tensor, "e t"]]  # of every item, for each of its entries


@dataclass(frozen=True, eq=False)
class Layout:
    """How items lie, known without running the model.

    Attributes:
        classes: of every item; those of one class have equal layouts.
        masks: the positions of every node, by what `key` calls it.
    """

    model: HookedAudioTransformer
    items: Items
    classes: list[Hashable]
    masks: dict[tuple[str, int], Masks] = field(default_factory=dict)

    @staticmethod
    def of(
        model: HookedAudioTransformer, items: Items, nodes: Sequence[Placed], size: int
    ) -> Layout:
        """The layout of items, with the places of some nodes.

        Raises:
            ItemError: an item that cannot be prepared.
            InputError: a place that selects nothing in some item.
        """
        layout = Layout(model, items, [None] * len(items))
        spots = {layout.key(one): (one, by_item(one.node.where, items)) for one in nodes}
        layout.masks.update({key: [torch.empty(0)] * len(items) for key in spots})
        for batch in items.batches(model, size):
            own = layout_of(batch.inputs[:1], model)
            for row in batch.rows:
                layout.classes[row] = own
            for key, (one, places) in spots.items():
                where = one.node.where if places is None else [places[row] for row in batch.rows]
                ground = Ground.of(model, batch.inputs, one.site.positions_of)
                masks = by_prompt(ground.held(where), ground)
                for row, mask in zip(batch.rows, masks, strict=True):
                    layout.masks[key][row] = mask
        return layout

    @staticmethod
    def key(placed: Placed) -> tuple[str, int]:
        """What a place is called: the same in every block."""
        where = placed.node.where
        return placed.site.positions_of, hash(where) if isinstance(where, str) else id(where)

    def masks_of(self, placed: Placed) -> Masks:
        return self.masks[self.key(placed)]

    def places_of(self, placed: Placed) -> list[bytes]:
        """The positions of a node in every item, to compare."""
        return [mask.numpy().tobytes() for mask in self.masks_of(placed)]


def by_prompt(x: Tensor, ground: Ground) -> list[Tensor]:
    """What every prompt has: mostly one entry, of cut clips several."""
    prompts = torch.tensor(ground.prompts)
    return [x[prompts == prompt] for prompt in range(ground.n_prompts)]


@dataclass(eq=False)
class Draw:
    """What a node holds, for every item that a run is to answer for.

    Attributes:
        lenders: who lends to it.
        bases: whose run it is computed in, where it is computed from others; each item's once.
        reads: what these others hold, by name.
        values: where it was computed.
    """

    placed: Placed
    lenders: Rows
    bases: Rows | None = None
    reads: dict[str, Draw] = field(default_factory=dict)
    values: list[Tensor] = field(default_factory=list)

    @property
    def height(self) -> int:
        """How many runs lie one behind the other until it is known."""
        return 1 + max(one.height for one in self.reads.values()) if self.reads else 0

    def walk(self) -> Iterator[Draw]:
        """Itself and all that it depends on."""
        yield self
        for one in self.reads.values():
            yield from one.walk()


@dataclass(frozen=True, eq=False)
class Scrub:
    """One draw of a hypothesis: into whose run what is put.

    Attributes:
        bases: of every item, another one, whose run stands for it; each once.
        roots: what is put into it.
    """

    bases: Rows
    roots: list[Draw]


def draw(
    tree: Tree,
    lenders: dict[str, Lenders],
    classes: Sequence[Hashable],
    bases: Rows,
    random: np.random.Generator,
) -> Scrub:
    """One draw of a tree; nodes that two others read are drawn for each."""

    def of(name: str, wanted: Rows) -> Draw:
        chosen = lenders[name].draw(wanted, random)
        if not tree.reads[name]:
            return Draw(tree.nodes[name], chosen)
        own = ring(classes, random)
        reads = {other: of(other, chosen) for other in tree.reads[name]}
        return Draw(tree.nodes[name], chosen, own, reads)

    return Scrub(bases, [of(name, np.arange(len(bases))) for name in tree.roots])


@dataclass(frozen=True, eq=False)
class Scores:
    """The metrics of every item.

    Attributes:
        metrics: their names.
        model: of the model itself.
        other: of another item's run, in every draw.
        scrubbed: of every scrub that was asked for.
    """

    metrics: list[str]
    model: Float[Tensor, "n m"]
    other: Float[Tensor, "n m draws"]
    scrubbed: Float[Tensor, "n m scrubs"]


@dataclass(frozen=True, eq=False)
class Runner:
    """Runs scrubs.

    Attributes:
        layout: of the items, who all can lend.
    """

    layout: Layout
    metric: Any
    size: int
    progress: bool | None
    plain: dict[tuple[str, int | None], list[Tensor]] = field(default_factory=dict)

    def scores(self, scrubs: Sequence[Scrub], others: Sequence[Rows]) -> Scores:
        """What scrubs leave of the metrics, beside the model and the runs of other items."""
        draws = [one for scrub in scrubs for root in scrub.roots for one in root.walk()]
        self._read([one.placed for one in draws if not one.reads])
        for height in range(1, 1 + max((one.height for one in draws), default=0)):
            self._compute([one for one in draws if one.height == height])

        def cells(batch: Batch) -> Iterator[tuple]:
            yield batch.inputs, []
            for bases in others:
                yield batch.inputs, [], _answered(bases, batch)
            for scrub in scrubs:
                slots = _answered(scrub.bases, batch)
                yield batch.inputs, [self._put(one, slots) for one in scrub.roots], slots

        told = self._measured(cells, "scrubbing")
        every = [np.arange(len(told.values)), *others, *(scrub.bases for scrub in scrubs)]
        runs = enumerate(every)
        values = torch.stack([told.values[torch.as_tensor(x), :, i] for i, x in runs], dim=-1)
        sizes = [1, len(others), len(scrubs)]
        model, other, scrubbed = values.split(sizes, dim=-1)
        return Scores(told.metrics, model[..., 0], other, scrubbed)

    def _measured(self, cells: Any, what: str) -> Any:
        layout = self.layout
        return measured(
            *(layout.model, layout.items, cells, self.metric),
            size=self.size,
            what=what,
            progress=self.progress,
        )

    def _read(self, nodes: Sequence[Placed]) -> None:
        """Keep what every item has at the sources of some nodes, from one run of each."""
        sources = {one.source: one for one in nodes}
        for source in sources:
            self.plain[source] = [torch.empty(0)] * len(self.layout.items)

        def cells(batch: Batch) -> Iterator[tuple]:
            watches = {source: one.watch() for source, one in sources.items()}
            yield batch.inputs, list(watches.values())
            for source, edit in watches.items():
                held = self._seen(edit, sources[source], batch.inputs)
                for row, value in zip(batch.rows, held, strict=True):
                    self.plain[source][row] = value

        if sources:
            self._measured(cells, "reading")

    def _compute(self, draws: Sequence[Draw]) -> None:
        """What nodes hold that are computed from others."""
        for one in draws:
            one.values = [torch.empty(0)] * len(one.lenders)

        def cells(batch: Batch) -> Iterator[tuple]:
            for one in draws:
                slots, watch = _answered(one.bases, batch), one.placed.watch()
                puts = [self._put(x, slots, one.lenders) for x in one.reads.values()]
                yield batch.inputs, [*puts, watch], slots
                held = self._seen(watch, one.placed, batch.inputs)
                for slot, value in zip(slots, held, strict=True):
                    one.values[slot] = value

        self._measured(cells, "computing nodes")

    def _put(self, draw: Draw, slots: Sequence[int], wanted: Rows | None = None) -> Edit:
        """What puts a node into runs that answer for some items.

        Args:
            wanted: the items whose activations are computed so, by slot; None: the slots' own.
        """
        masks = self.layout.masks_of(draw.placed)
        of = slots if wanted is None else wanted[list(slots)].tolist()
        return draw.placed.put([self._value(draw, s) for s in slots], [masks[i] for i in of])

    def _value(self, draw: Draw, slot: int) -> Tensor:
        if draw.reads:
            return draw.values[slot]
        return self.plain[draw.placed.source][draw.lenders[slot]]

    def _seen(self, edit: Edit, placed: Placed, inputs: AudioInputs) -> list[Tensor]:
        """What every prompt has there, at all positions of its part."""
        ground = Ground.of(self.layout.model, inputs, placed.site.positions_of)
        watched: Any = edit.do
        x, dim = watched.seen[placed.hook_name], placed.site.position_dim
        short = ground.n_positions - x.shape[dim]
        if short:  # the padding that nothing reads was left out
            x = torch.cat([x, x.new_zeros(*x.shape[:dim], short, *x.shape[dim + 1 :])], dim)
        return by_prompt(x, ground)


def _answered(bases: Rows | None, batch: Batch) -> list[int]:
    """The items that the runs of a batch answer for."""
    return np.argsort(needed(bases, "items"))[batch.rows].tolist()
