"""How well a label can be told of items by linear probes that never saw their group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool

from audio_lens.analysis.learning import REGRESSIONS, Strength, check_kind, sklearn
from audio_lens.analysis.probes.rows import Given, Labels, Rows, are_numbers, column, rows_of
from audio_lens.analysis.probes.task import Said, Task
from audio_lens.arguments import listed, number, whole
from audio_lens.errors import InputError
from audio_lens.items import Activations, ItemError, statistics
from audio_lens.progress import track
from audio_lens.results import Result

CONTROL = "permuted_labels"
ALONE = "its label is of one group alone"
CANNOT = (
    "What a probe reads the model need not use, and may hold in a form that no linear probe reads."
)


def probe(
    activations: Given,
    label: Labels,
    *,
    group: Labels | None = None,
    control: bool = True,
    kind: str | None = None,
    site: str | None = None,
    layers: Sequence[int] | None = None,
    types: Labels | None = None,
    beside: Mapping[str, Given] | None = None,
    strength: Strength = 10.0,
    n_folds: int = 5,
    by: str | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """How well a label can be told of items by a linear probe that never saw their group.

    The estimate is the balanced accuracy (every class counts as much, so that chance is one by the
    number of classes), an item's value the share of its rows that are told rightly. Of numbers it
    is the share of variance told, against the mean of what was fitted on; below 0 is worse than
    that mean. There is a probe for every layer, and head where a site has heads.

    Args:
        activations: `Activations`, or ``n d``.
        label: of the items, by its name, or one for every row. Texts, whole numbers, and true and
            false are classes, fractions numbers; ``kind="ridge"`` takes whole numbers as such.
        group: likewise: no probe is tested on groups that it saw. None takes the groups of the
            items, and else each item by itself.
        control: whether the same is fitted to labels in another order ("permuted_labels").
        kind: "logistic", "mass_mean" or "ridge"; see `learning.learner`.
        site, layers: of `Activations`; None takes the first, and all of its layers.
        types: what the control task draws labels by (Hewitt and Liang, 2019): all rows of a type,
            such as a word, keep one label, on both sides. A probe that does as well there knows
            types by heart. None draws by item.
        beside: other activations of the same rows, or of the same items ``items d``, that are
            probed likewise and stand among the controls, such as "log_mel".
        strength: of the penalty; of several the best is chosen on groups left out.
        n_folds: into how many parts groups are put at most, each of them tested once.
        by: "group" draws groups in place of items for intervals.
        seed: of folds, permutations and intervals.
        progress: as in `patching.sweep`.

    Raises:
        ExtraError: without scikit-learn (extra ``probe``).
        ItemError: a label of one value, of which all classes lie in one group each, or of mixed
            kinds; or items of one group.
        InputError: labels or groups that are not as many as the rows, or another ``kind``.
        ActivationsError: a site, layer or label that was not collected.
    """
    sklearn("linear_model")  # raises now what it would raise later
    _check(strength, n_folds, by)
    found = rows_of(activations, label, group, site=site, layers=layers)
    kind = check_kind(kind, are_numbers(found.labels))
    kept = _across_groups(found) if kind not in REGRESSIONS else np.full(len(found.labels), True)
    if len({one for one, there in zip(found.labels, kept, strict=True) if there}) < 2:
        raise ItemError(_nothing_to_tell(label, kept))
    rows, task = found.of(kept), Task.of(found.of(kept), kind, strength, n_folds, seed)
    others = {name: _alike(one, name, found, kept) for name, one in (beside or {}).items()}
    sorts = None if types is None else np.array(column(activations, types, site, "types"))[kept]
    chance = task.permuted(None if sorts is None else sorts.tolist(), seed) if control else None
    count = int(np.prod(rows.shape, dtype=int))
    with track("probes", count, "layers", show=progress) as advance:
        own = task.said(rows, advance)
    drawn = {"groups": rows.item_groups if by else None, "by": by, "seed": seed}
    controls = {name: task.result(task.said(one), one, drawn) for name, one in others.items()}
    report = []
    if chance is not None:
        by_chance = chance.said(rows)
        controls = {CONTROL: chance.result(by_chance, rows, drawn)} | controls
        report = [_selectivity(task, own, chance, by_chance, rows)]
    lost = len(found.names) - len(rows.names)
    return task.result(
        own,
        rows,
        drawn,
        controls=controls,
        dropped={ALONE: lost} if lost else {},
        meta=rows.meta | {"kind": kind, "folds": str(len(task.tests)), "value": task.score},
        report=[*_told(task, own, rows), *report, CANNOT],
    )


def _check(strength: Any, n_folds: int, by: str | None) -> None:
    whole("n_folds", n_folds, least=2)
    many = [strength] if isinstance(strength, (int, float)) else strength
    for one in listed("strength", many, (int, float), "numbers"):
        number("strength", one, above=0)
    if by not in (None, "group"):
        raise InputError(f"by is 'group' or None, got {by!r}")


# -------------------------------------------------------------------------------- rows


def _across_groups(rows: Rows) -> Bool[np.ndarray, " n"]:
    """The rows whose label is of two groups or more."""
    groups: dict[Any, set] = {}
    for label, group in zip(rows.labels, rows.groups, strict=True):
        groups.setdefault(label, set()).add(group)
    return np.array([len(groups[label]) > 1 for label in rows.labels])


def _nothing_to_tell(label: Labels, kept: Bool[np.ndarray, " n"]) -> str:
    name = f"label {label!r}" if isinstance(label, str) else "the labels"
    if kept.all():
        return f"{name}: all have one value, and there is nothing to tell"
    return (
        f"{name}: fewer than two classes are of several groups, so that none can be told of a "
        "group that was not seen. Name other groups (group='id' takes each item by itself)"
    )


def _alike(other: Given, name: str, found: Rows, kept: Bool[np.ndarray, " n"]) -> Rows:
    """The rows that are kept with other activations; those of items are their rows'."""
    if isinstance(other, Activations):
        site = found.meta.get("site")
        twin = rows_of(other, found.labels, found.groups, site=site, layers=found.axes.get("layer"))
        return twin.of(kept)
    held = rows_of(other, [0] * len(other)).cells(())
    if len(held) not in (len(kept), len(found.names)):
        raise InputError(
            f"{name!r} has {len(held)} rows: there are {len(kept)} of {len(found.names)} items"
        )
    wide = held if len(held) == len(kept) else held[torch.as_tensor(found.item)]
    return replace(found, cells=lambda _: wide, axes={}).of(kept)


