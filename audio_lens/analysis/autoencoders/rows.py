"""Rows of activations: which they are, in pieces, and in random order from all clips at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens.digests import of_tensor
from audio_lens.errors import InputError
from audio_lens.items import Activations
from audio_lens.items.activations import PIECE, Piece
from audio_lens.items.shards import HeldShard

Given = Activations | Tensor
POOL_BYTES = 2**26  # of rows in memory, from which batches are drawn


@dataclass(frozen=True)
class Source:
    """Rows of one site at one layer.

    Attributes:
        pieces: of them, each read when it is needed.
        d: how long they are.
        site, layer: what they are of; None of a plain tensor.
        origin: what tells these rows from others.
    """

    pieces: list[Piece] = field(repr=False)
    d: int
    site: str | None
    layer: int | None
    origin: dict[str, str]

    @staticmethod
    def of(given: Given, site: str | None = None, layer: int | None = None) -> Source:
        """Rows of `Activations` at a site and layer, or of a plain tensor ``n d``.

        Raises:
            InputError: a tensor of another shape, a site of heads, or no rows.
            ActivationsError: a site or layer that was not collected, or several of them.
        """
        if not isinstance(given, Activations):
            if site is not None or layer is not None:
                raise InputError("a plain tensor has no sites and layers to choose")
            return Source._of_tensor(given)
        site = given.sites[0] if site is None else site
        known = given.layers(site)
        if layer is None and len(known) > 1:
            raise InputError(f"several layers of {site} were collected, {known}: name one, layer=")
        layer = layer if layer is not None or not known else known[0]
        layer = layer + 1 + max(known) if layer is not None and layer < 0 else layer
        pieces = given.pieces(site, layer)
        shape = pieces[0].shard.part(pieces[0].key, 0, 1).shape if pieces else ()
        if len(shape) != 2:
            raise InputError(f"{site} has no rows of vectors: name a site without heads")
        kept = [str(item["id"]) for item in given.items]
        told = {name: str(given.meta.get(name, "")) for name in ("model", "weights_hash")}
        told |= {"items_hash": str(given.meta.get("items_hash", "")), "items": str(len(kept))}
        told |= {"site": f"{site} {layer}", "where": str(given.index.get("where", ""))}
        return Source(pieces, shape[1], site, layer, told)

    @staticmethod
    def _of_tensor(given: Any) -> Source:
        if not isinstance(given, Tensor) or given.ndim != 2 or not given.numel():
            what = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise InputError(f"activations are `Activations` or a tensor n d, got {what}")
        shard = HeldShard({"": given.detach()})
        starts = range(0, len(given), PIECE)
        pieces = [Piece(shard, "", "", at, min(at + PIECE, len(given))) for at in starts]
        return Source(pieces, given.shape[1], None, None, {"rows": of_tensor(given)})


def finite(rows: Tensor) -> Float[Tensor, "n d"]:
    """Rows in float32.

    Raises:
        InputError: NaN or infinite numbers.
    """
    wide = rows.detach().float()
    if not bool(wide.isfinite().all()):
        raise InputError("activations hold NaN or infinite numbers")
    return wide


def _together(pieces: Sequence[Piece], d: int) -> Float[Tensor, "n d"]:
    """The rows of some pieces, read one by one into the place that they have in the end."""
    first = pieces[0].read()
    rows = torch.empty(sum(one.stop - one.start for one in pieces), d, device=first.device)
    count = 0
    for number, piece in enumerate(pieces):
        held = finite(piece.read() if number else first)
        rows[count : count + len(held)] = held
        count += len(held)
    return rows[:count]


@dataclass
class Stream:
    """Rows in random order, epoch after epoch, in bounded memory.

    Every epoch puts the pieces of all clips in another order, holds as many of them as fit, and
    gives their rows in random order, each once. Where it stands is three numbers, from which it
    goes on.

    Attributes:
        pool_bytes: how many bytes of rows are held.
        epoch, pool, offset: which epoch, which of its pools, how many rows of that were given.
    """

    source: Source
    seed: int
    pool_bytes: int = POOL_BYTES
    epoch: int = 0
    pool: int = 0
    offset: int = 0
    _rows: Tensor | None = field(default=None, repr=False)
    _order: Tensor | None = field(default=None, repr=False)

    @property
    def n_pools(self) -> int:
        """How many pools an epoch has."""
        return -(-len(self.source.pieces) // self._each)

    @property
    def _each(self) -> int:
        return max(1, self.pool_bytes // (4 * self.source.d * PIECE))

    def next(self, count: int) -> Float[Tensor, "count d"]:
        """The next rows."""
        found, lacking, empty = [], count, 0
        while lacking:
            rows, order = self._pool()
            part = order[self.offset : self.offset + lacking]
            found.append(rows[part])
            self.offset += len(part)
            lacking -= len(part)
            empty = 0 if len(order) else empty + 1
            if empty > self.n_pools:
                raise InputError("these activations have no rows")
            if self.offset >= len(order):
                self._turn()
        return torch.cat(found) if len(found) > 1 else found[0]

    def peek(self) -> Float[Tensor, "n d"]:
        """The rows that are held now: some of all clips."""
        return self._pool()[0]

    def _turn(self) -> None:
        self.offset, self.pool, self._order = 0, self.pool + 1, None
        if self.n_pools > 1:
            self._rows = None
        if self.pool == self.n_pools:
            self.pool, self.epoch = 0, self.epoch + 1

    def _pool(self) -> tuple[Tensor, Tensor]:
        if self._rows is None:
            draw = np.random.default_rng((self.seed, self.epoch))
            order = draw.permutation(len(self.source.pieces)) if self.n_pools > 1 else None
            pieces = self.source.pieces
            at = range(self.pool * self._each, min((self.pool + 1) * self._each, len(pieces)))
            chosen = [pieces[i if order is None else order[i]] for i in at]
            self._rows = _together(chosen, self.source.d)
        if self._order is None:
            draw = np.random.default_rng((self.seed, self.epoch, self.pool))
            self._order = torch.as_tensor(draw.permutation(len(self._rows)))
            self._order = self._order.to(self._rows.device)
        return self._rows, self._order
