"""What items answer while neurons are turned: log-probability and recall, row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from audio_lens.analysis.answers import Answers
from audio_lens.analysis.neurons.selection import OFF, Selection
from audio_lens.edits import Edit
from audio_lens.errors import InputError
from audio_lens.items import Batch, ItemError, Items, found
from audio_lens.items.collect import Place, by_item
from audio_lens.items.item import listed
from audio_lens.models import HookedAudioTransformer
from audio_lens.places import Where
from audio_lens.results import Result
from audio_lens.sites import Site, unit_count

METRICS = ("log_prob", "recall")
RANDOM, PER_LAYER, IDENTITY = "random", "random_per_layer", "identity"


@dataclass(frozen=True)
class Study:
    """Neurons that are turned in items whose class is known.

    Attributes:
        own: the class of every item, by its number.
        where: the positions at which neurons are turned, as `collect` takes them.
    """

    model: HookedAudioTransformer
    items: Items
    selection: Selection
    own: Int[Tensor, " n"]
    where: Place
    size: int
    progress: bool | None

    @staticmethod
    def of(
        model: HookedAudioTransformer,
        items: Items,
        selection: Selection,
        label: str,
        where: Place,
        size: int,
        progress: bool | None,
    ) -> Study:
        """The study.

        Raises:
            ItemError: items without answers of one token, or of a class without neurons.
            InputError: neurons that this model does not have.
        """
        check_fit(model, selection)
        items.check_answers(model)
        classes = items.values(label)
        odd = [
            f"{item.name}: {label} is {one!r}"
            for item, one in zip(items, classes, strict=True)
            if one not in selection.classes
        ]
        if odd:
            what = f"no neurons were chosen for the {label} of {len(odd)} of {len(items)} items"
            raise ItemError(listed(what, odd))
        own = torch.tensor([selection.number(one) for one in classes])
        return Study(model, items, selection, own, where, size, progress)

    @property
    def n_classes(self) -> int:
        return len(self.selection.classes)

    def rows_of(self, rows: Sequence[int]) -> Where:
        """The place of some items."""
        each = by_item(self.where, self.items)
        return self.where if each is None else [each[row] for row in rows]

    def turned(
        self,
        weights: Float[Tensor, "b classes"],
        rows: Sequence[int],
        alpha: float | int = OFF,
        selection: Selection | None = None,
    ) -> list[Edit]:
        """Edits that turn neurons in a batch of some items, by weights of their classes."""
        held = self.selection if selection is None else selection
        return held.turned(weights, alpha, where=self.rows_of(rows))

    def one_class(self, number: int) -> Float[Tensor, "1 classes"]:
        """Weights that take one class in all rows."""
        return torch.nn.functional.one_hot(torch.tensor([number]), self.n_classes).double()

    def each_own(self, numbers: Int[Tensor, " n"], rows: Sequence[int]) -> Tensor:
        """Weights that take one class in each row."""
        return torch.nn.functional.one_hot(numbers[list(rows)], self.n_classes).double()

    def answers(
        self, runs: Callable[[Sequence[int]], Iterable[list[Edit]]], what: str
    ) -> Float[Tensor, "n metrics cells"]:
        """Log-probability and recall of every item, in each run of a batch of some items."""

        def cells(batch: Batch) -> Iterable[tuple[Any, list[Edit]]]:
            return [(batch.inputs, edits) for edits in runs(batch.rows)]

        asked = Answers.of(self.model, self.items, against=False)
        return asked.measured(cells, size=self.size, what=what, progress=self.progress).values

    def found(
        self, values: Tensor, axes: dict[str, list], by: str | None, seed: int, **beside: Any
    ) -> Result:
        """A result of every item's values."""
        axes = {"metric": list(METRICS), **axes}
        return found(values, axes, self.items, by=by, seed=seed, **beside)


def check_fit(model: HookedAudioTransformer, selection: Selection) -> None:
    """Raise unless a model has these neurons.

    Raises:
        SiteError: a site that the model does not have.
        InputError: other numbers of layers or neurons.
    """

    site = Site.parse(selection.site, model)
    width = selection.chosen.shape[-1]
    there = unit_count(model, site) if site.unit == "neuron" else None
    if there != width:
        what = "no neurons" if there is None else f"{there} neurons"
        raise InputError(f"{site} has {what} in each block, the selection is of {width}")
    odd = [one for one in selection.layers if one is not None and one >= (site.n_layers or 0)]
    if odd:
        raise InputError(f"{site} has {site.n_layers} blocks, the selection is of block {odd[0]}")
