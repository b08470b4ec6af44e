"""Whether activations that somebody holds are of the shape that a site has for some inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from audio_lens.inputs import InputError
from audio_lens.sites import Site, unit_count
from audio_lens.timeline import Timeline

if TYPE_CHECKING:
    from audio_lens.models.base import HookedAudioTransformer


def shape_of(
    model: HookedAudioTransformer, site: Site, timeline: Timeline
) -> tuple[int | None, ...]:
    """The shape of a site's activation; None where it depends on the run."""
    shape: list[int | None] = [None] * (4 if site.unit == "head" else 3)
    shape[-1] = _width(model, site, timeline)
    shape[0], shape[site.position_dim] = timeline.mask(site.positions_of).shape
    if site.unit is not None:
        _, unit_dim = site.split
        shape[unit_dim] = unit_count(model, site)
    return tuple(shape)


def _width(model: HookedAudioTransformer, site: Site, timeline: Timeline) -> int | None:
    """The size of the last axis; None for what enters a connector."""
    if site.reads_attention:  # keys
        keys_of = "encoder" if site.sublayer == "cross_attn" else site.positions_of
        return timeline.mask(keys_of).shape[1]
    if site.n_layers is None:
        return model.cfg.need_decoder.d_model if site.activation == "out" else None
    cfg = model.cfg.parts[site.part]
    is_of_a_head = site.unit == "head" and site.last != "result"
    return cfg.d_head if is_of_a_head else cfg.d_model


def check_shape(name: str, value: Any, expected: tuple[int | None, ...]) -> None:
    """Raise where an activation cannot have come from a site of this shape.

    Raises:
        InputError: naming both shapes, or what it is in place of a tensor.
    """
    if not isinstance(value, torch.Tensor):
        raise InputError(f"the source of {name} is a {type(value).__name__}, not a tensor")
    sizes = zip(value.shape, expected, strict=False)
    if value.ndim != len(expected) or any(n not in (None, size) for size, n in sizes):
        wanted = ", ".join("any" if n is None else str(n) for n in expected)
        raise InputError(
            f"the source of {name} has shape {tuple(value.shape)}, the activation ({wanted}): "
            "patching needs equal shapes"
        )