# -------------------------------------------------------------------------------- in words


def _best(task: Task, own: Said) -> tuple[int, ...]:
    """The cell with the highest score."""
    above, _ = task.per_item(own)
    return tuple(int(i) for i in np.unravel_index(int(above.sum(0).argmax()), above.shape[1:]))


def _told(task: Task, own: Said, rows: Rows) -> list[str]:
    groups = f"{len(set(rows.groups))} groups" if rows.grouped else "no groups, item by item"
    chance = "" if task.tells_numbers else f"; chance is {1 / len(set(task.y.tolist())):.3g}"
    best = _best(task, own)
    above, below = task.per_item(own[(slice(None), *best)])
    place = _place(rows, best)
    many = f" It was chosen of {own[0].numel()}, so it lies a little high." if place else ""
    said = [
        f"Told is the {task.score} of {len(rows.names)} items ({groups}){chance}.",
        f"Best{place}: {_shown(above, below)}.{many}",
    ]
    if not task.tells_numbers:
        at_best = own[(slice(None), *best)].numpy()
        macro = sklearn("metrics").f1_score(task.y, at_best, average="macro")
        said.append(f"Accuracy there {(at_best == task.y).mean():.3f}, macro F1 {macro:.3f}.")
    return said


def _selectivity(task: Task, own: Said, chance: Task, by_chance: Said, rows: Rows) -> str:
    at = (slice(None), *_best(task, own))
    above, below = task.per_item(own[at])
    under, _ = chance.per_item(by_chance[at])
    return f"Selectivity there (over {CONTROL}): {_shown(above - under, below)}."


def _place(rows: Rows, cell: tuple[int, ...]) -> str:
    named = [f"{axis} {rows.axes[axis][i]}" for axis, i in zip(rows.axes, cell, strict=True)]
    return f" at {', '.join(named)}" if named else ""


def _shown(above: Any, below: Any) -> str:
    mean = statistics.ratio_of_means(above, below)
    return f"{float(mean.value):.3f} [{float(mean.low):.3f}, {float(mean.high):.3f}]"
