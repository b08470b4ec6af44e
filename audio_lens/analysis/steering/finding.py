"""Directions from two kinds of items: means, probes, probes of heads, columns of a dictionary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from audio_lens.analysis import probes
from audio_lens.analysis.steering.directions import Direction, meta_of
from audio_lens.arguments import whole
from audio_lens.edits.do import Dictionary
from audio_lens.errors import InputError
from audio_lens.items import Activations, Item, Items, collect
from audio_lens.items.collect import Place
from audio_lens.models import HookedAudioTransformer
from audio_lens.places import described
from audio_lens.sites import Site

MEANS, PROBE, MASS_MEAN, HEAD_PROBE, COLUMN = KINDS = (
    *("means", "probe", "mass_mean", "head_probe", "column"),
)
SIDE = "side of the contrast"  # the label that tells a from b
_PROBES = {PROBE: "logistic", HEAD_PROBE: "logistic", MASS_MEAN: "mass_mean"}


def direction(
    model: HookedAudioTransformer,
    a: Items,
    b: Items,
    site: str,
    *,
    layer: int | None = None,
    where: Place = "all",
    kind: str = MEANS,
    dictionary: Any = None,
    column: int | None = None,
    size: int = 16,
    progress: bool | None = None,
) -> Direction:
    """The direction from items b to items a in one layer of a site; see `directions`.

    Args:
        layer: the block; may be left out of sites that lie outside the blocks.

    Raises:
        As `directions`; SiteError for a layer that the site does not have.
    """
    if layer is None and Site.parse(site, model).n_layers is not None:
        raise InputError(f"{site} is in every block: say which by layer=, or take directions()")
    (found,) = directions(
        *(model, a, b, site),
        layers=None if layer is None else [whole("layer", layer)],
        where=where,
        kind=kind,
        dictionary=dictionary,
        column=column,
        size=size,
        progress=progress,
    )
    return found


def directions(
    model: HookedAudioTransformer,
    a: Items,
    b: Items,
    site: str,
    *,
    layers: Sequence[int] | None = None,
    where: Place = "all",
    kind: str = MEANS,
    dictionary: Any = None,
    column: int | None = None,
    size: int = 16,
    progress: bool | None = None,
) -> list[Direction]:
    """The direction from items b to items a in every layer of a site, from one run of each item.

    - "means": from the mean of b to that of a, each item its mean over the place.
    - "probe": the weights of a logistic regression, "mass_mean": the difference of means times the
      inverse of the common covariance; both as long as the means are apart along them.
    - "head_probe": of a site of heads (``attn.z``): a logistic regression in each head, weighed by
      how far above chance it tells other items' sides (2404.02252; the weights are our reading).
    - "column": the latent of a dictionary that differs most between a and b, by how far its mean
      differs; what decoding makes of that.

    A probe reads better than it writes: the layer and kind that read best need not steer best.

    Args:
        model: the model.
        a, b: items of either kind, such as the same clips under two instructions.
        site: ``part.activation``.
        layers: which blocks; None takes all.
        where: the places that are averaged: "last" for what is about to be answered. Places that
            differ by item are a function of it.
        kind: see above.
        dictionary: of "column": an autoencoder of this site and layer, which has ``encode`` and
            ``decode``.
        column: which latent; None takes the one that differs most.
        size, progress: as in `collect`.

    Raises:
        InputError: another kind, the same items on both sides, places in a list, a site of heads
            where the kind takes vectors or the other way round, several layers for one dictionary,
            a dictionary that is none or is not asked for, heads that tell nothing.
        SiteError: a site or layer that is not there.
        ExtraError: probes without scikit-learn (extra ``probe``).
    """
    _check(kind, where, dictionary, column)
    parsed = Site.parse(site, model)
    if (kind == HEAD_PROBE) != (parsed.unit == "head" and not parsed.reads_attention):
        what = "a site of heads, such as attn.z" if kind == HEAD_PROBE else "a site without heads"
        raise InputError(f"kind {kind!r} takes {what}, not {parsed}")
    if a.digest() == b.digest():
        raise InputError("a and b are the same items: there is no direction between them")
    sides = Items([*_named(a, "a"), *_named(b, "b")])
    pool = None if kind == COLUMN else "mean"
    acts = collect(
        *(model, sides, str(parsed), where, pool),
        layers=layers,
        size=size,
        progress=progress,
    )
    there = acts.layers() or [None]
    if kind == COLUMN and len(there) > 1:
        raise InputError("a dictionary is of one layer: say which by layers=[n] (layer=)")
    told = {
        "model": acts.meta.get("model"),
        "weights_hash": acts.meta.get("weights_hash"),
        "a": f"{len(a)} items, {a.digest()}",
        "b": f"{len(b)} items, {b.digest()}",
        "where": "a function of the item" if callable(where) else described(where),
    }
    return [_Rows.of(acts, layer).direction(kind, dictionary, column, told) for layer in there]


def _check(kind: str, where: Any, dictionary: Any, column: int | None) -> None:
    if kind not in KINDS:
        raise InputError(f"kind is one of {', '.join(KINDS)}, got {kind!r}")
    if isinstance(where, list) and not all(isinstance(one, int) for one in where):
        raise InputError("places that differ by item are a function of it here, not a list")
    if kind == COLUMN and not isinstance(dictionary, Dictionary):
        raise InputError("kind 'column' needs dictionary=, which has encode and decode")
    if kind != COLUMN and (dictionary is not None or column is not None):
        raise InputError(f"dictionary= and column= are for kind 'column', not for {kind!r}")


def _named(items: Items, side: str) -> list[Item]:
    """Items with their side; clips of one name, or one group, belong together in both."""
    return [
        item.replaced(
            id=f"{side}: {item.id}",
            group=item.id if item.group is None else item.group,
            labels={**item.labels, SIDE: side},
        )
        for item in items
    ]


@dataclass(frozen=True)
class _Rows:
    """The rows of one layer."""

    acts: Activations
    layer: int | None
    x: Float[Tensor, "n *heads d"]
    is_a: Bool[Tensor, " n"]
    item: Any

    @staticmethod
    def of(acts: Activations, layer: int | None) -> _Rows:
        is_a = torch.tensor([one == "a" for one in acts.values(SIDE)])
        x = acts.array(layer=layer).double()
        if not x.isfinite().all():
            raise InputError("activations hold NaN or infinite numbers")
        return _Rows(acts, layer, x, is_a, torch.as_tensor(acts.table()["item"].copy()))

    def mean(self, side: bool, x: Tensor | None = None) -> Tensor:
        """The mean of a side; every item counts the same."""
        held, numbers = (self.x if x is None else x), self.item
        count = torch.bincount(numbers)[numbers].double()
        weights = (self.is_a == side).double() / count
        return torch.einsum("n,n...->...", weights / weights.sum(), held.double())

    def direction(
        self, kind: str, dictionary: Any, column: int | None, told: dict[str, Any]
    ) -> Direction:
        start, end = self.mean(False), self.mean(True)
        if kind == MEANS:
            vector = end - start
        elif kind == COLUMN:
            vector, number = self._column(dictionary, column)
            told = told | {"column": number}
        elif kind == HEAD_PROBE:
            vector = self._of_heads(end - start)
        else:
            vector = _along(self._weights(kind, self.x), end - start)
        if not vector.norm() > 0:
            raise InputError(
                f"items a and b do not differ in {self.acts.sites[0]} at {told['where']}: there is "
                "no direction"
            )
        held = (one.float().contiguous() for one in (vector, start, end))
        vector, start, end = held
        return Direction(vector, self.acts.sites[0], self.layer, kind, start, end, meta_of(told))

    def _weights(self, kind: str, x: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
        try:
            return probes.direction(x, self.is_a.tolist(), True, kind=_PROBES[kind]).double()
        except np.linalg.LinAlgError as error:
            raise InputError(
                f"items of one side are all alike in {self.acts.sites[0]}: kind {kind!r} needs "
                "some that differ"
            ) from error

    def _of_heads(self, apart: Float[Tensor, "heads d"]) -> Float[Tensor, "heads d"]:
        """What each head's probe tells, as often as it is right above chance."""
        found = probes.probe(
            self.acts, SIDE, layers=_some(self.layer), control=False, progress=False
        )
        right = found.mean().values.flatten()
        share = (2 * right - 1).clamp(min=0)
        if not bool((share > 0).any()):
            raise InputError("no head tells a from b better than chance: there is no direction")
        vectors = [
            _along(self._weights(HEAD_PROBE, self.x[:, head]), apart[head])
            for head in range(len(apart))
        ]
        return share[:, None] * torch.stack(vectors)

    def _column(self, dictionary: Any, column: int | None) -> tuple[Float[Tensor, " d"], int]:
        """What decoding makes of the difference of one latent."""
        with torch.no_grad():
            latents = dictionary.encode(self.x.float())
            middle = (self.mean(True, latents) + self.mean(False, latents)).float() / 2
            apart = (self.mean(True, latents) - self.mean(False, latents)).float()
            number = self._most(dictionary, middle, apart) if column is None else column
            whole("column", number, least=0, most=len(apart) - 1)
            moved = middle.clone()
            moved[number] += apart[number]
            vector = dictionary.decode(moved[None])[0] - dictionary.decode(middle[None])[0]
        return vector.double(), number

    @staticmethod
    def _most(dictionary: Any, middle: Tensor, apart: Tensor) -> int:
        """The latent whose difference, decoded, is longest; of those that differ most."""
        likely = apart.abs().topk(min(64, len(apart))).indices
        moved = middle.repeat(len(likely), 1)
        moved[torch.arange(len(likely)), likely] += apart[likely]
        news = dictionary.decode(moved) - dictionary.decode(middle[None])
        return int(likely[news.norm(dim=-1).argmax()])


def _some(layer: int | None) -> list[int] | None:
    return None if layer is None else [layer]


def _along(weights: Float[Tensor, " d"], apart: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """The part of a difference that lies along some weights."""
    unit = weights / weights.norm().clamp(min=1e-300)
    return unit * (apart @ unit)
