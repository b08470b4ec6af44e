"""One intervention: several activations overwritten at once, in one forward.

The single case that `sweep` runs thousands of times (METHODS section 3.1), open to any combination
of places and sources.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens import ActivationCache

from audio_lens import metrics
from audio_lens.arguments import listed, number, numbers, suggest
from audio_lens.combining import Either, Outside, Without
from audio_lens.edits.do import Put
from audio_lens.edits.edit import Edit, Laid, chosen_layers, chosen_units, in_force, is_inputs
from audio_lens.errors import InputError, KindError
from audio_lens.inputs import AudioInputs
from audio_lens.patching.cells import Positions
from audio_lens.patching.checks import check_pair
from audio_lens.patching.engine.trace import blocks_of, is_known, stack_of
from audio_lens.places import Where
from audio_lens.running import evaluating
from audio_lens.shapes import check_shape, shape_of
from audio_lens.sites import Site, SiteError
from audio_lens.timeline import Band, Span

if TYPE_CHECKING:
    from audio_lens.models.base import HookedAudioTransformer

Indices = int | Sequence[int]
Source = ActivationCache | AudioInputs | Mapping[str, Any] | Float[Tensor, "..."] | float | int
Values = dict[str, Any]  # tensors and numbers by hook name


class Patch(Edit):
    """What to overwrite, and with what: an `Edit` with `edits.Put`.

    It stands wherever an edit does (`intervene`, `patching.run`, files of edits). There a window
    that some prompt does not have is refused, as of every edit; `patch` leaves such prompts as they
    are.

    Attributes:
        site: ``part.activation``, as in `sweep`.
        layer: the block or blocks; None for all (and for sites outside the blocks).
        head, neuron: which of them, where the site has heads or neurons; None for all.
        time: a Span, ``(start_s, end_s)`` or a list of these. A prompt without the window is left
            as it is.
        frequency: a Band, ``(low_hz, high_hz)`` or a list of these, where positions are patches of
            a spectrogram.
        position: index, slice or several indices, as in Python; none of time, frequency and
            position means everywhere.
        source: where the values come from: a cache (or mapping) of hook names to activations,
            inputs to run, an activation of the site's shape, or one number (0 ablates).

    Raises:
        ValueError: time or frequency beside a position, an empty list of windows, or none of these.
    """

    def __init__(
        self,
        site: str,
        layer: Indices | None = None,
        head: Indices | None = None,
        neuron: Indices | None = None,
        time: Span | tuple | list | None = None,
        frequency: Band | tuple | list | None = None,
        position: Indices | slice | Int[Tensor, " n"] | None = None,
        *,
        source: Source,
    ):
        super().__init__(
            site, Put(source), layer=layer, head=head, neuron=neuron, where="all", when="both"
        )
        own = {"source": source, "time": time, "frequency": frequency, "position": position}
        own["where"] = _place_of(time, frequency, position)
        for name, value in own.items():
            object.__setattr__(self, name, value)

    source: Source
    time: Span | tuple | list | None
    frequency: Band | tuple | list | None
    position: Indices | slice | Int[Tensor, " n"] | None


@torch.no_grad()
def patch(
    model: HookedAudioTransformer,
    inputs: AudioInputs | Mapping[str, Any],
    patches: Sequence[Patch],
    *,
    metric: Any = None,
) -> Float[Tensor, "..."] | dict[str, Float[Tensor, "..."]]:
    """Run the inputs with every patch in place at once.

    Hooks of yours stay in force, before the patches, here and in runs of inputs given as sources.
    A model in training mode runs in evaluation mode, and the log says so where that matters.

    Args:
        model: the model.
        inputs: the run that is patched.
        patches: what to overwrite; no two of them the same element.
        metric: as in `sweep`; None gives the logits. Metrics that compare with a clean run need
            it: ``metrics.kl().bind(model, inputs, clean_logits)``.

    Returns:
        The metric, a scalar or one value per prompt (NaN for prompts that have none of the patched
        positions); a dict of these for a mapping of metrics; or logits, ``b t d_vocab``.

    Raises:
        SiteError: a site, head or neuron the model does not have, or a source without the site.
        InputError: inputs as source that do not correspond to ``inputs``, or a source of another
            shape.
        ValueError: no patches, two that overlap, or a place that holds nothing.
        MetricError: a metric that fails, or gives something else than numbers.
    """
    inputs = model.as_inputs(inputs)
    if metric is not None:
        metrics.check(metric)
    asked = listed("patches", patches, Patch, "Patches")
    placed = [_Placed.of(model, inputs, one) for one in asked]
    _check_distinct(model, placed)
    measures = {
        name: metrics.bound(one, model, inputs)
        for name, one in ({} if metric is None else metrics.named(metric)).items()
    }
    reads_attention = any(one.site.reads_attention for one in placed)
    with evaluating(model), model.attention("explicit" if reads_attention else model.attn_mode):
        runs = _run_sources(model, inputs, placed)
        with in_force(model, [one.laid(model, runs) for one in placed]):
            logits = model(inputs)
    if metric is None:
        return logits
    reached = torch.stack([one.reached for one in placed]).any(0)
    values = {name: _measured(name, measure, logits, reached) for name, measure in measures.items()}
    return values if isinstance(metric, Mapping) else next(iter(values.values()))


def _measured(
    name: str,
    measure: metrics.MetricFn,
    logits: Float[Tensor, "b *t v"],
    reached: Bool[Tensor, " b"],
) -> Float[Tensor, "*b"]:
    """The metric of the patched run; NaN for prompts that no patch reaches."""
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    value = metrics.measured(name, measure, precise, len(reached), "the patched run")
    return value.where(reached.to(value.device), torch.nan) if value.ndim else value


@dataclass(frozen=True, eq=False)
class _Placed:
    """A patch in some inputs.

    Attributes:
        names: of the hook points.
        positions: those that are overwritten, padding too where it is named.
        units: heads or neurons; None for all.
        reached: the prompts that hold something there.
        given: the values by hook name; None while they are to come from a run of the source.
    """

    patch: Patch
    site: Site
    names: tuple[str, ...]
    positions: Bool[Tensor, "batch t"]
    units: Bool[Tensor, " n"] | None
    reached: Bool[Tensor, " rows"]
    given: Values | None

    @staticmethod
    def of(model: HookedAudioTransformer, inputs: AudioInputs, patch: Patch) -> _Placed:
        site = Site.parse(patch.site, model)
        names = tuple(site.hook_name(layer) for layer in chosen_layers(site, patch.layer))
        timeline = model.timeline(inputs)
        where = Positions(timeline, site)
        positions = _positions(where, patch)
        reached = where.covered(positions[None])[0]
        if not reached.any():
            raise InputError(f"{patch.position} of {site} holds nothing in any prompt: all padding")
        units = chosen_units(model, site, {"head": patch.head, "neuron": patch.neuron})
        given = None if is_inputs(patch.source, model) else _given(patch.source, names)
        for name, value in (given or {}).items():
            _check_value(name, value, shape_of(model, site, timeline))
        return _Placed(patch, site, names, positions, units, reached, given)

    def laid(self, model: HookedAudioTransformer, runs: Mapping[int, ActivationCache]) -> Laid:
        """The edit that it is, which leaves prompts without its positions as they are."""
        values = runs[id(self.patch.source)] if self.given is None else self.given
        where = "all" if bool(self.positions.all()) else self.positions
        of = {name: getattr(self.patch, name) for name in ("layer", "head", "neuron")}
        edit = Edit(self.patch.site, Put(values), where=where, **of)
        return Laid.of(model, edit, may_miss=True)

    def overlaps(self, other: _Placed) -> bool:
        """Whether some element, were both at one tensor, is written by both."""
        if not (self.positions & other.positions).any():
            return False
        if self.units is None or other.units is None:
            return True
        return bool((self.units & other.units).any())


# -------------------------------------------------------------------------------- where


def _place_of(time: Any, frequency: Any, position: Any) -> Where:
    """The place of a patch."""
    if position is not None:
        if time is not None or frequency is not None:
            raise InputError("a patch has either time and frequency or position, not both")
        return position
    spans = [Span.of(window) for window in _listed(time, "windows")]
    bands = [Band.of(band) for band in _listed(frequency, "bands")]
    if not spans or not bands:
        return functools.reduce(Either, [*spans, *bands]) if spans or bands else "all"
    return Without(functools.reduce(Either, spans), Outside(functools.reduce(Either, bands)))


def _positions(where: Positions, patch: Patch) -> Bool[Tensor, "batch t"]:
    if patch.time is not None or patch.frequency is not None:
        spans = [Span.of(window) for window in _listed(patch.time, "windows")]
        bands = [Band.of(band) for band in _listed(patch.frequency, "bands")]
        inside = where.inside(spans).any(0) if spans else where.everywhere()[0]
        return inside & where.within(bands).any(0) if bands else inside
    if patch.position is None:
        return where.everywhere()[0]
    chosen = torch.zeros_like(where.valid)
    index = patch.position
    if not isinstance(index, (slice, Tensor)):
        index = numbers("position", index)
    try:
        chosen[:, index] = True
    except (IndexError, ValueError) as error:  # a number beyond all integers
        raise InputError(
            f"{where.site} has {chosen.shape[1]} positions here, which {patch.position} does not "
            "fit"
        ) from error
    if not chosen.any():
        raise InputError(f"{index} selects none of the {chosen.shape[1]} positions of {where.site}")
    return chosen


def _listed(given: Any, what: str) -> list:
    """What is given as a list; nothing for None."""
    if isinstance(given, list) and not given:
        raise InputError(f"the list of {what} is empty")
    return given if isinstance(given, list) else [] if given is None else [given]


def _check_distinct(model: HookedAudioTransformer, placed: list[_Placed]) -> None:
    """Raise where two patches write the same element: which one wins would be arbitrary."""
    if not placed:
        raise InputError("no patches: pass at least one Patch")
    for one, other in itertools.combinations(placed, 2):
        places = {_place(model, name) for name in other.names}
        shared = [name for name in one.names if _place(model, name) in places]
        if shared and one.overlaps(other):
            raise InputError(
                f"two patches write the same elements of {', '.join(shared)}: narrow one of them "
                "to other heads or positions, or leave it out"
            )


def _place(model: HookedAudioTransformer, name: str) -> str:
    """The hook's tensor: what leaves a block is what enters the next."""
    part, _, rest = name.partition(".blocks.")
    layer, _, activation = rest.partition(".")
    if not (layer and is_known(stack_of(model, part))):
        return name
    if activation != f"hook_{blocks_of(stack_of(model, part))[int(layer)].last_stage}":
        return name
    return f"{part}.blocks.{int(layer) + 1}.hook_resid_pre"


