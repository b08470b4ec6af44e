"""What each layer adds to its stream: how much, and in which direction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens.analysis.adapters.streams import NO_ADAPTER, beside_none, kept, part_to_read
from audio_lens.items import Items, found, method
from audio_lens.items.collect import Chosen, Place, by_item
from audio_lens.models import HookedAudioTransformer
from audio_lens.places import Ground
from audio_lens.progress import track
from audio_lens.results import Result
from audio_lens.running import evaluating

LEAST_NORM = 1e-6  # as the paper's code bounds norms
RATIO, COSINE = "_ratio", "_cosine"


@method("adapters.contributions")
def contributions(
    model: HookedAudioTransformer,
    items: Items,
    *,
    part: str | None = None,
    where: Place | None = None,
    controls: bool = True,
    by: str | None = None,
    size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """How much each layer adds to what enters it, and whether along it or against (2509.08454).

    Of attention and MLP (and cross-attention) the norm of what is added by that of the stream that
    enters the block, "..._ratio", their sum "ratio", and the cosine of both, "..._cosine"; means
    over an item's positions. A negative cosine takes away what is there. Control, for a model with
    a live adapter: "no_adapter", the same without it.

    Args:
        model: with or without an adapter.
        items: what it hears.
        part: "encoder" or "decoder"; None takes the encoder, or else the decoder.
        where: which positions; None takes "audio" in an encoder and "all" in a decoder.
        controls, by, size, progress: as in `alignment`.
        seed: of intervals.

    Raises:
        InputError: a part without blocks, or a place that selects nothing in some item.
    """
    part = part_to_read(model, part)
    first: Any = model.part(part).blocks[0]
    writes = [str(one) for one in first.writes]
    names = [f"{one}{RATIO}" for one in writes] + ["ratio"] + [f"{one}{COSINE}" for one in writes]
    n_layers = model.cfg.parts[part].n_layers
    place = ("audio" if part == "encoder" else "all") if where is None else where
    places = by_item(place, items)
    axes = {"metric": names, "layer": list(range(n_layers))}

    def of_model(what: str) -> Float[Tensor, "n metrics layers"]:
        values = torch.zeros(len(items), len(names), n_layers, dtype=torch.float64)
        title = f"contributions {what}".strip()
        with evaluating(model), track(title, len(items), "items", show=progress) as advance:
            done = 0
            for batch in items.batches(model, size):
                here: Any = place if places is None else [places[row] for row in batch.rows]
                chosen = Chosen.of(Ground.of(model, batch.inputs, part), here, batch.rows)
                hooks = [
                    f"{part}.blocks.{layer}.hook_{one}"
                    for layer in range(n_layers)
                    for one in ("resid_pre", *writes)
                ]
                cache = kept(model, batch.inputs, part, hooks)
                for layer in range(n_layers):
                    one = [cache[f"{part}.blocks.{layer}.hook_{w}"] for w in ("resid_pre", *writes)]
                    told = _of_layer(*(x[chosen.mask.to(x.device)].double().cpu() for x in one))
                    values[batch.rows, :, layer] = chosen.mean(told)
                done += len(batch)
                advance(len(batch), done)
        return values

    values, others = beside_none(model, controls, of_model)
    beside = {name: found(one, axes, items, by=by, seed=seed) for name, one in others.items()}
    return found(
        values,
        axes,
        items,
        by=by,
        seed=seed,
        controls=beside,
        meta={"part": part, "value": "share of what enters, or cosine with it"},
        report=_told(values.mean(0), names, others),
    )


def _of_layer(
    entered: Float[Tensor, "n d"], *added: Float[Tensor, "n d"]
) -> Float[Tensor, "n metrics"]:
    level = entered.norm(dim=1).clamp(min=LEAST_NORM)
    ratios = [one.norm(dim=1) / level for one in added]
    cosines = [
        (one * entered).sum(1) / (one.norm(dim=1).clamp(min=LEAST_NORM) * level) for one in added
    ]
    return torch.stack([*ratios, torch.stack(ratios).sum(0), *cosines], dim=1)


def _told(
    means: Float[Tensor, "metrics layers"],
    names: Sequence[str],
    others: dict[str, Float[Tensor, "n metrics layers"]],
) -> list[str]:
    ratio = means[names.index("ratio")]
    told = [f"Layer {int(ratio.argmax())} adds most by what enters it: {ratio.max():.2f}."]
    for name in (name for name in names if name.endswith(COSINE)):
        row = means[names.index(name)]
        against = (row < 0).nonzero().flatten().tolist()
        shown = ", ".join(map(str, against)) or "none"
        told.append(f"{name.removesuffix(COSINE)} writes against the stream in layers: {shown}.")
    if NO_ADAPTER in others:
        moved = (means - others[NO_ADAPTER].mean(0))[names.index("ratio")]
        most = int(moved.abs().argmax())
        told.append(f"The adapter changes the ratio most in layer {most}: by {moved[most]:+.3f}.")
    return told
