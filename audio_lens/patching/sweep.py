"""`sweep` and `plan`: activation patching, exactly, of every cell of a site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformer_lens import ActivationCache

from audio_lens.edits.do import Do
from audio_lens.patching.engine.checkpoint import EVERY_S
from audio_lens.patching.plan import Plan
from audio_lens.patching.refine import refined
from audio_lens.patching.result import SweepResult
from audio_lens.patching.spec import Bands, Direction, Inputs, Precision, SweepSpec, Windows
from audio_lens.places import Where

if TYPE_CHECKING:
    from audio_lens.models.base import HookedAudioTransformer


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
    do: Do | None = None,
    where: Where = "all",
    groups: Mapping[str, Where] | None = None,
    cells_per_forward: int | None = None,
    memory_gb: float | int | None = None,
    precision: Precision = "exact",
    refine: float | int | None = None,
    verify: int = 0,
    checkpoint: str | Path | None = None,
    checkpoint_every_s: float | int = EVERY_S,
    progress: bool | None = None,
) -> SweepResult:
    """Patch every cell of a site and measure what it does to the answer.

    Args:
        model: the model.
        clean, corrupted: inputs of equal shape that differ in what is asked about.
        site: ``part.activation``: ``resid_pre``, ``attn_out``, ``mlp_out``, ``attn.z``,
            ``cross_attn.z``, ``attn.q/k/v/pattern``, ``mlp.post``, ``connector.out`` ... Several
            are patched together as one.
        axes: any of "layer", "head" or "neuron" (where the site has them), and "time", "position"
            or "group", in the order wanted; and "frequency", where positions are patches of a
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
            name (an `AudioCache`, means over a data set ...), of the shape they have in the run
            that is patched.
        do: what to do in place of patching from the other run: one of `audio_lens.edits`. It is
            done in the run that is patched.
        where: a place (`audio_lens.places`) to which all cells keep; of scores and patterns, the
            queries.
        groups: for axis "group": a place by name for each of its cells. A prompt that has none of
            its positions is NaN there.
        cells_per_forward: at most so many cells run together; None leaves it to the budget.
        memory_gb: working memory, both unpatched runs included; None takes half of what is free.
            Running out of memory halves the batch and goes on.
        precision: "exact"; "tf32" (CUDA) and "bf16" are faster and not exact: see ``report``.
        refine: start with ``windows`` and split those whose |effect| reaches this share of the
            baseline gap, down to single positions; ``result.widths`` says how wide a window each
            value was measured with.
        verify: compare so many random cells with whole forwards.
        checkpoint: a file that keeps what is done; the same call goes on from there. Where it
            cannot be written, the sweep goes on, and the log and ``report`` say so.
        checkpoint_every_s: seconds between two saves; the first comes after the first batch.
        progress: show progress with the time left: None where somebody looks (terminals and
            notebooks), True everywhere, False nowhere.

    Your own hooks stay in force: every cell is then one whole forward, and ``report`` says so.

    Returns:
        `SweepResult`, with both baselines. Values of stimuli that have no position in a window
        (shorter clips of a batch) are NaN.

    Raises:
        SiteError: a site or axis the model does not have.
        InputError: inputs whose shapes differ, or whose audio lies at other positions; a source
            that lacks a patched site, or of another shape.
        MetricError: a metric that fails, gives something else than numbers, or is NaN on the
            unpatched runs; it names the run or the cell.
        ValueError: windows without positions, layers out of range, a metric that the site cannot
            reach, or a budget too small for one cell.
        PlacementError: a model that is split over devices.
        VerificationError: a cell that a whole forward does not confirm.
        CheckpointError: a file that belongs to another sweep.
    """
    spec = SweepSpec.of(**locals())
    options = {
        "verify": verify,
        "checkpoint": checkpoint,
        "checkpoint_every_s": checkpoint_every_s,
        "progress": progress,
    }
    return Plan.of(model, spec).run(**options) if refine is None else refined(model, spec, options)


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
    do: Do | None = None,
    where: Where = "all",
    groups: Mapping[str, Where] | None = None,
    cells_per_forward: int | None = None,
    memory_gb: float | int | None = None,
    precision: Precision = "exact",
) -> Plan:
    """What `sweep` would do with these arguments, before any work.

    ``print(plan.explain())`` says what will run, what is left out and why; ``plan.run()`` does it.

    Raises:
        SiteError, InputError, ValueError: as `sweep`.
    """
    return Plan.of(model, SweepSpec.of(**locals()))
