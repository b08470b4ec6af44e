"""Making a saved map again from what it recorded, and comparing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from audio_lens.edits.edit import edits_of, intervene
from audio_lens.errors import AudioLensError
from audio_lens.inputs import AudioInputs
from audio_lens.patching.attribution.attribute import Attribution, attribute
from audio_lens.patching.clip_pair import ClipPair
from audio_lens.patching.known import NAME_IT, own_parts
from audio_lens.patching.plan import Plan
from audio_lens.patching.refine import refined
from audio_lens.patching.result import SweepResult
from audio_lens.patching.spec import SweepSpec
from audio_lens.provenance import is_own, recalled, revision_of, versions, weights_hash
from audio_lens.running import evaluating

if TYPE_CHECKING:
    from audio_lens.models.base import HookedAudioTransformer

ROUNDING = {"float64": 1e-9, "float32": 1e-4}  # between machines and versions
COARSE = 2e-2  # of half precision, and of sweeps that are not exact


class RerunError(AudioLensError, ValueError):
    """A map that cannot be made again from what it recorded, or not with what was given."""


@dataclass(frozen=True)
class Rerun:
    """A map made again, beside the saved one.

    Attributes:
        result: the new map.
        n_cells: how many cells were compared.
        difference: the largest difference of a value, in units of the metric.
        tolerance: what rounding on other machines and versions explains, in the same units.
        agrees: whether no value differs by more than its metric's tolerance.
        changed: versions and the like that are not what they were: then and now.
    """

    result: SweepResult = field(repr=False)
    n_cells: int
    difference: float
    tolerance: float
    agrees: bool
    changed: dict[str, tuple[str, str]]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        numbers = ("agrees", "n_cells", "difference", "tolerance")
        changed = {name: {"then": a, "now": b} for name, (a, b) in self.changed.items()}
        return {name: getattr(self, name) for name in numbers} | {"changed": changed}


def rerun(
    saved: SweepResult,
    model: HookedAudioTransformer | None = None,
    *,
    clean: AudioInputs | Mapping[str, Any] | str | Path | None = None,
    corrupted: AudioInputs | Mapping[str, Any] | str | Path | None = None,
    metric: Any = None,
    source: Any = None,
    do: Any = None,
    where: Any = None,
    groups: Any = None,
    progress: bool | None = None,
) -> Rerun:
    """Make a saved sweep or attribution again and compare the values.

    Args:
        saved: the result, as `patching.load` gives it.
        model: the model; None loads what was recorded.
        clean, corrupted: where the clips are now, for a map made from files (by the command line);
            the inputs, for one made from inputs in memory. They must be what they were.
        metric: the metric, where it was a function of your own.
        source: the source, where the sweep was patched from one.
        do, where, groups: edit and places, where these held tensors or functions.
        progress: as in `sweep`.

    Raises:
        RerunError: a map that recorded too little or holds no value, a part or mean of one, other
            weights or inputs; a metric, a source or hooks that have to be given again, are others
            than they were, or cannot be known again.
        ChangedFileError: a clip that is gone or holds something else.
    """
    if "arguments" not in saved.recipe:
        raise RerunError("this map recorded no arguments, so it cannot be made again")
    model = load_recorded(saved) if model is None else model
    own = {"metric": metric, "source": source, "do": do, "where": where, "groups": groups}
    _check_values(saved)
    with _edited(saved, model), evaluating(model), model.attention(saved.meta["attn_mode"]):
        _check_model(saved, model)
        inputs = _inputs(saved, model, clean, corrupted)
        arguments: dict[str, Any] = _arguments(saved, own)
        arguments |= inputs
        _check_own(saved, model, SweepSpec.of(model, **arguments))
        again = _again(saved, model, arguments, progress)
    return _compared(saved, again)


@contextmanager
def _edited(saved: SweepResult, model: HookedAudioTransformer) -> Iterator[None]:
    """The edits that were in force when the map was made; those of the caller, if there are any.

    Raises:
        RerunError: edits that no file holds, where none are in force.
    """
    then = saved.recipe.get("edits")
    if then is None or edits_of(model):
        yield
        return
    if is_own(then):
        raise RerunError(
            "the edits in force when this map was made hold functions, modules or very large "
            "tensors, which no file holds: call rerun inside `with intervene(...)` of the same"
        )
    with intervene(model, recalled(then)):
        yield


def load_recorded(saved: SweepResult, name: str | None = None) -> HookedAudioTransformer:
    """The model a map was made with; ``name`` says where it is now, if elsewhere."""
    from audio_lens.models import HookedAudioTransformer

    name, options = how_loaded(saved, name)
    return HookedAudioTransformer.from_pretrained(name, **options)


def how_loaded(saved: SweepResult, name: str | None = None) -> tuple[str, dict[str, Any]]:
    """Name, dtype and device of the recorded model; on the CPU where the device is not there.

    Raises:
        RerunError: if its name was not recorded.
    """
    name = name or saved.meta.get("model")
    if not name or "dtype" not in saved.meta:
        raise RerunError("this map does not say which model it is of: pass the model")
    device = saved.meta["device"]
    is_there = device == "cpu" or (device.startswith("cuda") and torch.cuda.is_available())
    dtype = getattr(torch, saved.meta["dtype"])
    return name, {"dtype": dtype, "device": device if is_there else None}


def _check_values(saved: SweepResult) -> None:
    """Raise where nothing could be compared: no values would always agree."""
    names = saved.coords.get("metric", [""])
    for name, values in zip(names, _by_metric(saved, "values"), strict=True):
        if values.isnan().all():
            of_metric = f" of metric {name!r}" if name else ""
            raise RerunError(
                f"this map holds no value{of_metric}, only NaN: there is nothing to compare"
            )


def _check_own(saved: SweepResult, model: HookedAudioTransformer, spec: SweepSpec) -> None:
    """Raise unless what no file holds is what it was: metric, source and hooks of the user's own.

    Raises:
        RerunError: naming it.
    """
    recorded, arguments = saved.recipe.get("own", {}), saved.recipe["arguments"]
    own = {name: is_own(arguments.get(name)) for name in ("metric", "source")}
    further = [value for name, value in arguments.items() if name not in own]
    own["arguments"] = any(map(is_own, further))
    now = own_parts(model, spec)
    own["hooks"] = bool(saved.recipe.get("hooks") or recorded.get("hooks") or now["hooks"])
    for name in (name for name, is_so in own.items() if is_so):
        if not recorded.get(name) or not now[name]:
            raise RerunError(
                f"the {name} of this map cannot be known again, so nobody can tell whether what is "
                f"given is the same: {NAME_IT}, and make the map anew"
            )
        if recorded[name] != now[name]:
            raise RerunError(
                f"what is given as {name} is not what this map was made with: its code, or what "
                "that refers to, differs"
            )


def _check_model(saved: SweepResult, model: HookedAudioTransformer) -> None:
    if weights_hash(model) != saved.meta["weights_hash"]:
        raise RerunError(
            f"{model.cfg.model_name} has other weights (or another dtype) than the model the map "
            f"is of, {saved.meta['model']} in {saved.meta['dtype']}: pass that one"
        )
    attached, hooked = list(model.list_hooks(dir="fwd")), saved.recipe.get("hooks", [])
    if attached != hooked:
        raise RerunError(
            f"hooks were attached to {', '.join(hooked) or 'nothing'} when the map was made, and "
            f"are now to {', '.join(attached) or 'nothing'}: pass the model with the same hooks"
        )


def _inputs(
    saved: SweepResult, model: HookedAudioTransformer, clean: Any, corrupted: Any
) -> dict[str, AudioInputs]:
    """Both inputs: from the recorded files, or those given if they are what they were."""
    given = {"clean": clean, "corrupted": corrupted}
    are_files = all(one is None or isinstance(one, (str, Path)) for one in given.values())
    if are_files and "clips" in saved.recipe:
        moved = {name: None if one is None else Path(one) for name, one in given.items()}
        pair = ClipPair.from_record(saved.recipe["clips"], **moved).inputs(model)
        return dict(zip(given, pair, strict=True))
    if any(one is None or isinstance(one, (str, Path)) for one in given.values()):
        raise RerunError(
            "this map was made from inputs in memory: pass clean= and corrupted= as model.prepare "
            "made them"
        )
    inputs = {name: model.as_inputs(one) for name, one in given.items()}
    for name, one in inputs.items():
        if one.digest() != saved.meta[f"{name}_hash"]:
            raise RerunError(f"the {name} inputs are not those the map was made with")
    return inputs


def _arguments(saved: SweepResult, own: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded arguments, with what had to be given again."""
    arguments = {}
    for name, value in saved.recipe["arguments"].items():
        given = own.get(name)
        if given is not None:
            arguments[name] = given
        elif is_own(value):
            raise RerunError(f"the {name} of this map was your own, and no file holds it: pass it")
        else:
            arguments[name] = recalled(value)
    unknown = [name for name, one in own.items() if one is not None and name not in arguments]
    if unknown:
        raise RerunError(f"this map takes no {', '.join(unknown)}: leave it out")
    return arguments


