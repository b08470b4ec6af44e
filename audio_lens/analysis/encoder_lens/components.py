"""The layers, or heads, of a site: one after the other, as methods go through them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from audio_lens.edits import Do, Edit
from audio_lens.edits.edit import chosen_layers
from audio_lens.models import HookedAudioTransformer
from audio_lens.sites import Site, SiteError, unit_count


@dataclass(frozen=True)
class Components:
    """What is edited, one at a time.

    Attributes:
        site: what they are of.
        axes: "layer" and perhaps "head", with their coordinates.
    """

    site: Site
    axes: dict[str, list[int]]

    @staticmethod
    def of(
        model: HookedAudioTransformer, site: str, layers: Sequence[int] | None, heads: bool
    ) -> Components:
        """The layers of a site, or with ``heads`` the heads of each.

        Raises:
            SiteError: a site or layer that is not there, that lies outside the blocks, or that has
                no heads.
        """
        where = Site.parse(site, model)
        if where.n_layers is None:
            raise SiteError(f"{where} lies outside the blocks: it has no layers to go through")
        axes = {"layer": [layer for layer in chosen_layers(where, layers) if layer is not None]}
        if heads and where.unit != "head":
            raise SiteError(f"{where} has no heads: heads=False takes whole layers")
        if heads:
            axes["head"] = list(range(unit_count(model, where)))
        return Components(where, axes)

    @property
    def shape(self) -> list[int]:
        """How many there are along each axis."""
        return [len(coords) for coords in self.axes.values()]

    @property
    def hook_names(self) -> list[str]:
        """Where they are, layer by layer."""
        return [self.site.hook_name(layer) for layer in self.axes["layer"]]

    def edits(self, *each: Do) -> list[Edit]:
        """For every component one edit of each kind, component by component."""
        site, layers, heads = str(self.site), self.axes["layer"], self.axes.get("head", [None])
        places = itertools.product(layers, heads)
        return [Edit(site, do, layer=layer, head=head) for layer, head in places for do in each]
