"""What answers of one class lose when the neurons of a class are taken out: the whole matrix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from audio_lens.analysis.answers import TOLD
from audio_lens.analysis.neurons.effects import IDENTITY, PER_LAYER, RANDOM, Study
from audio_lens.analysis.neurons.selection import Selection
from audio_lens.arguments import names
from audio_lens.edits import Edit
from audio_lens.errors import InputError
from audio_lens.items import Items, found_by_name, method
from audio_lens.items.collect import Place
from audio_lens.models import HookedAudioTransformer
from audio_lens.results import Result

OWN = "own"
CONTROLS = (RANDOM, PER_LAYER, IDENTITY)
EFFECTS = ("self", "cross", "specificity")
LIMITS = (
    "Neurons that are taken out together may stand in for each other, and a class whose answers "
    "stay may be carried elsewhere: a small loss does not show that they are not used."
)


@method("neurons.deactivation")
def deactivation(
    model: HookedAudioTransformer,
    items: Items,
    selection: Selection,
    *,
    label: str = "answer",
    where: Place = "all",
    controls: Sequence[str] = CONTROLS,
    by: str | None = None,
    size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """What the answers of every class lose when the neurons of each class are taken out.

    Values are the unedited metric minus the edited one: log-probability of the answer in nats, and
    recall. The diagonal is what a class loses by its own neurons; see `specificity`.

    Args:
        model: the model.
        items: with answers of one token; not those that the neurons were chosen by. Take those
            that are answered rightly (`right`), or the recall of some is lost before.
        selection: of `select`.
        label: what the classes are of the items.
        where: positions at which neurons are taken out.
        controls: "random", as many other neurons for each class; "random_per_layer", as many in
            each layer; "identity", all chosen neurons turned by 0: nothing may change.
        by: a label (such as "group") whose values are drawn in place of items, for intervals.
        size: of the batches.
        seed: of what is drawn.
        progress: as in `patching.sweep`.

    Returns:
        Axes "metric" (log_prob, recall), "deactivated" and "tested".

    Raises:
        ItemError: items without answers of one token, or of a class without neurons.
        InputError: another control, or neurons that this model does not have.
        ControlError: fewer other neurons than were chosen.
    """
    study = Study.of(model, items, selection, label, where, size, progress)
    wanted = _controls(controls)
    sets = {OWN: selection} | randoms(selection, wanted, seed)
    nothing = IDENTITY in wanted
    lost = losses(study, sets, nothing)
    axes = {"deactivated": selection.classes, "tested": selection.classes}

    def of(part: Tensor, **beside: Any) -> Result:
        return study.found(by_tested(part, study), axes, by, seed, **beside)

    beside = {name: of(part) for name, part in lost.items() if name in (RANDOM, PER_LAYER)}
    if nothing:
        beside[IDENTITY] = study.found(lost[IDENTITY][..., 0], {}, by, seed)
    meta = {"title": "what is lost by neurons taken out", "value": "loss", "site": selection.site}
    result = of(lost[OWN], controls=beside, meta=meta)
    result.report = [_said(result, selection), TOLD, LIMITS]
    return result


def randoms(selection: Selection, controls: Sequence[str], seed: int) -> dict[str, Selection]:
    """As many other neurons for each class, in the model or in each layer."""
    return {
        name: selection.others(per_layer=name == PER_LAYER, seed=seed)
        for name in (RANDOM, PER_LAYER)
        if name in controls
    }


def losses(
    study: Study, sets: Mapping[str, Selection], nothing: bool = False
) -> dict[str, Float[Tensor, "n metrics classes"]]:
    """What every item loses by each class's neurons of several selections, from one pass.

    Args:
        nothing: also by all neurons of the study turned by 0, as "identity".
    """

    def runs(rows: Sequence[int]) -> Iterable[list[Edit]]:
        yield []
        if nothing:
            yield study.turned(torch.ones(1, study.n_classes).double(), rows, 0.0)
        for held in sets.values():
            for number in range(study.n_classes):
                yield study.turned(study.one_class(number), rows, selection=held)

    values = study.answers(runs, "deactivating")
    lost, first = values[..., :1] - values, 1 + nothing
    parts = lost[..., first:].split(study.n_classes, dim=-1)
    beside = {IDENTITY: lost[..., 1:2]} if nothing else {}
    return dict(zip(sets, parts, strict=True)) | beside


def _controls(asked: Sequence[str]) -> list[str]:
    wanted = names("controls", asked)
    odd = [name for name in wanted if name not in CONTROLS]
    if odd:
        raise InputError(f"controls are some of {', '.join(CONTROLS)}, got {odd[0]!r}")
    return wanted


def by_tested(
    lost: Float[Tensor, "n metrics classes"], study: Study
) -> Float[Tensor, "n metrics classes classes"]:
    """Each item's losses in the column of its class; NaN in the others."""
    table = torch.full((*lost.shape, study.n_classes), torch.nan, dtype=torch.float64)
    table[torch.arange(len(lost)), ..., study.own] = lost
    return table


