"""Back-patching: late states of a stream put into an earlier layer (2606.18924)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens.analysis.answers import RIGHT, TOLD, Answers
from audio_lens.arguments import names, numbers
from audio_lens.edits import Edit, Put
from audio_lens.errors import InputError
from audio_lens.items import Batch, Items, found, method
from audio_lens.items.collect import Place, by_item
from audio_lens.items.controls import norm_matched_noise
from audio_lens.models import HookedAudioTransformer
from audio_lens.places import Where
from audio_lens.results import Result
from audio_lens.sites import Site

OTHER, NOISE, IDENTITY = CONTROLS = ("other_item", "norm_matched_noise", "identity")
LIMITS = (
    "States of a late layer in an early one are nothing the model has met. What helps may help as "
    "any louder or emptier state would: read it beside the controls."
)


@method("steering.back_patch")
def back_patch(
    model: HookedAudioTransformer,
    items: Items,
    src: int | Sequence[int] | None = None,
    dst: int | Sequence[int] | None = None,
    *,
    where: Place = "audio",
    site: str = "decoder.resid_pre",
    controls: Sequence[str] = CONTROLS,
    by: str | None = None,
    size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """How items are answered with what enters a late layer put where it enters an earlier one.

    Args:
        model: the model; the states are those of its unedited run of the same item.
        items: with answers of one token.
        src, dst: the late layers and the earlier ones; None takes all.
        where: the positions that are put back, as `collect` takes places.
        site: ``part.activation``, which all these layers have.
        controls: "other_item", the late states of an item with another answer in the same batch
            (NaN where there is none); "norm_matched_noise", noise as long as the late states at
            each position; "identity", what enters a layer put there.
        by, size, seed, progress: as in `sweep`.

    Returns:
        Axes "metric" (as of `sweep`), "src" and "dst"; NaN where the source is not behind.

    Raises:
        InputError: no source behind a target, another control, or a place that selects nothing.
        ItemError: answers that are not one token.
        SiteError: a site or layer that the model does not have.
    """
    parsed = Site.parse(site, model)
    grid = _Grid.of(parsed, src, dst)
    wanted = names("controls", controls)
    odd = [name for name in wanted if name not in CONTROLS]
    if odd:
        raise InputError(f"controls are some of {', '.join(CONTROLS)}, got {odd[0]!r}")
    runs = _Runs(model, items, grid, where, wanted, seed)
    values = Answers.of(model, items).measured(
        runs, size=size, what="back-patching", progress=progress
    )
    kinds = ["", *(name for name in (OTHER, NOISE) if name in wanted)]
    parts = dict(zip(kinds, values.values[..., 2:].split(len(grid.pairs), dim=-1), strict=True))
    if OTHER in parts:
        parts[OTHER] = parts[OTHER].clone()
        parts[OTHER][runs.alone] = torch.nan

    def of(part: Tensor, axes: dict[str, list], **beside: Any) -> Result:
        told = {"metric": values.metrics, **axes}
        return found(part, told, items, by=by, seed=seed, **beside)

    beside = {name: of(grid.table(part), grid.axes) for name, part in parts.items() if name}
    if IDENTITY in wanted:
        beside[IDENTITY] = of(values.values[..., 1], {})
    meta = {"title": f"late states of {parsed} put into earlier layers", "site": str(parsed)}
    result = of(grid.table(parts[""]), grid.axes, controls=beside, meta=meta)
    result.report = [_said(result, values.values[..., 0].mean(0).tolist()), TOLD, LIMITS]
    return result


@dataclass(frozen=True)
class _Grid:
    """Sources and targets, of which the sources lie behind."""

    site: Site
    src: list[int]
    dst: list[int]
    pairs: list[tuple[int, int]]

    @staticmethod
    def of(site: Site, src: Any, dst: Any) -> _Grid:
        if site.n_layers is None or site.reads_attention:
            raise InputError(f"{site} has no states in layers: name one such as resid_pre")
        most = site.n_layers - 1
        sides = [
            list(range(site.n_layers)) if one is None else numbers(name, one, least=0, most=most)
            for name, one in (("src", src), ("dst", dst))
        ]
        pairs = [(s, d) for s in sides[0] for d in sides[1] if s > d]
        if not pairs or any(len(set(one)) < len(one) for one in sides):
            raise InputError(
                f"a source lies behind its target, each layer once: got src {sides[0]}, dst "
                f"{sides[1]}"
            )
        behind = [s for s in sides[0] if any(s == one for one, _ in pairs)]
        before = [d for d in sides[1] if any(d == one for _, one in pairs)]
        return _Grid(site, behind, before, pairs)

    @property
    def axes(self) -> dict[str, list]:
        return {"src": self.src, "dst": self.dst}

    def table(self, part: Float[Tensor, "n m pairs"]) -> Float[Tensor, "n m src dst"]:
        """The pairs in their places."""
        table = torch.full((*part.shape[:2], len(self.src), len(self.dst)), torch.nan).double()
        for at, (s, d) in enumerate(self.pairs):
            table[:, :, self.src.index(s), self.dst.index(d)] = part[..., at]
        return table


class _Runs:
    """The runs of a batch, in order: unedited, identity, all pairs, and those of the controls.

    Attributes:
        alone: rows of items without another answer in their batch.
    """

    def __init__(
        self,
        model: HookedAudioTransformer,
        items: Items,
        grid: _Grid,
        where: Place,
        wanted: Sequence[str],
        seed: int,
    ):
        self.model, self.items, self.grid = model, items, grid
        self.where, self.places = where, by_item(where, items)
        self.wanted, self.draw, self.seed = wanted, np.random.default_rng(seed), seed
        self.alone: list[int] = []

    def __call__(self, batch: Batch) -> Iterable[tuple[Any, list[Edit]]]:
        states = self._states(batch)
        dst = self.grid.dst[0]
        yield batch.inputs, []
        yield batch.inputs, [self._edit(dst, states[dst], batch)]
        for s, d in self.grid.pairs:
            yield batch.inputs, [self._edit(d, states[s], batch)]
        if OTHER in self.wanted:
            lenders = self._lenders(batch.rows)
            for s, d in self.grid.pairs:
                yield batch.inputs, [self._edit(d, states[s][lenders], batch)]
        if NOISE in self.wanted:
            for s, d in self.grid.pairs:
                noise = norm_matched_noise(states[s], self.seed + s)
                yield batch.inputs, [self._edit(d, noise, batch)]

    def _states(self, batch: Batch) -> dict[int, Float[Tensor, "b t d"]]:
        layers = sorted({layer for pair in self.grid.pairs for layer in pair})
        hooks = {layer: self.grid.site.hook_name(layer) for layer in layers}
        with torch.no_grad():
            _, cache = self.model.run_with_cache(
                batch.inputs, names_filter=[*hooks.values()], return_cache_object=False
            )
        return {layer: cache[name] for layer, name in hooks.items()}

    def _edit(self, layer: int, states: Tensor, batch: Batch) -> Edit:
        here: Where = self.where if self.places is None else [self.places[r] for r in batch.rows]
        return Edit(str(self.grid.site), Put(states), layer=layer, where=here)

    def _lenders(self, rows: Sequence[int]) -> list[int]:
        """For each row of the batch another one with another answer; itself where there is none."""
        answers = [self.items[row].answer for row in rows]
        chosen = []
        for at, answer in enumerate(answers):
            others = [n for n, other in enumerate(answers) if other != answer]
            if not others:
                self.alone.append(rows[at])
            chosen.append(int(self.draw.choice(others)) if others else at)
        return chosen


def _said(result: Result, unedited: Sequence[float]) -> str:
    before = dict(zip(result.coords["metric"], unedited, strict=True))[RIGHT]
    one = result.mean().select(metric=RIGHT)
    best = max((cell for cell in one.cells() if cell.value == cell.value), key=lambda x: x.value)
    told = f"{RIGHT} is {before:.2f} unedited, at most {best.value:.2f} ({best.at['src']} into "
    told += f"{best.at['dst']})"
    for name in (OTHER, NOISE):
        if name in one.controls:
            told += f"; {name} {one.controls[name].select(**best.at).values.item():.2f} there"
    return f"{told}."
