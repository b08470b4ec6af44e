"""What is checked of a sweep before anything is patched, and how its batch is laid out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens import metrics
from audio_lens.inputs import AudioInputs, InputError
from audio_lens.models.config import TEXT
from audio_lens.sites import Site
from audio_lens.timeline import Timeline

if TYPE_CHECKING:
    from audio_lens.models.base import HookedAudioTransformer


def check_pair(
    model: HookedAudioTransformer,
    one: AudioInputs,
    other: AudioInputs,
    names: tuple[str, str] = ("clean", "corrupted"),
    timeline: Timeline | None = None,
) -> Timeline:
    """The timeline that two batches share: every position of one corresponds to one of the other.

    Args:
        timeline: of ``one``, where it is known.

    Raises:
        InputError: naming the difference, where there is one.
    """
    one.check_pairs_with(other, *names)
    timeline = model.timeline(one) if timeline is None else timeline
    theirs = timeline if other is one else model.timeline(other)
    if not timeline.corresponds_to(theirs):
        raise InputError(
            f"the audio of {' and '.join(names)} lies at different positions of the prompt, so "
            "these do not correspond: use texts that put it in the same place"
        )
    return timeline


def rounding_notes(model: HookedAudioTransformer) -> list[str]:
    """What a reader of values must know of a model in half precision; nothing of other models."""
    if model.dtype in (torch.float32, torch.float64):
        return []
    name, steps = str(model.dtype).removeprefix("torch."), round(1 / torch.finfo(model.dtype).eps)
    return [
        f"the model runs in {name}, in which neighbouring numbers lie 1/{steps} of their size "
        "apart: values may be off by up to some twenty such steps of the largest effect, and "
        "differ between a sweep and single forwards; load float32 to measure small effects"
    ]


def check_reaches(model: HookedAudioTransformer, sites: Sequence[Site], metric: Any) -> None:
    """Raise unless what a metric reads depends on the sites.

    Raises:
        ValueError: naming the site and what is read.
    """
    deaf = [str(site) for site in sites if site.part in model.cfg.further_decoders]
    if deaf and metrics.streams_read(metric) == {TEXT}:
        raise InputError(
            f"{', '.join(deaf)} can change nothing that is read: of {model.cfg.family} the metric "
            f"reads the {TEXT}, which the decoder writes; read another stream, or sweep the decoder"
        )


def check_finite(values: Mapping[str, Tensor], names: Sequence[str]) -> None:
    """Raise where a metric is NaN or infinite before anything is patched.

    Raises:
        MetricError: naming metric and run.
    """
    for run, of_metrics in values.items():
        broken = [
            n for n, value in zip(names, of_metrics, strict=True) if not value.isfinite().all()
        ]
        if broken:
            raise metrics.MetricError(f"metric {', '.join(broken)} is not finite on the {run} run")


def batch_dims(
    metric: Any, names: Sequence[str], batch: int, baseline: Float[Tensor, " metrics *batch"]
) -> tuple[tuple[str, ...], dict[str, list]]:
    """The dims in front of the axes and their coordinates: several metrics, several stimuli."""
    dims: dict[str, list] = {}
    if isinstance(metric, Mapping):
        dims["metric"] = list(names)
    if baseline.ndim == 2 and batch > 1:
        dims["stimulus"] = list(range(batch))
    return tuple(dims), dims