def specificity(matrix: Result, *, seed: int = 0) -> Result:
    """The matrix in three numbers: what is lost by the own neurons, by others', and the difference.

    Every class counts the same, however many items it has. Controls are told likewise.

    Args:
        matrix: of `deactivation`.
        seed: of the intervals.

    Returns:
        Axis "effect": self, cross, specificity.

    Raises:
        InputError: another result, or one that no longer holds items.
    """
    if matrix.dims != ("metric", "stimulus", "deactivated", "tested"):
        raise InputError(f"a matrix of deactivation is asked for, got {', '.join(matrix.dims)}")

    def summed(one: Result) -> Result:
        return _three(one, seed)

    beside = {name: one for name, one in matrix.controls.items() if one.dims == matrix.dims}
    result = summed(matrix)
    result.controls = {name: summed(one) for name, one in beside.items()}
    result.meta |= {name: matrix.meta[name] for name in ("site", "model") if name in matrix.meta}
    result.dropped = dict(matrix.dropped)
    result.report = [
        f"{metric}: {told}."
        for metric in matrix.coords["metric"]
        for told in [_told(result, metric)]
    ]
    return result


def _three(matrix: Result, seed: int) -> Result:
    held = matrix.values.movedim(0, 1)  # items metrics deactivated tested
    own = held.isnan().logical_not().any(1).any(1).int().argmax(1)  # the class of every item
    losses = torch.stack([one[:, :, int(at)] for one, at in zip(held, own, strict=True)])
    values, weight = three(losses, own)
    return found_by_name(
        values * weight[:, None, None],
        {"metric": matrix.coords["metric"], "effect": list(EFFECTS)},
        matrix.coords["stimulus"],
        denominators=weight,
        seed=seed,
        meta={"title": "lost by own neurons, by others', and the difference", "value": "loss"},
    )


def three(
    losses: Float[Tensor, "n metrics classes"], own: Int[Tensor, " n"]
) -> tuple[Float[Tensor, "n metrics effects"], Float[Tensor, " n"]]:
    """Each item's three numbers, and weights by which every class counts the same."""
    count = losses.shape[-1]
    mine = torch.nn.functional.one_hot(own, count).bool()[:, None]
    itself = losses.masked_fill(~mine, 0).sum(-1)
    others = losses.masked_fill(mine, 0).sum(-1) / (count - 1)
    weight = 1 / torch.bincount(own, minlength=count).double()[own]
    return torch.stack([itself, others, itself - others], -1), weight


def _told(result: Result, metric: str) -> str:
    """The three numbers with intervals, and the controls' loss by own neurons."""
    pieces = [
        f"{cell.at['effect']} {cell.value:.2f} [{cell.low:.2f}, {cell.high:.2f}]"
        for cell in result.cells(metric)
    ]
    beside = [
        f"{name} {control.cells(metric)[0].value:.2f}" for name, control in result.controls.items()
    ]
    return ", ".join(pieces) + (f" ({'; '.join(beside)})" if beside else "")


def _said(result: Result, selection: Selection) -> str:
    three = specificity(result)
    counts = selection.counts
    many = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    return (
        f"{many} neurons of {selection.site} for each of {len(counts)} classes taken out, lost "
        f"log-probability: {_told(three, 'log_prob')}; lost recall: {_told(three, 'recall')}."
    )
