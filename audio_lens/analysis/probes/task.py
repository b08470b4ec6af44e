"""A label to be told, and how probes of it are fitted on some groups and scored on others."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from audio_lens.analysis.learning import REGRESSIONS, Strength, Tests, folds, numbered, predicted
from audio_lens.analysis.probes.rows import Rows
from audio_lens.items import found_by_name, statistics
from audio_lens.results import Result

Said = Shaped[Tensor, " n *cells"]


@dataclass(frozen=True)
class Task:
    """A label of rows, and the probes that tell it.

    Attributes:
        y: of every row, classes as numbers.
        item: the number of every row's item.
        groups: of every row, as numbers.
        tests: the rows that each fold tests.
        kind, strength: of the learner.
    """

    y: Shaped[np.ndarray, " n"]
    item: Int[np.ndarray, " n"]
    groups: Int[np.ndarray, " n"]
    tests: Tests
    kind: str
    strength: Strength

    @staticmethod
    def of(rows: Rows, kind: str, strength: Strength, n_folds: int, seed: int) -> Task:
        """The rows' own labels."""
        tells_numbers = kind in REGRESSIONS
        tests = folds(rows.labels, rows.groups, n_folds, seed, stratified=not tells_numbers)
        y = np.array(rows.labels, dtype=float) if tells_numbers else numbered(rows.labels)
        return Task(y, rows.item, numbered(rows.groups), tests, kind, strength)

    @property
    def tells_numbers(self) -> bool:
        """Whether the label is a number, not a class."""
        return self.kind in REGRESSIONS

    @property
    def score(self) -> str:
        """What the estimate is called."""
        return "R2" if self.tells_numbers else "balanced accuracy"

    def permuted(self, types: Sequence[Hashable] | None, seed: int) -> Task:
        """The control task: types, or items, under each other's labels.

        Raises:
            ControlError: labels that are all the same.
        """
        sorts = self.item if types is None else numbered(types)
        _, first, own = np.unique(sorts, return_index=True, return_inverse=True)
        drawn = statistics.permuted_labels(self.y[first].tolist(), seed=seed)
        return replace(self, y=np.array(drawn, dtype=self.y.dtype)[own])

    def said(self, rows: Rows, advance: Callable[[int, int], None] | None = None) -> Said:
        """What the probe of every cell says of every row, none of whose group it saw."""
        found = np.empty((len(self.y), *rows.shape), dtype=self.y.dtype)
        for done, cell in enumerate(itertools.product(*map(range, rows.shape)), 1):
            x = rows.cells(cell).numpy()
            found[(slice(None), *cell)] = predicted(
                x, self.y, self.groups, self.tests, self.kind, self.strength
            )
            if advance is not None:
                advance(1, done)
        return torch.as_tensor(found)

    def per_item(
        self, said: Said
    ) -> tuple[Float[Tensor, " items *cells"], Float[Tensor, " items"]]:
        """Numerators and denominators of every item, whose ratio of means is the score."""
        y = torch.as_tensor(self.y).reshape(-1, *[1] * (said.ndim - 1))
        if self.tells_numbers:
            spread = ((self.y - self._fitted_means()) ** 2).mean()
            good = 1 - (said - y).square() / spread
            weights = np.ones(len(self.y))
        else:
            good, weights = (said == y).double(), 1 / np.bincount(self.y)[self.y]
        weights = torch.as_tensor(weights)
        return self._summed(good * weights.reshape(y.shape)), self._summed(weights)

    def _fitted_means(self) -> Float[np.ndarray, " n"]:
        """Of every row the mean of the labels that its probe was fitted on."""
        means = np.empty(len(self.y))
        for test in self.tests:
            means[test] = np.delete(self.y, test).mean()
        return means

    def _summed(self, values: Float[Tensor, " n *cells"]) -> Float[Tensor, " items *cells"]:
        held = torch.zeros(int(self.item.max()) + 1, *values.shape[1:], dtype=torch.float64)
        return held.index_add(0, torch.as_tensor(self.item), values)

    def result(self, said: Said, rows: Rows, drawn: Mapping[str, Any], **beside: Any) -> Result:
        """The score of every cell, with its interval."""
        above, below = self.per_item(said)
        return found_by_name(above, rows.axes, rows.names, denominators=below, **drawn, **beside)
