"""How many directions the outputs of an adapter fill, and its gradients."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from audio_lens.analysis.adapters.outputs import SIDES, SMALL, Outputs, Spots, outputs, redrawn
from audio_lens.arguments import number, whole
from audio_lens.errors import InputError
from audio_lens.items import ItemError, Items, method, statistics
from audio_lens.items.collect import Place
from audio_lens.models import HookedAudioTransformer
from audio_lens.results import Result

RANDOM = "random"
RESAMPLES = 200  # of each count's interval
LEVEL = 0.95
_NOTHING = 1e-300  # energy below which there is none


@method("adapters.directions", whole="directions are counted over all items")
def directions(
    model: HookedAudioTransformer,
    items: Items,
    *,
    share: float = 0.9,
    positions: int = 64,
    part: str | None = None,
    where: Place | None = None,
    controls: bool = True,
    by: str | None = None,
    size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """How many directions hold most of the energy of A's and B's outputs, and of their gradients.

    Positions of all items are pooled, their mean taken off, and the squares of the singular values
    summed, largest first, up to the share (2509.08454). An item's value is how many of the pooled
    directions, by its own energy in them, it needs itself; the interval draws items anew in the
    pooled directions. Control: "random" is the same with every A and B drawn from N(0, 0.02²).

    Args:
        model: with a live adapter.
        items: two or more, with answers.
        share: of the energy, between 0 and 1.
        positions: at most so many of each item, drawn at random.
        part, where, controls, by, size, progress: as in `alignment`.
        seed: of positions, control and intervals.

    Returns:
        metric ("A", "B", "A_gradient", "B_gradient") by item by layer by module: counts; 0 where
        there is no energy, NaN where no adapter sits.

    Raises:
        As `alignment`.
    """
    number("share", share, above=0, most=1)
    whole("positions", positions, least=1)
    if len(items) < 2:
        raise InputError("directions are counted over two items or more")
    spots = Spots.of(model, part)
    groups = None if by is None else _groups(items, by)

    def of_model(what: str) -> Result:
        rows = _rows(model, items, spots, where, positions, size, seed, what, progress)
        return _counted(rows, items, spots, share, groups, seed)

    result = of_model("directions")
    if controls:
        with redrawn(model, ["A", "B"], seed, SMALL):
            result.controls[RANDOM] = of_model(RANDOM)
    result.meta |= {"part": spots.part, "value": f"directions for {share:.0%} of the energy"}
    result.meta |= {"interval": f"{LEVEL:.0%}, by {RESAMPLES} draws", "seed": str(seed)}
    result.report = [*_told(result, share), *spots.note]
    return result


def _groups(items: Items, by: str) -> list:
    groups = [item.value(by) for item in items]
    if lacking := [item.name for item, one in zip(items, groups, strict=True) if one is None]:
        raise ItemError(f"{lacking[0]} has no {by} to draw by")
    return groups


Rows = dict[tuple[int, str], dict[str, list[tuple[int, Float[Tensor, "_ d"]]]]]


def _rows(
    model: HookedAudioTransformer,
    items: Items,
    spots: Spots,
    where: Place | None,
    positions: int,
    size: int,
    seed: int,
    what: str,
    progress: bool | None,
) -> Rows:
    """Of every map and side, the number of each item with some of its positions."""
    kept: Rows = {spot: {side: [] for side in SIDES} for spot in spots.linears}
    for batch in outputs(model, items, spots, where, size=size, what=what, progress=progress):
        for place, row in enumerate(batch.rows):
            for spot, sides in batch.sides.items():
                own = _drawn(batch, spots.ground(spot[1]), place, positions, (seed, row))
                for side, found in sides.items():
                    kept[spot][side].append((row, found[own]))
    return kept


def _drawn(
    batch: Outputs, part: str, place: int, positions: int, seed: tuple[int, int]
) -> Int[Tensor, " m"]:
    """Some positions of an item, the same for every map on one part."""
    own = (batch.chosen[part].order == place).nonzero()[:, 0]
    draw = np.random.default_rng(seed)
    return own[torch.as_tensor(draw.permutation(len(own))[:positions])]


def _counted(
    rows: Rows, items: Items, spots: Spots, share: float, groups: list | None, seed: int
) -> Result:
    """The result of what was kept."""
    shape = (len(SIDES), len(items), len(spots.layers), len(spots.modules))
    values = torch.full(shape, torch.nan, dtype=torch.float64)
    told = [torch.full_like(values[:, 0], torch.nan) for _ in range(3)]
    for spot, sides in rows.items():
        for i, held in enumerate(sides.values()):
            place = spots.place(*spot)
            energies = _energies(held, len(items))
            values[(i, slice(None), *place)] = torch.stack([needed(e, share) for e in energies])
            estimate = statistics.bootstrap(
                energies,
                partial(_of_drawn, share=share),
                groups=groups,
                level=LEVEL,
                resamples=RESAMPLES,
                seed=seed,
            )
            for into, one in zip(told, estimate[:3], strict=True):
                into[(i, *place)] = one
    return Result(
        values,
        ("metric", "stimulus", "layer", "module"),
        {"metric": [*SIDES], "stimulus": [item.id for item in items], **spots.axes},
        estimate=told[0],
        low=told[1],
        high=told[2],
        n_kept=len(items),
    )


def _energies(
    held: list[tuple[int, Float[Tensor, "_ d"]]], count: int
) -> Float[Tensor, "items directions"]:
    """The energy of every item along the pooled directions, per position of its own."""
    centre = torch.cat([rows for _, rows in held]).mean(0)
    pooled = torch.cat([rows - centre for _, rows in held])
    axes = torch.linalg.svd(pooled, full_matrices=False)[2]
    energies = torch.zeros(count, len(axes), dtype=torch.float64)
    for row, rows in held:
        energies[row] = ((rows - centre) @ axes.T).square().sum(0)
    return energies


def needed(energies: Float[Tensor, " directions"], share: float) -> Float[Tensor, ""]:
    """How many directions, the strongest first, hold a share of all energy."""
    total = energies.sum()
    if total <= _NOTHING:
        return torch.zeros((), dtype=torch.float64)
    held = energies.sort(descending=True).values.cumsum(0) / total
    return 1 + (held < share - 1e-12).sum().double()


def _of_drawn(energies: Float[Tensor, "items directions"], share: float) -> Float[Tensor, ""]:
    return needed(energies.sum(0), share)


def _told(result: Result, share: float) -> list[str]:
    assert result.estimate is not None
    control = result.controls.get(RANDOM)
    told = []
    for i, side in enumerate(result.coords["metric"]):
        note = f"{side}: {_range(result.estimate[i])} directions hold {share:.0%} of the energy"
        if control is not None and control.estimate is not None:
            note += f"; random halves {_range(control.estimate[i])}"
        told.append(note + ".")
    return told


def _range(counts: Float[Tensor, "layers modules"]) -> str:
    known = counts[counts.isfinite()].long().tolist()
    if not known:
        return "no"
    return str(known[0]) if len(set(known)) == 1 else f"{min(known)} to {max(known)}"
