"""Whether activations tell that a text says what nobody said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from audio_lens import metrics
from audio_lens.analysis.encoder_lens.forced import check_writes, decoder_streams, forced
from audio_lens.analysis.encoder_lens.said import transcripts
from audio_lens.analysis.encoder_lens.streams import last_stage, written
from audio_lens.analysis.learning import folds, numbered, predicted, sklearn
from audio_lens.arguments import number, whole
from audio_lens.errors import InputError
from audio_lens.items import ItemError, Items, collect, found, method, statistics
from audio_lens.models import HookedAudioTransformer
from audio_lens.progress import track
from audio_lens.results import Result

RATES = ("insertion_rate", "wer")
FOLDS = 5


@method("encoder_lens.hallucination", whole="its probe is fitted to all items")
def hallucination(
    model: HookedAudioTransformer,
    items: Items,
    *,
    label: str = "insertion_rate",
    part: str = "decoder",
    most: int = 200,
    strength: float = 1.0,
    max_new_tokens: int | None = None,
    by: str | None = None,
    size: int = 8,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """Whether a linear probe tells items whose texts are made up from those that are right.

    Of the items whose rate is above 0 those with the highest, and as many of those whose rate is 0:
    chance is one half. A logistic regression of standardised activations is fitted on all groups
    (speakers) but those it is tested on; the value is 1 where it tells an item rightly. The
    decoder's layers are read where it writes the end of its text, the encoder's as the mean over
    the clip. The control "permuted_labels" fits the same to labels in another order.

    Args:
        model: a model whose decoder writes text (of the encoder's layers, any with an encoder).
        items: with transcripts, and with groups, of which none is trained and tested on.
        label: "insertion_rate", words that nobody said over words that were said; "wer"; or a label
            of the items, which is above 0 (or true) where something is made up. A high word error
            rate alone may be of mishearing.
        part: "decoder" or "encoder".
        most: of either kind.
        strength: of the regression's penalty (the inverse of scikit-learn's C).
        max_new_tokens, by, size, seed, progress: as in `encoder_lens`.

    Raises:
        ImportError: without scikit-learn (extra ``probe``), or jiwer (``asr``) for rates.
        InputError: a model without such a part, or another part.
        ItemError: items without transcripts, groups or the label; rates of one kind alone; or too
            few groups for both sides to have both kinds.
    """
    sklearn("model_selection")  # raises now what it would raise later
    if part not in ("decoder", "encoder"):
        raise InputError(f"part is 'decoder' or 'encoder', got {part!r}")
    if part == "decoder" or label in RATES:
        check_writes(model)
    if part == "encoder" and model.cfg.encoder is None:
        raise InputError(f"{model.cfg.family} has no encoder")
    whole("most", most, least=1)
    number("strength", strength, above=0)
    items.values("group")  # raises where an item has none
    rates = _rates(model, items, label, max_new_tokens, size, progress)
    rows = _extremes(rates, most, label, seed)
    kept = items[rows]
    labels = (rates[rows] > 0).long()
    groups = kept.values("group")
    shuffled = torch.tensor(statistics.permuted_labels(labels.tolist(), seed=seed))
    tests = _folds(labels, groups, seed)
    x = _activations(model, kept, part, max_new_tokens, size, progress)
    axes = {"layer": list(range(x.shape[1]))}
    own, chance = (
        _told_rightly(x, y, numbered(groups), tests, strength) for y in (labels, shuffled)
    )
    control = found(chance, axes, kept, by=by, seed=seed)
    best = int(own.mean(0).argmax())
    return found(
        own,
        axes,
        kept,
        by=by,
        seed=seed,
        controls={"permuted_labels": control},
        dropped={"neither made up nor right, or more than are needed": len(items) - len(rows)},
        meta={"label": label, "part": part, "folds": str(len(tests))},
        report=[
            f"{len(rows) // 2} items whose {label} is above 0, as many whose is 0; chance is 0.5.",
            f"Best at layer {best} of the {part}: {own.mean(0)[best]:.3f}, with permuted labels "
            f"{chance.mean(0)[best]:.3f}. It was chosen of {x.shape[1]}, so a little lies high.",
            "What a probe finds the model need not use.",
        ],
    )


# -------------------------------------------------------------------------------- labels


def _rates(
    model: HookedAudioTransformer,
    items: Items,
    label: str,
    max_new_tokens: int | None,
    size: int,
    progress: bool | None,
) -> Float[Tensor, " n"]:
    """How much of each item's text is made up."""
    if label not in RATES:
        values = items.values(label)
        if odd := [value for value in values if isinstance(value, str)]:
            raise ItemError(f"label {label!r} is a number or true and false, got {odd[0]!r}")
        return torch.tensor([float(value) for value in values], dtype=torch.float64)
    truth = transcripts(items)
    if truth is None:
        raise ItemError(f"{label} needs transcripts: answers of the items, or words")
    rate = {"insertion_rate": metrics.insertion_rate, "wer": metrics.wer}[label]
    rate("a word", "a word")  # raises now what it would raise later
    rates = torch.zeros(len(items), dtype=torch.float64)
    with track("texts", len(items), "items", show=progress) as advance:
        done = 0
        for batch in items.batches(model, size):
            said = written(model, batch.inputs, max_new_tokens=max_new_tokens)
            for row, text in zip(batch.rows, said, strict=True):
                rates[row] = rate(truth[row], text)
            done += len(batch)
            advance(len(batch), done)
    return rates


