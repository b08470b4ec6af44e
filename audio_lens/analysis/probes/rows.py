"""What is probed: rows of activations with labels, and which item and group each is of."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from audio_lens.errors import InputError
from audio_lens.items import Activations, ItemError

Label = str | bool | int | float
Labels = str | Sequence[Any] | Tensor | np.ndarray
Given = Activations | Tensor


@dataclass(frozen=True)
class Rows:
    """Rows of activations of one site, in cells of layers and heads.

    Attributes:
        labels: of every row.
        item: the number of every row's item, in the order of ``names``.
        names: of the items.
        groups: of every row: a probe is tested on other groups than it is fitted on.
        cells: gives the rows of every cell, by its place in ``axes``.
        axes: names and coordinates; none where there is one cell.
        meta: what the activations are of.
        grouped: whether groups were given; else each item is its own.
    """

    labels: list[Any]
    item: Int[np.ndarray, " n"]
    names: list[str]
    groups: list[Hashable]
    cells: Callable[[tuple[int, ...]], Float[Tensor, "n d"]]
    axes: dict[str, list]
    meta: dict[str, str]
    grouped: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """How many cells there are along every axis."""
        return tuple(len(along) for along in self.axes.values())

    @property
    def item_groups(self) -> list[Hashable]:
        """The group of every item."""
        own = dict(zip(self.item.tolist(), self.groups, strict=True))
        return [own[number] for number in range(len(self.names))]

    def of(self, kept: Bool[np.ndarray, " n"]) -> Rows:
        """Some of the rows, and the items that still have one."""
        numbers, item = np.unique(self.item[kept], return_inverse=True)
        at, all_cells = np.flatnonzero(kept), self.cells
        return replace(
            self,
            labels=[self.labels[row] for row in at],
            item=item,
            names=[self.names[number] for number in numbers],
            groups=[self.groups[row] for row in at],
            cells=lambda cell: all_cells(cell)[torch.as_tensor(at)],
        )


def rows_of(
    given: Given,
    label: Labels,
    group: Labels | None = None,
    *,
    site: str | None = None,
    layers: Sequence[int] | None = None,
) -> Rows:
    """Rows of `Activations`, or of a plain tensor.

    Args:
        given: activations, or ``n d``.
        label: a label of the items, or one for every row.
        group: likewise; None takes the groups of the items, where all have one, and else each
            item (row of a tensor) as its own.
        site: of activations; None takes the first.
        layers: of activations; None takes all.

    Raises:
        InputError: labels or groups that are not as many as the rows, a tensor of other shape, or
            activations that are not finite.
        ActivationsError: a site or label that was not collected.
    """
    if isinstance(given, Activations):
        return _collected(given, label, group, site, layers)
    if site is not None or layers is not None:
        raise InputError("a plain tensor has no sites and layers to choose")
    if given.ndim != 2 or not len(given):
        raise InputError(f"activations are n by d, got {' by '.join(map(str, given.shape))}")
    return Rows(
        labels=_each("label", label, len(given)),
        item=np.arange(len(given)),
        names=[str(row) for row in range(len(given))],
        groups=list(range(len(given))) if group is None else _each("group", group, len(given)),
        cells=lambda _: _finite(given),
        axes={},
        meta={},
        grouped=group is not None,
    )


def column(given: Given, name: Labels, site: str | None, what: str) -> list[Any]:
    """A label of every row, by its name or given as such."""
    if isinstance(name, str) and isinstance(given, Activations):
        return list(given.values(name, site))
    count = given.rows(site) if isinstance(given, Activations) else len(given)
    return _each(what, name, count)


def _collected(
    acts: Activations,
    label: Labels,
    group: Labels | None,
    site: str | None,
    layers: Sequence[int] | None,
) -> Rows:
    numbers = acts.table(site)["item"]
    present, item = np.unique(numbers, return_inverse=True)
    known: Sequence[Mapping[str, Any]] = acts.index["items"]
    grouped = group is not None or all("group" in known[number] for number in present)
    groups = column(acts, "group" if group is None else group, site, "group") if grouped else item
    there = acts.layers(site)
    chosen = there if layers is None else [range(max(there) + 1)[one] for one in layers]
    first = acts.array(site, chosen[0] if chosen else None)
    if first.ndim not in (2, 3):
        raise InputError(f"{site or acts.sites[0]} has no vectors to probe")
    axes: dict[str, list] = {"layer": chosen} if chosen else {}
    if first.ndim == 3:
        axes["head"] = list(range(first.shape[1]))

    def cell(at: tuple[int, ...]) -> Tensor:
        x = acts.array(site, chosen[at[0]] if chosen else None)
        return _finite(x[:, at[-1]] if x.ndim == 3 else x)

    return Rows(
        labels=column(acts, label, site, "label"),
        item=item,
        names=[str(known[number]["id"]) for number in present],
        groups=list(groups),
        cells=cell,
        axes=axes,
        meta=dict(acts.meta) | {"site": site or acts.sites[0]},
        grouped=grouped,
    )


def _each(what: str, values: Labels, count: int) -> list[Any]:
    if isinstance(values, str):
        raise InputError(
            f"{what} {values!r} names nothing of a plain tensor: give one for each row"
        )
    listed = values.tolist() if isinstance(values, (Tensor, np.ndarray)) else list(values)
    if len(listed) != count:
        raise InputError(f"{count} rows need as many values of {what}, got {len(listed)}")
    return listed


def _finite(x: Tensor) -> Float[Tensor, "n d"]:
    wide = x.detach().double().cpu()
    if not wide.isfinite().all():
        raise InputError("activations hold NaN or infinite numbers")
    return wide


def are_numbers(labels: Sequence[Any]) -> bool:
    """Whether labels are numbers to be told, not classes: fractions are, whole numbers are not.

    Raises:
        ItemError: labels of both kinds, or that are neither.
    """
    odd = [one for one in labels if not isinstance(one, (str, bool, int, float, np.generic))]
    if odd:
        raise ItemError(f"labels are texts, numbers or true and false, got {odd[0]!r}")
    numbers = [isinstance(one, (float, np.floating)) for one in labels]
    if any(numbers) and any(isinstance(one, str) for one in labels):
        raise ItemError("some labels are texts and others numbers")
    if any(numbers) and not np.isfinite(np.array(labels, dtype=float)).all():
        raise ItemError("some labels are NaN or infinite")
    return any(numbers)
