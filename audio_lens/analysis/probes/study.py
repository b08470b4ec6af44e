"""Probes of a model's layers over items, and what the answer loses with a label that is erased."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from audio_lens import edits
from audio_lens.analysis.encoder_lens.said import measured_with_right
from audio_lens.analysis.encoder_lens.streams import site_of_streams
from audio_lens.analysis.learning import Strength, sklearn
from audio_lens.analysis.probes.baselines import mean_log_mels, untrained
from audio_lens.analysis.probes.erasing import concept_erasure, erase
from audio_lens.analysis.probes.probing import CONTROL, probe
from audio_lens.arguments import listed
from audio_lens.edits.edit import Edit
from audio_lens.errors import InputError
from audio_lens.items import (
    Batch,
    Item,
    ItemError,
    Items,
    analysis,
    collect,
    found,
    method,
    statistics,
)
from audio_lens.items.collect import Place, by_item
from audio_lens.items.measuring import Cell
from audio_lens.models import HookedAudioTransformer
from audio_lens.results import Result
from audio_lens.timeline import Span

CONTROLS = (CONTROL, "log_mel")
UNTRAINED = "untrained"
IDENTITY, RANDOM = "identity", "random_direction"
WORD = "word"


@method(
    "probes.layers",
    whole="probes are fitted to all items: harvest activations, and probe these",
)
def layers(
    model: HookedAudioTransformer,
    items: Items,
    label: str = "answer",
    *,
    site: str | None = None,
    where: Place = "audio",
    group: str | None = None,
    kind: str | None = None,
    types: str | None = None,
    controls: Sequence[str] = CONTROLS,
    strength: Strength = 10.0,
    n_folds: int = 5,
    by: str | None = None,
    size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """In which layers a label can be read, by `probe` of the mean over every item's positions.

    Args:
        model: the model.
        items: with the label, and with groups (speakers), of which none is fitted and tested on.
        label: a label of the items, such as "answer" or "emotion".
        site: ``part.activation``; None takes the streams of the encoder, or else of the decoder.
        where: which positions, as in `items.collect`: ``lambda item: item.words[1]``.
        group: the label that names groups.
        controls: "permuted_labels"; "log_mel", the same probe of the clip's mean log-mel spectrum
            (in the seconds of ``where``, if it names such); "untrained", of a copy of the model
            whose weights are in random order.
        kind, types, strength, n_folds, by: as in `probe`.
        size: of the batches.
        seed: of folds, permutations and intervals.
        progress: as in `patching.sweep`.

    Raises:
        As `probe` and `items.collect`; InputError for other controls.
    """
    sklearn("linear_model")  # raises now what it would raise later
    known = (*CONTROLS, UNTRAINED)
    asked = listed("controls", controls, str, "names")
    if odd := [name for name in asked if name not in known]:
        raise InputError(f"controls are some of {', '.join(known)}, got {odd[0]!r}")
    items.values(label if group is None else group)
    site = site or site_of_streams(model)
    made: dict[str, Any] = {"size": size, "progress": progress}
    beside: dict[str, Any] = {}
    if "log_mel" in asked:
        beside["log_mel"] = mean_log_mels(items, where)
    if UNTRAINED in asked:
        beside[UNTRAINED] = collect(untrained(model, seed), items, site, where, "mean", **made)
    return probe(
        collect(model, items, site, where, "mean", **made),
        label,
        group=group,
        control=CONTROL in asked,
        kind=kind,
        types=types,
        beside=beside,
        strength=strength,
        n_folds=n_folds,
        by=by,
        seed=seed,
        progress=progress,
    )


# -------------------------------------------------------------------------------- erasing


@method("probes.erased", whole="what is erased is fitted to all items")
def erased(
    model: HookedAudioTransformer,
    items: Items,
    label: str = "answer",
    *,
    site: str = "connector.out",
    layer: int | None = None,
    where: Place = "audio",
    metric: Any = None,
    controls: bool = True,
    by: str | None = None,
    size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """What is answered when no linear probe can tell a label at a site any more (LEACE).

    The map of `erase` is fitted on the items' own activations at these positions, every position
    a row, and is in force there while the model answers. Controls: "identity" is the model without
    it, "permuted_labels" erases labels in another order, "random_direction" takes out as many
    random directions.

    Args:
        model: the model.
        items: with the label.
        label: what is erased: classes, or a number.
        site, layer: where.
        where: which positions, as in `items.collect`.
        metric: in place of "right" and the items' own.
        controls: whether the last two run; the first always does.
        by: a label whose values are drawn in place of items for intervals, such as "group".
        size: of the batches.
        seed: of the controls and intervals.
        progress: as in `patching.sweep`.

    Raises:
        ExtraError, ItemError, ActivationsError, InputError: as `erase` and `items.collect`.
    """
    concept_erasure()  # raises now what it would raise later
    labels = items.values(label)
    chosen = None if layer is None else [layer]
    acts = collect(
        model, items, site, where, layers=chosen, size=size, dtype=torch.float64, progress=progress
    )
    own = erase(acts, label)
    maps: dict[str, edits.Do | None] = {IDENTITY: None, "erased": own}
    if controls:
        order = statistics.permuted_labels(labels, seed=seed)
        rows = [order[number] for number in acts.table()["item"]]
        maps[CONTROL] = erase(acts, rows)
        maps[RANDOM] = edits.Project(statistics.random_direction(own.read, seed=seed))
    places = by_item(where, items)

    def cells(batch: Batch) -> Iterator[Cell]:
        here: Any = where if places is None else [places[row] for row in batch.rows]
        for do in maps.values():
            laid = [] if do is None else [Edit(site, do, layer=layer, where=here)]
            yield batch.inputs, laid

    names, values = measured_with_right(
        model, items, cells, metric, size=size, what="erased", progress=progress
    )
    columns = dict(zip(maps, values.unbind(-1), strict=True))

    def result(values: torch.Tensor, **beside: Any) -> Result:
        return found(values, {"metric": names}, items, by=by, seed=seed, **beside)

    return result(
        columns["erased"],
        controls={name: result(one) for name, one in columns.items() if name != "erased"},
        meta={"label": label, "site": site, "rank": str(own.read.shape[1])},
        report=[
            f"Erased is {label} at {site}: {own.read.shape[1]} directions, of "
            f"{len(acts)} rows of {len(items)} items.",
            *_changes(names, columns),
            "An answer that survives needs nothing of what a linear probe reads here, but may need "
            "the label in a form that no linear probe reads.",
        ],
    )


def _changes(names: Sequence[str], columns: dict[str, torch.Tensor]) -> list[str]:
    means = {cell: values.mean(0).tolist() for cell, values in columns.items()}
    return [
        f"{name}: " + ", ".join(f"{cell} {mean[i]:.3g}" for cell, mean in means.items())
        for i, name in enumerate(names)
    ]


# -------------------------------------------------------------------------------- the command


@analysis("probes")
def analyse(
    model: HookedAudioTransformer, items: Items, *, seed: int = 0, progress: bool | None = None
) -> dict[str, Result]:
    """In which layers can what is heard be read by linear probes that never saw the speaker?

    Probed is the first of these of which two classes are of several groups each: the answer, a
    label of the items, the words that are said. The answer is read where its word is said, if
    every item has that word once, and at the last position of the decoder.
    """
    sklearn("linear_model")  # raises now what it would raise later
    told, label = _to_tell(items)
    spoken = label == WORD or (label == "answer" and all(map(_answer_words, items)))
    heard: Place = _word if spoken else "audio"
    options: dict[str, Any] = {"seed": seed, "progress": progress}
    results: dict[str, Result] = {}
    if site_of_streams(model).startswith("encoder"):
        results["encoder"] = layers(model, told, label, where=heard, **options)
    if model.cfg.decoder is not None:
        where: Place = _word if label == WORD else "last"
        results["decoder"] = layers(
            model, told, label, site="decoder.resid_post", where=where, **options
        )
    for result in results.values():
        result.report.insert(0, f"Probed is {label}.")
    return results


def _to_tell(items: Items) -> tuple[Items, str]:
    """What is probed, and the label."""
    names = [n for n in dict.fromkeys(n for item in items for n in item.labels) if n != WORD]
    for name in ("answer", *names):
        if all(item.value(name) is not None for item in items) and _crosses(items, name):
            return items, name
    spoken = [one for item in items for one in _by_word(item)]
    if spoken and _crosses(Items(spoken), WORD):
        return Items(spoken), WORD
    raise ItemError(
        "nothing to probe: of no label of the items, and of no words, are there two classes that "
        "two groups have"
    )


def _crosses(items: Items, label: str) -> bool:
    """Whether two values of a label are of several groups each."""
    groups: dict[Any, set] = {}
    for item in items:
        groups.setdefault(item.value(label), set()).add(item.group or item.id)
    return sum(len(held) > 1 for held in groups.values()) > 1


def _by_word(item: Item) -> Iterator[Item]:
    """The item once for each of its words."""
    for number, word in enumerate(map(Span.of, item.words)):
        if word.label:
            labels = {**item.labels, WORD: word.label}
            yield item.replaced(id=f"{item.id}-{number}", labels=labels, words=[word])


def _answer_words(item: Item) -> bool:
    return [Span.of(word).label for word in item.words].count(item.answer) == 1


def _word(item: Item) -> Span:
    """The word that is probed: the only one, or that of the answer."""
    words = [Span.of(word) for word in item.words]
    return words[0] if len(words) == 1 else next(w for w in words if w.label == item.answer)
