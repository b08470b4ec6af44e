"""Fine-grained cross-modal causal tracing: a component of a layer at a class of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from audio_lens.analysis.fusion.groups import Groups
from audio_lens.analysis.fusion.recovery import CONTROLS, Request, Spot, traced
from audio_lens.analysis.fusion.tracing import block_numbers
from audio_lens.errors import InputError
from audio_lens.items import Items, Pairs, method
from audio_lens.models import HookedAudioTransformer
from audio_lens.results import Result
from audio_lens.sites import sites_of

COMPONENTS = ("attn_out", "cross_attn_out", "mlp_out", "resid_post")
STRONGEST = 3  # cells that the report names


@method("fusion.fcct")
def fcct(
    model: HookedAudioTransformer,
    items: Items | Pairs,
    *,
    components: Sequence[str] | None = None,
    heads: bool = False,
    layers: int | Sequence[int] | None = None,
    groups: Mapping[str, Any] | None = None,
    metric: Any = None,
    controls: Sequence[str] = CONTROLS,
    by: str | None = None,
    size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """Which component of which layer brings the answer back, at which class of tokens (2511.05923).

    As `trace`, with what attention and MLP write and the states behind a block in place of those
    that enter it. The default classes are thirds of the audio, the "options", the "attribute" (the
    item's label of that name, as its text has it), the "last" token, and all other text, called
    "instruction".

    Args:
        model, items: as in `trace`.
        components: of "attn_out", "cross_attn_out", "mlp_out" and "resid_post"; None for those
            that the model has.
        heads: each head, too, as "head 0", "head 1" ...: what it writes alone.
        layers, groups, metric, controls, by, size, seed, progress: as in `trace`.

    Returns:
        Recoveries by metric, item, component, layer and group.

    Raises:
        InputError, SiteError, ItemError, ControlError: as `trace`.
    """
    known = {str(site) for site in sites_of(model)}
    if components is None:
        components = [name for name in COMPONENTS if f"decoder.{name}" in known]
    rows = block_numbers(model, "decoder.resid_pre", layers)
    sites: dict[str, tuple[str, int | None]] = {
        name: (f"decoder.{name}", None) for name in components
    }
    if heads and model.cfg.decoder is not None:
        count = model.cfg.decoder.n_heads
        sites |= {f"head {head}": ("decoder.attn.z", head) for head in range(count)}
    if not sites:
        raise InputError(f"no components: choose of {', '.join(COMPONENTS)}, or heads=True")
    found = traced(
        model,
        items,
        Request(
            [Spot(site, layer, head) for site, head in sites.values() for layer in rows],
            {"component": list(sites), "layer": rows},
            Groups.of_tokens() if groups is None else Groups.given(groups),
            metric,
            controls,
            by,
            size,
            seed,
            progress,
        ),
    )
    found.report[:0] = _said(found)
    found.report.append(
        "components may share their work: one that recovers little need not be idle, and cells do "
        "not add up"
    )
    return found


def _said(result: Result) -> list[str]:
    """The strongest cells of each metric in words."""
    return [
        f"{metric}: most is recovered at {'; '.join(map(str, result.top(STRONGEST, metric)))}"
        for metric in result.coords["metric"]
    ]
