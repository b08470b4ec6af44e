"""Activations of many items, written down batch by batch: bounded in memory, and resumable."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from audio_lens.hooks import HookFn, HookPoint
from audio_lens.inputs import InputError
from audio_lens.items.activations import COLUMNS, Activations
from audio_lens.items.batches import Batch
from audio_lens.items.item import Item
from audio_lens.items.items import Items
from audio_lens.items.shards import ActivationsError, key_of, table_key
from audio_lens.items.store import Store
from audio_lens.models import HookedAudioTransformer
from audio_lens.places import Ground, Where
from audio_lens.progress import track
from audio_lens.provenance import of_model
from audio_lens.sites import Site, SiteError

SHARD_BYTES = 2**24  # a shard is written when it holds so much
Place = Where | Callable[[Item], Where]


@torch.no_grad()
def collect(
    model: HookedAudioTransformer,
    items: Items,
    sites: str | Sequence[str],
    where: Place = "audio",
    pool: str | None = None,
    to: str | Path | None = None,
    *,
    layers: Sequence[int] | None = None,
    size: int = 16,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: bool | None = None,
) -> Activations:
    """Activations of items at positions that hold something, padding never.

    What a batch gives is kept as it is computed and written down shard by shard, so that memory
    does not grow with the items. A run into a folder that was stopped goes on where it was: call
    it again with the same arguments. Nothing runs behind the last layer that is asked for.

    Args:
        model: the model.
        items: what it hears.
        sites: ``part.activation``, or several, as `patching.sweep` takes them.
        where: which positions, as `audio_lens.places` has them; where they differ by item, a
            function of it (``lambda item: item.words[1]``) or a list with one for each.
        pool: "mean" keeps the mean over an item's positions; None keeps every position.
        to: a folder to write to, made where it is missing; None keeps all in memory.
        layers: of all sites; None takes all. Negative ones count from the last.
        size: of batches; items of unequal layout are never in one.
        dtype: to keep them in; None keeps what the model computes.
        shard_bytes: how large a file grows, about.
        progress: show how far it is; None shows it in terminals and notebooks.

    Raises:
        SiteError: a site or layer that is not there, or attention of every position to every one.
        InputError: a place that selects nothing in some item.
        ItemError: an item that cannot be prepared.
        ActivationsError: a folder that holds something else, or activations of other items, sites
            or weights.
        OutputError: a folder that cannot be written.
        ValueError: another ``pool``, or places that are not as many as the items.
    """
    if pool not in (None, "mean"):
        raise InputError(f"pool is 'mean' or None, got {pool!r}")
    asked = Asked.of(model, [sites] if isinstance(sites, str) else sites, layers, pool, dtype)
    places = by_item(where, items)
    index = {
        "sites": asked.written,
        "where": told_of_place(where if places is None else places),
        "pool": pool or "none",
        "dtype": str(dtype or model.dtype).removeprefix("torch."),
        "items": [item.told() for item in items],
        "meta": of_model(model) | {"items_hash": items.digest()},
    }
    store = Store.open(index, None if to is None else Path(to), shard_bytes)
    left = [row for row in range(len(items)) if row not in store.done]
    with track("collecting", len(left), "items", show=progress) as advance:
        for batch in items[left].batches(model, size) if left else ():
            rows = [left[row] for row in batch.rows]
            here = where if places is None else [places[row] for row in rows]
            with _named([items[row] for row in rows]):
                kept = asked.of_batch(model, batch, rows, here)
            store.add(rows, kept)
            advance(len(rows), len(store.done))
    return store.finished()


@contextmanager
def _named(items: Sequence[Item]) -> Iterator[None]:
    """Say which items the prompts are that an error speaks of."""
    try:
        yield
    except InputError as error:
        names = ", ".join(repr(item.id) for item in items)
        raise InputError(f"{error} (the prompts are the items {names})") from error


@dataclass(frozen=True)
class Asked:
    """What is kept of every batch.

    Attributes:
        sites: with the layers of each; None for what lies outside the blocks.
        pool: "mean", or None.
        dtype: to keep it in; None is the model's.
    """

    sites: tuple[tuple[Site, tuple[int | None, ...]], ...]
    pool: str | None
    dtype: torch.dtype | None

    @staticmethod
    def of(
        model: HookedAudioTransformer,
        sites: Sequence[str],
        layers: Sequence[int] | None,
        pool: str | None,
        dtype: torch.dtype | None,
    ) -> Asked:
        parsed = [Site.parse(site, model) for site in sites]
        if not parsed or len(set(parsed)) < len(parsed):
            raise SiteError(f"name one site or more, each once, got {list(sites)}")
        if pairs := [site for site in parsed if site.reads_attention]:
            raise SiteError(
                f"{pairs[0]} is as wide as a batch has positions: collect what it is made of "
                "(attn.q, attn.k), or take it from run_with_cache"
            )
        return Asked(tuple((site, _layers(site, layers)) for site in parsed), pool, dtype)

    @property
    def written(self) -> dict[str, Any]:
        """The sites for the index."""
        return {
            str(site): {"layers": list(layers), "positions_of": site.positions_of}
            for site, layers in self.sites
        }

    def of_batch(
        self, model: HookedAudioTransformer, batch: Batch, rows: Sequence[int], where: Where
    ) -> dict[str, Tensor]:
        """What a batch gives: the columns of the table, and the activations."""
        grounds = {
            part: Chosen.of(Ground.of(model, batch.inputs, part), where, rows)
            for part in dict.fromkeys(site.positions_of for site, _ in self.sites)
        }
        kept: dict[str, Tensor] = {}
        for part, chosen in grounds.items():
            columns = chosen.pooled_table() if self.pool else chosen.table()
            kept |= {table_key(part, name): columns[name] for name in COLUMNS}
        hooks = [
            (site.hook_name(layer), self._keeper(key_of(str(site), layer), site, grounds, kept))
            for site, layers in self.sites
            for layer in layers
        ]
        with model.hooks(fwd_hooks=hooks):
            model(batch.inputs, stop_at_layer=self._stop(model), return_type=None)
        return kept

    def _keeper(
        self, key: str, site: Site, grounds: dict[str, Chosen], kept: dict[str, Tensor]
    ) -> HookFn:
        """A hook that keeps what is asked for of an activation, and nothing else of it."""
        chosen = grounds[site.positions_of]

        def keep(tensor: Tensor, hook: HookPoint) -> None:
            x = tensor.detach().movedim(site.position_dim, 1)
            if x.shape[:2] != chosen.mask.shape or key in kept:
                raise ActivationsError(
                    f"{site} is {list(x.shape)} here, and its positions {list(chosen.mask.shape)}"
                )
            found = x[chosen.mask.to(x.device)]
            found = chosen.mean(found) if self.pool else found
            kept[key] = found.to("cpu", self.dtype)

        keep.only_reads = True
        return keep

    def _stop(self, model: HookedAudioTransformer) -> int | str | None:
        """The block before which the model may stop."""
        cfg, parts = model.cfg, {site.part for site, _ in self.sites}
        if parts == {"encoder"} and self._behind("encoder") < cfg.need_encoder.n_layers:
            return f"encoder.{self._behind('encoder')}"
        if cfg.decoder is None or not parts <= {*cfg.is_heard_in, "connector", "decoder"}:
            return None
        behind = self._behind("decoder")  # 0 where nothing of it is asked for
        return behind if behind < cfg.decoder.n_layers else None

    def _behind(self, part: str) -> int:
        """The first block of a part behind all that are asked for."""
        own = [layers for site, layers in self.sites if site.part == part]
        return max(
            (layer + 1 for layers in own for layer in layers if layer is not None), default=0
        )


def _layers(site: Site, layers: Sequence[int] | None) -> tuple[int | None, ...]:
    """The layers of a site that are asked for, in order."""
    if site.n_layers is None:
        if layers is not None:
            raise SiteError(f"{site} lies outside the blocks: it has no layers to choose from")
        return (None,)
    there = range(site.n_layers)
    if layers is None:
        return tuple(there)
    odd = [layer for layer in layers if not -site.n_layers <= layer < site.n_layers]
    if odd or not layers:
        raise SiteError(f"{site} has layers 0 to {site.n_layers - 1}, not {odd or 'none'}")
    return tuple(sorted({there[layer] for layer in layers}))


# -------------------------------------------------------------------------------- positions


@dataclass(frozen=True)
class Chosen:
    """The positions of a part that are kept of a batch.

    Attributes:
        ground: the part in this batch.
        mask: which positions.
        items: the number of the item of each.
        segments: which segment of its item each lies in.
        order: for each the place of its item in the batch.
        rows: the numbers of the items of the batch.
    """

    ground: Ground
    mask: Bool[Tensor, "b t"]
    items: Int[Tensor, " n"]
    segments: Int[Tensor, " n"]
    order: Int[Tensor, " n"]
    rows: Int[Tensor, " items"] = field(repr=False)

    @staticmethod
    def of(ground: Ground, where: Where, rows: Sequence[int]) -> Chosen:
        mask = ground.held(where)
        entry = mask.nonzero()[:, 0]
        prompts = torch.tensor(ground.prompts)
        first = torch.tensor([ground.prompts.index(prompt) for prompt in ground.prompts])
        numbers, order = torch.tensor(list(rows)), prompts[entry]
        segments = entry - first[entry]
        return Chosen(ground, mask, numbers[order], segments, order, numbers)

    def table(self) -> dict[str, Tensor]:
        """The columns, a row for every position."""
        return {
            "item": self.items,
            "row": self.segments,
            "position": self.mask.nonzero()[:, 1],
            "second": self._seconds(),
        }

    def pooled_table(self) -> dict[str, Tensor]:
        """The columns, a row for every item."""
        seconds = self._seconds()
        known = seconds.isfinite()
        counts = torch.zeros(len(self.rows)).double().index_add(0, self.order, known.double())
        sums = torch.zeros(len(self.rows)).double()
        sums = sums.index_add(0, self.order, seconds.masked_fill(~known, 0))
        nothing = torch.zeros_like(self.rows)
        return {
            "item": self.rows,
            "row": nothing,
            "position": nothing - 1,
            "second": sums / counts,
        }

    def _seconds(self) -> Tensor:
        return torch.stack([track.seconds for track in self.ground.tracks])[self.mask]

    def mean(self, found: Shaped[Tensor, " n *shape"]) -> Shaped[Tensor, " items *shape"]:
        """The mean over each item's positions, summed in float32 at least."""
        wide = found.to(torch.promote_types(found.dtype, torch.float32))
        order = self.order.to(wide.device)
        sums = wide.new_zeros(len(self.rows), *wide.shape[1:]).index_add(0, order, wide)
        counts = torch.bincount(order, minlength=len(self.rows)).to(wide)
        return (sums / counts.reshape(-1, *[1] * (sums.ndim - 1))).to(found.dtype)


def by_item(where: Place, items: Items) -> list[Where] | None:
    """One place for each item, where they differ by item; None where one serves all.

    Raises:
        InputError: a list of places of another length.
    """
    if callable(where):
        return [where(item) for item in items]
    if not isinstance(where, list) or all(type(one) is int for one in where):
        return None
    if len(where) != len(items):
        raise InputError(f"{len(items)} items need one place, or as many, got {len(where)}")
    return where


def told_of_place(where: Where) -> str:
    """A place as the index holds it: what another place would not say."""
    if isinstance(where, list) and len(where) > 3:
        told = "".join(map(told_of_place, where))
        return f"{len(where)} places, sha256 {hashlib.sha256(told.encode()).hexdigest()[:16]}"
    if isinstance(where, Tensor):
        held = where.cpu().contiguous().numpy().tobytes()
        return f"mask {list(where.shape)}, sha256 {hashlib.sha256(held).hexdigest()[:16]}"
    return repr(where)
