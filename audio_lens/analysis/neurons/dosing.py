"""How answers move with the strength at which the neurons of a class are turned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from audio_lens.analysis.answers import TOLD
from audio_lens.analysis.neurons.effects import PER_LAYER, Study
from audio_lens.analysis.neurons.selection import Selection
from audio_lens.arguments import listed, number
from audio_lens.edits import Edit
from audio_lens.errors import InputError
from audio_lens.items import Items, method
from audio_lens.items.collect import Place
from audio_lens.items.controls import other_item
from audio_lens.models import HookedAudioTransformer
from audio_lens.results import Result

ALPHAS = (-1.0, -0.5, 0.0, 1.0, 3.0)
OWN, OTHER = WHOSE = ("own", "other")


@method("neurons.dose")
def dose(
    model: HookedAudioTransformer,
    items: Items,
    selection: Selection,
    alphas: Sequence[float | int] = ALPHAS,
    *,
    label: str = "answer",
    where: Place = "all",
    control: bool = True,
    by: str | None = None,
    size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """What answers gain when neurons are turned by 1 + alpha: their own class's, or another's.

    Values are the edited metric minus the unedited one. -1 takes the neurons out, 0 changes
    nothing, 1 doubles them. Gains that grow with alpha only for the own class's neurons are what a
    class's neurons should show.

    Args:
        alphas: by how much neurons are turned.
        control: whether as many other neurons in each layer are turned beside them.

    The others are those of `deactivation`.

    Returns:
        Axes "metric" (log_prob, recall), "alpha" and "whose" (own; other: the neurons of a class
        that is drawn for each item).

    Raises:
        As `deactivation`; InputError for alphas that are no numbers.
    """
    study = Study.of(model, items, selection, label, where, size, progress)
    wanted = [float(number("alphas", x)) for x in listed("alphas", alphas, object, "numbers")]
    if not wanted or len(set(wanted)) < len(wanted):
        raise InputError(f"alphas are one number or more, each once; got {list(alphas)}")
    rows = other_item(len(items), study.own.tolist(), seed=seed)
    numbers = {OWN: study.own, OTHER: study.own[rows]}
    sets = [selection, *([selection.others(per_layer=True, seed=seed)] if control else [])]

    def runs(rows: Sequence[int]) -> Iterable[list[Edit]]:
        yield []
        for held in sets:
            for alpha in wanted:
                for whose in WHOSE:
                    weights = study.each_own(numbers[whose], rows)
                    yield study.turned(weights, rows, alpha, held)

    values = study.answers(runs, "turning")
    gained = (values - values[..., :1])[..., 1:]
    parts = gained.split(len(wanted) * len(WHOSE), dim=-1)
    axes = {"alpha": wanted, "whose": list(WHOSE)}

    def of(part: Tensor, **beside: Any) -> Result:
        shaped = part.reshape(*part.shape[:2], len(wanted), len(WHOSE))
        return study.found(shaped, axes, by, seed, **beside)

    controls = {PER_LAYER: of(parts[1])} if control else {}
    meta = {"title": "answers by how far neurons are turned", "value": "gain"}
    result = of(parts[0], controls=controls, meta=meta | {"site": selection.site})
    result.report = [_said(result), TOLD]
    return result


def _said(result: Result) -> str:
    """The curve of the own neurons, and its ends for the others."""
    one = result.mean().select(metric="log_prob")
    own = ", ".join(
        f"{value:+.2f} at {alpha:g}"
        for alpha, value in zip(
            result.coords["alpha"], one.select(whose=OWN).values.tolist(), strict=True
        )
    )
    other = one.select(whose=OTHER).values
    told = f"The answer's log-probability moves by {own}; by another class's neurons "
    told += f"{other.min():+.2f} to {other.max():+.2f}"
    if PER_LAYER in one.controls:
        chance = one.controls[PER_LAYER].values
        told += f", by random ones {chance.min():+.2f} to {chance.max():+.2f}"
    return f"{told}."
