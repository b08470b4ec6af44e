"""Activation patching, exactly: one forward with hooks for every batch of cells.

Many cells of the table (plan.py) run as rows of one forward: the base inputs are repeated, and
every copy has its own cell patched.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

import torch
from einops import repeat
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from audio_lens import metrics
from audio_lens.inputs import AudioInputs, InputError
from audio_lens.patching.plan import CellTable, Intervention, Windows
from audio_lens.patching.result import SweepResult
from audio_lens.patching.sites import Site

if TYPE_CHECKING:
    from audio_lens.hooks import HookPoint
    from audio_lens.models.base import HookedAudioTransformer

Direction = Literal["denoise", "noise"]
_POSITIONS_PER_FORWARD = 6_000  # of all parts together; more gains nothing on a CPU
_MOST_CELLS_PER_FORWARD = 64


@torch.no_grad()
def sweep(
    model: HookedAudioTransformer,
    *,
    clean: AudioInputs | Mapping[str, Any],
    corrupted: AudioInputs | Mapping[str, Any],
    site: str = "decoder.resid_pre",
    axes: Sequence[str] = ("layer", "time"),
    metric: Any,
    windows: Windows | None = None,
    direction: Direction = "denoise",
    layers: int | Sequence[int] | None = None,
    cells_per_forward: int | None = None,
    progress: bool = True,
) -> SweepResult:
    """Patch every cell of a site and measure what it does to the answer.

    Args:
        model: the model.
        clean, corrupted: inputs of equal shape that differ in what is asked about.
        site: ``part.activation``: ``resid_pre``, ``attn_out``, ``mlp_out``, ``attn.z``,
            ``cross_attn.z``, ``attn.q/k/v/pattern``, ``mlp.post``, ``connector.out`` ...
        axes: any of "layer", "head" or "neuron" (where the site has them), and "time" or
            "position", in the order wanted. What is not an axis is patched as one: without
            "layer" all ``layers`` together, without "head" all heads, without "time" and
            "position" all positions.
        metric: a metric of `audio_lens.metrics`, any function from logits to a scalar or one
            value per row, or a mapping from names to these. Called once per cell, with logits of
            the original batch.
        windows: for axis "time": width in seconds (default 0.1), ``(width, stride)``, a list of
            Spans or ``(start_s, end_s)``, or "position" for single positions.
        direction: "denoise" puts clean activations into the corrupted run, "noise" the reverse.
        layers: the block or blocks to patch; None for all.
        cells_per_forward: how many cells share a forward, each as a copy of the batch; None
            chooses. Hooks of yours stay in force; with them it chooses 1, so that they see the
            batch as it is, and ``report`` says so.
        progress: show a progress bar.

    Returns:
        `SweepResult`, with both baselines. Values of stimuli that have no position in a window
        (shorter clips of a batch) are NaN.

    Raises:
        SiteError: a site or axis the model does not have.
        InputError: inputs whose shapes differ, or whose audio lies at other positions.
        ValueError: windows without positions, layers out of range, a metric of another shape, or
            one that is NaN on the unpatched runs.
    """
    clean, corrupted = model.as_inputs(clean), model.as_inputs(corrupted)
    _check_pair(model, clean, corrupted)
    if direction not in ("denoise", "noise"):
        raise ValueError(f"direction is 'denoise' or 'noise', got {direction!r}")
    if cells_per_forward is not None and cells_per_forward < 1:
        raise ValueError(f"cells_per_forward must be at least 1, got {cells_per_forward}")
    table = CellTable.lay_out(model, clean, Site.parse(site, model), axes, windows, layers)
    mode = "explicit" if table.site.reads_attention else model.attn_mode
    with model.attention(mode):
        return _run(model, clean, corrupted, table, metric, direction, cells_per_forward, progress)


def _check_pair(model: HookedAudioTransformer, clean: AudioInputs, corrupted: AudioInputs) -> None:
    clean.check_pairs_with(corrupted, "clean", "corrupted")
    if not model.timeline(clean).corresponds_to(model.timeline(corrupted)):
        raise InputError(
            "the audio of clean and corrupted lies at different positions of the prompt, so these "
            "do not correspond: use texts that put it in the same place"
        )


def _run(
    model: HookedAudioTransformer,
    clean: AudioInputs,
    corrupted: AudioInputs,
    table: CellTable,
    metric: Any,
    direction: Direction,
    cells_per_forward: int | None,
    progress: bool,
) -> SweepResult:
    base, source = (corrupted, clean) if direction == "denoise" else (clean, corrupted)
    names = sorted({table.site.hook_name(layer) for cell in table.cells for layer in cell.layers})
    source_logits, source_cache = model.run_with_cache(source, names_filter=names)
    patched = _Patched(model, base, table, {name: source_cache[name] for name in names})
    base_logits = model(base, encoder_out=patched.encoder_out)
    clean_logits = source_logits if direction == "denoise" else base_logits
    measures = {
        name: metrics.bound(one, model, base, clean_logits)
        for name, one in metrics.named(metric).items()
    }
    source_values, base_values = (
        _measure(measures, logits, len(base)) for logits in (source_logits, base_logits)
    )
    is_denoise = direction == "denoise"
    clean_values, corrupted_values = (
        (source_values, base_values) if is_denoise else (base_values, source_values)
    )
    _check_finite({"clean": clean_values, "corrupted": corrupted_values}, list(measures))
    hooked = list(model.list_hooks(dir="fwd"))
    size = cells_per_forward or (1 if hooked else _cells_per_forward(model, base))
    values = []
    with tqdm(total=len(table.cells), unit="cell", disable=not progress) as bar:
        for start in range(0, len(table.cells), size):
            cells = table.cells[start : start + size]
            for logits in patched.logits(cells).split(len(base)):
                values.append(_measure(measures, logits, len(base)))
            bar.update(len(cells))
    per_cell = torch.stack(values, dim=-1)
    dims, coords = _batch_dims(metric, measures, base, base_values)
    if "stimulus" in dims:
        absent = ~table.covered[[cell.positions for cell in table.cells]].T
        per_cell = per_cell.masked_fill(absent, torch.nan)
    shape = [len(coords[dim]) for dim in dims] + [len(table.coords[a]) for a in table.axes]
    batch_shape = shape[: len(dims)]
    return SweepResult(
        values=per_cell.reshape(shape),
        dims=(*dims, *table.axes),
        coords={**coords, **table.coords},
        clean=clean_values.reshape(batch_shape),
        corrupted=corrupted_values.reshape(batch_shape),
        site=str(table.site),
        direction=direction,
        report=[f"your hooks were in force: {', '.join(hooked)}"] if hooked else [],
        meta=_provenance(model, clean, corrupted, list(measures)),
    )


def _cells_per_forward(model: HookedAudioTransformer, base: AudioInputs) -> int:
    frames = model.cfg.encoder.n_ctx * len(base.features)
    positions = frames + base.tokens.numel()
    return max(1, min(_MOST_CELLS_PER_FORWARD, _POSITIONS_PER_FORWARD // max(1, positions)))


def _measure(
    measures: dict[str, Callable], logits: Float[Tensor, "b t v"], batch: int
) -> Float[Tensor, "metrics *batch"]:
    """Every metric of one run: a scalar or one value per row each, alike for all metrics."""
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    values = [torch.as_tensor(measure(precise)).detach().cpu() for measure in measures.values()]
    for name, value in zip(measures, values, strict=True):
        if value.shape not in ((), (batch,)):
            raise ValueError(
                f"metric {name!r} must give a scalar or one value per row ([{batch}]), got shape "
                f"{tuple(value.shape)}"
            )
    if len({value.shape for value in values}) > 1:
        raise ValueError("metrics of one sweep must all give a scalar, or all one value per row")
    return torch.stack(values)


def _check_finite(values: dict[str, Tensor], names: list[str]) -> None:
    """Raise where a metric is NaN or infinite before anything is patched."""
    for run, of_metrics in values.items():
        broken = [
            n for n, value in zip(names, of_metrics, strict=True) if not value.isfinite().all()
        ]
        if broken:
            raise ValueError(f"metric {', '.join(broken)} is not finite on the {run} run")


def _batch_dims(
    metric: Any, measures: dict, base: AudioInputs, baseline: Float[Tensor, "metrics *batch"]
) -> tuple[tuple[str, ...], dict[str, list]]:
    """The dims in front of the axes: several metrics, several stimuli."""
    dims: dict[str, list] = {}
    if isinstance(metric, Mapping):
        dims["metric"] = list(measures)
    if baseline.ndim == 2 and len(base) > 1:
        dims["stimulus"] = list(range(len(base)))
    return tuple(dims), dims


class _Patched:
    """The base run with one cell patched in each of its copies."""

    def __init__(
        self,
        model: HookedAudioTransformer,
        base: AudioInputs,
        table: CellTable,
        source: dict[str, Tensor],
    ):
        self.model, self.base, self.table, self.source = model, base, table, source
        self.positions = table.positions.to(base.device)
        reads_encoder_only = table.site.part == "decoder"
        self.encoder_out = model.encode(base) if reads_encoder_only else None

    def logits(self, cells: list[Intervention]) -> Float[Tensor, "cb t v"]:
        """Logits of every cell's run, the whole batch for cell after cell."""
        names = {self.table.site.hook_name(layer) for cell in cells for layer in cell.layers}
        hooks = [(name, lambda x, hook: self._patch(x, hook, cells)) for name in names]
        encoder_out = self.encoder_out
        if encoder_out is not None:
            encoder_out = repeat(encoder_out, "c ... -> (n c) ...", n=len(cells))
        return self.model.run_with_hooks(
            self.base.repeat(len(cells)), fwd_hooks=hooks, encoder_out=encoder_out
        )

    def _patch(self, activation: Tensor, hook: HookPoint, cells: list[Intervention]) -> Tensor:
        """The source's values where each copy's cell says so, the run's own elsewhere."""
        source = repeat(self.source[hook.name], "c ... -> (n c) ...", n=len(cells))
        return torch.where(self._mask(activation, hook.name, cells), source, activation)

    def _mask(
        self, activation: Tensor, name: str, cells: list[Intervention]
    ) -> Bool[Tensor, "..."]:
        site = self.table.site
        here = [name in map(site.hook_name, cell.layers) for cell in cells]
        touched = torch.tensor(here, device=activation.device)
        positions = self.positions[[cell.positions for cell in cells]] & touched[:, None, None]
        mask = _along(positions.flatten(0, 1), activation.ndim, site.position_dim)
        if site.unit is None or cells[0].unit is None:
            return mask
        n_units = activation.shape[site.unit_dim]
        units = torch.eye(n_units, dtype=torch.bool, device=activation.device)
        units = units[[cell.unit for cell in cells]].repeat_interleave(positions.shape[1], dim=0)
        return mask & _along(units, activation.ndim, site.unit_dim)


def _along(mask: Bool[Tensor, "batch n"], ndim: int, dim: int) -> Bool[Tensor, "..."]:
    """The mask with its second axis on axis ``dim`` of a tensor of ``ndim`` axes."""
    shape = [1] * ndim
    shape[0], shape[dim] = mask.shape
    return mask.reshape(shape)


def _provenance(
    model: HookedAudioTransformer, clean: AudioInputs, corrupted: AudioInputs, names: list[str]
) -> dict[str, str]:
    """What it takes to make the map again."""
    packages = ("audio_lens", "torch", "transformers", "transformer_lens")
    return {
        "model": model.cfg.model_name,
        "metric": ", ".join(names),
        "clean_hash": clean.digest(),
        "corrupted_hash": corrupted.digest(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "attn_mode": model.attn_mode,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **{package: version(package) for package in packages},
    }