def _again(
    saved: SweepResult,
    model: HookedAudioTransformer,
    arguments: dict[str, Any],
    progress: bool | None,
) -> SweepResult:
    if "method" in arguments:
        (again,) = _listed(attribute(model, **arguments, progress=progress))
    elif arguments.get("refine") is not None:
        again = refined(model, SweepSpec.of(model, **arguments), {"progress": progress})
    else:
        planned = Plan.of(model, SweepSpec.of(model, **arguments))
        _check_whole(saved, planned.table.axes, planned.table.coords)
        again = planned.run(only=_computed(saved), progress=progress)
    _check_whole(saved, again.dims, again.coords)
    return again


def _listed(made: Attribution | dict[str, Attribution]) -> list[Attribution]:
    return list(made.values()) if isinstance(made, dict) else [made]


def _check_whole(saved: SweepResult, dims: Sequence[str], coords: Mapping[str, list]) -> None:
    if any(coords[dim] != saved.coords.get(dim) for dim in dims):
        raise RerunError(
            "this is a part or a mean of a map, or one on other positions: make the whole map again"
        )


def _computed(saved: SweepResult) -> list[int]:
    """The cells that hold a value."""
    n_cells = saved.values[(0,) * (saved.values.ndim - len(saved.axes))].numel()
    return (~saved.values.reshape(-1, n_cells).isnan()).any(0).nonzero().flatten().tolist()


