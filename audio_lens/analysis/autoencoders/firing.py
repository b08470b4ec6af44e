"""When latents are active: the moments and clips that excite them most, and their course."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens.analysis.autoencoders.autoencoder import Autoencoder
from audio_lens.analysis.autoencoders.evaluating import chosen, encoded
from audio_lens.arguments import number, whole
from audio_lens.errors import InputError
from audio_lens.items import Activations, ItemError
from audio_lens.items.activations import COLUMNS
from audio_lens.results import Result
from audio_lens.timeline import Span

APART_S = 0.1  # seconds between two firings of a clip that count as two
STEP_S = 0.02  # of a position, where a clip has one alone


@dataclass(frozen=True)
class Firing:
    """A moment at which a latent is active.

    Attributes:
        item: the name of the item.
        row: which segment of it.
        position: in the part.
        second: in the clip; NaN for text.
        value: of the latent.
    """

    item: str
    row: int
    position: int
    second: float
    value: float


def firings(
    autoencoder: Autoencoder,
    activations: Activations,
    latents: Any,
    *,
    most: int = 20,
    apart_s: float | int = APART_S,
    site: str | None = None,
    layer: int | None = None,
) -> dict[int, list[Firing]]:
    """The moments at which each of some latents is strongest, the strongest first.

    Positions of one clip that lie closer than ``apart_s`` seconds count once, where the latent is
    strongest. Latents that are never active have none.

    Args:
        autoencoder: the autoencoder.
        activations: of clips, with every position (no pooled ones).
        latents: their numbers.
        most: how many of each.
        apart_s: see above.
        site, layer: None takes the autoencoder's own.

    Raises:
        InputError: latents that are not there, or pooled activations.
        ActivationsError: a site or layer that was not collected.
    """
    wanted = autoencoder.of(latents)
    whole("most", most, least=1)
    number("apart_s", apart_s, least=0, unit="seconds")
    held = _active(autoencoder, activations, wanted, site, layer)
    names = [str(item["id"]) for item in activations.index["items"]]
    found: dict[int, list[Firing]] = {}
    for place, latent in enumerate(wanted):
        rows = held[place]
        order = rows[:, -1].argsort(descending=True, stable=True).tolist()
        kept: list[tuple[int, float, float]] = []  # item, row, second
        found[latent] = []
        for at in order:
            item, row, position, second, value = rows[at].tolist()
            near = any(i == item and r == row and abs(s - second) < apart_s for i, r, s in kept)
            if near:
                continue
            kept.append((item, row, second))
            found[latent].append(Firing(names[int(item)], int(row), int(position), second, value))
            if len(kept) == most:
                break
    return found


def _active(
    autoencoder: Autoencoder,
    activations: Activations,
    wanted: Sequence[int],
    site: str | None,
    layer: int | None,
) -> list[Float[Tensor, "n 5"]]:
    """Of each latent the rows where it is active: the columns of the table, and its value."""
    if activations.index.get("pool", "none") != "none":
        raise InputError("moments are of every position: collect without pool=")
    parts: list[list[Tensor]] = [[] for _ in wanted]
    for block in encoded(autoencoder, activations, site, layer):
        table = torch.stack([block.column(name).double() for name in COLUMNS], dim=1)
        own = block.latents[:, wanted].double().cpu()
        for place, values in enumerate(own.unbind(1)):
            at = values > 0
            parts[place].append(torch.cat([table[at], values[at, None]], dim=1))
    return [torch.cat(held) for held in parts]


def clips(
    autoencoder: Autoencoder,
    activations: Activations,
    latents: Any,
    *,
    most: int = 10,
    by: str = "peak",
    site: str | None = None,
    layer: int | None = None,
) -> dict[int, list[tuple[str, float]]]:
    """The clips that excite each of some latents most, with their scores, the highest first.

    Args:
        autoencoder, activations, latents, site, layer: as of `firings`.
        most: how many clips of each.
        by: "peak", the largest value in the clip; "mean", the mean over its positions, standardised
            over the clips, plus the share of positions at which the latent is active (after AR&D,
            2602.22253): what goes on all through a clip, in place of what happens once.

    Raises:
        InputError: latents that are not there, another ``by``, or pooled activations.
    """
    wanted = autoencoder.of(latents)
    whole("most", most, least=1)
    if by not in ("peak", "mean"):
        raise InputError(f"by is 'peak' or 'mean', got {by!r}")
    if by == "peak":
        found = {}
        for latent, moments in firings(
            autoencoder, activations, wanted, most=1_000_000, apart_s=0, site=site, layer=layer
        ).items():
            best: dict[str, float] = {}
            for one in moments:
                best.setdefault(one.item, one.value)
            found[latent] = list(best.items())[:most]
        return found
    count = len(activations.index["items"])
    total, active = (torch.zeros(count, len(wanted), dtype=torch.float64) for _ in range(2))
    rows = torch.zeros(count, dtype=torch.float64)
    for block in encoded(autoencoder, activations, site, layer):
        own = block.latents[:, wanted].double().cpu()
        total.index_add_(0, block.items, own)
        active.index_add_(0, block.items, (own > 0).double())
        rows.index_add_(0, block.items, torch.ones(len(own), dtype=torch.float64))
    there = (rows > 0).nonzero()[:, 0]
    mean, share = (x[there] / rows[there, None] for x in (total, active))
    scores = (mean - mean.mean(0)) / mean.std(0, correction=0).clamp(min=1e-12) + share
    names = [str(item["id"]) for item in activations.index["items"]]
    best_first = scores.argsort(dim=0, descending=True, stable=True)[:most]
    return {
        latent: [(names[there[i]], scores[i, place].item()) for i in best_first[:, place].tolist()]
        for place, latent in enumerate(wanted)
    }


def profile(
    autoencoder: Autoencoder,
    activations: Activations,
    item: str,
    latents: Any,
    *,
    site: str | None = None,
    layer: int | None = None,
) -> Result:
    """The course of some latents over the seconds of a clip, as a map of latent by time.

    Raises:
        ItemError: no item of this name, or one without positions in time.
        InputError: latents that are not there, or pooled activations.
    """
    wanted = autoencoder.of(latents)
    if item not in {str(one["id"]) for one in activations.items}:
        raise ItemError(f"no item is called {item!r}")
    one = activations.filter(id=item)
    if one.index.get("pool", "none") != "none":
        raise InputError("a course in time is of every position: collect without pool=")
    site, layer = chosen(autoencoder, one, site, layer)
    seconds = torch.as_tensor(one.table(site)["second"])
    timed = seconds.isfinite()
    if not timed.any():
        raise ItemError(f"item {item!r} has no positions in time at {site}")
    rows = one.array(site, layer)[timed].float()
    with torch.no_grad():
        values = autoencoder.encode(rows)[:, wanted].mT.cpu()
    windows = _windows(seconds[timed])
    return Result(
        values,
        ("latent", "time"),
        {"latent": wanted, "time": windows},
        meta={"title": f"latents in {item}", "value": "activity", "item": item},
    )


def _windows(seconds: Float[Tensor, " t"]) -> list[Span]:
    """The stretch of each position, which lies in its middle."""
    steps = seconds.diff()
    half = (steps[steps > 0].median().item() if (steps > 0).any() else STEP_S) / 2
    return [Span(max(0.0, at - half), at + half) for at in seconds.tolist()]


def purity(
    moments: Sequence[Firing], said: Mapping[str, Sequence[Span]], nothing: str = ""
) -> tuple[str, float]:
    """What is said most often at some moments, and at which share of them.

    Args:
        moments: of a latent, as `firings` gives them.
        said: for the name of every item, what is said when: its phones, or words.
        nothing: what a moment is called at which nothing is said.

    Raises:
        InputError: no moments, or an item of which nothing is known.
    """
    if not moments:
        raise InputError("a latent without moments falls on nothing")
    labels = [_said_at(one, said, nothing) for one in moments]
    label, count = Counter(labels).most_common(1)[0]
    return label, count / len(labels)


def _said_at(one: Firing, said: Mapping[str, Sequence[Span]], nothing: str) -> str:
    if one.item not in said:
        raise InputError(f"nothing is known of what is said in {one.item!r}")
    here = (span for span in said[one.item] if span.start_s <= one.second < span.end_s)
    return next((span.label or nothing for span in here), nothing)
