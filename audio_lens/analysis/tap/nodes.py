"""Nodes of a search: windows of a stream, heads, neurons, and windows of what a connector gives."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from audio_lens.arguments import number
from audio_lens.edits import Edit, Put
from audio_lens.errors import InputError
from audio_lens.items import Items
from audio_lens.items.batches import prepared
from audio_lens.models import HookedAudioTransformer
from audio_lens.results import in_words
from audio_lens.sites import Site, unit_count
from audio_lens.timeline import Span

WINDOW, HEAD, NEURON, CONNECTOR = "window", "head", "neuron", "connector"
KINDS = (WINDOW, HEAD, NEURON, CONNECTOR)
Windows = float | int | tuple[float | int, ...]


@dataclass(frozen=True)
class Node:
    """A part of the model that may bring the answer.

    Attributes:
        kind: one of `KINDS`.
        site: ``part.activation``.
        layer: the block; None outside of the blocks.
        head, neuron: which one; None where the node is a window.
        span: the seconds of a window; None where the node is all positions.
    """

    kind: str
    site: str
    layer: int | None = None
    head: int | None = None
    neuron: int | None = None
    span: Span | None = None

    @property
    def at(self) -> dict[str, Any]:
        """Its coordinates by axis."""
        named = {"layer": self.layer, "head": self.head, "neuron": self.neuron, "time": self.span}
        return {name: one for name, one in named.items() if one is not None}

    def put(self, source: Any) -> Edit:
        """The edit that overwrites it with what a source has there."""
        where: Any = "all" if self.span is None else self.span
        return Edit(
            self.site,
            Put(source),
            layer=self.layer,
            head=self.head,
            neuron=self.neuron,
            where=where,
        )

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.site, in_words(self.at))))


@dataclass(frozen=True, eq=False)
class Kind:
    """All nodes of one kind, in a grid.

    Attributes:
        name: one of `KINDS`.
        coords: what stands along its axes.
    """

    name: str
    site: Site
    coords: Mapping[str, list]

    @property
    def axes(self) -> tuple[str, ...]:
        return (*self.coords,)

    @property
    def shape(self) -> list[int]:
        return [len(along) for along in self.coords.values()]

    @property
    def nodes(self) -> list[Node]:
        """All of them, the last axis fastest."""
        found = []
        for at in itertools.product(*self.coords.values()):
            named = dict(zip(self.axes, at, strict=True))
            span = named.pop("time", None)
            found.append(Node(self.name, str(self.site), **named, span=span))
        return found


def kinds_of(
    model: HookedAudioTransformer,
    items: Items,
    windows: Windows,
    part: str | None,
    asked: Sequence[str],
) -> list[Kind]:
    """The kinds of nodes that a model has, over the seconds of the longest clip.

    Args:
        windows: width in seconds, or width and stride.
        part: whose blocks are searched; None takes the decoder where its positions have seconds,
            and else the encoder.
        asked: which kinds.

    Raises:
        InputError: windows, a part or kinds that are none, or a part whose positions have no time.
    """
    width, stride = _sizes(windows)
    odd = [name for name in asked if name not in KINDS]
    if odd or not asked:
        raise InputError(f"kinds are some of {', '.join(KINDS)}, got {list(asked)}")
    timeline = model.timeline(prepared(max(items, key=lambda item: item.duration_s), model))
    if part is None:
        hears = model.cfg.decoder is not None and timeline.has_time("decoder")
        part = "decoder" if hears else "encoder"
    if part not in model.cfg.parts or part not in ("encoder", "decoder"):
        raise InputError(f"part is encoder or decoder, as far as the model has them; got {part!r}")
    if not timeline.has_time(part):
        raise InputError(f"positions of the {part} have no seconds: search part='encoder'")
    found = []
    for name, local in (
        (WINDOW, f"{part}.resid_pre"),
        (HEAD, f"{part}.attn.z"),
        (NEURON, f"{part}.mlp.post"),
        (CONNECTOR, "connector.out"),
    ):
        if name not in asked or (name == CONNECTOR and "connector.hook_out" not in model.hook_dict):
            continue
        site = Site.parse(local, model)
        coords: dict[str, list] = {}
        if site.n_layers is not None:
            coords["layer"] = list(range(site.n_layers))
        if name in (HEAD, NEURON):
            coords[name] = list(range(unit_count(model, site)))
        else:
            coords["time"] = timeline.windows(site.positions_of, width, stride)
        found.append(Kind(name, site, coords))
    if not found:
        raise InputError(f"the model has none of {', '.join(asked)}")
    return found


def _sizes(windows: Any) -> tuple[float, float]:
    pair = windows if isinstance(windows, tuple) else (windows, windows)
    if len(pair) != 2:
        raise InputError(f"windows are a width in seconds, or (width, stride); got {windows!r}")
    width, stride = (
        number(what, one, above=0, unit="seconds")
        for what, one in zip(("the width of windows", "their stride"), pair, strict=True)
    )
    return float(width), float(stride)
