"""Confirmation of estimates: exact values of the strongest cells, beside controls."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from audio_lens.arguments import names, whole
from audio_lens.errors import InputError
from audio_lens.inputs import AudioInputs
from audio_lens.patching.plan import Plan
from audio_lens.patching.result import Cell, SweepResult
from audio_lens.patching.spec import SweepSpec
from audio_lens.progress import heading
from audio_lens.provenance import weights_hash
from audio_lens.running import evaluating
from audio_lens.sites import Site

if TYPE_CHECKING:
    from audio_lens.models.base import HookedAudioTransformer

CONTROLS = ("identity", "other_item", "norm_matched_noise", "random_sites")
EXPECTED_BY_CHANCE = CONTROLS[1:]  # identity tests the engine, these test the finding


@dataclass(frozen=True, repr=False)
class ConfirmedCell:
    """A cell with its estimated and its exact effect, and those of its controls.

    Effects are 0 where nothing changed and 1 where the run moved the whole way to the other
    baseline; estimates of unsigned methods are 0 or more.

    Attributes:
        cell: the place, with the estimate.
        estimate, exact: the effects.
        controls: effect by name of the control; NaN where it cannot be had.
    """

    cell: Cell
    estimate: float
    exact: float
    controls: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings; None for NaN."""
        effects = {"estimate": self.estimate, "exact": self.exact, **self.controls}
        place = {k: v for k, v in self.cell.to_dict().items() if k not in ("value", "recovery")}
        place.pop("effect")
        return place | {name: _plain(x) for name, x in effects.items()}

    def __repr__(self) -> str:
        controls = "".join(f", {name} {x:+.3f}" for name, x in self.controls.items())
        return (
            f"{self.cell.place}: estimate {self.estimate:+.3f}, exact {self.exact:+.3f}{controls}"
        )


