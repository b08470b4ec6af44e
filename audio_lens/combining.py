"""Places joined into one: ``a | b``, ``a - b`` and ``~a``.

What a place is, and which positions it holds, is said in `audio_lens.places`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class Combinable:
    """Something that stands for positions, and that ``|``, ``-`` and ``~`` join with others."""

    def __or__(self, other: Any) -> Either:
        return Either(self, other)

    def __ror__(self, other: Any) -> Either:
        return Either(other, self)

    def __sub__(self, other: Any) -> Without:
        return Without(self, other)

    def __rsub__(self, other: Any) -> Without:
        return Without(other, self)

    def __invert__(self) -> Outside:
        return Outside(self)


@dataclass(frozen=True, eq=False)
class Either(Combinable):
    """The positions of one place or of the other."""

    one: Any
    other: Any


@dataclass(frozen=True, eq=False)
class Without(Combinable):
    """The positions of one place that are not in the other."""

    one: Any
    other: Any


@dataclass(frozen=True, eq=False)
class Outside(Combinable):
    """The positions that hold something and are not in the place."""

    place: Any
