"""`ablate`: what becomes of the answer when places are taken out of one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audio_lens.edits.do import Do, Put, Source
from audio_lens.patching.engine.checkpoint import EVERY_S
from audio_lens.patching.result import SweepResult
from audio_lens.patching.spec import Bands, Inputs, Windows
from audio_lens.patching.sweep import sweep
from audio_lens.places import Where

if TYPE_CHECKING:
    from audio_lens.models.base import HookedAudioTransformer


def ablate(
    model: HookedAudioTransformer,
    inputs: Inputs,
    *,
    site: str | Sequence[str],
    axes: str | Sequence[str],
    value: Source | Do = 0,
    metric: Any,
    where: Where = "all",
    groups: Mapping[str, Where] | None = None,
    windows: Windows | None = None,
    bands: Bands | None = None,
    layers: int | Sequence[int] | None = None,
    layer_window: int = 1,
    cells_per_forward: int | None = None,
    memory_gb: float | int | None = None,
    verify: int = 0,
    checkpoint: str | Path | None = None,
    checkpoint_every_s: float | int = EVERY_S,
    progress: bool | None = None,
) -> SweepResult:
    """Edit every cell of a site in one run, and measure by how much the answer changes.

    Args:
        inputs: the run; there is no other.
        site, axes, metric, windows, bands, layers, layer_window: as in `sweep`.
        value: what is put in place: a number, "mean" (over all rows and positions that hold
            something), or whatever `edits.Put` takes; or another edit, such as `edits.Scale(2)` or
            `edits.Block("audio")`.
        where, groups: as in `sweep`.
        cells_per_forward, memory_gb, verify, checkpoint, checkpoint_every_s, progress: as in
            `sweep`.

    Returns:
        `SweepResult` with direction "edit", whose cells are ranked and drawn by ``change``: the
        metric minus that of the unedited run.

    Raises:
        SiteError, InputError, MetricError, ValueError, CheckpointError: as `sweep`.
    """
    inputs = model.as_inputs(inputs)
    return sweep(
        model,
        clean=inputs,
        corrupted=inputs,
        site=site,
        axes=axes,
        metric=metric,
        do=value if isinstance(value, Do) else Put(value),
        where=where,
        groups=groups,
        windows=windows,
        bands=bands,
        layers=layers,
        layer_window=layer_window,
        cells_per_forward=cells_per_forward,
        memory_gb=memory_gb,
        verify=verify,
        checkpoint=checkpoint,
        checkpoint_every_s=checkpoint_every_s,
        progress=progress,
    )