@dataclass(repr=False)
class Confirmation:
    """Exact values of the strongest cells of an attribution. ``print`` gives a table.

    Attributes:
        rows: the cells, strongest estimate first.
        rank_correlation: Spearman's, between estimates and exact effects of all cells measured
            (magnitudes, for unsigned methods). NaN if one of them is the same everywhere.
        overlap: Jaccard overlap of the strongest by estimate with as many strongest by exact
            effect, among all cells measured.
        precision: the share of the strongest by estimate that are among those.
        n_measured, n_cells: how many cells were measured exactly, of how many.
        seed: of noise and random cells.
        report: what was left out, and why.
    """

    rows: list[ConfirmedCell]
    rank_correlation: float
    overlap: float
    precision: float
    n_measured: int
    n_cells: int
    seed: int = 0
    report: list[str] = field(default_factory=list)

    @property
    def threshold(self) -> float:
        """95th percentile of the controls' |effect| (identity apart); NaN without controls."""
        effects = [
            abs(row.controls[name])
            for row in self.rows
            for name in EXPECTED_BY_CHANCE
            if math.isfinite(row.controls.get(name, math.nan))
        ]
        return torch.tensor(effects).quantile(0.95).item() if effects else math.nan

    @property
    def beyond_controls(self) -> list[ConfirmedCell]:
        """The cells whose exact |effect| lies above `threshold`."""
        return [row for row in self.rows if abs(row.exact) > self.threshold]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings for JSON; None for NaN."""
        summary = ("rank_correlation", "overlap", "precision", "threshold")
        return {
            "rows": [row.to_dict() for row in self.rows],
            **{name: _plain(getattr(self, name)) for name in summary},
            "n_measured": self.n_measured,
            "n_cells": self.n_cells,
            "seed": self.seed,
            "report": self.report,
        }

    def __str__(self) -> str:
        names = ["estimate", "exact", *self.rows[0].controls]
        width = max(len(row.cell.place) for row in self.rows)
        lines = [" ".join([" " * width, *(f"{name:>8}" for name in names)])]
        for row in self.rows:
            effects = [row.estimate, row.exact, *row.controls.values()]
            numbers = [
                f"{x:>+{max(8, len(name))}.3f}" for x, name in zip(effects, names, strict=True)
            ]
            lines.append(" ".join([f"{row.cell.place:<{width}}", *numbers]))
        lines.append(
            f"{self.n_measured} of {self.n_cells} cells measured: rank correlation "
            f"{self.rank_correlation:.2f}, overlap of the strongest {self.overlap:.2f}, precision "
            f"{self.precision:.2f}; {len(self.beyond_controls)} of {len(self.rows)} beyond the "
            f"controls ({self.threshold:.3f})"
        )
        return "\n".join([*lines, *self.report])

    __repr__ = __str__


def confirm(
    estimated: SweepResult,
    request: Mapping[str, Any] | None,
    model: HookedAudioTransformer,
    *,
    is_signed: bool,
    top_k: int,
    controls: Sequence[str] | None,
    other: AudioInputs | Mapping[str, Any] | None,
    metric: str | None,
    exact: str,
    seed: int,
    progress: bool | None,
) -> Confirmation:
    """Measure the strongest of some estimates; see `Attribution.confirm`.

    Args:
        estimated: the estimates, as a sweep would give them.
        request: the arguments of that sweep, as `plan` takes them.
        is_signed: whether estimates have a direction, or are magnitudes only.
    """
    whole("top_k", top_k, least=1)
    whole("seed", seed, least=-(2**63), most=2**63 - 1)
    if exact not in ("top", "all"):
        raise InputError(f"exact is 'top' or 'all', got {exact!r}")
    site = Site.parse(estimated.site, model)
    chosen, report = _chosen_controls(controls, other, site)
    with evaluating(model) as notes:
        _check_model(estimated, model)
        sweeps = _Sweeps(estimated, request, model, site, metric, progress)
        generator = torch.Generator().manual_seed(seed)
        order = _strongest(sweeps.estimates)
        top, rest = order[:top_k].tolist(), order[top_k:].tolist()
        partners = sweeps.partners(top, rest, generator) if "random_sites" in chosen else {}
        if "random_sites" in chosen and len(partners) < len(top):
            report.append(
                f"{len(top) - len(partners)} cells have no other cell of their layer left"
            )
        everything = range(len(sweeps.estimates))
        effects = sweeps.effects(everything if exact == "all" else [*top, *partners.values()])
        makers = {
            "identity": lambda: sweeps.effects(top, source=sweeps.base),
            "other_item": lambda: sweeps.effects(top, source=model.as_inputs(other)),
            "norm_matched_noise": lambda: sweeps.effects(top, source=sweeps.noise(generator)),
            "random_sites": lambda: _of_partners(effects, partners),
        }
        of_controls = {}
        for name in chosen:
            with heading(f"control {name}"):
                of_controls[name] = makers[name]()
    rows = [
        ConfirmedCell(
            cell=sweeps.cells[i],
            estimate=sweeps.estimates[i].item(),
            exact=effects[i].item(),
            controls={name: column[i].item() for name, column in of_controls.items()},
        )
        for i in top
    ]
    truth = effects if is_signed else effects.abs()
    agreement = _agreement(sweeps.estimates, truth, top)
    return Confirmation(rows=rows, report=[*notes, *report], seed=seed, **agreement)


def _check_model(estimated: SweepResult, model: HookedAudioTransformer) -> None:
    """Raise for another model than the estimates are of."""
    if estimated.meta.get("weights_hash") not in (None, weights_hash(model)):
        raise InputError(
            "this model has other weights than the one the estimates are of: pass that one"
        )


def _strongest(effects: Float[Tensor, " cells"]) -> Int[Tensor, " known"]:
    """Cells by magnitude, without those of no value."""
    order = effects.abs().nan_to_num(-1.0).argsort(descending=True, stable=True)
    return order[: int(effects.isfinite().sum())]


def _agreement(
    estimates: Float[Tensor, " cells"], truth: Float[Tensor, " cells"], top: list[int]
) -> dict[str, Any]:
    """How well estimates order the cells that were measured."""
    there = truth.isfinite() & estimates.isfinite()
    shared = len(set(top) & set(_strongest(truth)[: len(top)].tolist()))
    return {
        "rank_correlation": rank_correlation(estimates[there], truth[there]),
        "overlap": shared / (2 * len(top) - shared),
        "precision": shared / len(top),
        "n_measured": int(there.sum()),
        "n_cells": len(estimates),
    }


def _chosen_controls(
    controls: Sequence[str] | None, other: Any, site: Site
) -> tuple[list[str], list[str]]:
    """The controls to run, and notes on those left out."""
    lacking = {}
    if other is None:
        lacking["other_item"] = "it needs the inputs of another item: pass other="
    if site.reads_attention:
        lacking["norm_matched_noise"] = "attention rows are weights (or masked), not vectors"
    if controls is None:
        report = [f"control {name} left out: {why}" for name, why in lacking.items()]
        return [name for name in CONTROLS if name not in lacking], report
    for name in names("controls", controls):
        if name not in CONTROLS:
            raise InputError(f"no control {name!r}; there are {', '.join(CONTROLS)}")
        if name in lacking:
            raise InputError(f"control {name!r}: {lacking[name]}")
    if other is not None and "other_item" not in controls:
        raise InputError("other= is for the control 'other_item', which is not among controls")
    return list(controls), []


class _Sweeps:
    """The sweep an attribution estimates, from its own source run and from others.

    Attributes:
        cells: every cell, with its estimate.
        estimates: their effects; NaN where there is none.
        base: inputs of the run that is patched.
    """

    def __init__(
        self,
        estimated: SweepResult,
        request: Mapping[str, Any] | None,
        model: HookedAudioTransformer,
        site: Site,
        metric: str | None,
        progress: bool | None,
    ):
        if request is None:
            raise InputError(
                "confirm takes an attribution as attribute gave it: call it before select or mean, "
                "and before it is pickled"
            )
        self.model, self.site, self.progress = model, site, progress
        self.request = dict(request)
        self.estimated = estimated.of_metric(metric)
        if metric is not None:
            self.request["metric"] = self.request["metric"][metric]
        self.cells = self.estimated.cells()
        self.estimates = torch.tensor([cell.effect for cell in self.cells])
        if not self.estimates.isfinite().any():
            raise InputError("clean and corrupted are alike in the metric: nothing to confirm")
        pair = (self.request["corrupted"], self.request["clean"])
        self.base, self.source = pair if estimated.direction == "denoise" else pair[::-1]

    def effects(self, cells: Sequence[int], source: Any = None) -> Float[Tensor, " cells"]:
        """Exact effects of some cells, NaN elsewhere; patched from the source run or another."""
        spec = SweepSpec.of(self.model, **self.request | {"source": source})
        planned = Plan.of(self.model, spec)
        measured = planned.run(only=sorted(set(cells)), progress=self.progress)
        result = replace(self.estimated, values=measured.values)  # against its own baselines
        return torch.tensor([cell.effect for cell in result.cells()])

    def noise(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Gaussian noise of the mean and norm of the source run at each position."""
        layers = [None] if self.site.n_layers is None else range(self.site.n_layers)
        names = [self.site.hook_name(layer) for layer in layers]
        with torch.no_grad():
            _, cache = self.model.run_with_cache(self.source, names_filter=names)
        return {name: matched_noise(cache[name], generator) for name in names}

    def partners(
        self, top: list[int], rest: list[int], generator: torch.Generator
    ) -> dict[int, int]:
        """For every strong cell a random other one of its layer, as long as there are some."""
        left = [rest[i] for i in torch.randperm(len(rest), generator=generator)]
        found = {}
        for cell in top:
            layer = self.cells[cell].layer
            partner = next((other for other in left if self.cells[other].layer == layer), None)
            if partner is not None:
                found[cell] = partner
                left.remove(partner)
        return found


