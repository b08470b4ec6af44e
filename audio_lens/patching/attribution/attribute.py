"""Attribution patching: every cell of a sweep estimated from two forwards and one backward.

The source run keeps what it had at the sites. The base run is differentiated from the earliest
site on; in the backward pass each gradient meets its difference, is summed to cells and dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from audio_lens import metrics
from audio_lens.arguments import whole
from audio_lens.errors import InputError
from audio_lens.inputs import AudioInputs
from audio_lens.patching.attribution.confirm import Confirmation, confirm
from audio_lens.patching.attribution.runs import (
    FIXES_QUERIES_AND_KEYS,
    UNSIGNED,
    Estimate,
    Method,
    differentiable,
    layers_from,
)
from audio_lens.patching.attribution.taps import QueryKeyTap
from audio_lens.patching.cells import CellTable
from audio_lens.patching.known import own_parts
from audio_lens.patching.result import SweepResult
from audio_lens.patching.spec import Bands, Direction, SweepSpec, Windows
from audio_lens.provenance import edits_in_force, provenance
from audio_lens.running import evaluating
from audio_lens.sites import Site

if TYPE_CHECKING:
    from audio_lens.models.base import HookedAudioTransformer

DEFAULT_STEPS = 5
MOST_STEPS = 10_000


@dataclass(repr=False, init=False)
class Attribution(SweepResult):
    """Estimates of what a sweep would measure; `confirm` measures the strongest.

    All that `SweepResult` has works here too. ``values`` are the base run's metric plus the
    estimated effect. A saved attribution loads as a `SweepResult` whose report says what it is.

    Attributes:
        request: the arguments it was asked with, as `plan` takes them; None for a part, a mean
            or a pickle of an attribution.
    """

    request: dict[str, Any] | None = field(init=False, default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles hold: no inputs and no metric, which may be any function."""
        return super().__getstate__() | {"request": None}

    @property
    def method(self) -> str:
        """The method of the estimate: "atp", "ig", "qk_fix", "grad_drop" or "atp*"."""
        return self.meta["method"]

    @property
    def is_signed(self) -> bool:
        """Whether estimates have a direction, or are magnitudes only."""
        return self.method not in UNSIGNED

    def confirm(
        self,
        model: HookedAudioTransformer,
        top_k: int = 20,
        controls: Sequence[str] | None = None,
        other: AudioInputs | Mapping[str, Any] | None = None,
        metric: str | None = None,
        exact: Literal["top", "all"] = "top",
        seed: int = 0,
        progress: bool | None = None,
    ) -> Confirmation:
        """Exact values of the strongest cells beside their estimates, with controls.

        Args:
            model: the model the estimates are of.
            top_k: how many cells, by |estimated effect|.
            controls: of "identity" (the base run patched into itself: no effect), "other_item"
                (patched from another item, ``other``), "norm_matched_noise" (Gaussian of the mean
                and norm of the source at each position) and "random_sites" (as many other cells
                of the same layers). None takes all that can be had.
            other: inputs of the other item, shaped as clean and corrupted.
            metric: which one, where there are several.
            exact: "top" measures those cells (and the random ones), "all" every cell, which costs
                a whole sweep and makes rank correlation and overlap those of the whole map.
            seed: of noise and random cells.
            progress: as in `sweep`.

        Raises:
            ValueError: a control that does not exist or cannot be had, fewer than one cell, a
                part of an attribution, a metric that is alike on both runs, or other hooks or
                edits in force than when the estimates were made.
        """
        self._check_in_force(model)
        return confirm(
            self,
            self.request,
            model,
            is_signed=self.is_signed,
            top_k=top_k,
            controls=controls,
            other=other,
            metric=metric,
            exact=exact,
            seed=seed,
            progress=progress,
        )

    def _check_in_force(self, model: HookedAudioTransformer) -> None:
        then, now = self.recipe.get("hooks", []), list(model.list_hooks(dir="fwd"))
        if then != now or self.recipe.get("edits") != edits_in_force(model):
            raise InputError(
                f"the estimates were made with hooks or edits at {', '.join(then) or 'nothing'}, "
                f"and now they are at {', '.join(now) or 'nothing'}: confirm under the same, for "
                "edits inside the same `with intervene(...)`"
            )


