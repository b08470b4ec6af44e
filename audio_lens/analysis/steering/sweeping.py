"""Directions added in every layer, at every strength: what the answers become."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from audio_lens.analysis.answers import RIGHT, TOLD, Answers
from audio_lens.analysis.steering.directions import Direction, by_layer, told
from audio_lens.arguments import listed, names, number
from audio_lens.edits import Edit
from audio_lens.errors import InputError
from audio_lens.items import Batch, Items, Measured, found, measured, method
from audio_lens.items.collect import Place, by_item
from audio_lens.items.controls import random_direction
from audio_lens.models import HookedAudioTransformer
from audio_lens.results import Result

ALPHAS = (-1.0, 0.5, 1.0, 1.5, 2.0)
RANDOM, OTHER, IDENTITY = CONTROLS = ("random_direction", "other_layer", "identity")
LIMITS = (
    "The best of many settings was chosen on these items: take it to others. A direction that "
    "steers need not be what the model itself uses."
)


@method("steering.sweep")
def sweep(
    model: HookedAudioTransformer,
    items: Items,
    directions: Direction | Sequence[Direction],
    alphas: Sequence[float | int] = ALPHAS,
    *,
    where: Place = "last",
    keep_norm: bool = False,
    metric: Any = None,
    controls: Sequence[str] = CONTROLS,
    by: str | None = None,
    size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """How items are answered with a direction added, by layer and by how often it is added.

    Args:
        model: the model.
        items: with answers of one token; other ones than the directions are of.
        directions: one of every layer, of one site, as `steering.directions` gives them.
        alphas: how often each is added; 1 moves the one mean onto the other.
        where: the positions to which it is added, as `collect` takes places.
        keep_norm: whether sums are as long as the activations were.
        metric: as in `items.measured`; None takes the answer's log-probability, whether it is the
            likeliest token ("right") and, where items have ``against``, the logit difference and
            whether that is the likeliest ("against").
        controls: "random_direction", a random one as long; "other_layer", the direction of the
            next layer of the sweep, as long; "identity", added 0 times.
        by: a label (such as "group") whose values are drawn in place of items, for intervals.
        size: of the batches.
        seed: of what is drawn.
        progress: as in `patching.sweep`.

    Returns:
        Axes "metric", "layer" and "alpha"; values are the metrics under the edit, of "identity"
        those of the unedited run.

    Raises:
        InputError: directions of several sites, or two of one layer; alphas that are none; another
            control; a place that selects nothing, or vectors of another width.
        ItemError: answers that are not one token, where there is no ``metric``.
        SiteError: a site or layer that the model does not have.
    """
    held = by_layer(directions)
    strengths = [float(number("alphas", x)) for x in listed("alphas", alphas, object, "numbers")]
    if not strengths or len(set(strengths)) < len(strengths):
        raise InputError(f"alphas are one number or more, each once; got {list(alphas)}")
    wanted = names("controls", controls)
    odd = [name for name in wanted if name not in CONTROLS]
    if odd:
        raise InputError(f"controls are some of {', '.join(CONTROLS)}, got {odd[0]!r}")
    kinds = {"": held} | _stand_ins(held, wanted, seed)
    places = by_item(where, items)

    def cells(batch: Batch) -> Iterable[tuple[Any, list[Edit]]]:
        here = where if places is None else [places[row] for row in batch.rows]
        yield batch.inputs, [held[0].edit(0.0, where=here, keep_norm=keep_norm)]
        for ones in kinds.values():
            for one in ones:
                for alpha in strengths:
                    yield batch.inputs, [one.edit(alpha, where=here, keep_norm=keep_norm)]

    run = _measured(model, items, cells, metric, size, progress)
    parts = run.values[..., 1:].split(len(held) * len(strengths), dim=-1)
    axes = {"layer": [one.layer for one in held], "alpha": strengths}

    def of(values: Tensor, along: dict[str, list], **beside: Any) -> Result:
        shape = [len(one) for one in along.values()]
        values = values.reshape(*values.shape[:2], *shape)
        return found(values, {"metric": run.metrics, **along}, items, by=by, seed=seed, **beside)

    beside = {name: of(part, axes) for name, part in zip(kinds, parts, strict=True) if name}
    if IDENTITY in wanted:
        beside[IDENTITY] = of(run.values[..., 0], {})
    meta = {"title": f"answers with a {told(held[0]).partition(' of block')[0]} added"}
    result = of(parts[0], axes, controls=beside, meta=meta | {"site": held[0].site})
    unedited = dict(zip(run.metrics, run.values[..., 0].mean(0).tolist(), strict=True))
    result.report = [_said(result, unedited), *([TOLD] if metric is None else []), LIMITS]
    return result


def _stand_ins(
    held: Sequence[Direction], wanted: Sequence[str], seed: int
) -> dict[str, list[Direction]]:
    """Controls for every direction, each as long as it."""
    found: dict[str, list[Direction]] = {}
    if RANDOM in wanted:
        found[RANDOM] = [at_random(one, seed + at) for at, one in enumerate(held)]
    if OTHER in wanted and len(held) > 1:
        following = [*held[1:], held[0]]
        found[OTHER] = [one.like(other.vector) for one, other in zip(held, following, strict=True)]
    return found


def at_random(one: Direction, seed: int) -> Direction:
    """A random direction as long as one."""
    vector = random_direction(one.vector.flatten(), seed).reshape(one.vector.shape)
    return one.like(vector)


def _measured(
    model: HookedAudioTransformer,
    items: Items,
    cells: Any,
    metric: Any,
    size: int,
    progress: bool | None,
) -> Measured:
    beside: dict[str, Any] = {"size": size, "what": "steering", "progress": progress}
    if metric is not None:
        return measured(model, items, cells, metric, **beside)
    return Answers.of(model, items).measured(cells, **beside)


def _said(result: Result, unedited: dict[str, float]) -> str:
    """The best cell, and what controls have there."""
    metric = RIGHT if RIGHT in result.coords["metric"] else result.coords["metric"][0]
    one = result.mean().select(metric=metric)
    best = max(one.cells(), key=lambda cell: cell.value)
    told = f"{metric} is {unedited[metric]:.2f} unedited, at most {best.value:.2f} (layer "
    told += f"{best.at['layer']}, alpha {best.at['alpha']:g})"
    for name in (RANDOM, OTHER):
        if name in one.controls:
            control = one.controls[name]
            there, most = control.select(**best.at).values.item(), control.values.max().item()
            told += f"; {name} {there:.2f} there, at most {most:.2f}"
    return f"{told}."
