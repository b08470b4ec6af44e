"""TransformerLens's `patching.get_act_patch_*`, with its names and results, served by the engine.

``get_act_patch_resid_pre(part, corrupted, clean_cache, metric)`` takes ``model.part("decoder")`` or
``model.part("encoder")`` for its model and gives what `transformer_lens.patching` gives, without a
whole forward for every cell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens import patching as original
from transformer_lens.patching import PatchingResult

from audio_lens import metrics
from audio_lens.cache import AudioCache
from audio_lens.errors import InputError
from audio_lens.inputs import AudioInputs
from audio_lens.models.part import Part, PartInputs
from audio_lens.patching.cells import CellTable
from audio_lens.patching.direct_paths import (
    by_full_name,
    get_act_patch_direct_path,  # noqa: F401
    get_act_patch_direct_path_all_sources,  # noqa: F401
)
from audio_lens.patching.engine.readout import Readout
from audio_lens.patching.interventions import Interventions
from audio_lens.patching.plan import Plan
from audio_lens.patching.spec import SweepSpec
from audio_lens.running import evaluating
from audio_lens.shapes import check_shape, shape_of
from audio_lens.sites import Site, unit_count

if TYPE_CHECKING:
    from audio_lens.models.base import HookedAudioTransformer

Inputs = PartInputs | AudioInputs | Mapping[str, Any]
Cache = ActivationCache | Mapping[str, Tensor]
Metric = metrics.Metric | metrics.MetricFn
Metrics = Metric | Mapping[str, Metric]
Values = Float[Tensor, "..."] | PatchingResult

Answer = Values | tuple[Float[Tensor, "..."], pd.DataFrame]

# Their loop runs on whatever has the methods of their models: its types name these models alone.
_by_entry = cast("Callable[..., Answer]", original.get_act_patch_attn_head_pattern_dest_src_pos)
_OURS = {"pos": "position", "dest_pos": "position", "head_index": "head"}  # names of axes
_DOC = """Patch {what}.

    Args:
        model: ``model.part("decoder")`` or ``model.part("encoder")``.
        corrupted_tokens: inputs of the run that is patched: ``part.inputs(corrupted)``, or what
            `sweep` takes.
        clean_cache: activations of the clean run under the part's names or the model's. Patterns
            are cached only with ``attention=True``.
        {metric}: from logits ``b t d_vocab`` to a scalar; under other ``reduce`` than
            "scalar" to one value per prompt, as those of `audio_lens.metrics` (`kl` bound to the
            clean logits first). Or a mapping from names to these.
        reduce: "scalar", "mean" over the prompts, or "none" to keep them apart.
        baseline: also measure the unpatched run.{more}

    Returns:
        The metric of every patched run, ``[{axes}]``; a `PatchingResult` for
        named metrics, a baseline or ``reduce="none"``.{padded}

    Raises:
        HookNameError: a cache without the activation.
        SiteError: a part without the activation.
        InputError: a cache of inputs of another shape.
        MetricError: a metric that fails, or gives something else than finite numbers before
            patching.
        ValueError: an empty mapping, or options that do not exist or exclude each other.
    """
_TABLE = """
        return_index_df: also give the table of indices; a `PatchingResult` holds it."""


@dataclass(frozen=True)
class _Call:
    """What one call asks for, checked.

    Attributes:
        measures: the metrics by name; each checks the shape of what it gives.
        is_named: whether they came as a mapping.
    """

    part: Part
    inputs: PartInputs
    cache: AudioCache
    measures: dict[str, metrics.MetricFn]
    is_named: bool
    reduce: str
    baseline: bool

    @staticmethod
    def of(
        part: Part,
        corrupted: Inputs,
        clean_cache: Cache,
        metric: Metrics,
        reduce: str,
        baseline: bool,
    ) -> _Call:
        if reduce not in ("scalar", "mean", "none"):
            raise InputError(f"reduce is 'scalar', 'mean' or 'none', got {reduce!r}")
        is_named = isinstance(metric, Mapping)
        asked = dict(metric) if is_named else {"metric": metric}
        if not asked:
            raise InputError("the mapping of metrics must hold at least one")
        inputs = part.inputs(corrupted)
        measures = {
            name: _checked(name, metrics.bound(one, part.model, inputs.inputs), inputs, reduce)
            for name, one in asked.items()
        }
        cache = by_full_name(part, clean_cache)
        return _Call(part, inputs, cache, measures, is_named, reduce, baseline)

    @property
    def gives_tensor(self) -> bool:
        """Whether the answer is a bare tensor and no `PatchingResult`."""
        return not (self.is_named or self.baseline or self.reduce == "none")

    def site(self, activation: str) -> Site:
        return Site.parse(f"{self.part.name}.{activation}", self.part.model)

    def source(self, site: Site) -> dict[str, Tensor]:
        """The clean activations of every block, by full name."""
        names = [site.hook_name(layer) for layer in range(self.part.cfg.n_layers)]
        model = self.part.model
        expected = shape_of(model, site, model.timeline(self.inputs.inputs))
        source = {name: self.cache[name] for name in names}
        for name, activation in source.items():
            check_shape(name, activation, expected)
        return source

    def plan(self, activation: str, axes: Sequence[str]) -> Plan:
        """The sweep of one activation, checked and not yet run."""
        site, model, inputs = self.site(activation), self.part.model, self.inputs.inputs
        spec = SweepSpec.of(
            model,
            clean=inputs,
            corrupted=inputs,
            site=str(site),
            axes=[_OURS.get(axis, axis) for axis in axes],
            metric=self.measures,
            source=self.source(site),
        )
        return Plan.of(model, spec, _table(model, self.inputs, site, spec.axes))

    def swept(self, plan: Plan) -> Float[Tensor, "metrics ..."]:
        """Every metric of every patched run: by the axes, and by prompt unless it is a scalar."""
        sizes = [len(coord) for coord in plan.table.coords.values()]
        values = plan.values().unflatten(-1, sizes)
        return values if self.reduce == "scalar" else values.movedim(1, -1)

    def answer(
        self,
        values: Float[Tensor, "metrics ..."],
        axes: Sequence[str],
        patch_types: list[str] | None = None,
    ) -> Values:
        """The values in the form asked for."""
        if self.gives_tensor:
            return self._given(values)
        return PatchingResult(
            values=self._given(values),
            axis_names=list(axes),
            index_df=original.make_df_from_ranges(values.shape[1 : 1 + len(axes)], axes),
            metric_names=list(self.measures),
            reduced=self.reduce != "none",
            baseline=self._given(self._unpatched()) if self.baseline else None,
            has_metric_axis=self.is_named,
            patch_type_names=patch_types,
        )

    def _given(self, values: Float[Tensor, "metrics ..."]) -> Float[Tensor, "..."]:
        """Reduced, with an axis of metrics only where they have names, on the model's device."""
        values = values.mean(-1) if self.reduce == "mean" else values
        values = values if self.is_named else values[0]
        return values.to(self.part.model.device, copy=True)  # no tensor of inference mode

    @torch.no_grad()
    def _unpatched(self) -> Float[Tensor, " metrics *batch"]:
        model, inputs = self.part.model, self.inputs.inputs
        readout = Readout(model, self.measures, inputs)
        with evaluating(model):
            return readout.measure(readout.of_logits(model(inputs)), "the corrupted run")


