"""The metrics of every item under edits: the loop that methods over items share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens import metrics
from audio_lens.edits.edit import Edit
from audio_lens.errors import InputError
from audio_lens.inputs import AudioInputs
from audio_lens.items.batches import Batch
from audio_lens.items.items import Items
from audio_lens.items.pairs import PairBatch, Pairs
from audio_lens.metrics import Metric
from audio_lens.models import HookedAudioTransformer
from audio_lens.patching import run
from audio_lens.progress import track

Cell = tuple[AudioInputs, Sequence[Edit]] | tuple[AudioInputs, Sequence[Edit], Sequence[int]]


@dataclass(frozen=True)
class Measured:
    """What was measured of every item.

    Attributes:
        metrics: their names.
        values: in double precision; every batch gave equally many cells.
    """

    metrics: list[str]
    values: Float[Tensor, "n metrics cells"]


def measured(
    model: HookedAudioTransformer,
    items: Items | Pairs,
    cells: Callable[[Any], Iterable[Cell]],
    metric: Any = None,
    *,
    size: int = 16,
    what: str = "items",
    progress: bool | None = None,
) -> Measured:
    """Every metric of every item in every cell; batches hold items of equal layout.

    Args:
        model: the model.
        items: items, or pairs, whose answers are those of the clean side.
        cells: what runs for a `Batch` (of pairs, a `PairBatch`): inputs and the edits in force,
            none for an unedited run. Cells of the same inputs that follow each other start from
            one unedited run (`patching.run`). Each batch gives the same cells, in one order. A
            third entry names the items whose answers are measured in the rows of the batch, where
            these are not its own: how would this run do as an answer to another item?
        metric: one metric, or several by name; of one word for each item where they name words.
            None takes the log-probability and the logit difference of the items' answers.
        size: of the batches.
        what: said beside the progress.
        progress: as in `patching.sweep`.

    Raises:
        ItemError: items without answers of one token each, where ``metric`` is None, or that
            cannot be prepared.
        InputError: a metric of words for another number of items, or batches of unequal cells.
    """
    asked = items.clean if isinstance(items, Pairs) else items
    wanted = asked.metrics(model) if metric is None else metrics.named(metric)
    metrics.check(wanted)
    _of_rows(wanted, range(len(asked)), len(asked))
    found: Tensor | None = None
    with track(what, len(asked), "items", show=progress) as advance:
        done = 0
        for batch in items.batches(model, size):
            values = _of_batch(model, batch, cells(batch), wanted, len(asked))
            if found is None:
                found = torch.full((len(asked), *values.shape[1:]), torch.nan, dtype=torch.float64)
            if values.shape[1:] != found.shape[1:]:
                raise InputError(f"{values.shape[-1]} cells of a batch, of others {len(found[0])}")
            found[batch.rows] = values
            done += len(batch)
            advance(len(batch), done)
    if found is None:
        raise InputError("no batch holds an item")
    return Measured(list(wanted), found)


def _of_batch(
    model: HookedAudioTransformer,
    batch: Batch | PairBatch,
    cells: Iterable[Cell],
    wanted: Mapping[str, Any],
    count: int,
) -> Float[Tensor, "b metrics cells"]:
    own = _of_rows(wanted, batch.rows, count)
    columns = []
    for inputs, edits, *of in cells:
        asked = _of_rows(wanted, of[0], count) if of else own
        told = cast(dict[str, Tensor], run(model, inputs, edits, asked))
        columns.append(torch.stack([_by_row(told[n], n, len(batch)) for n in own], dim=1))
    return torch.stack(columns, dim=-1)


def _of_rows(wanted: Mapping[str, Any], rows: Sequence[int], count: int) -> dict[str, Any]:
    """The metrics of some items; a function of logits is of any."""
    return {
        name: one.of_rows(rows, count) if isinstance(one, Metric) else one
        for name, one in wanted.items()
    }


def _by_row(value: Tensor, name: str, count: int) -> Float[Tensor, " b"]:
    if value.shape != (count,):
        raise InputError(
            f"metric {name!r} gives {list(value.shape)} for {count} items: over items it must give "
            "one value for each"
        )
    return value.detach().double().cpu()
