"""Which neurons an attack changes most."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from audio_lens.arguments import number
from audio_lens.edits.do import Do
from audio_lens.edits.edit import Edit
from audio_lens.errors import InputError
from audio_lens.items import Items, Pairs, collect
from audio_lens.items.collect import Place
from audio_lens.models import HookedAudioTransformer
from audio_lens.places import Where
from audio_lens.sites import Site, SiteError

SITE = "encoder.mlp.post"


@dataclass(frozen=True)
class Ranking:
    """Neurons by how much an attack changes them.

    Attributes:
        site: whose neurons.
        layers: the blocks.
        scores: of every neuron.
    """

    site: str
    layers: list[int]
    scores: Float[Tensor, "layers neurons"] = field(repr=False)

    def count(self, percent: float | int) -> int:
        """How many neurons a share of all is, one at least.

        Raises:
            InputError: no percentage.
        """
        number("percent", percent, above=0, most=100, unit="per cent")
        return max(1, round(self.scores.numel() * percent / 100))

    def top(self, percent: float | int) -> Bool[Tensor, "layers neurons"]:
        """The most changed ones of all blocks together."""
        chosen = self.scores.flatten().argsort(descending=True, stable=True)
        return self._mask(chosen[: self.count(percent)])

    def random(self, percent: float | int, seed: int = 0) -> Bool[Tensor, "layers neurons"]:
        """As many of all, drawn."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(self.scores.numel(), generator=generator)
        return self._mask(order[: self.count(percent)])

    def edits(self, chosen: Bool[Tensor, "layers neurons"], do: Do, where: Where) -> list[Edit]:
        """One edit of the chosen neurons in every block that has some."""
        return [
            Edit(
                self.site,
                do,
                layer=layer,
                neuron=None if own.all() else own.nonzero()[:, 0].tolist(),
                where=where,
            )
            for layer, own in zip(self.layers, chosen, strict=True)
            if own.any()
        ]

    def _mask(self, chosen: Tensor) -> Bool[Tensor, "layers neurons"]:
        mask = torch.zeros(self.scores.numel(), dtype=torch.bool)
        mask[chosen] = True
        return mask.reshape(self.scores.shape)


def rank(
    model: HookedAudioTransformer,
    pairs: Pairs[Items],
    site: str = SITE,
    *,
    where: Place = "all",
    layers: list[int] | None = None,
    size: int = 16,
    progress: bool | None = None,
) -> Ranking:
    """Neurons by how much their mean over a clip's positions differs between the sides of pairs.

    The mean of the absolute differences over the items. SPIRIT sums over positions, so that longer
    padding changes its ranking; here padding does not count, and clips of any length count alike.

    Args:
        model: the model.
        pairs: references and attacked items, such as ``attack.pairs``.
        site: with neurons: ``encoder.mlp.post``, ``decoder.mlp.post``, ``decoder.mlp.gate``.
        where: which positions, as in `items.collect`.
        layers: the blocks; None takes all.
        size: of the batches.
        progress: as in `patching.sweep`.

    Raises:
        SiteError: a site without neurons in blocks.
    """
    named = str(check_neurons(model, site))
    means = []
    for side in (pairs.clean, pairs.corrupted):
        acts = collect(
            model, side, named, where, "mean", layers=layers, size=size, progress=progress
        )
        means.append(torch.stack([acts.array(named, layer) for layer in acts.layers(named)]))
    if means[0].shape != means[1].shape:
        raise InputError("both sides give activations of one shape")
    scores = (means[1] - means[0]).double().abs().mean(1)
    return Ranking(named, acts.layers(named), scores)


def check_neurons(model: HookedAudioTransformer, site: str) -> Site:
    """The site, if it has neurons in blocks.

    Raises:
        SiteError: another one.
    """
    parsed = Site.parse(site, model)
    if parsed.unit != "neuron" or parsed.n_layers is None:
        raise SiteError(f"{parsed} has no neurons in blocks: take {SITE} or decoder.mlp.post")
    return parsed
