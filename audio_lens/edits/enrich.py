"""An edit that reaches over several blocks: later ones are given what earlier ones computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens.arguments import numbers
from audio_lens.edits.at import At
from audio_lens.edits.do import Do, Number, as_long_as
from audio_lens.inputs import InputError
from audio_lens.sites import Site, SiteError


@dataclass(frozen=True, eq=False)
class Enrich(Do):
    """Adds to later layers what earlier ones gave at the same site, in the same run.

    A taker l becomes ``x_l + alpha * sum of weight_k * x_k`` over the givers k before it, as these
    were before this edit; a taker with no giver before it stays. The ``layer`` of the edit names
    givers and takers together, or is None. Every position is enriched from itself.

    Attributes:
        givers: the layers that are taken from.
        weights: one for each of them.
        takers: the layers that are changed.
        alpha: how much is added.
        keep_norm: rescale each enriched vector to the length that it had.

    Raises:
        InputError: layers that are none, or named twice, or not as many weights as givers.
    """

    givers: Sequence[int]
    weights: Sequence[Number]
    takers: Sequence[int]
    alpha: Number | Float[Tensor, ""] = 1.0
    keep_norm: bool = True
    reads_vectors: ClassVar[bool] = True
    spans_blocks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, layers in (("givers", self.givers), ("takers", self.takers)):
            listed = numbers(f"the {name} of Enrich", layers)
            if not listed or len(set(listed)) < len(listed):
                raise InputError(f"the {name} of Enrich are layers, each once; got {layers}")
        if len(self.weights) != len(self.givers):
            raise InputError(f"{len(self.givers)} givers need as many weights: {self.weights}")

    def check(self, site: Site, asked: Mapping[str, Any]) -> None:
        super().check(site, asked)
        if site.n_layers is None:
            raise SiteError(f"Enrich goes from layer to layer, and {site} lies outside the blocks")
        outside = [n for n in (*self.givers, *self.takers) if not 0 <= n < site.n_layers]
        if outside:
            raise SiteError(f"layers of {site} lie in 0 to {site.n_layers - 1}, got {outside[0]}")

    def __call__(self, x: Float[Tensor, "..."], at: At) -> Float[Tensor, "..."]:
        layer = int(at.name.split(".")[2])
        given = at.need_step.given.setdefault(id(self), {})
        if layer in self.givers:
            given[layer] = x
        if layer not in self.takers:
            return x
        added = torch.zeros_like(x)
        for giver, weight in zip(self.givers, self.weights, strict=True):
            if giver < layer:
                added = added + weight * self._of(given, giver, x, at)
        enriched = x + self.alpha * added
        return as_long_as(x, enriched) if self.keep_norm else enriched

    def _of(self, given: Mapping[int, Tensor], giver: int, x: Tensor, at: At) -> Tensor:
        """What a giver gave in this call."""
        if giver not in given or given[giver].shape != x.shape:
            raise InputError(
                f"Enrich at {at.name} takes from layer {giver}, which this edit did not see in "
                "this call: its layer= names givers and takers, and all run in one forward"
            )
        return given[giver].to(x)