def _checked(
    name: str, measure: metrics.MetricFn, inputs: PartInputs, reduce: str
) -> metrics.MetricFn:
    """The metric with its shape checked, in the precision TransformerLens keeps."""
    batch = len(inputs.inputs)

    def check(value: Any) -> Tensor:
        value = torch.as_tensor(value)
        if reduce == "scalar" and value.ndim:
            raise metrics.MetricError(
                f"metric {name!r} must give a scalar under reduce='scalar', got shape "
                f"{tuple(value.shape)}: pass reduce='mean' or 'none' for one value per prompt"
            )
        if reduce != "scalar" and value.shape != (batch,):
            raise metrics.MetricError(
                f"metric {name!r} must give one value per prompt of the batch ([{batch}]) under "
                f"reduce={reduce!r}, got shape {tuple(value.shape)}"
            )
        return value.to(torch.get_default_dtype())

    if isinstance(measure, metrics.Reading):
        return replace(measure, value=lambda rows: check(measure.value(rows)))
    return lambda logits: check(measure(logits))


def _table(
    model: HookedAudioTransformer, inputs: PartInputs, site: Site, axes: Sequence[str]
) -> CellTable:
    """One cell for every layer and place, padding included, as TransformerLens walks them."""
    batch, width = inputs.shape
    sizes = {"layer": site.n_layers, "position": width}
    if site.unit:
        sizes["head"] = unit_count(model, site)
    coords = {axis: list(range(sizes[axis])) for axis in axes}
    single = torch.eye(width) if "position" in axes else torch.ones(1, width)
    return CellTable(
        sites=(site,),
        axes=tuple(axes),
        coords=coords,
        positions=single.bool()[:, None].expand(-1, batch, -1),
        covered=torch.ones(len(single), len(inputs.inputs), dtype=torch.bool),
        cells=Interventions.of(site, axes, coords, tuple(coords["layer"]), layer_window=1),
    )


