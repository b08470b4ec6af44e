"""Controls: what must show nothing, or a known amount, if a finding is one.

Plain functions that methods call and report beside their values, under the names of `CONTROLS`.
All that is drawn has a seed, and what cannot be drawn raises `ControlError`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from audio_lens.corruptions import Silence
from audio_lens.errors import AudioLensError, InputError
from audio_lens.items.item import Item, Spoiled

CONTROLS = {
    "identity": "a run's own activations put back: nothing may change",
    "other_item": "activations of another item in place of the right one's",
    "norm_matched_noise": "noise of the same mean and norm at every position",
    "random_sites": "as many other places, of the same kind",
    "random_direction": "a random direction or subspace of the same size",
    "random_keys": "as many other positions",
    "permuted_labels": "the same items under each other's labels",
    "empty": "the claim that claims nothing",
    "full": "the claim that everything matters",
    "no_audio": "the same question over silence",
    "destroyed": "what wiping out the corrupted answer would give by itself",
}
LEVELS = ("logit_diff", "log_prob", "prob")  # metrics whose destroyed level is known
Place = TypeVar("Place", bound=Hashable)


class ControlError(AudioLensError, ValueError):
    """A control that cannot be drawn; the message says what it lacks."""


# -------------------------------------------------------------------------------- sources


def identity(own: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The same activations: what puts them back changes nothing."""
    return own.clone()


def other_item(
    count: int, labels: Sequence[Hashable] | None = None, *, same: bool = False, seed: int = 0
) -> Int[Tensor, " n"]:
    """For every item the number of another one, whose activations stand in for its own.

    A logit difference recovers about half by this (see `destroyed`).

    Args:
        count: how many items there are.
        labels: of every item: the other one has another label, or with ``same`` the same.
        same: see ``labels``.
        seed: of the choice.

    Raises:
        ControlError: one item, or none with such a label.
        ValueError: not as many labels as items.
    """
    if count < 2:
        raise ControlError(f"other_item needs two items or more, here is {count}")
    if labels is not None and len(labels) != count:
        raise InputError(f"{count} items need as many labels, got {len(labels)}")
    draw = np.random.default_rng(seed)
    if labels is None:
        ring = draw.permutation(count)
        other = np.empty(count, dtype=int)
        other[ring] = np.roll(ring, 1)
        return torch.as_tensor(other)
    chosen = []
    for i, label in enumerate(labels):
        fitting = [j for j, held in enumerate(labels) if j != i and (held == label) == same]
        if not fitting:
            kind = "the same" if same else "another"
            raise ControlError(f"other_item: no other item has {kind} label than {i} ({label!r})")
        chosen.append(int(draw.choice(fitting)))
    return torch.tensor(chosen)


def norm_matched_noise(source: Float[Tensor, "*b d"], seed: int = 0) -> Float[Tensor, "*b d"]:
    """Gaussian noise with the mean and the norm that the source has at every position.

    Raises:
        ControlError: positions of one number, which mean and norm leave no freedom.
    """
    if source.shape[-1] < 2:
        raise ControlError("norm_matched_noise needs vectors of two numbers or more")
    noise = torch.randn(source.shape, generator=_generator(seed), dtype=torch.float64)
    noise = noise - noise.mean(-1, keepdim=True)
    wide = source.detach().double().cpu()
    spread = wide.std(-1, correction=0, keepdim=True)
    noise = noise / noise.std(-1, correction=0, keepdim=True)
    return (wide.mean(-1, keepdim=True) + spread * noise).to(source)


def no_audio(item: Item) -> Item:
    """The item over silence as long as its clip: what is answered without hearing anything."""
    silent = Spoiled(item.clip, Silence())
    return item.replaced(audio=silent, other_audio=None, sampling_rate=None)


# -------------------------------------------------------------------------------- places


def random_sites(
    chosen: Iterable[Place],
    among: Iterable[Place],
    *,
    alike: Callable[[Place], Hashable] | None = None,
    seed: int = 0,
) -> list[Place]:
    """As many other places as were chosen.

    Args:
        chosen: places, such as ``(layer, head)``.
        among: all that there are.
        alike: what the others must share with those chosen, such as the layer.
        seed: of the draw.

    Raises:
        ControlError: too few others.
    """
    draw, key = np.random.default_rng(seed), alike or (lambda _: None)
    wanted = list(chosen)
    others: dict[Hashable, list[Place]] = {}
    for place in dict.fromkeys(among):
        if place not in wanted:
            others.setdefault(key(place), []).append(place)
    found: list[Place] = []
    for kind in dict.fromkeys(map(key, wanted)):
        count, pool = sum(key(place) == kind for place in wanted), others.get(kind, [])
        if count > len(pool):
            of = "" if alike is None else f" of kind {kind!r}"
            raise ControlError(f"random_sites: {count} wanted{of}, and {len(pool)} others there")
        found += [pool[i] for i in draw.choice(len(pool), count, replace=False)]
    return found


