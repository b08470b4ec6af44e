"""CKA between what A and B of an adapter give, forward and backward, beside random halves."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens.analysis.adapters.outputs import Spots, outputs, redrawn
from audio_lens.analysis.similarity.comparing import cka_by_item
from audio_lens.analysis.similarity.kernels import LEAST
from audio_lens.errors import InputError
from audio_lens.items import Items, found, method
from audio_lens.items.collect import Place
from audio_lens.models import HookedAudioTransformer
from audio_lens.results import Result

DIRECTIONS = {"forward": ("A", "B"), "backward": ("A_gradient", "B_gradient")}
RANDOM_A, RANDOM_B = "random_A", "random_B"
CANNOT = (
    "What B gives is a linear map of what A gives, and A's gradient one of B's: high values are "
    "arithmetic, unless they lie beyond those of random halves."
)


@method("adapters.alignment", whole="CKA is of all items")
def alignment(
    model: HookedAudioTransformer,
    items: Items,
    *,
    part: str | None = None,
    where: Place | None = None,
    controls: bool = True,
    by: str | None = None,
    size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """How alike A's and B's outputs are over items, and their gradients (2509.08454): CKA.

    Unbiased linear CKA of the means over each item's positions, forward (activations) and backward
    (gradients of the answers' loss); an item's value is the CKA of all plus its influence (of the
    jackknife). Controls, without which "forward alignment, backward differentiation" says nothing:
    "random_B" and "random_A" are the same of the model with every B, or every A, drawn at random
    with the spread that it has.

    Args:
        model: with a live adapter.
        items: 5 or more, with answers.
        part: whose adapters; None takes the first part that has some.
        where: which positions; None takes "audio" in an encoder and "all" in a decoder.
        controls: whether they run.
        by: a label whose values are drawn in place of items for intervals, such as "group".
        size: of the batches.
        seed: of controls and intervals.
        progress: as in `patching.sweep`.

    Returns:
        metric ("forward", "backward") by item by layer by module; NaN where no adapter sits.

    Raises:
        LoraError: a model without a live adapter.
        InputError: fewer items, an adapter that is switched off or sits elsewhere, or a model that
            writes neither one stream of tokens nor classes.
        ItemError: items without answers.
    """
    if len(items) <= LEAST:
        raise InputError(f"CKA with an interval needs {LEAST + 1} items or more, got {len(items)}")
    spots = Spots.of(model, part)

    def of_model(what: str) -> Float[Tensor, "n metrics layers modules"]:
        means = _means(model, items, spots, where, size, what, progress)
        shape = (len(items), len(DIRECTIONS), len(spots.layers), len(spots.modules))
        values = torch.full(shape, torch.nan, dtype=torch.float64)
        for spot, sides in means.items():
            for i, (one, other) in enumerate(DIRECTIONS.values()):
                values[(slice(None), i, *spots.place(*spot))] = cka_by_item(
                    sides[one], sides[other]
                )
        return values

    axes = {"metric": [*DIRECTIONS], **spots.axes}
    values = of_model("alignment")
    beside: dict[str, Result] = {}
    if controls:
        for name, half in ((RANDOM_B, "B"), (RANDOM_A, "A")):
            with redrawn(model, [half], seed):
                beside[name] = found(of_model(name), axes, items, by=by, seed=seed)
    report = [*_told(values, beside), CANNOT, *spots.note]
    return found(
        values,
        axes,
        items,
        by=by,
        seed=seed,
        controls=beside,
        meta={"part": spots.part, "value": "CKA"},
        report=report,
    )


def _means(
    model: HookedAudioTransformer,
    items: Items,
    spots: Spots,
    where: Place | None,
    size: int,
    what: str,
    progress: bool | None,
) -> dict[tuple[int, str], dict[str, Float[Tensor, "items d"]]]:
    """The mean over every item's positions, of all sides of every map."""
    kept: dict[tuple[int, str], dict[str, Tensor]] = {spot: {} for spot in spots.linears}
    for batch in outputs(model, items, spots, where, size=size, what=what, progress=progress):
        for spot, sides in batch.sides.items():
            chosen = batch.chosen[spots.ground(spot[1])]
            for side, rows in sides.items():
                empty = rows.new_zeros(len(items), rows.shape[1])
                kept[spot].setdefault(side, empty)[batch.rows] = chosen.mean(rows)
    return kept


def _told(
    values: Float[Tensor, "n metrics layers modules"], beside: Mapping[str, Result]
) -> list[str]:
    told = []
    for i, name in enumerate(DIRECTIONS):
        own = values[:, i].mean(0).flatten()
        others = [
            f"{control} {_range(result.values[i].mean(0).flatten())}"
            for control, result in beside.items()
        ]
        told.append("; ".join([f"{name}: {_range(own)} over layers and maps", *others]) + ".")
    return told


def _range(values: Float[Tensor, " n"]) -> str:
    known = values[values.isfinite()]
    return f"{known.min():.2f} to {known.max():.2f}" if len(known) else "not defined"