def _named(function: Callable[..., Any], what: str, doc: str) -> Callable[..., Any]:
    function.__name__ = function.__qualname__ = f"get_act_patch_{what}"
    function.__doc__ = doc
    return function


# -------------------------------------------------------------------------------- one activation


def _sweep(what: str, activation: str, *places: str) -> Callable[..., Any]:
    """The function that patches one activation by layer and these places."""
    axes = ("layer", *places)

    def get_act_patch(
        model: Part,
        corrupted_tokens: Inputs,
        clean_cache: Cache,
        patching_metric: Metrics,
        *,
        return_index_df: bool = False,
        reduce: str = "scalar",
        baseline: bool = False,
    ) -> Answer:
        call = _Call.of(model, corrupted_tokens, clean_cache, patching_metric, reduce, baseline)
        if return_index_df and not call.gives_tensor:
            raise InputError("return_index_df goes with a tensor: a PatchingResult has index_df")
        values = call.answer(call.swept(call.plan(activation, axes)), axes)
        if return_index_df and isinstance(values, Tensor):
            return values, original.make_df_from_ranges(values.shape, axes)
        return values

    doc = _DOC.format(
        what=f"``{activation}`` by {', '.join(axes)}",
        metric="patching_metric",
        axes=", ".join(axes),
        padded="",
        more=_TABLE,
    )
    return _named(get_act_patch, what, doc)


get_act_patch_resid_pre = _sweep("resid_pre", "resid_pre", "pos")
get_act_patch_resid_mid = _sweep("resid_mid", "resid_mid", "pos")
get_act_patch_attn_out = _sweep("attn_out", "attn_out", "pos")
get_act_patch_mlp_out = _sweep("mlp_out", "mlp_out", "pos")
get_act_patch_attn_head_out_by_pos = _sweep("attn_head_out_by_pos", "attn.z", "pos", "head")
get_act_patch_attn_head_q_by_pos = _sweep("attn_head_q_by_pos", "attn.q", "pos", "head")
get_act_patch_attn_head_k_by_pos = _sweep("attn_head_k_by_pos", "attn.k", "pos", "head")
get_act_patch_attn_head_v_by_pos = _sweep("attn_head_v_by_pos", "attn.v", "pos", "head")
get_act_patch_attn_head_pattern_by_pos = _sweep(
    "attn_head_pattern_by_pos", "attn.pattern", "head_index", "dest_pos"
)
get_act_patch_attn_head_out_all_pos = _sweep("attn_head_out_all_pos", "attn.z", "head")
get_act_patch_attn_head_q_all_pos = _sweep("attn_head_q_all_pos", "attn.q", "head")
get_act_patch_attn_head_k_all_pos = _sweep("attn_head_k_all_pos", "attn.k", "head")
get_act_patch_attn_head_v_all_pos = _sweep("attn_head_v_all_pos", "attn.v", "head")
get_act_patch_attn_head_pattern_all_pos = _sweep(
    "attn_head_pattern_all_pos", "attn.pattern", "head_index"
)