def _extremes(rates: Float[Tensor, " n"], most: int, label: str, seed: int) -> list[int]:
    """Items of the highest rates above 0, and as many of rate 0, in the order of the items."""
    above, zero = (mask.nonzero()[:, 0].tolist() for mask in (rates > 0, rates <= 0))
    if not above or not zero:
        kind = "above 0" if not above else "0"
        raise ItemError(f"of no item of {len(rates)} the {label} is {kind}: a probe needs both")
    count = min(len(above), len(zero), most)
    highest = sorted(above, key=lambda row: -float(rates[row]))[:count]
    drawn = np.random.default_rng(seed).choice(zero, count, replace=False).tolist()
    return sorted([*highest, *drawn])


# -------------------------------------------------------------------------------- activations


def _activations(
    model: HookedAudioTransformer,
    items: Items,
    part: str,
    max_new_tokens: int | None,
    size: int,
    progress: bool | None,
) -> Float[Tensor, "n layers d"]:
    if part == "encoder":
        site = f"encoder.{last_stage(model)}"
        acts = collect(model, items, site, "audio", "mean", size=size, progress=progress)
        return torch.stack([acts.array(layer=layer) for layer in acts.layers()], dim=1).double()
    found: list[Tensor] = [torch.empty(0)] * len(items)
    with track("activations", len(items), "items", show=progress) as advance:
        done = 0
        for batch in items.batches(model, size):
            given = forced(model, batch.inputs, max_new_tokens)
            last = given.lengths.clamp(max=given.tokens.shape[1] - 1)
            ends = [
                stream[torch.arange(len(last)), last] for stream in decoder_streams(model, given)
            ]
            for row, held in zip(batch.rows, torch.stack(ends, dim=1).cpu(), strict=True):
                found[row] = held
            done += len(batch)
            advance(len(batch), done)
    return torch.stack(found).double()


# -------------------------------------------------------------------------------- probes


def _told_rightly(
    x: Float[Tensor, "n layers d"],
    labels: Int[Tensor, " n"],
    groups: Int[np.ndarray, " n"],
    tests: Sequence[Int[np.ndarray, " _"]],
    strength: float,
) -> Float[Tensor, "n layers"]:
    """Whether a probe of each layer that never saw an item's group tells the item rightly."""
    y = labels.numpy()
    layers = x.double().numpy().swapaxes(0, 1)
    said = [predicted(held, y, groups, tests, "logistic", strength) for held in layers]
    return torch.as_tensor(np.stack(said, axis=1) == y[:, None]).double()


def _folds(labels: Int[Tensor, " n"], groups: Sequence[Any], seed: int) -> list[np.ndarray]:
    """The items that each fold tests; of no group is one tested and another trained on.

    Raises:
        ItemError: groups that are too few.
    """
    y = labels.numpy()
    tests = folds(y.tolist(), groups, FOLDS, seed, stratified=True)
    if any(len(set(np.delete(y, test))) < 2 for test in tests):
        raise ItemError(
            f"{len(set(groups))} groups are too few: without some of them only one kind is left"
        )
    return tests
