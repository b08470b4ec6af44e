"""Steering by neurons where nobody says of which class an item is."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens import metrics
from audio_lens.analysis.answers import TOLD
from audio_lens.analysis.neurons.effects import IDENTITY, PER_LAYER, Study
from audio_lens.analysis.neurons.selection import Selection
from audio_lens.arguments import names, number
from audio_lens.edits import Edit
from audio_lens.errors import InputError
from audio_lens.items import Items, measured, method
from audio_lens.items.collect import Place
from audio_lens.models import HookedAudioTransformer
from audio_lens.results import Result

TWO_PASS, MIX, UNION = MODES = ("two_pass", "mix", "union")
KNOWN = "known_class"  # control: the right class's neurons, which nobody knows in earnest


@method("neurons.inject")
def inject(
    model: HookedAudioTransformer,
    items: Items,
    selection: Selection,
    alpha: float | int = 1.0,
    *,
    modes: Sequence[str] = MODES,
    says: Mapping[Any, str] | None = None,
    label: str = "answer",
    where: Place = "all",
    controls: Sequence[str] = (KNOWN, PER_LAYER, IDENTITY),
    by: str | None = None,
    size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """What answers gain when neurons are turned by 1 + alpha without knowing an item's class.

    A first run says how probable each class is. "two_pass" turns the neurons of the likeliest one,
    "mix" those of every class by alpha times its probability, "union" those of all classes alike,
    which needs no first run. The names are those of 2601.03115, whose code is not public; that mix
    weighs by the first run's probabilities is our reading.

    Args:
        alpha: by how much neurons are turned.
        modes: some of the three.
        says: the word of each class that the first run is asked for; None takes its name.
        controls: "known_class", the right class's neurons: what modes could reach at best;
            "random_per_layer", as many other neurons in each layer; "identity", turned by 0.

    The others are those of `deactivation`.

    Returns:
        Axes "metric" (log_prob, recall) and "mode"; values are the edited metric minus the
        unedited one.

    Raises:
        As `deactivation`; InputError for another mode; TokenError for a class whose word is not
        one token.
    """
    study = Study.of(model, items, selection, label, where, size, progress)
    number("alpha", alpha)
    chosen, wanted = names("modes", modes), names("controls", controls)
    _check_names(chosen, wanted)
    probable = first_pass(study, says)
    numbers = probable.argmax(1)
    others = selection.others(per_layer=True, seed=seed) if PER_LAYER in wanted else None

    def weights(mode: str, rows: Sequence[int]) -> Tensor:
        if mode == UNION:
            return torch.ones(1, study.n_classes).double()
        return probable[list(rows)] if mode == MIX else study.each_own(numbers, rows)

    def runs(rows: Sequence[int]) -> Iterable[list[Edit]]:
        yield []
        yield study.turned(study.each_own(study.own, rows), rows, alpha)
        yield study.turned(weights(UNION, rows), rows, 0.0)
        for held in (selection, *([] if others is None else [others])):
            for mode in chosen:
                yield study.turned(weights(mode, rows), rows, alpha, held)

    values = study.answers(runs, "injecting")
    gained = values - values[..., :1]
    parts = gained[..., 3:].split(len(chosen), dim=-1)
    beside: dict[str, Result] = {}
    for name, at in ((KNOWN, 1), (IDENTITY, 2)):
        if name in wanted:
            beside[name] = study.found(gained[..., at], {}, by, seed)
    if others is not None:
        beside[PER_LAYER] = study.found(parts[1], {"mode": chosen}, by, seed)
    meta = {"title": f"neurons turned by 1 + {alpha:g}", "value": "gain", "site": selection.site}
    result = study.found(parts[0], {"mode": chosen}, by, seed, controls=beside, meta=meta)
    right = (numbers == study.own).double().mean().item()
    result.report = [_said(result, values[:, 1, 0].mean().item(), right), TOLD]
    return result


def first_pass(study: Study, says: Mapping[Any, str] | None) -> Float[Tensor, "n classes"]:
    """How probable each class is in every item, among the words of all classes.

    Raises:
        InputError: a class without a word, or two with the same.
        TokenError: a word of several tokens.
    """
    classes: list[Hashable] = study.selection.classes
    lacking = [] if says is None else [one for one in classes if one not in says]
    if lacking:
        raise InputError(f"says= has no word for the class {lacking[0]!r}")
    words = [str(one) if says is None else says[one] for one in classes]
    tokens = [study.model.to_single_token(word) for word in words]
    if len(set(tokens)) < len(tokens):
        raise InputError(f"the classes are not told apart by their words: {', '.join(words)}")
    wanted: dict[str, Any] = {str(token): metrics.log_prob(token) for token in tokens}
    held = measured(
        *(study.model, study.items, lambda batch: [(batch.inputs, [])], wanted),
        size=study.size,
        what="first pass",
        progress=study.progress,
    )
    return held.values[..., 0].softmax(1)


def _check_names(modes: Sequence[str], controls: Sequence[str]) -> None:
    known = (KNOWN, PER_LAYER, IDENTITY)
    for what, given, there in (("modes", modes, MODES), ("controls", controls, known)):
        odd = [one for one in given if one not in there]
        if odd or (what == "modes" and not given):
            raise InputError(f"{what} are some of {', '.join(there)}, got {given!r}")


def _said(result: Result, recall: float, right: float) -> str:
    gains = ", ".join(f"{cell.at['mode']} {cell.value:+.2f}" for cell in result.cells("recall"))
    told = f"Recall is {recall:.2f} unedited, and moves by {gains}"
    if KNOWN in result.controls:
        known = result.controls[KNOWN].cells("recall")[0].value
        told += f"; with the class known by {known:+.2f}"
    return f"{told}. The first run names the right class in {right:.2f} of the items."
