"""Phonetic arithmetic: whether what tells two sounds apart tells others apart alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, permutations
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from audio_lens.analysis.phonology.features import Features, Pair, features, kinds_of
from audio_lens.analysis.phonology.sounds import Sounds
from audio_lens.arguments import whole
from audio_lens.errors import InputError
from audio_lens.items import found_by_name
from audio_lens.results import Result

OTHER, WITHOUT, PERMUTED = "other_sound", "no_arithmetic", "permuted_labels"
LEAST, DRAWS = 50, 200
FOR_ORDER = 3  # pairs of a kind, of which two differ alike and a third can be mismatched
CANNOT = (
    "That sounds add up says how activations lie, not that the model computes with these "
    "directions: steer along them."
)


def analogies(
    said: Sounds,
    known: Features | None = None,
    *,
    least: int = LEAST,
    draws: int = DRAWS,
    centre: bool = True,
    seed: int = 0,
) -> Result:
    """How near b + c - d comes to a, where a differs from b as c does from d (2602.18899).

    Of every four such sounds the mean cosine over samples drawn at random of each, all of unit
    length. Controls: "other_sound" holds another sound than a against the same sum; "no_arithmetic"
    holds a against b alone, which shares all features but those of the difference.

    Args:
        said: samples of sounds.
        known: their features; None asks panphon (extra ``phones``).
        least: samples that a sound must have.
        draws: of samples of each four.
        centre: whether the mean of all sounds' means is taken off at first. Activations share a
            large mean, which makes all cosines high; the published measure does not speak of it.
        seed: of draws and intervals.

    Returns:
        The cosine by four sounds and layer, with an interval over the fours.

    Raises:
        InputError: sounds among which no two pairs differ alike.
        ExtraError: as `features`.
    """
    whole("draws", draws, least=1)
    rows, kinds = _grouped(said, known, least, 2)
    values = _unit(said, rows, centre)
    fours = [(*one, *other) for pairs in kinds.values() for one, other in combinations(pairs, 2)]
    draw = torch.Generator().manual_seed(seed)
    names = [f"{a} = {b} + {c} - {d}" for a, b, c, d in fours]
    found: dict[str, list[Tensor]] = {"": [], OTHER: [], WITHOUT: []}
    labels = list(rows)
    for a, b, c, d in fours:
        others = [label for label in labels if label not in (a, b, c, d)]
        first, second, third, fourth = (_drawn(values, rows[x], draws, draw) for x in (a, b, c, d))
        total = second + third - fourth
        found[""].append(_cosine(first, total))
        found[WITHOUT].append(_cosine(first, second))
        if others:
            other = others[int(torch.randint(len(others), (), generator=draw))]
            found[OTHER].append(_cosine(_drawn(values, rows[other], draws, draw), total))
    axes = {"layer": list(said.layers)}
    controls = {
        name: found_by_name(torch.stack(found[name]), axes, names, seed=seed)
        for name in (OTHER, WITHOUT)
        if found[name]
    }
    result = found_by_name(torch.stack(found[""]), axes, names, seed=seed, controls=controls)
    return _told(result, f"{len(names)} fours of {len(rows)} sounds", "cosine", centre)


def consistency(
    said: Sounds,
    known: Features | None = None,
    *,
    least: int = LEAST,
    draws: int = DRAWS,
    controls: bool = True,
    seed: int = 0,
) -> Result:
    """How well pairs that differ alike are told from mismatched ones (PCS, 2602.18899).

    Of every kind of difference that three pairs or more have: the area under the ROC curve by
    which the cosine of two differences tells ``a - b`` and ``c - d`` of two pairs from ``a - b``
    and ``c - f`` of three, 0.5 by chance. The control "permuted_labels" gives the sounds each
    other's names.

    Args:
        said, known, least, draws, seed: as in `analogies`.
        controls: whether the control runs.

    Returns:
        The area by kind of difference (named by its first pair) and layer.

    Raises:
        InputError: sounds among which no three pairs differ alike.
        ExtraError: as `features`.
    """
    whole("draws", draws, least=1)
    rows, kinds = _grouped(said, known, least, FOR_ORDER)
    values = _unit(said, rows, centre=False)
    names = [f"{pairs[0][0]} - {pairs[0][1]}, {len(pairs)} pairs" for pairs in kinds.values()]
    axes = {"layer": list(said.layers)}

    def areas(of: Mapping[str, Int[Tensor, " _"]]) -> Float[Tensor, "kinds layers"]:
        draw = torch.Generator().manual_seed(seed)
        return torch.stack([_area(values, of, pairs, draws, draw) for pairs in kinds.values()])

    beside = {}
    if controls:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed + 1))
        permuted = dict(zip(rows, [list(rows.values())[i] for i in order.tolist()], strict=True))
        beside[PERMUTED] = found_by_name(areas(permuted), axes, names, seed=seed)
    result = found_by_name(areas(rows), axes, names, seed=seed, controls=beside)
    return _told(result, f"{len(names)} kinds of difference", "area under the ROC curve", False)


# -------------------------------------------------------------------------------- parts


def _grouped(
    said: Sounds, known: Features | None, least: int, pairs: int
) -> tuple[dict[str, Int[Tensor, " _"]], dict[tuple[int, ...], list[Pair]]]:
    """The rows of every sound that serves, and the kinds of difference with so many pairs."""
    whole("least", least, least=1)
    rows = {
        label: torch.tensor(said.of(label))
        for label in sorted(set(said.labels))
        if len(said.of(label)) >= least
    }
    known = features(rows) if known is None else known
    held = {label: known[label] for label in rows if label in known}
    kinds = kinds_of(held) if held else {}
    kept = {changed: found for changed, found in kinds.items() if len(found) >= pairs}
    if not kept:
        raise InputError(
            f"no {pairs} pairs of sounds differ alike among {len(held)} with features and {least} "
            f"samples or more ({', '.join(held) or 'none'}): lower least, or bring more speech"
        )
    return {label: rows[label] for label in held}, kept


def _unit(
    said: Sounds, rows: Mapping[str, Int[Tensor, " _"]], centre: bool
) -> Float[Tensor, "n layers d"]:
    """Samples of unit length, as they are or from the mean of all sounds on."""
    values = said.values.double()
    if centre:
        values = values - torch.stack([values[at].mean(0) for at in rows.values()]).mean(0)
    return F.normalize(values, dim=-1)


def _drawn(
    values: Float[Tensor, "n layers d"],
    rows: Int[Tensor, " _"],
    draws: int,
    draw: torch.Generator,
) -> Float[Tensor, "draws layers d"]:
    return values[rows[torch.randint(len(rows), (draws,), generator=draw)]]


def _cosine(
    one: Float[Tensor, "draws layers d"], other: Float[Tensor, "draws layers d"]
) -> Float[Tensor, " layers"]:
    return F.cosine_similarity(one, other, dim=-1).mean(0)


def _area(
    values: Float[Tensor, "n layers d"],
    rows: Mapping[str, Int[Tensor, " _"]],
    pairs: Sequence[Pair],
    draws: int,
    draw: torch.Generator,
) -> Float[Tensor, " layers"]:
    """How often two differences of a kind are more alike than mismatched ones, by layer."""
    alike, mismatched = combinations(pairs, 2), permutations(pairs, FOR_ORDER)
    matched = [(a, b, c, d) for (a, b), (c, d) in alike]
    crossed = [(a, b, c, f) for (a, b), (c, _), (_, f) in mismatched]
    own, other = (_cosines(values, rows, fours, draws, draw) for fours in (matched, crossed))
    ranked = other.sort(dim=0).values.mT.contiguous()
    asked = own.mT.contiguous()
    below = torch.searchsorted(ranked, asked) + torch.searchsorted(ranked, asked, right=True)
    return below.double().mean(1) / (2 * ranked.shape[1])


def _cosines(
    values: Float[Tensor, "n layers d"],
    rows: Mapping[str, Int[Tensor, " _"]],
    fours: Sequence[tuple[str, ...]],
    draws: int,
    draw: torch.Generator,
) -> Float[Tensor, "draws layers"]:
    """Of so many of some fours, each drawn at random, the cosine of both differences."""
    chosen = torch.randint(len(fours), (draws,), generator=draw).tolist()
    uniform = torch.rand(draws, 4, generator=draw)
    at = torch.stack(
        [
            torch.stack([rows[x][int(u * len(rows[x]))] for x, u in zip(fours[i], us, strict=True)])
            for i, us in zip(chosen, uniform.tolist(), strict=True)
        ]
    )
    first, second, third, fourth = values[at].unbind(1)
    return F.cosine_similarity(first - second, third - fourth, dim=-1)


def _told(result: Result, of: str, value: str, centre: bool) -> Result:
    means = {"": result, **result.controls}
    best = int(result.estimate.argmax()) if result.estimate is not None else 0
    layer = result.coords["layer"][best]
    levels: list[Any] = []
    for name, one in means.items():
        if one.estimate is not None:
            levels.append(f"{name or value} {float(one.estimate[best]):.2f}")
    result.meta |= {"value": value, "centre": str(centre)}
    result.report = [f"{of}; highest at layer {layer}: {', '.join(levels)}", CANNOT]
    return result