def attribute(
    model: HookedAudioTransformer,
    *,
    clean: AudioInputs | Mapping[str, Any],
    corrupted: AudioInputs | Mapping[str, Any],
    site: str | Sequence[str] = "decoder.resid_pre",
    axes: str | Sequence[str] = ("layer", "time"),
    metric: Any,
    windows: Windows | None = None,
    bands: Bands | None = None,
    direction: Direction = "denoise",
    layers: int | Sequence[int] | None = None,
    layer_window: int = 1,
    method: Method = "atp",
    steps: int | None = None,
    progress: bool | None = None,
) -> Attribution | dict[str, Attribution]:
    """Estimate every cell of a sweep at once, by gradients.

    An estimate orders cells and says where to look; `Attribution.confirm` measures. It is good
    where the model is near linear between the two runs, and poor for residual streams and early
    layers between unlike inputs. Hooks of yours stay in force in both runs.

    Args:
        model: the model. Its parameters are frozen meanwhile.
        clean, corrupted, axes, windows, bands, direction, layers, layer_window: as in `sweep`.
        site: as in `sweep`; several are estimated side by side, in the same runs.
        metric: as in `sweep`, and differentiable. One value per row must depend on the logits of
            that row alone. Each metric costs a backward.
        method:
            "atp" (attribution patching; Nanda 2023, 2403.00745): gradient at the base run times
            (source - base), two forwards and one backward.
            "ig" (integrated gradients on inputs; 2403.17806): the mean of ``steps`` gradients,
            between the two runs, where audio (after the convolutions, or as the connector gives
            it) and text enter. The report says how much of the metric's change it explains.
            "qk_fix" (2403.00745): for queries and keys only, the softmax is computed exactly,
            which saturated attention needs. Attention is written out.
            "grad_drop" (2403.00745): the mean of |estimate| over backwards that each ignore what
            one layer writes, the cell's own layer left out, for direct and indirect effects that
            cancel. One backward per layer from the site's part to the decoder's last. Unsigned:
            ``effect`` is a magnitude, 0 or more.
            "atp*" (2403.00745): both of these; queries and keys get the QK-fix, other sites not.
        steps: of "ig", at the middles of as many equal pieces of the way; None is 5.
        progress: as in `sweep`.

    Returns:
        `Attribution`; of several sites, a mapping from site to result.

    Raises:
        SiteError, InputError, MetricError: as in `sweep`.
        ValueError: as in `sweep`; a metric without gradient, or one that mixes rows; a method that
            does not fit the site or axes, ``steps`` without "ig"; sites in a second writing stack,
            or a metric of what such a stack writes beside the decoder (Kimi-Audio's speech).
        DeadHookError: a site that does not run.
    """
    with model.alone():
        spec = SweepSpec.of(**locals())
        if not spec.sites or len(set(spec.sites)) < len(spec.sites):
            raise InputError(f"name one site or several, each once; got {site!r}")
        _check_further_decoders(model, spec.sites, metric)
        tables = [CellTable.of(model, spec, (one,)) for one in spec.sites]
        _check_method(model, tables, method, steps)
        if direction == "noise" and method != "ig":
            _check_not_at_its_minimum(metric)
        mode = _attention_mode(model, spec.sites, method)
        with evaluating(model) as notes, model.attention(mode), differentiable(model):
            own = own_parts(model, spec)
            estimate = Estimate(model, spec, tables, method, steps or DEFAULT_STEPS, progress)
            results = {
                str(table.site): _result(
                    model, spec, estimate, table, {"method": method, "steps": steps}, own, notes
                )
                for table in tables
            }
        return results[str(spec.sites[0])] if isinstance(site, str) else results


