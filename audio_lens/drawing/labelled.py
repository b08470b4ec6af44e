"""What a figure asks of a result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Labelled(Protocol):
    """Values by named axes, as maps draw them; `results.Result` is one.

    Attributes:
        coords: per axis its coordinates: names or numbers, of "time" spans, of "frequency" bands.
        meta: facts in words; "metric" names what was measured.
    """

    coords: dict[str, list]
    meta: dict[str, str]

    @property
    def quantities(self) -> Mapping[str, str]:
        """Attributes of cells that can be drawn, with names for people; the first ranks them."""
        ...

    @property
    def axes(self) -> tuple[str, ...]:
        """The named axes, without metric and stimulus."""
        ...

    @property
    def title(self) -> str:
        """Headline of the figure."""
        ...

    def baselines(self) -> Mapping[str, float]:
        """Numbers that values are read against, by name."""
        ...

    def cells(self) -> Sequence[Any]:
        """Every cell in the order of the axes, with its ``place`` in words and the quantities."""
        ...
