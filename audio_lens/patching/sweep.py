"""`sweep` and `plan`: activation patching, exactly, of every cell of a site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformer_lens import ActivationCache

from audio_lens.inputs import AudioInputs
from audio_lens.patching.cells import Bands, CellTable, Windows
from audio_lens.patching.checks import check_pair, check_reaches
from audio_lens.patching.engine.hooked import HookedRoute
from audio_lens.patching.engine.request import Direction, Precision, Request
from audio_lens.patching.engine.schedule import Schedule
from audio_lens.patching.plan import Plan
from audio_lens.patching.refine import refined
from audio_lens.patching.result import SweepResult
from audio_lens.patching.sites import Site
from audio_lens.provenance import recorded

if TYPE_CHECKING:
    from audio_lens.models.base import HookedAudioTransformer

Inputs = AudioInputs | Mapping[str, Any]


def sweep(
    model: HookedAudioTransformer,
    *,
    clean: Inputs,
    corrupted: Inputs,
    site: str | Sequence[str] = "decoder.resid_pre",
    axes: str | Sequence[str] = ("layer", "time"),
    metric: Any,
    windows: Windows | None = None,
    bands: Bands | None = None,
    direction: Direction = "denoise",
    layers: int | Sequence[int] | None = None,
    layer_window: int = 1,
    source: Inputs | ActivationCache | None = None,
    cells_per_forward: int | None = None,
    memory_gb: float | int | None = None,
    precision: Precision = "exact",
    refine: float | int | None = None,
    verify: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool | None = None,
) -> SweepResult:
    """Patch every cell of a site and measure what it does to the answer.

    Args:
        model: the model.
        clean, corrupted: inputs of equal shape that differ in what is asked about.
        site: ``part.activation``: ``resid_pre``, ``attn_out``, ``mlp_out``, ``attn.z``,
            ``cross_attn.z``, ``attn.q/k/v/pattern``, ``mlp.post``, ``connector.out`` ... Several
            are patched together as one.
        axes: any of "layer", "head" or "neuron" (where the site has them), and "time" or
            "position", in the order wanted; and "frequency", where positions are patches of a
            spectrogram (AST). What is not an axis is patched as one: without "layer" all
            ``layers`` together, without "head" all heads, without "time" all times, without any
            of the last three all positions.
        metric: a metric of `audio_lens.metrics`, any function from logits to a scalar or one
            value per row, or a mapping from names to these. Called once per cell, with logits of
            the original batch. A bare function makes the engine compute the logits of all
            positions: `metrics.read_at` avoids that.
        windows: for axis "time": width in seconds (default 0.1), ``(width, stride)``, a list of
            Spans or ``(start_s, end_s)``, or "position" for single positions.
        bands: for axis "frequency": a list of Bands or ``(low_hz, high_hz)``, which hold the
            patches whose middle lies in them, or "patch" (default) for every row of patches.
        direction: "denoise" puts clean activations into the corrupted run, "noise" the reverse.
        layers: the block or blocks to patch; None for all.
        layer_window: how many adjacent blocks a cell patches together, from its layer on.
        source: patch from this instead: the inputs of another run, or activations by full hook
            name (an `AudioCache`, means over a data set ...).
        cells_per_forward: at most so many cells run together; None leaves it to the budget.
        memory_gb: working memory, both unpatched runs included; None takes half of what is free.
            Running out of memory halves the batch and goes on.
        precision: "exact"; "tf32" (CUDA) and "bf16" are faster and not exact: see ``report``.
        refine: start with ``windows`` and split those whose |effect| reaches this share of the
            baseline gap, down to single positions; ``result.widths`` says how wide a window each
            value was measured with.
        verify: compare so many random cells with whole forwards.
        checkpoint: a file that keeps what is done; the same call goes on from there.
        progress: show progress with the time left: None where somebody looks (terminals and
            notebooks), True everywhere, False nowhere.

    Your own hooks stay in force: every cell is then one whole forward, and ``report`` says so.

    Returns:
        `SweepResult`, with both baselines. Values of stimuli that have no position in a window
        (shorter clips of a batch) are NaN.

    Raises:
        SiteError: a site or axis the model does not have.
        InputError: inputs whose shapes differ, or whose audio lies at other positions.
        ValueError: windows without positions, layers out of range, a metric of another shape, one
            that is NaN on the unpatched runs or that the site cannot reach, or a budget too small
            for one cell.
        PlacementError: a model that is split over devices.
        VerificationError: a cell that a whole forward does not confirm.
        CheckpointError: a file that belongs to another sweep.
    """
    arguments = {
        "clean": clean,
        "corrupted": corrupted,
        "site": site,
        "axes": axes,
        "metric": metric,
        "direction": direction,
        "layers": layers,
        "layer_window": layer_window,
        "bands": bands,
        "source": source,
        "cells_per_forward": cells_per_forward,
        "memory_gb": memory_gb,
        "precision": precision,
    }
    if refine is None:
        planned = plan(model, windows=windows, **arguments)
        return planned.run(verify=verify, checkpoint=checkpoint, progress=progress)
    options = {"verify": verify, "checkpoint": checkpoint, "progress": progress}
    result = refined(lambda w: plan(model, windows=w, **arguments), windows, refine, options)
    result.recipe["arguments"]["refine"] = refine
    return result


def plan(
    model: HookedAudioTransformer,
    *,
    clean: Inputs,
    corrupted: Inputs,
    site: str | Sequence[str] = "decoder.resid_pre",
    axes: str | Sequence[str] = ("layer", "time"),
    metric: Any,
    windows: Windows | None = None,
    bands: Bands | None = None,
    direction: Direction = "denoise",
    layers: int | Sequence[int] | None = None,
    layer_window: int = 1,
    source: Inputs | ActivationCache | None = None,
    cells_per_forward: int | None = None,
    memory_gb: float | int | None = None,
    precision: Precision = "exact",
) -> Plan:
    """What `sweep` would do with these arguments, before any work.

    ``print(plan.explain())`` says what will run, what is left out and why; ``plan.run()`` does it.

    Raises:
        SiteError, InputError, ValueError: as `sweep`.
    """
    clean, corrupted = model.as_inputs(clean), model.as_inputs(corrupted)
    check_pair(model, clean, corrupted)
    _check_options(model, direction, cells_per_forward, memory_gb, precision)
    named = [site] if isinstance(site, str) else list(site)
    sites = [Site.parse(one, model) for one in named]
    check_reaches(model, sites, metric)
    table = CellTable.lay_out(model, clean, sites, axes, windows, layers, layer_window, bands)
    request = Request(
        model=model,
        clean=clean,
        corrupted=corrupted,
        table=table.to(model.device),
        metric=metric,
        direction=direction,
        source=_checked_source(model, source, table, clean),
        precision=precision,
        layer_window=layer_window,
    )
    asked = {
        "site": site,
        "axes": axes,
        "metric": metric,
        "windows": windows,
        "bands": bands,
        "direction": direction,
        "layers": layers,
        "layer_window": layer_window,
        "source": source,
        "precision": precision,
    }
    return laid_out(request, cells_per_forward, memory_gb, recorded(asked))


def laid_out(
    request: Request,
    cells_per_forward: int | None = None,
    memory_gb: float | int | None = None,
    arguments: dict[str, Any] | None = None,
) -> Plan:
    """A plan for a request; where cells are whole forwards, one per forward by default.

    Args:
        arguments: what was asked, as results keep it.
    """
    is_whole = request.route is HookedRoute
    schedule = Schedule(
        request.model,
        request.table,
        request.base,
        whole=is_whole,
        reads_all=request.reads_all,
        explicit=request.attn_mode == "explicit",
        most=1 if is_whole and cells_per_forward is None else cells_per_forward,
        memory_gb=memory_gb,
    )
    return Plan(request, schedule, arguments or {})


def _check_options(
    model: HookedAudioTransformer,
    direction: str,
    cells_per_forward: int | None,
    memory_gb: float | int | None,
    precision: str,
) -> None:
    if direction not in ("denoise", "noise"):
        raise ValueError(f"direction is 'denoise' or 'noise', got {direction!r}")
    if cells_per_forward is not None and cells_per_forward < 1:
        raise ValueError(f"cells_per_forward must be at least 1, got {cells_per_forward}")
    if memory_gb is not None and memory_gb <= 0:
        raise ValueError(f"memory_gb must be positive, got {memory_gb}")
    if precision not in ("exact", "tf32", "bf16"):
        raise ValueError(f"precision is 'exact', 'tf32' or 'bf16', got {precision!r}")
    if precision == "tf32" and model.device.type != "cuda":
        raise ValueError("precision 'tf32' exists on CUDA only; the model is elsewhere")
    if precision != "exact" and model.dtype != torch.float32:
        raise ValueError(f"precision {precision!r} is for float32 models; this is {model.dtype}")


def _checked_source(
    model: HookedAudioTransformer, source: Any, table: CellTable, like: AudioInputs
) -> AudioInputs | Mapping[str, Tensor] | None:
    """The inputs to patch from, or activations by full hook name.

    Raises:
        InputError: inputs of another shape.
        ValueError: activations that lack a patched site.
    """
    if source is None:
        return None
    if not any(name in model.hook_dict for name in _keys(source)):
        inputs = model.as_inputs(source)
        check_pair(model, like, inputs, ("clean", "the source"))
        return inputs
    names = table.hook_names(range(len(table.cells)))
    missing = [name for name in names if name not in source]
    if missing:
        raise ValueError(f"source holds no {', '.join(missing[:3])}: cache what is to be patched")
    return {name: source[name] for name in names}


def _keys(source: Any) -> Sequence[str]:
    return list(source.keys()) if hasattr(source, "keys") else []
