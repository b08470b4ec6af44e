"""What the decoder makes of every stream of the encoder, and from which on that changes no more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from audio_lens.analysis.encoder_lens.said import REFERENCE, Said, reading_of, say
from audio_lens.analysis.encoder_lens.streams import first_stable, shuffled_before_last
from audio_lens.items import Items, analysis, found, method, statistics
from audio_lens.models import HookedAudioTransformer
from audio_lens.results import Result

SHOWN = 60  # letters of a text in a report
CANNOT = (
    "The decoder was trained to read the last stream alone: that it cannot read an earlier one "
    "does not show that the answer is not in it (a probe may find it there), only that it is not "
    "yet in the form the decoder reads."
)


@method("encoder_lens.encoder_lens")
def encoder_lens(
    model: HookedAudioTransformer,
    items: Items,
    *,
    reads: str | None = None,
    metric: Any = None,
    controls: bool = True,
    max_new_tokens: int | None = None,
    by: str | None = None,
    size: int = 8,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """What the decoder says if it is given each stream of the encoder in place of the last.

    Everything behind the encoder's blocks stays as it is: final norm, pooling, connector, decoder.
    Stream l enters block l; the last one gives what the model gives. Of a CTC model or a
    classifier, its head reads the streams.

    Metrics: "right" (the answer is the likeliest token), the items' own, or ``metric``; of texts
    "wer" (with the extra ``asr``); and "same", the share of items of which the same is said as of
    the last stream. Controls: "identity" is the model without the lens, "permuted_labels" takes
    another item's answer for right, "destroyed" the streams of a silent clip as long as the item's.

    Args:
        model: a model with an encoder that writes tokens, CTC labels or classes.
        items: with answers of one token (or class), or with transcripts: ``answer``, else the
            labels of ``words``.
        reads: "answers" or "texts" (written greedily); None takes answers where every item has one
            of one token.
        metric: of answers, in place of the items' own.
        controls: whether silence runs too; the other controls cost nothing.
        max_new_tokens: of texts; None as in ``model.generate``.
        by: a label whose values are drawn in place of items for intervals, such as "group".
        size: of the batches.
        seed: of the controls and intervals.
        progress: as in `patching.sweep`.

    Raises:
        InputError: a model of which streams cannot be read (none, several codes side by side, a
            connector that reads several blocks), or something else that is to be read.
        ItemError: items without answers, where these are to be read.
        ControlError: a single item, which has no other one's answer.
        ImportError: texts with transcripts, without jiwer.
    """
    reads = reading_of(model, items, reads)
    order = cast(list[int], statistics.permuted_labels(range(len(items)), seed=seed))
    said = say(
        model,
        items,
        reads,
        order,
        metric=metric,
        controls=controls,
        max_new_tokens=max_new_tokens,
        size=size,
        progress=progress,
    )
    final = said.said[:, said.own][:, -1:]
    scores = said.scores | {"same": (said.said == final).double()}
    chance = said.by_chance | {"same": (said.said == final[torch.tensor(order)]).double()}
    axes = {"layer": list(range(said.n_streams))}

    def result(values: Mapping[str, Tensor], cells: slice | int, **beside: Any) -> Result:
        stacked = torch.stack([values[name][:, cells] for name in scores], dim=1)
        along = axes if isinstance(cells, slice) else {}
        return found(stacked, {"metric": list(scores), **along}, items, by=by, seed=seed, **beside)

    beside = {"identity": result(scores, 0), "permuted_labels": result(chance, said.own)}
    if controls:
        beside["destroyed"] = result(scores, said.silent)
    return result(
        scores,
        said.own,
        controls=beside,
        meta={
            "title": "what each encoder stream is read as",
            "reads": reads,
            "reference": REFERENCE if controls else "none",
        },
        report=[*_curves(scores, said), f"Read were {reads}.", *_examples(said, items), CANNOT],
    )


@method("encoder_lens.commit")
def commit(
    model: HookedAudioTransformer,
    items: Items,
    *,
    reads: str | None = None,
    max_new_tokens: int | None = None,
    by: str | None = None,
    size: int = 8,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """From which encoder stream on what is said of an item changes no more.

    The mean over all items, those that end right and those that end wrong (axis "group"; NaN
    for an item that is of another). Stream l enters block l, so layer 0 says that no block is
    needed, and the number of blocks that all of them are. The control "random_sites" takes the
    streams before the last in random order.

    Args:
        model, items, reads, max_new_tokens, by, size, seed, progress: as in `encoder_lens`.

    Raises:
        InputError, ItemError, ImportError: as `encoder_lens`.
    """
    reads = reading_of(model, items, reads)
    said = say(
        model,
        items,
        reads,
        range(len(items)),
        controls=False,
        max_new_tokens=max_new_tokens,
        size=size,
        progress=progress,
    )
    streams = said.said[:, said.own]
    ends_right = None if said.right is None else said.right[:, said.own][:, -1]
    groups = _groups(ends_right, len(items))
    axes = {"group": list(groups)}
    layers = _spread(first_stable(streams.T), groups)
    drawn = _spread(first_stable(shuffled_before_last(streams, seed).T), groups)
    counts = {name: int(mask.sum()) for name, mask in groups.items()}
    report = [
        f"Of {counts[name]} items ({name}): committed at stream {layer:.2f} on average."
        for name, layer in zip(groups, layers.nanmean(0).tolist(), strict=True)
        if counts[name]
    ]
    return found(
        layers,
        axes,
        items,
        by=by,
        seed=seed,
        controls={"random_sites": found(drawn, axes, items, by=by, seed=seed)},
        meta={
            "title": "where what is said changes no more",
            "value": "stream",
            "reads": reads,
            "streams": str(said.n_streams),
        },
        report=[*report, CANNOT],
    )


def _groups(ends_right: Tensor | None, count: int) -> dict[str, Tensor]:
    everything = torch.ones(count, dtype=torch.bool)
    if ends_right is None:
        return {"all": everything}
    return {"all": everything, "right": ends_right, "wrong": ~ends_right}


def _spread(values: Int[Tensor, " n"], groups: Mapping[str, Tensor]) -> Float[Tensor, "n groups"]:
    """Values in the columns of the groups that they are of, NaN elsewhere."""
    columns = [values.double().masked_fill(~mask, torch.nan) for mask in groups.values()]
    return torch.stack(columns, dim=1)


def _curves(scores: Mapping[str, Tensor], said: Said) -> list[str]:
    """The mean of every metric at every stream, in words."""
    told = []
    for name, values in scores.items():
        means = values[:, said.own].nanmean(0).tolist()
        told.append(f"{name} by stream: " + ", ".join(f"{i} {x:.3g}" for i, x in enumerate(means)))
    return told


def _examples(said: Said, items: Items) -> list[str]:
    """What is written of every stream of the first item."""
    if not said.texts:
        return []
    own = said.texts[0][said.own]
    return [f"{items[0].name}, stream {i}: {text[:SHOWN]!r}" for i, text in enumerate(own)]


@analysis("encoder_lens")
def analyse(
    model: HookedAudioTransformer, items: Items, *, seed: int = 0, progress: bool | None = None
) -> dict[str, Result]:
    """What does the decoder make of every encoder stream, and when does that change no more?"""
    return {
        "encoder_lens": encoder_lens(model, items, seed=seed, progress=progress),
        "commit": commit(model, items, seed=seed, progress=progress),
    }
