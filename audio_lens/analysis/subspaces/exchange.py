"""Where subspaces are exchanged between runs: one site, in one block, at a place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens.analysis.subspaces.subspace import Subspace
from audio_lens.arguments import whole
from audio_lens.edits import Edit, Put, Swap
from audio_lens.edits.do import Do
from audio_lens.edits.edit import chosen_layers
from audio_lens.errors import InputError
from audio_lens.inputs import AudioInputs
from audio_lens.items import Items
from audio_lens.items.collect import Place, by_item
from audio_lens.models import HookedAudioTransformer
from audio_lens.places import Where
from audio_lens.sites import Site, SiteError


@dataclass(frozen=True)
class Spot:
    """A site in one block, at a place of every item.

    Attributes:
        layer: None outside of the blocks.
        place: one for all items, or one for each.
    """

    model: HookedAudioTransformer
    site: Site
    layer: int | None
    place: Where
    is_by_item: bool

    @staticmethod
    def of(
        model: HookedAudioTransformer,
        items: Items,
        site: str,
        where: Place,
        layer: int | None,
        subspace: Subspace | None = None,
    ) -> Spot:
        """The spot; a layer that nobody names is that of a subspace of this site.

        Raises:
            SiteError: a site or block that the model does not have, one that has no vectors at
                positions, or a block that is not named.
            InputError: places that are not as many as the items.
        """
        parsed = Site.parse(site, model)
        if parsed.reads_attention:
            raise SiteError(f"{parsed} holds numbers per query and key: it has no subspaces")
        if layer is None and subspace is not None and subspace.site == str(parsed):
            layer = subspace.layer
        if layer is not None:
            layer = whole("layer", layer)
        elif parsed.n_layers is not None:
            raise SiteError(f"{parsed} is in every block: say which by layer=")
        (block,) = chosen_layers(parsed, layer)
        places = by_item(where, items)
        return Spot(model, parsed, block, where if places is None else places, places is not None)

    @property
    def name(self) -> str:
        """Of its hook point."""
        return self.site.hook_name(self.layer)

    def __str__(self) -> str:
        return f"{self.site}" if self.layer is None else f"{self.site} of block {self.layer}"

    def at(self, rows: Sequence[int]) -> Where:
        """The place of some items."""
        return [self.place[row] for row in rows] if self.is_by_item else self.place

    def edit(self, do: Do, rows: Sequence[int]) -> Edit:
        """An edit of it in a batch of some items."""
        return Edit(str(self.site), do, layer=self.layer, where=self.at(rows))

    @torch.no_grad()
    def run(self, inputs: AudioInputs) -> tuple[Float[Tensor, "b *t v"], Float[Tensor, "b ..."]]:
        """The logits of a run, and its activation.

        Raises:
            InputError: an activation that has no row for each prompt.
        """
        logits, cache = self.model.run_with_cache(
            inputs, names_filter=self.name, return_cache_object=False
        )
        states = cache[self.name]
        if len(states) != len(inputs):
            raise InputError(
                f"{self.name} has {len(states)} rows for {len(inputs)} prompts: clips are cut in "
                "pieces here, which cannot be told apart by prompt"
            )
        return logits, states


@dataclass(frozen=True)
class Exchange:
    """Two runs of one batch at a spot, of which one takes something from the other.

    Attributes:
        own: the activation of the run that is edited.
        other: of the run that it takes from.
        rows: which items they are.
    """

    spot: Spot
    own: Float[Tensor, "b ..."]
    other: Float[Tensor, "b ..."]
    rows: Sequence[int]

    def inside(self, subspace: Subspace) -> list[Edit]:
        """Take what lies in a subspace."""
        return [self.spot.edit(Swap(subspace.basis, self.other), self.rows)]

    def outside(self, subspace: Subspace) -> list[Edit]:
        """Take what lies outside of it."""
        news = self.other - self.own
        return self._put(self.own + news - subspace.part(news))

    def whole(self) -> list[Edit]:
        """Take all."""
        return self._put(self.other)

    def nothing(self, subspace: Subspace) -> list[Edit]:
        """Take what lies in a subspace from itself."""
        return [self.spot.edit(Swap(subspace.basis, self.own), self.rows)]

    def as_much(self, subspace: Subspace, like: Subspace) -> list[Edit]:
        """Take what lies in a subspace, as long at every position as in another one."""
        news = self.other - self.own
        part = subspace.part(news)
        wanted, there = (x.norm(dim=-1, keepdim=True) for x in (like.part(news), part))
        return self._put(self.own + part * (wanted / there.clamp(min=1e-30)))

    def _put(self, value: Tensor) -> list[Edit]:
        return [self.spot.edit(Put(value), self.rows)]


def check_width(subspace: Subspace, vectors: Any, spot: Spot) -> None:
    """Raise unless a subspace is of vectors as long as a spot has.

    Raises:
        InputError: naming both.
    """
    if len(subspace.basis) != vectors.shape[-1]:
        raise InputError(
            f"vectors of {spot} have {vectors.shape[-1]} entries, those of the subspace "
            f"{len(subspace.basis)}"
        )
