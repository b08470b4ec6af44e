"""Residual erasure: what the answers lose when layers are skipped, one by one or more and more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens import metrics
from audio_lens.analysis.adapters.streams import (
    beside_none,
    part_to_read,
    stages_of,
    streams_of_part,
)
from audio_lens.analysis.encoder_lens.said import answer_tokens
from audio_lens.edits import Edit, Put
from audio_lens.errors import InputError
from audio_lens.items import Batch, Items, found, measured, method
from audio_lens.items.measuring import Cell
from audio_lens.models import HookedAudioTransformer
from audio_lens.results import Result

METRICS = ("score", "right", "confidence", "loss")
CONFIDENCE, LOSS = 0.5, -0.1  # their weights in the score, as the paper's code has them
ONE, TOP, BOTTOM = "one", "from_top", "from_bottom"
IDENTITY = "identity"


@method("adapters.erasure")
def erasure(
    model: HookedAudioTransformer,
    items: Items,
    *,
    part: str | None = None,
    controls: bool = True,
    by: str | None = None,
    size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """What the answers lose when layers are skipped: residual erasure (2509.08454).

    A skipped layer gives what enters it: "one" skips a layer alone, "from_top" it and all behind,
    "from_bottom" it and all before. Each metric is that of the whole model minus that without:
    "right" (whether the answer is likeliest), "confidence" (the largest probability), "loss"
    (negative log-probability of the answer, nats), and "score" = right + 0.5 confidence - 0.1 loss:
    positive where a layer helps. Controls: "identity" gives a layer's own output back, and, for a
    model with a live adapter, "no_adapter" is the same without it.

    Args:
        model: with or without an adapter.
        items: with answers of one token, or classes.
        part: "encoder" or "decoder"; None takes the encoder, or else the decoder.
        controls, by, size, progress: as in `alignment`.
        seed: of intervals.

    Raises:
        InputError: a part without blocks, or an encoder whose blocks are read beside each other.
        ItemError: items without such answers.
    """
    part = part_to_read(model, part)
    if taps := getattr(getattr(model, "connector", None), "taps", ()) if part == "encoder" else ():
        raise InputError(
            f"the connector reads blocks {', '.join(map(str, taps))} of the encoder together: no "
            "stream can stand for all"
        )
    n_layers = model.cfg.parts[part].n_layers
    layers = list(range(n_layers))
    axes = {"metric": [*METRICS], "erased": [ONE, TOP, BOTTOM], "layer": layers}

    def of_model(what: str) -> Float[Tensor, "n metrics cells"]:
        title = f"erasure {what}".strip()
        return _lost(model, items, part, controls and not what, size, title, progress)

    lost, others = beside_none(model, controls, of_model)
    n_cells = len(axes["erased"]) * n_layers

    def result(values: Float[Tensor, "n metrics cells"], **beside: Any) -> Result:
        shaped = values[..., :n_cells].unflatten(-1, (len(axes["erased"]), n_layers))
        return found(shaped, axes, items, by=by, seed=seed, **beside)

    beside = {name: result(values) for name, values in others.items()}
    if controls:
        own = {"metric": [*METRICS], "layer": layers}
        beside[IDENTITY] = found(lost[..., n_cells:], own, items, by=by, seed=seed)
    return result(
        lost,
        controls=beside,
        meta={"part": part, "value": "whole model minus without"},
        report=_told(lost.mean(0)[..., :n_cells].unflatten(-1, (3, n_layers)), beside),
    )


def _lost(
    model: HookedAudioTransformer,
    items: Items,
    part: str,
    with_identity: bool,
    size: int,
    title: str,
    progress: bool | None,
) -> Float[Tensor, "n metrics cells"]:
    """`METRICS` of the whole model minus those of every cell."""

    def cells(batch: Batch) -> Iterator[Cell]:
        yield batch.inputs, []
        for edit in _edits(model, batch, part, with_identity):
            yield batch.inputs, [edit]

    wanted = {
        "log_prob": items.metrics(model)["log_prob"],
        "top": metrics.read_at(lambda logits: logits.argmax(-1).double(), name="top"),
        "confidence": metrics.read_at(
            lambda logits: logits.softmax(-1).amax(-1).double(), name="confidence"
        ),
    }
    runs = measured(model, items, cells, wanted, size=size, what=title, progress=progress)
    values = dict(zip(runs.metrics, runs.values.unbind(1), strict=True))
    right = (values["top"] == answer_tokens(model, items)[:, None]).double()
    each = {"right": right, "confidence": values["confidence"], "loss": -values["log_prob"]}
    lost = {name: one[:, :1] - one[:, 1:] for name, one in each.items()}
    score = lost["right"] + CONFIDENCE * lost["confidence"] + LOSS * lost["loss"]
    return torch.stack([score, *lost.values()], dim=1)


def _edits(
    model: HookedAudioTransformer, batch: Batch, part: str, with_identity: bool
) -> Iterator[Edit]:
    """What skips layers: one, from the top, from the bottom; and at last what skips none."""
    stages = stages_of(model, part)
    streams = streams_of_part(model, batch.inputs, part)
    layers, last = range(len(stages)), len(stages) - 1

    def given(stream: int, layer: int) -> Edit:
        return Edit(f"{part}.{stages[layer]}", Put(streams[stream]), layer=layer)

    yield from (given(layer, layer) for layer in layers)
    yield from (given(layer, last) for layer in layers)
    yield from (given(0, layer) for layer in layers)
    if with_identity:
        yield from (given(layer + 1, layer) for layer in layers)


def _told(lost: Float[Tensor, "metrics erased layers"], beside: Mapping[str, Result]) -> list[str]:
    score, right = lost[0], lost[1]
    most = int(score[0].argmax())
    told = [
        f"Layer {most} has the highest score, {score[0, most]:.2f}: skipped alone, "
        f"{right[0, most]:.2f} of the answers are lost."
    ]
    idle = (score[0].abs() < 0.01).nonzero().flatten().tolist()
    if idle:
        told.append(f"Skipped alone, these change next to nothing: {', '.join(map(str, idle))}.")
    if IDENTITY in beside:
        moved = float(beside[IDENTITY].values.abs().max())
        told.append(f"{IDENTITY}: {moved:.2g} at most.")
    told.append(
        "A skipped layer is far from anything that later layers were trained on: a loss says that "
        "they need it, not what for."
    )
    return told
