"""Subspaces from activations: differences of pairs, shared directions, classes, dictionaries."""

from __future__ import annotations

import importlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens.analysis.subspaces.subspace import Subspace, orthonormal
from audio_lens.arguments import whole
from audio_lens.errors import ExtraError, InputError
from audio_lens.items import Activations, Items, Pairs, collect
from audio_lens.items.collect import Place
from audio_lens.models import HookedAudioTransformer

Kind = Literal["difference", "cca", "lda", "columns"]
Given = Activations | Tensor
SHARED = 0.9  # canonical correlation on held-out rows from which on a direction is kept
HELD_OUT = 4  # a quarter of the rows
VARIANCE = 0.99  # of each side that canonical correlations are looked for in
TINY = 1e-6  # of the largest singular value


@dataclass(frozen=True)
class _Rows:
    """Rows of a site, and what is known of them."""

    x: Float[Tensor, "n d"]
    site: str | None
    layer: int | None
    meta: dict[str, str]

    @staticmethod
    def of(given: Given, site: str | None, layer: int | None) -> _Rows:
        if not isinstance(given, Activations):
            return _Rows(_matrix(given), site, layer, {})
        site = given.sites[0] if site is None else site
        known = given.layers(site)
        if layer is None and len(known) == 1:
            layer = known[0]
        kept = {name: text for name, text in given.meta.items() if isinstance(text, str)}
        return _Rows(_matrix(given.array(site, layer)), site, layer, kept)


def basis(
    activations: Given | tuple[Given, Given],
    kind: str = "difference",
    *,
    rank: int | None = None,
    labels: str | Sequence[Hashable] | None = None,
    site: str | None = None,
    layer: int | None = None,
) -> Subspace:
    """The subspace of a site that activations show, its directions in order.

    - "difference": what changes between the sides of pairs: uncentred principal directions of
      their differences. Of both sides, ``(clean, corrupted)``, row by row; of a tensor, whose rows
      are differences already; of `Activations` alone, whose rows differ from their mean.
    - "cca": what two conditions share, such as two speakers saying the same: ``(one, other)``,
      row by row. Canonical directions of the first, fitted on the first three quarters of the rows
      and kept where the last quarter, too, is correlated by more than 0.9 (the best, if none is).
    - "lda": what tells classes apart (extra ``probe``), which ``labels`` name.
    - "columns": directions that are given, ``d k``, the first of them first: of a dictionary
      (``autoencoder.directions[latents].T``), or of probes.

    Directions that are learned by exchanging them ("das") are those of `interchange.das`.

    Rows of one clip are no independent samples: test what you find on other clips, best of other
    speakers.

    Args:
        activations: `Activations`, or a tensor ``n d``; see above.
        kind: see above.
        rank: how many directions to keep; None keeps all that carry anything.
        labels: of every row, or the label's name, where they are `Activations`.
        site, layer: which of `Activations`; of tensors, what they are of.

    Raises:
        InputError: another kind, sides that do not fit together, labels that are missing, fewer
            directions than asked for, or values that are no numbers.
        ActivationsError: a site, layer or label that was not collected.
        ExtraError: without scikit-learn.
    """
    if kind == "das":
        raise InputError(
            "the directions of 'das' are learned from runs, not from activations: "
            "interchange.das(model, pairs, site, where, layer=, rank=) gives them as a Subspace, "
            "which curve, effects and iia take"
        )
    if kind not in get_args(Kind):
        raise InputError(f"kind is one of {', '.join(get_args(Kind))}, got {kind!r}")
    if rank is not None:
        whole("rank", rank, least=1)
    if kind != "lda" and labels is not None:
        raise InputError(f"labels are for kind 'lda', not for {kind!r}")
    is_two = isinstance(activations, (tuple, list))
    sides = [_Rows.of(x, site, layer) for x in (activations if is_two else [activations])]
    if len(sides) != 2 and (is_two or kind == "cca"):
        raise InputError(f"{kind!r} takes two sides, (one, other), got {len(sides)}")
    if is_two and kind not in ("difference", "cca"):
        raise InputError(f"{kind!r} takes one set of rows, not two sides")
    if is_two and sides[0].x.shape != sides[1].x.shape:
        shapes = " and ".join(str(list(side.x.shape)) for side in sides)
        raise InputError(f"the rows of both sides belong together, and they are {shapes}")
    vectors, strengths = _found(kind, activations, [side.x for side in sides], labels)
    count = vectors.shape[1] if rank is None else rank
    if not 0 < count <= vectors.shape[1]:
        raise InputError(f"{kind!r} finds {vectors.shape[1]} directions here, and {rank} are asked")
    first, kept = sides[0], None if strengths is None else strengths[:count].float()
    told = {"site": first.site, "layer": first.layer, "kind": kind}
    meta = first.meta | {"rows": str(len(first.x))} if kind != "columns" else first.meta
    return Subspace(orthonormal(vectors[:, :count]).float(), strengths=kept, meta=meta, **told)


def _found(
    kind: str, given: Any, sides: Sequence[Tensor], labels: str | Sequence[Hashable] | None
) -> tuple[Float[Tensor, "d k"], Float[Tensor, " k"] | None]:
    """Directions in order, and what each has."""
    first = sides[0]
    if kind == "columns":
        return first, None
    if kind == "cca":
        return canonical(*sides)
    if kind == "lda":
        if isinstance(labels, str) and isinstance(given, Activations):
            labels = given.values(labels)
        if labels is None or isinstance(labels, str) or len(labels) != len(first):
            raise InputError(f"'lda' needs a label for each of the {len(first)} rows")
        return discriminants(first, list(labels))
    if len(sides) == 2:
        first = first - sides[1]
    elif isinstance(given, Activations):
        first = first - first.mean(0)
    return principal(first)


