"""Who lends to whom: items that agree in a feature, and others at random, of equal layout."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from audio_lens.errors import AudioLensError, InputError
from audio_lens.items import Items
from audio_lens.items.item import listed

Rows = Int[np.ndarray, " n"]


class LendingError(AudioLensError, ValueError):
    """Items that nobody can lend an activation to; the message names them and what is missing."""


@dataclass(frozen=True, eq=False)
class Lenders:
    """For every item, those that may lend to it.

    Attributes:
        keys: of every item; those of one key lend to each other. None: it keeps its own.
    """

    keys: Sequence[Hashable] | None

    def of(self, row: int) -> list[int]:
        """Who may lend to an item."""
        if self.keys is None:
            return [row]
        return [i for i, key in enumerate(self.keys) if key == self.keys[row] and i != row]

    def lacking(self, rows: Sequence[int]) -> list[int]:
        """Which of some items nobody among them lends to."""
        if self.keys is None:
            return []
        held = [self.keys[row] for row in rows]
        return [row for row, key in zip(rows, held, strict=True) if held.count(key) < 2]

    def draw(self, wanted: Rows, random: np.random.Generator) -> Rows:
        """One of them for each of some items."""
        if self.keys is None:
            return wanted
        fitting = {row: self.of(row) for row in set(wanted.tolist())}
        return np.array([random.choice(fitting[row]) for row in wanted.tolist()])


def ring(classes: Sequence[Hashable], random: np.random.Generator) -> Rows:
    """For every item another one of its class, no two the same: its place in a random ring."""
    other = np.arange(len(classes))
    for one in dict.fromkeys(classes):
        order = random.permutation([row for row, key in enumerate(classes) if key == one])
        other[order] = np.roll(order, 1)
    return other


def values(items: Items, features: Sequence[Any], whose: str) -> list[Hashable]:
    """What every item has of some features together.

    Raises:
        ItemError: an item that lacks a label.
        InputError: values that cannot be compared.
    """
    columns = []
    for feature in features:
        if isinstance(feature, str):
            columns.append(items.values(feature))
        elif callable(feature):
            columns.append([feature(item) for item in items])
        else:
            raise InputError(f"{whose}: a feature is a label or a function, got {feature!r}")
    told: list[Hashable] = [*zip(*columns, strict=True)]
    try:
        set(told)
    except TypeError as error:
        raise InputError(f"{whose}: its feature gives what cannot be compared: {error}") from error
    return told


def kept(
    items: Items,
    classes: Sequence[Hashable],
    lenders: Sequence[tuple[str, Lenders]],
    skip_bad: bool,
) -> tuple[list[int], dict[str, int]]:
    """The items that others lend to, and how many were left out, by why.

    Args:
        classes: of every item; a random other one is of the same class.
        lenders: of every node, with what the node is.
        skip_bad: leave out the others, in place of raising.

    Raises:
        LendingError: items that nobody can lend to; or none that others can lend to.
    """
    rows, dropped = list(range(len(items))), {}
    wanted = [("no other item of equal layout", Lenders(classes))]
    wanted += [(f"no other item of equal layout agrees in {what}", one) for what, one in lenders]
    while True:
        found = next(((why, x) for why, one in wanted if (x := one.lacking(rows))), None)
        if found is None:
            return rows, dropped
        why, lacking = found
        if not skip_bad or len(lacking) == len(rows):
            told = [f"{items[row].name}: {why}" for row in lacking]
            hint = "" if skip_bad else "; skip_bad=True leaves them out"
            raise LendingError(
                listed(f"nobody can lend to {len(lacking)} of {len(items)} items{hint}", told)
            )
        dropped[why] = dropped.get(why, 0) + len(lacking)
        rows = [row for row in rows if row not in set(lacking)]
