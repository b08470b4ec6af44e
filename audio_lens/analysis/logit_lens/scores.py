"""How many items each layer would answer rightly, by the logit lens (AudioLens, 2506.05140)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from audio_lens.analysis.logit_lens.curves import ALPHA, LANDMARKS, landmarks, threshold
from audio_lens.analysis.logit_lens.reading import (
    LAST,
    Asked,
    Readings,
    balanced,
    read_options,
)
from audio_lens.analysis.logit_lens.tuned import TunedLens
from audio_lens.items import Items, found, method
from audio_lens.items.collect import Place
from audio_lens.items.controls import no_audio, other_item, permuted_labels
from audio_lens.items.statistics import LEVEL, Estimate, bootstrap
from audio_lens.models import HookedAudioTransformer
from audio_lens.results import Result

Where = Place | Mapping[str, Place]
Table = Float[Tensor, "n groups streams options"]
OUTCOMES = ("right", "wrong")
DRAWS = 500  # of landmarks, which are found anew in each
CANNOT = (
    "A lens sees what the unembedding reads: a layer at chance may hold the answer in another "
    "basis (a tuned lens or a probe tells), and a layer that holds it need not be used."
)


@method("logit_lens.information")
def information(
    model: HookedAudioTransformer,
    items: Items,
    where: Any = LAST,
    *,
    lens: TunedLens | None = None,
    alpha: float = ALPHA,
    by: str | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """The share of items whose answer is the likeliest option in each layer.

    Layer l is the residual stream that enters block l, the last one what leaves the last block;
    each is read by the final norm and the unembedding, as what the model writes is. Options are
    the items' own, or all answers (and ``against``) that any item names; of each the first token
    counts. The estimate is the balanced accuracy: every answer counts as much as any other, so that
    a layer that says the same of all items is at chance.

    Controls: ``permuted_labels`` and ``other_item`` (another item's streams, of another answer)
    score the same readings; ``no_audio`` asks the same over silence.

    Args:
        model: the model.
        items: what it hears, with answers.
        where: the positions that are read, or several places by name, which become the axis
            "group". An item's value is the share of its positions.
        lens: a tuned lens; None reads the streams as they are.
        alpha: how far above chance a layer counts for the critical layer, in the report.
        by: a label whose values are drawn in place of items, such as "group".
        seed: of controls and intervals.
        progress: as in `collect`.

    Raises:
        InputError: a model without a vocabulary, a place that selects nothing in some item, or a
            lens of another model.
        ItemError: items without an answer, of unequal options, or of a single one.
        TokenError: options that begin with the same token.
        ControlError: items of which no control can be drawn.
    """
    return _measured(model, items, where, _votes, lens, alpha, by, seed, progress)


@method("logit_lens.probability")
def probability(
    model: HookedAudioTransformer,
    items: Items,
    where: Any = LAST,
    *,
    lens: TunedLens | None = None,
    by: str | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """The probability of the answer in each layer, among all tokens, averaged over the items.

    Args and controls are those of `information`.

    Raises:
        InputError, ItemError, TokenError, ControlError: as `information`.
    """
    return _measured(model, items, where, _probs, lens, ALPHA, by, seed, progress)


def _votes(read: Readings) -> Table:
    return read.votes


def _probs(read: Readings) -> Table:
    return read.probs


def _measured(
    model: HookedAudioTransformer,
    items: Items,
    where: Where,
    table: Callable[[Readings], Table],
    lens: TunedLens | None,
    alpha: float,
    by: str | None,
    seed: int,
    progress: bool | None,
) -> Result:
    """A table's column of the right option for each item, with its controls."""
    asked = Asked.of(model, items)
    others = other_item(len(items), asked.right.tolist(), seed=seed)
    permuted = torch.tensor(permuted_labels(asked.right.tolist(), seed=seed))
    read = read_options(model, items, where, asked, lens=lens, progress=progress)
    silent = Items.of(map(no_audio, items))
    unheard = read_options(
        model, silent, where, asked, lens=lens, what="items without audio", progress=progress
    )
    axes = _axes(read, where)

    def scored(of: Table, labels: Int[Tensor, " n"], **beside: Any) -> Result:
        weights = balanced(labels)
        own = _of_label(of, labels, where)
        over = own * weights.reshape(-1, *[1] * (own.ndim - 1))
        return found(over, axes, items, denominators=weights, by=by, seed=seed, **beside)

    controls = {
        "permuted_labels": scored(table(read), permuted),
        "other_item": scored(table(read)[others], asked.right),
        "no_audio": scored(table(unheard), asked.right),
    }
    is_share = table is _votes
    meta = {
        "value": "share of items whose likeliest option is right" if is_share else "probability",
        "options": ", ".join(asked.options),
        "chance": f"{asked.chance:.4g}",
        "lens": "plain" if lens is None else "tuned",
    }
    report = _report(items, read, where, alpha, by, seed) if is_share else []
    return scored(table(read), asked.right, controls=controls, meta=meta, report=[*report, CANNOT])


def _axes(read: Readings, where: Where) -> dict[str, Sequence[Any]]:
    layers: dict[str, Sequence[Any]] = {"layer": list(range(read.votes.shape[2]))}
    return layers | ({"group": list(where)} if isinstance(where, Mapping) else {})


def _of_label(
    table: Table, labels: Int[Tensor, " n"], where: Where
) -> Float[Tensor, "n streams *groups"]:
    """The column of every item's label; the axis of places is behind that of layers, if any."""
    chosen = table[torch.arange(len(labels)), :, :, labels].movedim(1, 2)
    return chosen if isinstance(where, Mapping) else chosen[..., 0]


# -------------------------------------------------------------------------------- by outcome


@method("logit_lens.outcomes")
def outcomes(
    model: HookedAudioTransformer,
    items: Items,
    where: Place = LAST,
    *,
    lens: TunedLens | None = None,
    by: str | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """The information of items that end up answered rightly, and of those that do not.

    The axis "outcome" is by what the last position writes among the options. An item has NaN in
    the other outcome. Other arguments are those of `information`.

    Raises:
        InputError, ItemError, TokenError: as `information`.
    """
    asked = Asked.of(model, items)
    read = read_options(model, items, where, asked, lens=lens, progress=progress)
    curves = _of_label(read.votes, asked.right, where)
    sides = torch.stack([read.is_right, ~read.is_right], 1)
    values = curves[:, None].masked_fill(~sides[..., None], torch.nan)
    n_right = int(read.is_right.sum())
    return found(
        values,
        {"outcome": list(OUTCOMES), **_axes(read, where)},
        items,
        by=by,
        seed=seed,
        meta={
            "value": "share of items whose likeliest option is right",
            "chance": f"{asked.chance:.4g}",
        },
        report=[_outcome_report(curves, read, n_right)],
    )


def _outcome_report(curves: Float[Tensor, "n layers"], read: Readings, n_right: int) -> str:
    wrong = curves[~read.is_right].mean(0)
    said = f"{n_right} of {len(curves)} items end up right."
    if not n_right < len(curves):
        return said
    top = int(wrong.argmax())
    return (
        f"{said} Of the others {wrong[-1]:.2f} are right in the last layer, and at most "
        f"{wrong[top]:.2f} on the way, in layer {top}; chance is {read.asked.chance:.2f}."
    )


# -------------------------------------------------------------------------------- landmarks


@method(
    "logit_lens.critical",
    whole="its layers are read from the mean over all items: study logit_lens.information",
)
def critical(
    model: HookedAudioTransformer,
    items: Items,
    where: Place = LAST,
    *,
    lens: TunedLens | None = None,
    alpha: float = ALPHA,
    excess: bool = False,
    by: str | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """The critical layer of the items' information, its onset and its peak, with intervals.

    What an item has by itself is of its own curve; the estimate is of the curve of all.

    Args:
        alpha, excess: as in `critical_layer`.

    Raises:
        InputError, ItemError, TokenError: as `information`.
    """
    asked = Asked.of(model, items)
    read = read_options(model, items, where, asked, lens=lens, progress=progress)
    curves = _of_label(read.votes, asked.right, where)
    estimate = _landmarks_of(items, curves, asked, alpha, excess, by, seed)
    return Result(
        landmarks(curves, asked.chance, alpha, excess),
        ("stimulus", "landmark"),
        {"stimulus": [item.id for item in items], "landmark": list(LANDMARKS)},
        estimate=estimate.value,
        low=estimate.low,
        high=estimate.high,
        n_kept=len(items),
        meta={"value": "layer", "chance": f"{asked.chance:.4g}", "alpha": f"{alpha:g}"},
        report=[_landmark_report(estimate, asked, alpha)],
    )


def _landmarks_of(
    items: Items,
    curves: Float[Tensor, "n layers"],
    asked: Asked,
    alpha: float,
    excess: bool,
    by: str | None,
    seed: int,
) -> Estimate:
    """Landmarks of the mean curve, in which every answer counts the same, also in each draw."""
    labelled = torch.cat([asked.right[:, None].double(), curves], 1)

    def of_mean(drawn: Float[Tensor, "m columns"]) -> Float[Tensor, " 3"]:
        labels = drawn[:, 0].long()
        if len(labels.unique()) < 2:  # no layer is above chance where there is one answer
            return torch.full((len(LANDMARKS),), torch.nan, dtype=torch.float64)
        mean = (balanced(labels)[:, None] * drawn[:, 1:]).mean(0)
        return landmarks(mean, asked.level(labels), alpha, excess)

    groups = None if by is None else items.values(by)
    return bootstrap(labelled, of_mean, groups=groups, resamples=DRAWS, seed=seed)


def _report(
    items: Items, read: Readings, where: Where, alpha: float, by: str | None, seed: int
) -> list[str]:
    """What was found, in words; of several places, nothing that is of one curve."""
    if isinstance(where, Mapping):
        return []
    curves = _of_label(read.votes, read.asked.right, where)
    estimate = _landmarks_of(items, curves, read.asked, alpha, False, by, seed)
    return [
        _landmark_report(estimate, read.asked, alpha),
        _outcome_report(curves, read, int(read.is_right.sum())),
    ]


def _landmark_report(estimate: Estimate, asked: Asked, alpha: float) -> str:
    chance = asked.level(asked.right)
    tau = threshold(chance, alpha)
    if estimate.value[0].isnan():
        return f"No layer gets more than {tau:.2f} of the items right ({chance:.2f} is chance)."
    told = [
        f"{name} {value:.3g} ({low:.3g} to {high:.3g})"
        for name, value, low, high in zip(
            LANDMARKS, estimate.value, estimate.low, estimate.high, strict=True
        )
    ]
    return (
        f"Layers with more than {tau:.2f} of the items right ({chance:.2f} is chance): "
        f"{', '.join(told)}. In brackets the {LEVEL:.0%} interval of {DRAWS} draws."
    )