def matched_noise(
    activation: Float[Tensor, "*places d"], generator: torch.Generator
) -> Float[Tensor, "*places d"]:
    """Gaussian vectors, each with the mean and the norm of the vector in its place."""
    drawn = torch.randn(activation.shape, generator=generator, dtype=torch.float64)
    drawn = drawn.to(activation.device)
    mean = activation.double().mean(-1, keepdim=True)
    centred = drawn - drawn.mean(-1, keepdim=True)
    spread = (activation - mean).norm(dim=-1, keepdim=True)
    return (mean + spread * F.normalize(centred, dim=-1)).to(activation.dtype)


def _of_partners(
    effects: Float[Tensor, " cells"], partners: dict[int, int]
) -> Float[Tensor, " cells"]:
    """The effect of every cell's partner; NaN where it has none."""
    found = torch.full_like(effects, torch.nan)
    if partners:
        found[list(partners)] = effects[list(partners.values())]
    return found


def rank_correlation(a: Float[Tensor, " n"], b: Float[Tensor, " n"]) -> float:
    """Spearman's rank correlation; ties share their mean rank. NaN if one does not vary."""
    ranks = torch.stack([_ranks(a), _ranks(b)])
    ranks = ranks - ranks.mean(-1, keepdim=True)
    return ((ranks[0] * ranks[1]).sum() / ranks.norm(dim=-1).prod()).item()


def _ranks(x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    _, group, counts = x.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[group]


def _plain(x: float) -> float | None:
    return x if math.isfinite(x) else None
