"""What is claimed: which activations matter, and what of an item each of them depends on."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from audio_lens.edits.written import read_value, writable, write_value
from audio_lens.errors import InputError
from audio_lens.items import Item
from audio_lens.places import described

OWN = "id"  # the feature of what stays the item's own
Feature = str | Callable[[Item], Hashable] | Sequence[str | Callable[[Item], Hashable]]


@writable
@dataclass(frozen=True, eq=False)
class Node:
    """An activation that is claimed to matter, and to depend on one feature of the item alone.

    Attributes:
        site: ``part.activation``, as in `patching.sweep`; no scores and no patterns.
        layer: the block; None for sites outside the blocks.
        where: a place (`audio_lens.places`), or a function of the item that gives one. What agrees
            in the feature then lends only where it has the place at the same positions.
        basis: vectors ``d k`` that span what matters of it; None takes whole vectors.
        feature: a label or field of the item, or a function of it, or several of these, in all of
            which items must agree; "id" keeps the item's own.
        head: which heads, where the site has some; None takes all.
        name: what others call it in ``reads``; its number where it has none.
        reads: names of the nodes that it is computed from. None takes those that lie next before it
            in the model, () none: it is then as the lending item has it.
    """

    site: str
    layer: int | None = None
    where: Any = "all"
    basis: Float[Tensor, "d k"] | None = None
    feature: Any = OWN
    head: int | Sequence[int] | None = None
    name: str = ""
    reads: Sequence[str] | None = None

    @property
    def features(self) -> tuple[Any, ...]:
        """What items must agree in, one by one."""
        return tuple(self.feature) if isinstance(self.feature, (list, tuple)) else (self.feature,)

    @property
    def is_own(self) -> bool:
        """Whether it keeps the item's own activation."""
        return OWN in self.features

    @property
    def told_feature(self) -> str:
        """What it depends on, in words."""
        return " and ".join(map(_said, self.features))

    @property
    def feature_key(self) -> tuple[Any, ...]:
        """What tells its features from others."""
        return tuple(one if isinstance(one, str) else id(one) for one in self.features)

    def at(self, layer: int | None) -> Node:
        """The node in another block."""
        return replace(self, layer=layer)

    def __str__(self) -> str:
        named = [f"layer {self.layer}"] if self.layer is not None else []
        named += [] if self.head is None else [f"head {self.head}"]
        named += [] if self.basis is None else [f"{self.basis.shape[1]} directions"]
        place = "places by item" if callable(self.where) else described(self.where)
        place = place.strip("'")
        return f"{', '.join([self.site, *named])} at {place}: {self.told_feature}"


@writable
@dataclass(frozen=True, eq=False)
class Hypothesis:
    """Nodes, of which those that lie further back may be computed from those before them.

    What no node claims is claimed not to matter: all else, at all positions and in all layers, is
    another item's.

    Raises:
        InputError: no list of nodes, two of one name, or a name in ``reads`` that no node has.
    """

    nodes: Sequence[Node]

    def __post_init__(self) -> None:
        given: Any = self.nodes
        nodes: list[Any] = list(given) if isinstance(given, (list, tuple)) else [given]
        odd = [one for one in nodes if not isinstance(one, Node)]
        if odd:
            raise InputError(f"a hypothesis is a list of scrubbing.Node, got {odd[0]!r}")
        named = [one if one.name else replace(one, name=str(i)) for i, one in enumerate(nodes)]
        names = [one.name for one in named]
        for name in names:
            if names.count(name) > 1:
                raise InputError(f"two nodes are called {name!r}")
        for node in named:
            unknown = [name for name in node.reads or () if name not in names]
            if unknown:
                raise InputError(
                    f"node {node.name!r} reads {unknown[0]!r}; there are {', '.join(names)}"
                )
        object.__setattr__(self, "nodes", tuple(named))

    def __str__(self) -> str:
        return "; ".join(map(str, self.nodes)) or "nothing matters"

    def moved(self, blocks: int) -> Hypothesis:
        """The same so many blocks further back; nodes outside the blocks stay."""
        return Hypothesis([x if x.layer is None else x.at(x.layer + blocks) for x in self.nodes])

    @property
    def first_layer(self) -> int:
        """The first block that a node lies in.

        Raises:
            InputError: where none lies in a block.
        """
        layers = [one.layer for one in self.nodes if one.layer is not None]
        if not layers:
            raise InputError("no node of this hypothesis lies in a block: it has no layer to move")
        return min(layers)

    def save(self, path: str | Path) -> None:
        """Write it as JSON; tensors stand in a file beside it.

        Raises:
            InputError: places or features that are functions, which no file holds.
            OutputError: a file that cannot be written.
        """
        write_value(self, path, "hypothesis")

    @staticmethod
    def load(path: str | Path) -> Hypothesis:
        """What `save` wrote.

        Raises:
            InputError: no such file, or one that holds no hypothesis.
        """
        found = read_value(path, "hypothesis")
        if not isinstance(found, Hypothesis):
            raise InputError(f"{path} holds no hypothesis, but {type(found).__name__}")
        return found


def _said(feature: Any) -> str:
    return feature if isinstance(feature, str) else getattr(feature, "__name__", "a function")