@torch.no_grad()
def get_act_patch_attn_head_pattern_dest_src_pos(
    model: Part,
    corrupted_tokens: Inputs,
    clean_cache: Cache,
    patching_metric: Metrics,
    *,
    return_index_df: bool = False,
    reduce: str = "scalar",
    baseline: bool = False,
) -> Answer:
    """Patch ``attn.pattern`` entry by entry: layer, head_index, dest_pos, src_pos.

    TransformerLens's own loop, one whole forward per entry; arguments, result and errors are those
    of `get_act_patch_attn_head_pattern_by_pos`.
    """
    call = _Call.of(model, corrupted_tokens, clean_cache, patching_metric, reduce, baseline)
    source = call.source(call.site("attn.pattern"))
    with evaluating(call.part.model):
        return _by_entry(
            model,
            call.inputs,
            {model.local(name): activation for name, activation in source.items()},
            call.measures if call.is_named else call.measures["metric"],
            return_index_df=return_index_df,
            reduce=reduce,
            baseline=baseline,
        )


# -------------------------------------------------------------------------------- several


def _every(what: str, activations: dict[str, str], *places: str) -> Callable[..., Any]:
    """The function that patches several activations, one after the other."""
    axes = ("layer", *places)

    def get_act_patch(
        model: Part,
        corrupted_tokens: Inputs,
        clean_cache: Cache,
        metric: Metrics,
        *,
        reduce: str = "scalar",
        baseline: bool = False,
    ) -> Values:
        call = _Call.of(model, corrupted_tokens, clean_cache, metric, reduce, baseline)
        plans = [call.plan(activation, axes) for activation in activations.values()]
        stacked = _stacked([call.swept(plan) for plan in plans]).movedim(0, 1)
        return call.answer(stacked, ("patch_type", *axes), list(activations))

    doc = _DOC.format(
        what=f"{', '.join(activations)} in turn, each by {', '.join(axes)}",
        metric="metric",
        axes=", ".join(("patch_type", *axes)),
        padded=" Missing key and value heads are 0." if "head" in axes else "",
        more="",
    )
    return _named(get_act_patch, what, doc)


def _stacked(values: Sequence[Float[Tensor, "..."]]) -> Float[Tensor, "n ..."]:
    """Tensors of unequal sizes as one, filled up with 0."""
    sizes = [max(size) for size in zip(*(one.shape for one in values), strict=True)]
    stacked = values[0].new_zeros(len(values), *sizes)
    for place, one in zip(stacked, values, strict=True):
        place[tuple(map(slice, one.shape))] = one
    return stacked


_OF_HEADS = {
    "out": "attn.z",
    "q": "attn.q",
    "k": "attn.k",
    "v": "attn.v",
    "pattern": "attn.pattern",
}
_OF_BLOCKS = {name: name for name in ("resid_pre", "attn_out", "mlp_out")}

get_act_patch_attn_head_all_pos_every = _every("attn_head_all_pos_every", _OF_HEADS, "head")
get_act_patch_attn_head_by_pos_every = _every("attn_head_by_pos_every", _OF_HEADS, "pos", "head")
get_act_patch_block_every = _every("block_every", _OF_BLOCKS, "pos")
