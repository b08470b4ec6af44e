"""What a model makes of reconstructions in place of its activations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from audio_lens import edits, metrics
from audio_lens.analysis.autoencoders.autoencoder import Autoencoder
from audio_lens.analysis.encoder_lens.said import error_rates, measured_with_right, transcripts
from audio_lens.analysis.encoder_lens.streams import written
from audio_lens.arguments import listed
from audio_lens.edits import Edit
from audio_lens.errors import InputError
from audio_lens.items import Batch, ItemError, Items, found, method
from audio_lens.items.collect import Place, by_item
from audio_lens.items.measuring import Cell
from audio_lens.models import HookedAudioTransformer
from audio_lens.progress import track
from audio_lens.results import Result
from audio_lens.running import evaluating

UNEDITED, MEAN = "unedited", "mean"
CONTROLS = (UNEDITED, MEAN)
WER = "wer"


def place_of(
    autoencoder: Autoencoder, site: str | None, layer: int | None
) -> tuple[str, int | None]:
    """Where an autoencoder belongs.

    Raises:
        InputError: where nobody says.
    """
    if site is None and autoencoder.site is None:
        raise InputError("this autoencoder does not say whose activations it is of: name site=")
    if site is None:
        return str(autoencoder.site), autoencoder.layer if layer is None else layer
    return site, layer


@method("autoencoders.splice")
def splice(
    model: HookedAudioTransformer,
    items: Items,
    autoencoder: Autoencoder,
    *,
    site: str | None = None,
    layer: int | None = None,
    where: Place = "audio",
    metric: Any = None,
    controls: Sequence[str] = CONTROLS,
    by: str | None = None,
    size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """What is answered when reconstructions stand in place of activations.

    Small errors may hold what the answer needs, and large ones nothing: this says which. Controls:
    "unedited" is the model as it is, "mean" has the mean over the prompts of a batch everywhere in
    place, which is what is answered without anything of these activations.

    Args:
        model: the model.
        items: what it hears.
        autoencoder: of activations of this model.
        site, layer: where it is put; None takes the autoencoder's own.
        where: at which positions, best those that it was trained on.
        metric: one metric, or several by name; "wer" writes transcripts and compares them with the
            items' answers (extra ``asr``); None takes "right" and the items' own. Of a loss, the
            log-probability is its negative.
        controls: of "unedited" and "mean".
        by: a label whose values are drawn in place of items for intervals, such as "group".
        size: of the batches.
        seed: of the interval.
        progress: as in `patching.sweep`.

    Raises:
        InputError: an autoencoder without a site, of another width, or other controls.
        ItemError: items without answers, where ``metric`` needs them.
    """
    asked = listed("controls", controls, str, "names")
    if odd := [name for name in asked if name not in CONTROLS]:
        raise InputError(f"controls are some of {', '.join(CONTROLS)}, got {odd[0]!r}")
    site, layer = place_of(autoencoder, site, layer)
    dos: dict[str, edits.Do | None] = {
        UNEDITED: None,
        MEAN: edits.Put(MEAN),
        "spliced": edits.Reconstruct(autoencoder),
    }
    dos = {name: do for name, do in dos.items() if name == "spliced" or name in asked}
    places = by_item(where, items)

    def cells(batch: Batch) -> Iterator[Cell]:
        here: Any = where if places is None else [places[row] for row in batch.rows]
        for do in dos.values():
            yield batch.inputs, [] if do is None else [Edit(site, do, layer=layer, where=here)]

    with evaluating(model):
        if isinstance(metric, str):
            names, values = _written(model, items, cells, metric, size, progress)
        else:
            names, values = measured_with_right(
                model, items, cells, metric, size=size, what="splice", progress=progress
            )
    columns = dict(zip(dos, values.unbind(-1), strict=True))

    def result(values: torch.Tensor, **beside: Any) -> Result:
        return found(values, {"metric": names}, items, by=by, seed=seed, **beside)

    held = {name: result(one) for name, one in columns.items() if name != "spliced"}
    return result(
        columns["spliced"],
        controls=held,
        meta={"site": site, "layer": str(layer), "title": f"reconstructions at {site}"},
        report=[_said(name, row, columns) for row, name in enumerate(names)],
    )


def _said(name: str, row: int, columns: dict[str, torch.Tensor]) -> str:
    means = {cell: values[:, row].mean().item() for cell, values in columns.items()}
    said = f"{name}: " + ", ".join(f"{cell} {mean:.4g}" for cell, mean in means.items())
    if set(CONTROLS) <= means.keys() and means[UNEDITED] != means[MEAN]:
        share = (means["spliced"] - means[MEAN]) / (means[UNEDITED] - means[MEAN])
        said += f"; reconstructions keep {share:.3g} of the way from mean to unedited"
    return said


def _written(
    model: HookedAudioTransformer,
    items: Items,
    cells: Any,
    metric: str,
    size: int,
    progress: bool | None,
) -> tuple[list[str], torch.Tensor]:
    """The word error rate of every item in every cell."""
    if metric != WER:
        raise InputError(f"metric is metrics, or {WER!r}, got {metric!r}")
    truth = transcripts(items)
    if truth is None:
        raise ItemError("items have neither answers nor words to compare transcripts with")
    metrics.wer(truth[0], truth[0])  # raises now what it would raise later
    texts: list[list[str]] = [[] for _ in items]
    with track("transcripts", len(items), "items", show=progress) as advance:
        done = 0
        for batch in items.batches(model, size):
            for inputs, laid, *_ in cells(batch):
                said = written(model, inputs, laid)
                for row, text in zip(batch.rows, said, strict=True):
                    texts[row].append(text)
            done += len(batch)
            advance(len(batch), done)
    return [WER], error_rates(truth, texts)[:, None]
