"""Information enrichment: an earlier, richer stream added to a later one (2506.05140)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens import metrics
from audio_lens.analysis.logit_lens.reading import LAST, Asked
from audio_lens.edits import Add, Edit, Enrich, Scale
from audio_lens.inputs import InputError
from audio_lens.items import Items, collect, found, measured, method
from audio_lens.items.batches import Batch
from audio_lens.items.collect import Place, by_item
from audio_lens.items.controls import norm_matched_noise, other_item
from audio_lens.models import HookedAudioTransformer
from audio_lens.places import Where
from audio_lens.results import Result

SITE = "decoder.resid_pre"
AMOUNTS = (0.2, 0.5, 1.0)
METRICS = ("accuracy", "log_prob")
Mode = Literal["add", "average"]
Rescale = Literal["none", "keep_norm"]


def enrich(
    source: int,
    target: int,
    c: float | int = 1.0,
    *,
    mode: Mode = "add",
    rescale: Rescale = "none",
    where: Where = LAST,
) -> list[Edit]:
    """The edits that add what enters block ``source`` to what enters block ``target``.

    They hold in every forward and in `generate`, where "last" is each new token, too:
    ``intervene(model, enrich(2, 4))``.

    Args:
        c: how much of it is added.
        mode: "add" gives h + c s, "average" divides that by 1 + c.
        rescale: "keep_norm" gives the sum the length that h had.
        where: the positions, each of which is enriched from itself.

    Raises:
        InputError: a target that is not behind the source, or an average that divides by 0.
    """
    _check_order(source, target)
    do = Enrich((source,), (1.0,), (target,), c, keep_norm=rescale == "keep_norm")
    first = Edit(SITE, do, layer=[source, target], where=where)
    return [first, *_averaged(target, c, mode, rescale, where)]


def _averaged(
    target: int, c: float | int, mode: Mode, rescale: Rescale, where: Where
) -> list[Edit]:
    """What makes an average of a sum; nothing where its length is given."""
    if mode == "add" or rescale == "keep_norm":
        return []
    if c == -1:
        raise InputError("an average with c = -1 divides by 0")
    return [Edit(SITE, Scale(1 / (1 + c)), layer=target, where=where)]


def _check_order(source: int, target: int) -> None:
    if not 0 <= source < target:
        raise InputError(f"the target lies behind the source, got {source} and {target}")


@dataclass(frozen=True)
class _Way:
    """How streams are enriched."""

    mode: Mode
    rescale: Rescale
    where: Place
    items: Items

    def places(self, rows: Sequence[int]) -> Where:
        each = by_item(self.where, self.items)
        return self.where if each is None else [each[row] for row in rows]

    def edit(self, source: int, target: int, c: float | int, rows: Sequence[int]) -> list[Edit]:
        where = self.places(rows)
        return enrich(source, target, c, mode=self.mode, rescale=self.rescale, where=where)

    def stand_in(
        self, vectors: Float[Tensor, "n d"], target: int, c: float | int, rows: Sequence[int]
    ) -> list[Edit]:
        """The same with other vectors, one for each item, in place of the earlier stream."""
        where = self.places(rows)
        do = Add(vectors[list(rows)][:, None], c, keep_norm=self.rescale == "keep_norm")
        added = Edit(SITE, do, layer=target, where=where)
        return [added, *_averaged(target, c, self.mode, self.rescale, where)]


@method("logit_lens.enrichment")
def enrichment(
    model: HookedAudioTransformer,
    items: Items,
    source: int,
    target: int,
    c: Any = AMOUNTS,
    *,
    mode: Mode = "add",
    rescale: Rescale = "none",
    where: Any = LAST,
    by: str | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """Answers with an earlier stream added to a later one, by how much of it is added.

    Controls: ``identity`` (none of it is added), ``other_item`` (the stream of an item with another
    answer), ``norm_matched_noise`` (a random vector of the same norm).

    Args:
        model: the model; its decoder's streams are enriched.
        items: what it hears, with answers.
        source, target: the stream that enters block ``source`` is added to the one that enters
            block ``target``, at the same positions.
        c: how much of it, one amount or several.
        mode, rescale: as in `enrich`.
        where: the positions.
        by, seed, progress: as in `information`.

    Raises:
        InputError: a target that is not behind the source, no amounts, or a model without a
            decoder that writes text.
        SiteError: a layer that is not there.
        ItemError, TokenError, ControlError: as `information`.
    """
    _check_order(source, target)
    amounts = [float(one) for one in (c if isinstance(c, Sequence) else [c])]
    if not amounts:
        raise InputError("no amounts: c is a number or several")
    asked = _asked(model, items)
    others = other_item(len(items), asked.right.tolist(), seed=seed)
    way = _Way(mode, rescale, where, items)
    own = collect(model, items, SITE, where, "mean", layers=[source], progress=progress).array()
    noise = norm_matched_noise(own, seed)

    def cells(batch: Batch) -> Iterable[tuple[Any, list[Edit]]]:
        rows = batch.rows
        yield batch.inputs, []
        yield batch.inputs, way.edit(source, target, 0.0, rows)
        for amount in amounts:
            yield batch.inputs, way.edit(source, target, amount, rows)
        for vectors in (own[others], noise):
            for amount in amounts:
                yield batch.inputs, way.stand_in(vectors, target, amount, rows)

    values = _answers(model, items, asked, cells, progress)
    n = len(amounts)
    plain, none, enriched, other, random = values.split([1, 1, n, n, n], dim=-1)

    def of(part: Tensor, **beside: Any) -> Result:
        axes: dict[str, Sequence[Any]] = {"metric": list(METRICS)}
        axes |= {} if part.ndim == 2 else {"c": amounts}
        return found(part, axes, items, by=by, seed=seed, **beside)

    controls = {
        "identity": of(none[..., 0]),
        "other_item": of(other),
        "norm_matched_noise": of(random),
    }
    return of(
        enriched,
        controls=controls,
        meta={"source": str(source), "target": str(target), "mode": mode, "rescale": rescale},
        report=[_said(plain, enriched, other, amounts, source, target)],
    )


def _said(
    plain: Float[Tensor, "n 2 1"],
    enriched: Float[Tensor, "n 2 c"],
    other: Float[Tensor, "n 2 c"],
    amounts: Sequence[float],
    source: int,
    target: int,
) -> str:
    before, after = plain[:, 0, 0].mean(), enriched[:, 0].mean(0)
    best = int(after.argmax())
    helps = "more" if after[best] > before else "no more"
    return (
        f"Layer {source} added to layer {target}: {helps} items are right than without it "
        f"({before:.2f}), at best {after[best]:.2f} with c = {amounts[best]:g}. Another item's "
        f"stream gives {other[:, 0, best].mean():.2f} there."
    )


@method("logit_lens.grid")
def grid(
    model: HookedAudioTransformer,
    items: Items,
    sources: Any = None,
    targets: Any = None,
    c: Any = AMOUNTS,
    *,
    mode: Mode = "add",
    rescale: Rescale = "none",
    where: Any = LAST,
    by: str | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """What every source, target and amount of enrichment gives, to choose among on items apart.

    Axes are "source", "target" and "c"; NaN where the target is not behind the source. The values
    are those of many tries: take the best to other items, as `selected` does.

    Args:
        sources, targets: layers; None takes all.
        c: amounts.
        mode, rescale, where, by, seed, progress: as in `enrichment`.

    Raises:
        InputError: no pair of a source and a target behind it.
        ItemError, TokenError: as `information`.
    """
    asked = _asked(model, items)
    n_layers = model.cfg.need_decoder.n_layers
    sources, targets = (
        list(range(n_layers)) if one is None else list(one) for one in (sources, targets)
    )
    tried = [(s, t, float(a)) for s in sources for t in targets if s < t for a in c]
    if not tried:
        raise InputError("no target lies behind a source, or there are no amounts")
    way = _Way(mode, rescale, where, items)

    def cells(batch: Batch) -> Iterable[tuple[Any, list[Edit]]]:
        yield batch.inputs, []
        for one in tried:
            yield batch.inputs, way.edit(*one, batch.rows)

    measures = _answers(model, items, asked, cells, progress)
    amounts = [float(one) for one in c]
    values = torch.full(
        (len(items), 2, len(sources), len(targets), len(amounts)), torch.nan, dtype=torch.float64
    )
    for cell, (s, t, a) in enumerate(tried):
        at = sources.index(s), targets.index(t), amounts.index(a)
        values[:, :, at[0], at[1], at[2]] = measures[..., cell + 1]
    axes = {"metric": list(METRICS), "source": sources, "target": targets, "c": amounts}
    unedited = f"{measures[:, 0, 0].mean():.4g}"
    return found(values, axes, items, by=by, seed=seed, meta={"unedited": unedited})


@method(
    "logit_lens.selected",
    whole="it chooses on one part of all items: make a study of logit_lens.enrichment",
)
def selected(
    model: HookedAudioTransformer,
    items: Items,
    sources: Any = None,
    targets: Any = None,
    c: Any = AMOUNTS,
    *,
    split: str = "group",
    share: float = 0.5,
    mode: Mode = "add",
    rescale: Rescale = "none",
    where: Any = LAST,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """Enrichment chosen on some of the items and measured on the others.

    Args:
        sources, targets, c: what is chosen among, as in `grid`: the most right items win, of
            several the most probable answers.
        split: what the parts have not in common, as in `Items.split`.
        share: of the items that are measured.
        mode, rescale, where, seed, progress: as in `enrichment`.

    Returns:
        The result of `enrichment` on the items that were not chosen on; ``meta`` has what was
        chosen.

    Raises:
        ItemError: a label that splits nothing.
        InputError, TokenError, ControlError: as `enrichment` and `grid`.
    """
    chosen_on, rest = items.split(split, share, seed)
    options: dict[str, Any] = {"mode": mode, "rescale": rescale, "progress": progress}
    by_place = by_item(where, items)
    if by_place is not None and not callable(where):
        raise InputError("places that differ by item are a function of it, since items are split")
    tried = grid(model, chosen_on, sources, targets, c, where=where, **options)
    accuracy, log_prob = tried.mean().values
    order = torch.stack([accuracy, log_prob], -1).flatten(0, -2).nan_to_num(-torch.inf).tolist()
    best = max(range(len(order)), key=order.__getitem__)
    s, t, a = torch.unravel_index(torch.tensor(best), accuracy.shape)
    source, target, amount = (
        tried.coords[name][int(at)] for name, at in (("source", s), ("target", t), ("c", a))
    )
    result = enrichment(model, rest, source, target, [amount], where=where, seed=seed, **options)
    result.meta |= {"chosen_on": f"{len(chosen_on)} items", "c": f"{amount:g}"}
    result.report.insert(
        0,
        f"Of {sum(value[0] > -torch.inf for value in order)} settings, layer {source} added to "
        f"layer {target} with c = {amount:g} was best on {len(chosen_on)} items "
        f"({order[best][0]:.2f} right, {tried.meta['unedited']} without); what is told here is of "
        f"the {len(rest)} others.",
    )
    return result


def _asked(model: HookedAudioTransformer, items: Items) -> Asked:
    if model.cfg.decoder is None:
        raise InputError(f"{model.cfg.model_name} has no decoder whose streams could be enriched")
    return Asked.of(model, items)


def _answers(
    model: HookedAudioTransformer, items: Items, asked: Asked, cells: Any, progress: bool | None
) -> Float[Tensor, "n 2 cells"]:
    """Whether the answer is the likeliest option, and its log-probability."""
    tokens = [token for own in asked.tokens for token in own]
    wanted: Mapping[str, Any] = {str(token): metrics.log_prob(token) for token in tokens}
    log_probs = measured(model, items, cells, wanted, progress=progress).values
    parts = log_probs.split([len(own) for own in asked.tokens], dim=1)
    options = torch.stack([part.logsumexp(1) for part in parts], 1)  # n options cells
    is_right = (options.argmax(1) == asked.right[:, None]).double()
    return torch.stack([is_right, options[torch.arange(len(items)), asked.right]], 1)