def _result(
    model: HookedAudioTransformer,
    spec: SweepSpec,
    estimate: Estimate,
    table: CellTable,
    further: dict[str, Any],
    own: dict[str, str],
    notes: list[str],
) -> Attribution:
    """What was estimated for one table.

    Args:
        further: the arguments that a sweep does not have.
        own: what metric and hooks are.
        notes: for the report, beside the estimate's own.
    """
    site = str(table.site)
    attribution = Attribution(
        values=estimate.values(table),
        dims=(*estimate.dims, *table.axes),
        coords={**estimate.dims, **table.coords},
        clean=estimate.shaped(estimate.clean),
        corrupted=estimate.shaped(estimate.corrupted),
        site=site,
        direction=spec.direction,
        report=[*notes, *estimate.report],
        meta=provenance(model, spec.clean, spec.corrupted, estimate.names) | estimate.meta,
        recipe={
            "arguments": {**spec.record, "site": site, **further},
            "hooks": list(model.list_hooks(dir="fwd")),
            "edits": edits_in_force(model),
            "own": own,
        },
    )
    attribution.request = spec.arguments | {"site": site}
    return attribution


def _check_method(
    model: HookedAudioTransformer, tables: list[CellTable], method: str, steps: int | None
) -> None:
    if method not in get_args(Method):
        raise InputError(f"method is one of {', '.join(get_args(Method))}, got {method!r}")
    if steps is not None and method != "ig":
        raise InputError(f"steps belong to method 'ig', not to {method!r}")
    if steps is not None:
        whole("steps", steps, least=1, most=MOST_STEPS)
    fixed = [str(table.site) for table in tables if QueryKeyTap.fits(model, table)]
    if method == "qk_fix" and len(fixed) < len(tables):
        others = [str(table.site) for table in tables if str(table.site) not in fixed]
        raise InputError(
            f"method 'qk_fix' is for queries and keys, not {', '.join(others)}: use 'atp' there, "
            "or 'atp*' for all"
        )
    if method in UNSIGNED:
        for table in tables:
            _check_droppable(model, table)
    if method in FIXES_QUERIES_AND_KEYS and fixed:
        _check_softmax_is_free(model, tables)


def _check_further_decoders(
    model: HookedAudioTransformer, sites: Sequence[Site], metric: Any
) -> None:
    family, further = model.cfg.family, model.cfg.further_decoders
    inside = [str(site) for site in sites if site.part in further]
    if inside:
        raise InputError(f"attribution does not reach into {', '.join(inside)}: use sweep")
    if beside := model.written_beside(metrics.streams_read(metric)):
        raise InputError(
            f"attribution does not reach through the {' and '.join(beside)} of {family}, which "
            "writes beside the decoder: read the text alone (metrics.of_stream('text', ...)), or "
            "use sweep"
        )
    if model.writes_behind or not further:
        return
    points = ("hook_logits", *(f"{part}." for part in further))
    dead = [name for name in model.list_hooks(dir="fwd") if name.startswith(points)]
    if dead:
        raise InputError(
            f"your hooks on {', '.join(dead)} do not run: of {family} only the text is computed "
            "here. Remove them"
        )


def _check_not_at_its_minimum(metric: Any) -> None:
    for name, one in metrics.named(metric).items():
        if getattr(one, "needs_reference", False):
            raise InputError(
                f"metric {name!r} compares with the clean run, which is the base run of direction "
                "'noise': it is flat there, and gradients say nothing. Use another metric or "
                "direction, or method 'ig'"
            )


def _check_droppable(model: HookedAudioTransformer, table: CellTable) -> None:
    if not table.cells.are_of_one_layer:
        raise InputError(
            "dropping gradients leaves out a cell's own layer, so a cell can have but one: put "
            "'layer' among the axes, without layer_window"
        )
    if len(layers_from(model, table.site)) < 2:
        raise InputError("dropping gradients needs a model of at least two layers")


def _check_softmax_is_free(model: HookedAudioTransformer, tables: list[CellTable]) -> None:
    hooked = [
        name
        for table in tables
        if QueryKeyTap.fits(model, table)
        for layer in table.cells.layers
        for name in QueryKeyTap.softmax_points(table.site.hook_name(layer))
        if model.hook_dict[name].fwd_hooks
    ]
    if hooked:
        raise InputError(
            f"the QK-fix computes the softmax itself, without your hooks on {', '.join(hooked)}: "
            "remove them or use method 'atp'"
        )


def _attention_mode(model: HookedAudioTransformer, sites: Sequence[Site], method: str) -> str:
    if any(site.reads_attention for site in sites):
        return "explicit"
    needs_pattern = method in FIXES_QUERIES_AND_KEYS
    return "auto" if needs_pattern and model.attn_mode == "sdpa" else model.attn_mode
