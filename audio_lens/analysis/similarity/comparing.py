"""How alike the layers of a model, or of two, are over items, and what shape each has."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens.analysis.encoder_lens.streams import site_of_streams
from audio_lens.analysis.similarity.kernels import LEAST, gram, hsic_without, matrix
from audio_lens.analysis.similarity.shapes import SHAPES, by_row
from audio_lens.errors import InputError
from audio_lens.items import (
    Activations,
    Items,
    analysis,
    collect,
    found_by_name,
    method,
    statistics,
)
from audio_lens.items.collect import Place
from audio_lens.models import HookedAudioTransformer
from audio_lens.results import Result

OTHER, SAME_CLIP = "other_item", "another item has the same clip"
CANNOT = (
    "Alike layers tell items apart alike. That does not show what is told apart, nor that a later "
    "layer could read the one as it reads the other."
)
FEW = (
    "Of {n} items with {d} dimensions effective rank is at most {most}, and isotropy is held down: "
    "compare layers and models over equally many items."
)


@method("similarity.layers", whole="CKA is of all items: harvest activations, and compare these")
def layers(
    model: HookedAudioTransformer,
    items: Items,
    *,
    site: str | None = None,
    where: Place = "audio",
    controls: bool = True,
    by: str | None = None,
    size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """How alike every two layers are: unbiased linear CKA of the means over items' positions.

    An item's value is the CKA of all plus its influence (of the jackknife). The control
    "other_item" compares every item with another: near 0, whatever the layers.

    Args:
        model: the model.
        items: 5 or more; of several with one clip and the same place, take one.
        site: ``part.activation``; None takes the streams of the encoder, or else of the decoder.
        where: which positions, as in `items.collect`.
        controls: whether the control runs.
        by: a label whose values are drawn in place of items for intervals, such as "group".
        size: of the batches.
        seed: of control and intervals.
        progress: as in `patching.sweep`.

    Raises:
        InputError: fewer items, or a site without layers or with heads.
        As `items.collect`.
    """
    _check_count(len(items))
    acts = collect(
        model, items, site or site_of_streams(model), where, "mean", size=size, progress=progress
    )
    return between(acts, acts, controls=controls, by=by, seed=seed)


def between(
    first: Activations,
    second: Activations,
    *,
    site: str | None = None,
    other_site: str | None = None,
    controls: bool = True,
    by: str | None = None,
    seed: int = 0,
) -> Result:
    """How alike every layer of one model is to every one of another: unbiased linear CKA.

    Args:
        first, second: activations of the same items, one row for each (``pool="mean"``); of two
            models, two sites of one, or one twice.
        site, other_site: of the first and the second; None takes the first that was collected.
        controls, by, seed: as in `layers`.

    Raises:
        InputError: other items, fewer than 5 of them, or sites without layers or with heads.
        ActivationsError: a site or label that was not collected.
    """
    names, others = _names(first, site), _names(second, other_site)
    if names != others:
        raise InputError("both sides are of the same items in one order, one row for each")
    _check_count(len(names))
    x, y = _layers(first, site), _layers(second, other_site)
    axes = {"layer": list(x), "other_layer": list(y)}
    drawn = {"groups": None if by is None else first.values(by, site), "by": by, "seed": seed}
    values = _cka_by_item(list(x.values()), list(y.values()))
    beside: dict[str, Result] = {}
    if controls:
        order = statistics.other_item(len(names), seed=seed)
        swapped = _cka_by_item(list(x.values()), [held[order] for held in y.values()])
        beside[OTHER] = found_by_name(swapped, axes, names, **drawn)
    return found_by_name(
        values,
        axes,
        names,
        controls=beside,
        meta=_meta(first, site) | {"other_model": second.meta["model"], "value": "CKA"},
        report=[*_told(values.mean(0), axes, beside), CANNOT],
        **drawn,
    )


@method(
    "similarity.shape",
    whole="ranks and isotropy are of all items: harvest activations, and look at these",
)
def shape(
    model: HookedAudioTransformer,
    items: Items,
    *,
    site: str | None = None,
    where: Place = "audio",
    controls: bool = True,
    by: str | None = None,
    size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """What shape every layer has: norms, effective rank, isotropy, and how near the last it is.

    Metrics: "norm" and "cosine_to_last" are means over items; "effective_rank", "isotropy" and
    "mean_cosine" (of two items) are of all of them, and an item's value is that plus its
    influence. The control "norm_matched_noise" has the same of noise as long as every activation:
    what no structure gives, with so many items.

    Args:
        model, items, site, where, controls, by, size, seed, progress: as in `layers`.

    Raises:
        As `layers`.
    """
    acts = collect(
        model, items, site or site_of_streams(model), where, "mean", size=size, progress=progress
    )
    names, x = _names(acts, None), _layers(acts, None)
    if len(names) < 2:
        raise InputError("a shape is of two items or more")
    groups = None if by is None else acts.values(by)
    axes = {"metric": ["norm", "cosine_to_last", *SHAPES], "layer": list(x)}
    drawn = {"groups": groups, "by": by, "seed": seed}
    values = _shapes(list(x.values()))
    beside: dict[str, Result] = {}
    if controls:
        noise = [statistics.norm_matched_noise(held, seed + i) for i, held in enumerate(x.values())]
        beside["norm_matched_noise"] = found_by_name(_shapes(noise), axes, names, **drawn)
    n_dims = next(iter(x.values())).shape[1]
    few = FEW.format(n=len(names), d=n_dims, most=min(len(names) - 1, n_dims))
    return found_by_name(
        values,
        axes,
        names,
        controls=beside,
        meta=_meta(acts, None),
        report=[*_peaks(values.mean(0), axes), few],
        **drawn,
    )


def by_depth(result: Result) -> Result:
    """A result with its layers at relative depths, 0 for the first and 1 for the last.

    Curves of models with different numbers of layers can then be laid on each other.

    Raises:
        InputError: a result without layers.
    """
    dims = {"layer": "depth", "other_layer": "other_depth"}
    if "layer" not in result.dims:
        raise InputError(f"no layers to place: the result has {', '.join(result.dims)}")
    coords = {
        dims.get(name, name): _depths(along) if name in dims else along
        for name, along in result.coords.items()
    }
    return replace(
        result,
        dims=tuple(dims.get(name, name) for name in result.dims),
        coords=coords,
        controls={
            name: by_depth(one) if "layer" in one.dims else one
            for name, one in result.controls.items()
        },
    )


def _depths(along: Sequence[int]) -> list[float]:
    return [round(i / max(1, len(along) - 1), 6) for i in range(len(along))]


# -------------------------------------------------------------------------------- values


def cka_by_item(x: Float[Tensor, "n d"], y: Float[Tensor, "n e"]) -> Float[Tensor, " n"]:
    """Unbiased linear CKA of the same items in two spaces, plus every item's influence."""
    return _cka_by_item([x], [y])[:, 0, 0]


