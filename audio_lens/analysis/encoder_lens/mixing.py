"""Components moved towards what they are on a clip that says nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens.analysis.encoder_lens.components import Components
from audio_lens.analysis.encoder_lens.said import measured_with_right
from audio_lens.analysis.encoder_lens.streams import check_reference, reference_of
from audio_lens.arguments import number
from audio_lens.edits import Mix
from audio_lens.errors import InputError
from audio_lens.inputs import AudioInputs
from audio_lens.items import Batch, ControlError, Items, found, method
from audio_lens.items.measuring import Cell
from audio_lens.models import HookedAudioTransformer
from audio_lens.results import Result

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)


@method("encoder_lens.mix")
def mix(
    model: HookedAudioTransformer,
    items: Items,
    site: str = "encoder.resid_post",
    *,
    reference: str = "noise",
    alphas: Sequence[float | int] = ALPHAS,
    layers: Sequence[int] | None = None,
    heads: bool = False,
    metric: Any = None,
    controls: bool = True,
    by: str | None = None,
    size: int = 8,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """What becomes of the answer as a component moves towards what it is on noise or silence.

    The component a becomes (1 - alpha) a + alpha a_ref, at every position: alpha 0 changes nothing,
    alpha 1 is a full patch. a_ref is of a clip of equal length that says nothing. Values are
    changes: the metric minus that of the unedited model, by layer (and head) and alpha. "right" is
    the change of the share of right answers.

    The control "other_item" is a full patch from another item's clip: what that does as well, the
    reference does by being another clip, not by saying nothing. It is NaN for items that no other
    has the layout of.

    Args:
        model: the model.
        items: with answers of one token (or class).
        site: the component: ``encoder.resid_post``, ``encoder.attn_out``,
            ``decoder.cross_attn_out``, ``encoder.mlp_out``, ``encoder.attn.z`` ...
        reference: "noise", white and as loud as the clip, or "silence".
        alphas: how far; from 0 to 1.
        layers: of the site; None takes all.
        heads: whether each head moves by itself, where the site has heads.
        metric: in place of the items' own; "right" is then left out.
        controls: whether the control runs.
        by, size, seed, progress: as in `encoder_lens`; the seed is that of the noise, too.

    Raises:
        SiteError: a site or layer that is not there, or heads of a site without any.
        InputError: another reference, or alphas that are none.
        ItemError: items without answers of one token, where ``metric`` is None.
        ControlError: a single item, which has no other.
    """
    components = Components.of(model, site, layers, heads)
    shares = [float(number("alpha", one, least=0, most=1)) for one in alphas]
    if not shares or len(set(shares)) < len(shares):
        raise InputError(f"alphas are one or more numbers, each once, got {list(alphas)}")
    check_reference(reference)
    if controls and len(items) < 2:
        raise ControlError("other_item needs two items or more, here is 1 (or controls=False)")
    alone: list[int] = []  # items that no other has the layout of

    def cells(batch: Batch) -> Iterator[Cell]:
        yield batch.inputs, []
        held = _held(model, components, reference_of(batch.inputs, reference, seed))
        for edit in components.edits(*(Mix(held, alpha) for alpha in shares)):
            yield batch.inputs, [edit]
        if controls:
            alone.extend(batch.rows if len(batch) == 1 else [])
            others = _held(model, components, batch.inputs[[*range(1, len(batch)), 0]])
            for edit in components.edits(Mix(others, 1.0)):
                yield batch.inputs, [edit]

    names, values = measured_with_right(
        model, items, cells, metric, size=size, what="reference mixing", progress=progress
    )
    changes = values[..., 1:] - values[..., :1]
    n_mixed = math.prod(components.shape) * len(shares)
    axes = {"metric": names, **components.axes}
    beside = {}
    if controls:
        other = changes[..., n_mixed:].unflatten(-1, components.shape)
        other[alone] = torch.nan
        beside["other_item"] = found(other, axes, items, by=by, seed=seed)
    return found(
        changes[..., :n_mixed].unflatten(-1, [*components.shape, len(shares)]),
        axes | {"alpha": shares},
        items,
        by=by,
        seed=seed,
        controls=beside,
        meta={"site": str(components.site), "reference": reference},
        report=_told(names, values[..., 0], len(alone)),
    )


def _held(
    model: HookedAudioTransformer, components: Components, inputs: AudioInputs
) -> dict[str, Tensor]:
    """The components of a run, by hook name."""
    with torch.no_grad():
        return model.run_with_cache(
            inputs,
            names_filter=components.hook_names,
            return_cache_object=False,
            return_type=None,
        )[1]


def _told(names: Sequence[str], unedited: Float[Tensor, "n metrics"], n_alone: int) -> list[str]:
    means = zip(names, unedited.mean(0).tolist(), strict=True)
    told = [f"{name} of the unedited model: {mean:.3g}" for name, mean in means]
    if n_alone:
        told.append(f"{n_alone} items have the layout of no other, and no control other_item")
    return [
        *told,
        "A component that changes nothing may be read all the same: others can make up for it.",
    ]