# -------------------------------------------------------------------------------- with what


def _given(source: Source, names: tuple[str, ...]) -> Values:
    """The source's value for every hook name."""
    if not isinstance(source, (ActivationCache, Mapping)):
        return dict.fromkeys(names, source)
    missing = [name for name in names if name not in source]
    if missing:
        raise SiteError(
            f"the source does not hold {missing[0]}; {suggest(missing[0], source.keys())}. Cache "
            "it by name: run_with_cache(inputs, names_filter=...)"
        )
    return {name: source[name] for name in names}


def _check_value(name: str, value: Any, expected: tuple[int | None, ...]) -> None:
    """Raise for what is no value of an activation of this shape; a number is one."""
    if isinstance(value, Real):
        number("a source", value)
        return
    if not isinstance(value, torch.Tensor):
        raise KindError(
            f"the source of {name} is a {type(value).__name__}: a patch takes a cache, inputs, a "
            "tensor or a number"
        )
    check_shape(name, value, expected)


def _run_sources(
    model: HookedAudioTransformer, inputs: AudioInputs, placed: list[_Placed]
) -> dict[int, ActivationCache]:
    """One run of every distinct source of inputs, keeping just what is taken from it."""
    distinct = {id(one.patch.source): one.patch.source for one in placed if one.given is None}
    runs = {}
    for key, source in distinct.items():
        given = model.as_inputs(source)
        check_pair(model, inputs, given, ("the inputs", "the source"))
        own = [one for one in placed if id(one.patch.source) == key]
        names = sorted({name for one in own for name in one.names})
        _, runs[key] = model.run_with_cache(given, names_filter=names)
    return runs
