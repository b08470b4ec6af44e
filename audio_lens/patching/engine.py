"""Activation patching, exactly: one forward with hooks for every batch of cells.

A sweep is a table of cells, one per combination of the axes asked. Many cells run as rows of one
forward: the base inputs are repeated, and every copy has its own cell patched.
"""

from __future__ import annotations

import datetime
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

import torch
from einops import repeat
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from audio_lens import metrics
from audio_lens.inputs import AudioInputs
from audio_lens.patching.result import SweepResult
from audio_lens.patching.sites import Site, SiteError
from audio_lens.timeline import Span, Timeline

if TYPE_CHECKING:
    from audio_lens.hooks import HookPoint
    from audio_lens.models.base import HookedAudioTransformer

logger = logging.getLogger(__name__)

Windows = float | tuple[float, float] | Sequence["Span | tuple[float, float]"] | Literal["position"]
Direction = Literal["denoise", "noise"]
DEFAULT_WINDOW_S = 0.1
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
    layers: Sequence[int] | None = None,
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
        layers: the blocks to patch; None for all.
        cells_per_forward: how many cells share a forward; None chooses. Hooks of yours stay in
            force and see that many copies of the batch; 1 shows them the batch as it is.
        progress: show a progress bar.

    Returns:
        `SweepResult`, with both baselines.

    Raises:
        SiteError: a site or axis the model does not have.
        InputError: inputs whose shapes differ.
        ValueError: windows without positions, layers out of range, a metric of another shape.
    """
    clean, corrupted = model.as_inputs(clean), model.as_inputs(corrupted)
    clean.check_pairs_with(corrupted, "clean", "corrupted")
    if direction not in ("denoise", "noise"):
        raise ValueError(f"direction is 'denoise' or 'noise', got {direction!r}")
    if cells_per_forward is not None and cells_per_forward < 1:
        raise ValueError(f"cells_per_forward must be at least 1, got {cells_per_forward}")
    table = CellTable.lay_out(model, clean, Site.parse(site, model), axes, windows, layers)
    mode = "explicit" if table.site.reads_attention else model.attn_mode
    with model.attention(mode):
        return _run(model, clean, corrupted, table, metric, direction, cells_per_forward, progress)


# -------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Intervention:
    """What one row of a forward has patched: blocks, units (None: all) and a set of positions."""

    layers: tuple[int | None, ...]
    unit: int | None
    positions: int  # row of `CellTable.positions`


@dataclass(frozen=True)
class CellTable:
    """Every cell of a sweep, in the order of its axes.

    `positions` holds the distinct sets of positions, for each entry of the site's batch axis
    (prompts, or clips in encoder and connector).
    """

    site: Site
    axes: tuple[str, ...]
    coords: dict[str, list]
    positions: Bool[Tensor, "sets batch t"]
    cells: list[Intervention]

    @staticmethod
    def lay_out(
        model: HookedAudioTransformer,
        inputs: AudioInputs,
        site: Site,
        axes: Sequence[str],
        windows: Windows | None,
        layers: Sequence[int] | None,
    ) -> CellTable:
        """The table of a sweep; everything that can be wrong with it raises here."""
        axes = (axes,) if isinstance(axes, str) else tuple(axes)
        _check_axes(site, axes, windows)
        coords: dict[str, list] = {}
        chosen = _chosen_layers(site, layers)
        if "layer" in axes:
            coords["layer"] = list(chosen)
        if site.unit in axes:
            coords[site.unit] = list(range(_unit_count(model, site)))
        where = _Positions(model.timeline(inputs), site, inputs)
        if "time" in axes:
            coords["time"], positions = where.of_windows(windows)
        elif "position" in axes:
            coords["position"], positions = where.one_by_one()
        else:
            positions = where.all()
        cells = list(_cells(site, axes, coords, chosen))
        return CellTable(site, axes, {axis: coords[axis] for axis in axes}, positions, cells)


def _check_axes(site: Site, axes: tuple[str, ...], windows: Windows | None) -> None:
    unknown = [axis for axis in axes if axis not in site.axes]
    if unknown or not axes or len(set(axes)) < len(axes):
        raise SiteError(
            f"axes {axes} do not fit {site}: choose one or more of {', '.join(site.axes)}, each "
            "once"
        )
    if "time" in axes and "position" in axes:
        raise SiteError("'time' and 'position' are two names of one axis: choose one")
    if windows is not None and "time" not in axes:
        raise SiteError("windows belong to axis 'time', which is not among the axes")


def _chosen_layers(site: Site, layers: Sequence[int] | None) -> tuple[int | None, ...]:
    if site.n_layers is None:
        if layers is not None:
            raise SiteError(f"{site} lies outside the blocks: it has no layers to choose")
        return (None,)
    chosen = tuple(range(site.n_layers)) if layers is None else tuple(layers)
    if not chosen or not all(0 <= layer < site.n_layers for layer in chosen):
        raise ValueError(f"layers must lie in 0 to {site.n_layers - 1}, got {chosen}")
    return chosen


def _unit_count(model: HookedAudioTransformer, site: Site) -> int:
    cfg = model.cfg.parts[site.part]
    if site.unit == "neuron":
        return cfg.d_mlp
    is_key_value = site.activation.rpartition(".")[2] in ("k", "v", "rot_k")
    return cfg.n_key_value_heads if is_key_value else cfg.n_heads


def _cells(
    site: Site, axes: tuple[str, ...], coords: dict[str, list], layers: tuple[int | None, ...]
) -> Iterator[Intervention]:
    for place in itertools.product(*(range(len(coords[axis])) for axis in axes)):
        at = dict(zip(axes, place, strict=True))
        yield Intervention(
            layers=(coords["layer"][at["layer"]],) if "layer" in at else layers,
            unit=at.get(site.unit),
            positions=at.get("time", at.get("position", 0)),
        )


@dataclass
class _Positions:
    """Sets of positions of a site, for every entry of its batch axis."""

    timeline: Timeline
    site: Site
    inputs: AudioInputs

    def _entries(self) -> list[tuple[Timeline, int | None]]:
        """Per entry of the batch axis: its prompt, and its clip where clips run one by one."""
        rows = [self.timeline[row] for row in range(len(self.timeline))]
        if self.site.positions_of == "decoder":
            return [(row, None) for row in rows]
        return [(row, clip) for row in rows for clip in range(row.n_clips)]

    def _width(self) -> int:
        row, clip = self._entries()[0]
        return len(row.valid(self.site.positions_of, clip or 0))

    def all(self) -> Bool[Tensor, "1 batch t"]:
        return torch.ones(1, len(self._entries()), self._width(), dtype=torch.bool)

    def one_by_one(self) -> tuple[list[int], Bool[Tensor, "sets batch t"]]:
        """Every position that holds something in any row."""
        valid = torch.stack(
            [row.valid(self.site.positions_of, clip or 0) for row, clip in self._entries()]
        )
        chosen = valid.any(0).nonzero().flatten().tolist()
        single = torch.eye(self._width(), dtype=torch.bool)[chosen]
        return chosen, repeat(single, "sets t -> sets batch t", batch=len(valid))

    def of_windows(self, windows: Windows | None) -> tuple[list[Span], Bool[Tensor, "s b t"]]:
        """The windows as Spans, with their positions; one without any raises."""
        part = self.site.positions_of
        spans = self._spans(part, DEFAULT_WINDOW_S if windows is None else windows)
        sets = torch.zeros(len(spans), len(self._entries()), self._width(), dtype=torch.bool)
        for i, span in enumerate(spans):
            for entry, (row, clip) in enumerate(self._entries()):
                if clip is None or clip == span.clip:
                    sets[i, entry] = row.inside(part, span)
            if not sets[i].any():
                longest = max(row.duration_s(span.clip) for row, _ in self._entries())
                raise ValueError(
                    f"no position of {self.site} lies in the window {span.start_s:g} to "
                    f"{span.end_s:g} s of clip {span.clip} ({longest:g} s long)"
                )
        return spans, sets

    def _spans(self, part: str, windows: Windows) -> list[Span]:
        longest = max((row for row, _ in self._entries()), key=lambda row: row.duration_s())
        if windows == "position":
            return _single_position_spans(longest, part)
        if isinstance(windows, (int, float)):
            return longest.windows(part, float(windows))
        if isinstance(windows, tuple) and all(isinstance(w, (int, float)) for w in windows):
            return longest.windows(part, *windows)
        if isinstance(windows, str) or not len(windows):
            raise ValueError(
                "windows is a width in seconds, (width, stride), a list of spans, or 'position'; "
                f"got {windows!r}"
            )
        return [Span.of(window) for window in windows]


def _single_position_spans(timeline: Timeline, part: str) -> list[Span]:
    """One span around the centre of every position of the first clip."""
    seconds, valid = timeline.seconds(part), timeline.valid(part)
    centres = seconds[valid & seconds.isfinite() & (timeline.clips(part) == 0)]
    if len(centres) < 2:
        raise ValueError(f"the {part} has too few positions in time for single-position windows")
    half = float(centres[1] - centres[0]) / 2
    return [Span(max(0.0, c - half), c + half) for c in centres.tolist()]


# -------------------------------------------------------------------------------- running it


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
    base_logits = model(base)
    clean_logits = source_logits if direction == "denoise" else base_logits
    measures = {
        name: metrics.bound(one, model, base, clean_logits)
        for name, one in metrics.named(metric).items()
    }
    source_values, base_values = (
        _measure(measures, logits, len(base)) for logits in (source_logits, base_logits)
    )
    patched = _Patched(model, base, table, {name: source_cache[name] for name in names})
    size = cells_per_forward or _cells_per_forward(model, base)
    values = []
    with tqdm(total=len(table.cells), unit="cell", disable=not progress) as bar:
        for start in range(0, len(table.cells), size):
            cells = table.cells[start : start + size]
            for logits in patched.logits(cells).split(len(base)):
                values.append(_measure(measures, logits, len(base)))
            bar.update(len(cells))
    per_cell = torch.stack(values, dim=-1)
    dims, coords = _batch_dims(metric, measures, base, base_values)
    shape = [len(coords[dim]) for dim in dims] + [len(table.coords[a]) for a in table.axes]
    batch_shape = shape[: len(dims)]
    is_denoise = direction == "denoise"
    return SweepResult(
        values=per_cell.reshape(shape),
        dims=(*dims, *table.axes),
        coords={**coords, **table.coords},
        clean=(source_values if is_denoise else base_values).reshape(batch_shape),
        corrupted=(base_values if is_denoise else source_values).reshape(batch_shape),
        site=str(table.site),
        direction=direction,
        meta=_provenance(model, clean, corrupted, list(measures)),
    )


def _cells_per_forward(model: HookedAudioTransformer, base: AudioInputs) -> int:
    frames = model.cfg.encoder.n_ctx * len(base.features)
    positions = frames + base.tokens.numel()
    return max(1, min(_MOST_CELLS_PER_FORWARD, _POSITIONS_PER_FORWARD // max(1, positions)))


def _measure(
    measures: dict[str, Callable], logits: Float[Tensor, "b t v"], batch: int
) -> Float[Tensor, metrics *batch]:
    """Every metric of one run: a scalar or one value per row each, alike for all metrics."""
    values = [torch.as_tensor(measure(logits)).detach().cpu() for measure in measures.values()]
    for name, value in zip(measures, values, strict=True):
        if value.shape not in ((), (batch,)):
            raise ValueError(
                f"metric {name!r} must give a scalar or one value per row ([{batch}]), got shape "
                f"{tuple(value.shape)}"
            )
    if len({value.shape for value in values}) > 1:
        raise ValueError("metrics of one sweep must all give a scalar, or all one value per row")
    return torch.stack(values)


def _batch_dims(
    metric: Any, measures: dict, base: AudioInputs, baseline: Float[Tensor, metrics *batch]
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
    ) -> Bool[Tensor, ...]:
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


def _along(mask: Bool[Tensor, "batch n"], ndim: int, dim: int) -> Bool[Tensor, ...]:
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