def principal(rows: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "d k"], Float[Tensor, " k"]]:
    """The directions of the largest sums of squares (uncentred), and the roots of these.

    Raises:
        InputError: rows that are all 0.
    """
    _, strengths, directions = torch.linalg.svd(rows, full_matrices=False)
    is_there = strengths > TINY * strengths[0]
    if not is_there.any():
        raise InputError("all differences are 0: no direction carries anything")
    return directions[is_there].mT, strengths[is_there]


def canonical(
    one: Float[Tensor, "n d"], other: Float[Tensor, "n d"]
) -> tuple[Float[Tensor, "d k"], Float[Tensor, " k"]]:
    """The directions of one side that the other predicts, and their correlations on rows apart.

    Raises:
        InputError: fewer than eight rows, or a side that does not vary.
    """
    fitted = len(one) - len(one) // HELD_OUT
    if len(one) < 2 * HELD_OUT:
        raise InputError(f"canonical correlations need {2 * HELD_OUT} rows or more, got {len(one)}")
    sides = [side - side[:fitted].mean(0) for side in (one, other)]
    whiten = [_whitening(side[:fitted]) for side in sides]
    white = [side @ w for side, w in zip(sides, whiten, strict=True)]
    left, _, right = torch.linalg.svd(white[0][:fitted].mT @ white[1][:fitted], full_matrices=False)
    scores = white[0][fitted:] @ left, white[1][fitted:] @ right.mT
    scores = [score - score.mean(0) for score in scores]
    over, under = (scores[0] * scores[1]).sum(0), scores[0].norm(dim=0) * scores[1].norm(dim=0)
    found = over / under.clamp(min=1e-30)
    order = found.argsort(descending=True)
    kept = order[: max(1, int((found > SHARED).sum()))]
    return (whiten[0] @ left)[:, kept], found[kept]


def _whitening(rows: Float[Tensor, "n d"]) -> Float[Tensor, "d m"]:
    """To uncorrelated scores of equal length, of the directions that hold most of the variance."""
    _, strengths, directions = torch.linalg.svd(rows, full_matrices=False)
    held = strengths.square().cumsum(0) / strengths.square().sum().clamp(min=1e-300)
    if not strengths[0] > 0:
        raise InputError("a side does not vary: nothing is correlated with it")
    count = min(int((held < VARIANCE).sum()) + 1, max(1, len(rows) // 2))
    return directions[:count].mT / strengths[:count]


def discriminants(
    rows: Float[Tensor, "n d"], labels: Sequence[Hashable]
) -> tuple[Float[Tensor, "d k"], Float[Tensor, " k"]]:
    """The directions that tell classes apart, and how much each of what they tell.

    The spread within classes is shrunk (Ledoit and Wolf).

    Raises:
        InputError: fewer than two classes, or a class for each row.
        ExtraError: without scikit-learn.
    """
    number = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    if not 1 < len(number) < len(labels):
        raise InputError(f"'lda' needs two classes or more of several rows, got {len(number)}")
    try:
        lda = importlib.import_module("sklearn.discriminant_analysis")
        covariance = importlib.import_module("sklearn.covariance")
    except ImportError as error:
        raise ExtraError(
            "kind 'lda' needs scikit-learn, which the extra probe brings: "
            "pip install 'audio_lens[probe]'"
        ) from error
    spread = covariance.LedoitWolf()
    model = lda.LinearDiscriminantAnalysis(solver="eigen", covariance_estimator=spread)
    model.fit(rows.numpy(), [number[label] for label in labels])
    count = min(len(number) - 1, rows.shape[1])
    vectors = torch.tensor(model.scalings_[:, :count].copy())
    return vectors, torch.tensor(model.explained_variance_ratio_[:count].copy())


def differences(
    model: HookedAudioTransformer,
    pairs: Pairs[Items],
    site: str,
    where: Place = "all",
    *,
    layer: int | None = None,
    progress: bool | None = None,
) -> Float[Tensor, "n d"]:
    """What is different between the sides of pairs at every position, clean minus corrupted.

    Raises:
        SiteError: a site or layer that is not there.
        InputError: a place that selects nothing in some item.
    """
    clean, corrupted = both_sides(model, pairs, site, where, layer=layer, progress=progress)
    return _Rows.of(clean, None, None).x - _Rows.of(corrupted, None, None).x


def both_sides(
    model: HookedAudioTransformer,
    pairs: Pairs[Items],
    site: str,
    where: Place = "all",
    *,
    layer: int | None = None,
    progress: bool | None = None,
) -> tuple[Activations, Activations]:
    """The activations of both sides of pairs, row by row those of the same positions.

    Raises:
        SiteError: a site or layer that is not there.
        InputError: a place that selects nothing in some item.
    """
    layers = None if layer is None else [layer]
    clean, corrupted = (
        collect(model, side, site, where, layers=layers, progress=progress)
        for side in (pairs.clean, pairs.corrupted)
    )
    return clean, corrupted


def _matrix(given: Any) -> Float[Tensor, "n d"]:
    if not isinstance(given, Tensor) or given.ndim != 2 or not given.numel():
        what = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise InputError(f"activations are `Activations` or a tensor n d, got {what}")
    if not bool(given.isfinite().all()):
        raise InputError("some activations are no finite numbers")
    return given.detach().double().cpu()