def _cka_by_item(
    x: Sequence[Float[Tensor, "n d"]], y: Sequence[Float[Tensor, "n e"]]
) -> Float[Tensor, "n layers others"]:
    """CKA of every two, plus every item's influence; their mean is the CKA."""
    ours, theirs = ([gram(held) for held in side] for side in (x, y))
    first, second = ([hsic_without(k, k) for k in side] for side in (ours, theirs))
    cells = [
        _influences(hsic_without(k, l), own, other)
        for k, own in zip(ours, first, strict=True)
        for l, other in zip(theirs, second, strict=True)
    ]
    return torch.stack(cells, dim=1).reshape(-1, len(ours), len(theirs))


def _influences(*hsics: tuple[Tensor, Tensor]) -> Float[Tensor, " n"]:
    """Of the HSIC across, of the first and of the second: of all items, and without each."""
    whole, without = (
        across / (own * other).clamp(min=0).sqrt()
        for across, own, other in zip(*hsics, strict=True)
    )
    return whole + (len(without) - 1) * (without.mean() - without)


def _shapes(x: Sequence[Float[Tensor, "n d"]]) -> Float[Tensor, "n metrics layers"]:
    found = []
    for held in x:
        own = [held.norm(dim=1), torch.cosine_similarity(held, x[-1], dim=1)]
        found.append(torch.stack(own + [by_row(one, held) for one in SHAPES.values()], dim=1))
    return torch.stack(found, dim=-1)


