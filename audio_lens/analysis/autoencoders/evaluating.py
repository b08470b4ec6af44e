"""How well an autoencoder stands for activations: what is lost, how many latents, how many dead."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from audio_lens.analysis.autoencoders.autoencoder import Autoencoder
from audio_lens.analysis.autoencoders.rows import Given, Source, finite
from audio_lens.errors import InputError
from audio_lens.items import Activations, found_by_name
from audio_lens.items.activations import COLUMNS, Piece
from audio_lens.results import Result

BLOCKS = 100  # of a plain tensor's rows, which stand for items


@dataclass(frozen=True)
class Sums:
    """What is added up over the rows of every item.

    Attributes:
        names: of the items.
        rows: how many each has.
        lost: squared lengths of what is not reconstructed.
        active: latents that were active.
        total, first: sums of squared lengths and of vectors.
        fired: of each latent, in how many rows it was active.
    """

    names: list[str]
    rows: Int[Tensor, " n"]
    lost: Float[Tensor, " n"]
    active: Float[Tensor, " n"]
    total: Float[Tensor, " n"]
    first: Float[Tensor, "n d"]
    fired: Int[Tensor, " m"]

    @property
    def spread(self) -> Float[Tensor, " n"]:
        """Squared distances from the mean of all rows."""
        mean = self.first.sum(0) / self.rows.sum()
        return self.total - 2 * self.first @ mean + self.rows * mean.square().sum()


def evaluate(
    autoencoder: Autoencoder,
    activations: Given,
    *,
    site: str | None = None,
    layer: int | None = None,
    by: str | None = None,
    seed: int = 0,
) -> Result:
    """What an autoencoder loses of activations, and how many latents it takes.

    "fvu" is the share of the variance that is not reconstructed: squared lengths of the errors over
    squared distances from the mean of all rows; "l0" is how many latents are active in a row. The
    estimates are ratios of sums over items. ``meta["dead"]`` is the share of latents that no row
    has: of few rows that says little. Evaluate on other clips than were trained on.

    Args:
        autoencoder: the autoencoder.
        activations: `Activations`, or ``n d``, whose rows then stand in a hundred blocks.
        site, layer: of `Activations`; None takes those of the autoencoder where they were
            collected, else the first and its only layer.
        by: a label whose values are drawn in place of items, such as "group".
        seed: of the interval.

    Raises:
        InputError: vectors of another length, or activations that do not vary.
        ActivationsError: a site or layer that was not collected.
    """
    held = sums(autoencoder, activations, site, layer)
    spread = held.spread
    if not spread.sum() > 0:
        raise InputError("these activations do not vary: no share of their variance is lost")
    groups = None
    if by is not None:
        if not isinstance(activations, Activations):
            raise InputError("rows of a plain tensor have no labels to draw by")
        known = {item["id"]: {**item, **item.get("labels", {})} for item in activations.items}
        groups = [known[name].get(by) for name in held.names]
        if None in groups:
            raise InputError(f"some items have no {by!r} to draw by")
    over = torch.stack([held.lost, held.active], dim=1)
    under = torch.stack([spread, held.rows.double()], dim=1)
    result = found_by_name(
        over,
        {"metric": ["fvu", "l0"]},
        held.names,
        groups=groups,
        by=by,
        denominators=under,
        seed=seed,
    )
    dead = (held.fired == 0).double().mean().item()
    result.meta |= _told(autoencoder) | {"dead": f"{dead:.6g}", "rows": str(int(held.rows.sum()))}
    fvu, l0 = result.mean().values.tolist()
    result.report = [
        f"{autoencoder.width} latents of kind {autoencoder.kind} lose {fvu:.3g} of the variance of "
        f"{int(held.rows.sum())} rows, with {l0:.3g} of them active; {dead:.3g} of them never are."
    ]
    return result


def _told(autoencoder: Autoencoder) -> dict[str, str]:
    own = {name: getattr(autoencoder, name) for name in ("kind", "k", "width", "site", "layer")}
    return {name: str(value) for name, value in own.items() if value is not None}


def chosen(
    autoencoder: Autoencoder, given: Given, site: str | None, layer: int | None
) -> tuple[str | None, int | None]:
    """Site and layer of activations: as asked, or else the autoencoder's own, if collected."""
    if not isinstance(given, Activations):
        return site, layer
    if site is None and autoencoder.site in given.sites:
        site = autoencoder.site
        if layer is None and autoencoder.layer in given.layers(site):
            layer = autoencoder.layer
    return site, layer


@dataclass(frozen=True)
class Block:
    """Some rows that lie together, and their latents.

    Attributes:
        piece: where they lie.
        there: which of the rows of the piece they are; None for all.
        items: the number of every row's item; of a plain tensor, that of its row.
    """

    piece: Piece
    there: Bool[Tensor, " all"] | None
    items: Int[Tensor, " n"]
    rows: Float[Tensor, "n d"]
    latents: Float[Tensor, "n m"]

    def column(self, name: str) -> Tensor:
        """A column of the table of activations, of these rows."""
        key = f"{self.piece.item.removesuffix(COLUMNS[0])}{name}"
        held = self.piece.shard.part(key, self.piece.start, self.piece.stop)
        return held if self.there is None else held[self.there]


def encoded(
    autoencoder: Autoencoder, given: Given, site: str | None = None, layer: int | None = None
) -> Iterator[Block]:
    """Rows and their latents, some at a time, in the order in which they lie on disk."""
    site, layer = chosen(autoencoder, given, site, layer)
    source = Source.of(given, site, layer)
    if source.d != autoencoder.d:
        raise InputError(f"vectors have {source.d} entries, the autoencoder's {autoencoder.d}")
    for piece in source.pieces:
        rows, there = finite(piece.read()), None
        items = torch.arange(piece.start, piece.stop)
        if isinstance(given, Activations):
            items = piece.items()
            if piece.kept is not None:
                there = torch.isin(items, torch.tensor(sorted(piece.kept)))
                items = items[there]
        if len(rows):
            with torch.no_grad():
                latents = autoencoder.encode(rows)
            yield Block(piece, there, items.cpu(), rows, latents)


def sums(
    autoencoder: Autoencoder, given: Given, site: str | None = None, layer: int | None = None
) -> Sums:
    """What is added up over rows, item by item, in one pass."""
    each = 1
    if isinstance(given, Activations):
        names = [str(item["id"]) for item in given.index["items"]]
    else:
        each = -(-len(given) // BLOCKS)
        names = [f"block {i}" for i in range(-(-len(given) // each))]
    n, d = len(names), autoencoder.d
    scalars = torch.zeros(4, n, dtype=torch.float64)  # rows, lost, active, total
    first = torch.zeros(n, d, dtype=torch.float64)
    fired = torch.zeros(autoencoder.width, dtype=torch.long)
    for block in encoded(autoencoder, given, site, layer):
        rows, latents, wide = block.rows, block.latents, block.rows.double().cpu()
        items = block.items if isinstance(given, Activations) else block.items // each
        lost = (rows - autoencoder.decode(latents)).double().square().sum(1).cpu()
        active = (latents > 0).sum(1).double().cpu()
        told = torch.stack([torch.ones_like(lost), lost, active, wide.square().sum(1)])
        scalars.index_add_(1, items, told)
        first.index_add_(0, items, wide)
        fired += (latents > 0).sum(0).cpu()
    there = scalars[0] > 0
    kept = [name for name, is_there in zip(names, there.tolist(), strict=True) if is_there]
    rows, lost, active, total = scalars[:, there]
    return Sums(kept, rows.long(), lost, active, total, first[there], fired)
