"""Stage 2: how many nodes of a kind to confirm, by patching its best k at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens.analysis.tap.exact import Patch, exact
from audio_lens.analysis.tap.nodes import Kind, Node
from audio_lens.items import Items, Pairs, found, statistics
from audio_lens.models import HookedAudioTransformer
from audio_lens.results import Result

MOST = 8  # nodes of a kind: each is a test, and all tests are corrected for each other
PLATEAU = 0.9  # of the largest recovery beyond that of random nodes
RANDOM = "random_sites"


def matched(kind: Kind, chosen: Sequence[Node], seed: int) -> list[Node]:
    """As many other nodes of the kind, as many of every layer."""
    return statistics.random_sites(chosen, kind.nodes, alike=lambda x: x.layer, seed=seed)


def sizes_up_to(most: int) -> list[int]:
    """1, 2, 4 ... and the last one."""
    sizes = [2**i for i in range(most.bit_length()) if 2**i < most]
    return [*sizes, most]


def choice(
    model: HookedAudioTransformer,
    pairs: Pairs[Items],
    kinds: Sequence[Kind],
    ranking: Mapping[str, Sequence[Node]],
    metric: Mapping[str, Any],
    *,
    size: int,
    seed: int = 0,
    progress: bool | None = None,
) -> dict[str, Result]:
    """For every kind, what its best k nodes bring back together, and as many random ones.

    Args:
        pairs: those that were searched.
        ranking: the nodes of every kind, strongest first.
        metric: one, by its name.
    """
    asked: list[tuple[str, int, Patch]] = []
    for kind in kinds:
        best = ranking[kind.name]
        for k in sizes_up_to(len(best)) if best else []:
            asked.append((kind.name, k, Patch(tuple(best[:k]))))
            asked.append((kind.name, k, Patch(tuple(matched(kind, best[:k], seed)))))
    told = exact(
        model, pairs, [x for *_, x in asked], metric, size=size, seed=seed, progress=progress
    )
    results = {}
    for kind in kinds:
        at = [number for number, (name, *_) in enumerate(asked) if name == kind.name]
        if not at:
            continue
        ks = [asked[number][1] for number in at[::2]]
        gap = told.gap[:, 0]
        best, random = (
            _along(told.effects[:, 0, some], gap, ks, pairs) for some in (at[::2], at[1::2])
        )
        best.controls[RANDOM] = random
        best.meta |= {"title": f"the best nodes of {kind.site} together", "value": "recovery"}
        best.report = [f"{chosen_k(best)} nodes are confirmed (the fewest that reach {PLATEAU:g})"]
        results[kind.name] = best
    return results


def _along(
    effects: Float[Tensor, "n k"], gap: Float[Tensor, " n"], ks: list[int], pairs: Pairs[Items]
) -> Result:
    return found(effects, {"k": ks}, list(pairs.clean), denominators=gap)


def chosen_k(curve: Result) -> int:
    """The fewest nodes that bring 0.9 of what any number brings beyond random ones.

    One where none brings anything: it is then confirmed, or refused, like any other.
    """
    one = curve.mean()
    beyond = one.values - one.controls[RANDOM].values
    top = float(beyond.nan_to_num(nan=-torch.inf).max())
    if not top > 0:
        return int(one.coords["k"][0])
    return int(one.coords["k"][int((beyond >= PLATEAU * top).nonzero()[0])])