# -------------------------------------------------------------------------------- rows


def _layers(acts: Activations, site: str | None) -> dict[int, Float[Tensor, "n d"]]:
    if not (there := acts.layers(site)):
        raise InputError(f"{site or acts.sites[0]} has no layers to compare")
    return {layer: matrix(acts.array(site, layer)) for layer in there}


def _check_count(count: int) -> None:
    if count <= LEAST:
        raise InputError(f"CKA with an interval needs {LEAST + 1} items or more, got {count}")


def _names(acts: Activations, site: str | None) -> list[str]:
    numbers = acts.table(site)["item"].tolist()
    if len(set(numbers)) < len(numbers):
        raise InputError("items have several rows each: collect their means, pool='mean'")
    return [str(acts.index["items"][number]["id"]) for number in numbers]


def _meta(acts: Activations, site: str | None) -> dict[str, str]:
    return dict(acts.meta) | {"site": site or acts.sites[0]}


# -------------------------------------------------------------------------------- in words


def _told(
    cka: Float[Tensor, "layers others"], axes: Mapping[str, list], beside: Mapping[str, Result]
) -> list[str]:
    same = axes["layer"] == axes["other_layer"]
    neighbours = [float(cka[i, i + 1]) for i in range(len(cka) - 1)] if same else []
    told = []
    if neighbours:
        least = min(range(len(neighbours)), key=neighbours.__getitem__)
        pair = f"{axes['layer'][least]} and {axes['layer'][least + 1]}"
        told.append(f"Neighbours differ most between layers {pair}: {neighbours[least]:.3f}.")
        told.append(f"The first layer and the last: {float(cka[0, -1]):.3f}.")
    else:
        best = cka.argmax(1)
        pairs = [f"{a} {axes['other_layer'][b]}" for a, b in zip(axes["layer"], best, strict=True)]
        told.append(f"Most alike (layer, other layer): {', '.join(pairs)}.")
    for name, control in beside.items():
        told.append(f"{name}: {float(control.values.mean(0).abs().max()):.3f} at most, in size.")
    return told


def _peaks(shapes: Float[Tensor, "metrics layers"], axes: Mapping[str, list]) -> list[str]:
    told = []
    for name in ("effective_rank", "isotropy"):
        row = shapes[axes["metric"].index(name)]
        told.append(
            f"{name} is highest at layer {axes['layer'][int(row.argmax())]}: {row.max():.3g}"
        )
    return [f"{'; '.join(told)}. Both are candidates for a layer to read, chosen without labels."]


# -------------------------------------------------------------------------------- the command


@analysis("similarity")
def analyse(
    model: HookedAudioTransformer, items: Items, *, seed: int = 0, progress: bool | None = None
) -> dict[str, Result]:
    """Which layers are alike (CKA), and how many directions does each fill, how evenly?"""
    results: dict[str, Result] = {}
    options: dict[str, Any] = {"seed": seed, "progress": progress}
    if site_of_streams(model).startswith("encoder"):
        once = _one_per_clip(items)
        results |= {
            "encoder": layers(model, once, **options),
            "encoder_shape": shape(model, once, **options),
        }
        if lost := len(items) - len(once):
            for result in results.values():
                result.dropped = {SAME_CLIP: lost}
    if model.cfg.decoder is not None:
        last: dict[str, Any] = {"site": "decoder.resid_post", "where": "last"}
        results["decoder"] = layers(model, items, **last, **options)
        results["decoder_shape"] = shape(model, items, **last, **options)
    return results


def _one_per_clip(items: Items) -> Items:
    """The first item of every clip: an encoder hears the others no differently."""
    first: dict[Hashable, int] = {}
    for number, item in enumerate(items):
        clip = item.audio
        first.setdefault(str(clip) if isinstance(clip, (str, Path)) else id(clip), number)
    return items[sorted(first.values())]