def random_keys(
    keys: Bool[Tensor, "b t"], among: Bool[Tensor, "b t"], seed: int = 0
) -> Bool[Tensor, "b t"]:
    """As many positions of every row as ``keys`` has there, none of them in it.

    Args:
        keys: the positions under study.
        among: where others may be drawn from, such as all that hold something.
        seed: of the draw.

    Raises:
        ControlError: rows with too few others.
        ValueError: masks of unequal shapes.
    """
    if keys.shape != among.shape:
        raise InputError(f"keys are {list(keys.shape)}, and those among {list(among.shape)}")
    counts, free = keys.sum(1), among & ~keys
    for row in (counts > free.sum(1)).nonzero()[:, 0].tolist():
        raise ControlError(
            f"random_keys: row {row} has {counts[row]} keys, and {free[row].sum()} others to draw"
        )
    return some_of(free, counts, seed)


def some_of(
    free: Bool[Tensor, "b t"], counts: Int[Tensor, " b"], seed: int = 0
) -> Bool[Tensor, "b t"]:
    """So many positions of every row, drawn from those that are free; all where there are fewer."""
    ranks = torch.rand(free.shape, generator=_generator(seed)).to(free.device)
    order = ranks.masked_fill(~free, 2).argsort(1).argsort(1)
    return free & (order < counts[:, None])


def random_direction(like: Float[Tensor, " d *k"], seed: int = 0) -> Float[Tensor, " d *k"]:
    """A random direction of the same norm; of several, a random subspace of the same norms.

    Columns of a subspace are orthogonal, and every subspace is as likely as any other.

    Raises:
        ControlError: more directions than dimensions, or a single dimension.
    """
    columns = like.detach().double().cpu().reshape(len(like), -1)
    if columns.shape[1] > len(columns) or len(columns) < 2:
        raise ControlError(f"random_direction: {columns.shape[1]} in {len(columns)} dimensions")
    drawn = torch.randn(columns.shape, generator=_generator(seed), dtype=torch.float64)
    basis, upper = torch.linalg.qr(drawn)
    basis = basis * upper.diagonal().sign()  # QR by itself prefers some signs
    return (basis * columns.norm(dim=0)).reshape(like.shape).to(like)


def empty(places: Bool[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
    """None of the places: the hypothesis that claims nothing."""
    return torch.zeros_like(places)


def full(places: Bool[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
    """All of the places: the hypothesis that everything matters."""
    return torch.ones_like(places)


# -------------------------------------------------------------------------------- labels, levels


def permuted_labels(
    labels: Sequence[Hashable], groups: Sequence[Hashable] | None = None, *, seed: int = 0
) -> list[Hashable]:
    """The labels in another order: what a probe finds then, it finds in anything.

    Args:
        labels: of every item.
        groups: of every item: labels are permuted within each, so that what groups share stays.
        seed: of the order.

    Raises:
        ControlError: labels that are all the same, in every group.
        ValueError: not as many groups as labels.
    """
    named = [None] * len(labels) if groups is None else list(groups)
    if len(named) != len(labels):
        raise InputError(f"{len(labels)} labels need as many groups, got {len(named)}")
    rows: dict[Hashable, list[int]] = {}
    for row, group in enumerate(named):
        rows.setdefault(group, []).append(row)
    if all(len({labels[row] for row in own}) < 2 for own in rows.values()):
        where = "" if groups is None else " within every group"
        raise ControlError(f"permuted_labels: the {len(labels)} labels are all the same{where}")
    draw, found = np.random.default_rng(seed), list(labels)
    while found == list(labels):
        for own in rows.values():
            order = draw.permutation(len(own))
            for row, other in zip(own, order, strict=True):
                found[row] = labels[own[other]]
    return found


def destroyed(
    clean: Float[Tensor, " n"], corrupted: Float[Tensor, " n"], metric: str = "logit_diff"
) -> float:
    """The recovery of a patch that wipes out the corrupted answer and brings no clean one.

    A logit difference is then 0, which lies between the baselines: about half is recovered by
    destroying alone. The (log-)probability of the clean answer stays where it was: 0 is recovered.

    Args:
        clean, corrupted: the metric of both unpatched runs, for every item.
        metric: "logit_diff", "log_prob" or "prob" (of the clean answer).

    Raises:
        ControlError: baselines that do not differ.
        ValueError: another metric.
    """
    if metric not in LEVELS:
        raise InputError(
            f"the destroyed level is known of logit_diff, log_prob and prob, not of {metric!r}"
        )
    gap = (clean - corrupted).double().mean()
    if gap == 0:
        raise ControlError("destroyed: the clean and the corrupted runs do not differ")
    return float(-corrupted.double().mean() / gap) if metric == "logit_diff" else 0.0


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
