"""What the user's own parts of a sweep are, so that what they made is never taken for another's."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from audio_lens import metrics
from audio_lens.edits.written import held
from audio_lens.identity import NoIdentityError, identity_of
from audio_lens.inputs import AudioInputs, InputError
from audio_lens.patching.spec import SweepSpec
from audio_lens.provenance import known
from audio_lens.sites import Site

if TYPE_CHECKING:
    from audio_lens.models.base import HookedAudioTransformer

PARTS = ("metric", "hooks", "source", "arguments")
_TOLD = {  # arguments that are hashed by name elsewhere, come to cells, or change no value
    *("clean", "corrupted", "timeline", "sites", "axes", "metric", "record", "windows", "bands"),
    *("direction", "layers", "layer_window", "source", "precision", "refine"),
    *("cells_per_forward", "memory_gb"),
}
NAME_IT = (
    "wrap the function in metrics.versioned(fn, version), which makes it known by its name and "
    "that version"
)


def own_parts(model: HookedAudioTransformer, spec: SweepSpec) -> dict[str, str]:
    """What metric, hooks, source and further arguments are, as hashes, which results record.

    Empty where nobody can tell, or there is none.
    """
    parts = {name: known(part) for name, part in _parts(model, spec).items() if part}
    return {name: parts.get(name, "") for name in PARTS}


def need_own_parts(model: HookedAudioTransformer, spec: SweepSpec) -> dict[str, str]:
    """The same, where each must be known again.

    Raises:
        NoIdentityError: naming the part that cannot be, and what to do.
    """
    found = {name: "" for name in PARTS}
    for name, part in _parts(model, spec).items():
        try:
            found[name] = identity_of(part) if part else ""
        except NoIdentityError as error:
            raise NoIdentityError(
                f"the {name} cannot be known again: {error}; {NAME_IT}"
            ) from error
    return found


def _parts(model: HookedAudioTransformer, spec: SweepSpec) -> dict[str, Any]:
    return {
        "metric": metrics.named(spec.metric),
        "hooks": [one for one in (_attached(model), model.torch_hooks()) if one],
        "source": _source(spec),
        "arguments": _further(spec),
    }


def _attached(model: HookedAudioTransformer) -> dict[str, list[Any]]:
    """What is attached to every point; of edits what they are, not how they are laid out."""
    return {
        name: [_edit_or_function(fn) for fn in functions]
        for name, functions in model.hook_functions().items()
    }


def _edit_or_function(fn: Any) -> Any:
    laid = getattr(fn, "laid", None)
    if laid is None:
        return fn
    try:
        return held(laid.edit, str(laid.edit))
    except InputError:  # functions or modules of the user's own
        return laid.edit


def _further(spec: SweepSpec) -> dict[str, Any]:
    """The arguments that nothing else tells of."""
    given = {f.name: getattr(spec, f.name) for f in fields(spec) if f.name not in _TOLD}
    return {name: value for name, value in given.items() if value is not None}


def _source(spec: SweepSpec) -> str | dict[str, Any] | None:
    """Of activations, those that the sites can take."""
    source = spec.source
    if source is None:
        return None
    if isinstance(source, AudioInputs):
        return source.digest()
    names = [name for site in spec.sites for name in _names(site)]
    return {name: source[name] for name in names if name in source}


def _names(site: Site) -> list[str]:
    layers = [None] if site.n_layers is None else range(site.n_layers)
    return [site.hook_name(layer) for layer in layers]