def _compared(saved: SweepResult, again: SweepResult) -> Rerun:
    """Values and baselines of every metric, side by side."""
    old, new = (_by_metric(one) for one in (saved, again))
    is_same = (old == new) | (old.isnan() & new.isnan())
    differences = (new - old).abs().masked_fill(is_same, 0.0).nan_to_num(torch.inf).amax(1)
    allowed = _allowed(saved, old)
    worst = int((differences / allowed).argmax())
    return Rerun(
        result=again,
        n_cells=len(_computed(saved)),
        difference=differences[worst].item(),
        tolerance=allowed[worst].item(),
        agrees=bool((differences <= allowed).all()),
        changed=_changed(saved, again),
    )


def _by_metric(result: SweepResult, *names: str) -> Tensor:
    """All values and baselines, ``metrics numbers``; or those that are named."""
    n_metrics = len(result.coords["metric"]) if "metric" in result.dims else 1
    numbers = [getattr(result, name) for name in names or ("values", "clean", "corrupted")]
    return torch.cat([x.detach().cpu().double().reshape(n_metrics, -1) for x in numbers], dim=1)


def _allowed(saved: SweepResult, numbers: Tensor) -> Tensor:
    """What rounding explains: a share of the largest number of each metric."""
    exact = saved.meta.get("precision", "exact") == "exact"
    share = ROUNDING.get(saved.meta["dtype"], COARSE) if exact else COARSE
    return share * numbers.nan_to_num(0.0, 0.0, 0.0).abs().amax(1).clamp(min=1e-6)


def _changed(saved: SweepResult, again: SweepResult) -> dict[str, tuple[str, str]]:
    now = again.meta | versions()
    revision = revision_of(again.meta["model"])
    now |= {} if revision is None else {"revision": revision}
    names = ("revision", "device", "clean_hash", "corrupted_hash", *versions())
    pairs = {name: (saved.meta.get(name, ""), now.get(name, "")) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
