"""Activation patching, exactly: plan, schedule, execute.

A plan is a table of cells (plan.py). Each is served by the route (routes.py) that re-runs only what
its patch can change; cells that share work run together, as many as the memory budget holds.
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import gc
import hashlib
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens import ActivationCache

from audio_lens import metrics
from audio_lens.inputs import AudioInputs, InputError
from audio_lens.patching.checkpoint import Checkpoint
from audio_lens.patching.plan import CellTable, Windows
from audio_lens.patching.readout import Readout
from audio_lens.patching.result import SweepResult
from audio_lens.patching.routes import (
    ConnectorRoute,
    DecoderRoute,
    EncoderRoute,
    HookedRoute,
    Route,
    Run,
    SuffixRoute,
)
from audio_lens.patching.sites import Site
from audio_lens.patching.trace import ConnectorSource, GivenSource, RunSource, Source
from audio_lens.patching.work import GIGA, Costs, Shape

if TYPE_CHECKING:
    from audio_lens.models.base import HookedAudioTransformer

Direction = Literal["denoise", "noise"]
Precision = Literal["exact", "tf32", "bf16"]
Inputs = AudioInputs | Mapping[str, Any]

_ROWS_TOGETHER = {"cpu": 1_024, "cuda": 16_384}  # more gain nothing: matrix products are full
_SAVE_EVERY_S = 20.0
_COMPLEMENT_SHARE = 0.4  # of the budget


class VerificationError(RuntimeError):
    """A cell that a whole forward with hooks does not confirm."""


def sweep(
    model: HookedAudioTransformer,
    *,
    clean: Inputs,
    corrupted: Inputs,
    site: str | Sequence[str] = "decoder.resid_pre",
    axes: str | Sequence[str] = ("layer", "time"),
    metric: Any,
    windows: Windows | None = None,
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
    progress: bool = True,
) -> SweepResult:
    """Patch every cell of a site and measure what it does to the answer.

    Args:
        model: the model.
        clean, corrupted: inputs of equal shape that differ in what is asked about.
        site: ``part.activation``: ``resid_pre``, ``attn_out``, ``mlp_out``, ``attn.z``,
            ``cross_attn.z``, ``attn.q/k/v/pattern``, ``mlp.post``, ``connector.out`` ... Several
            are patched together as one.
        axes: any of "layer", "head" or "neuron" (where the site has them), and "time" or
            "position", in the order wanted. What is not an axis is patched as one: without
            "layer" all ``layers`` together, without "head" all heads, without "time" and
            "position" all positions.
        metric: a metric of `audio_lens.metrics`, any function from logits to a scalar or one
            value per row, or a mapping from names to these. Called once per cell, with logits of
            the original batch. A bare function makes the engine compute the logits of all
            positions: `metrics.read_at` avoids that.
        windows: for axis "time": width in seconds (default 0.1), ``(width, stride)``, a list of
            Spans or ``(start_s, end_s)``, or "position" for single positions.
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
        progress: show a progress bar with the time left.

    Your own hooks stay in force: every cell is then one whole forward, and ``report`` says so.

    Returns:
        `SweepResult`, with both baselines. Values of stimuli that have no position in a window
        (shorter clips of a batch) are NaN.

    Raises:
        SiteError: a site or axis the model does not have.
        InputError: inputs whose shapes differ, or whose audio lies at other positions.
        ValueError: windows without positions, layers out of range, a metric of another shape, one
            that is NaN on the unpatched runs, or a budget too small for one cell.
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
        "source": source,
        "cells_per_forward": cells_per_forward,
        "memory_gb": memory_gb,
        "precision": precision,
    }
    if refine is None:
        planned = plan(model, windows=windows, **arguments)
        return planned.run(verify=verify, checkpoint=checkpoint, progress=progress)
    from audio_lens.patching.refine import refined

    options = {"verify": verify, "checkpoint": checkpoint, "progress": progress}
    return refined(model, windows, refine, arguments, options)


def plan(
    model: HookedAudioTransformer,
    *,
    clean: Inputs,
    corrupted: Inputs,
    site: str | Sequence[str] = "decoder.resid_pre",
    axes: str | Sequence[str] = ("layer", "time"),
    metric: Any,
    windows: Windows | None = None,
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
    _check_pair(model, clean, corrupted)
    _check_options(model, direction, cells_per_forward, memory_gb, precision)
    named = [site] if isinstance(site, str) else list(site)
    sites = [Site.parse(one, model) for one in named]
    table = CellTable.lay_out(model, clean, sites, axes, windows, layers, layer_window)
    return Plan(
        model=model,
        clean=clean,
        corrupted=corrupted,
        table=table,
        metric=metric,
        direction=direction,
        source=_checked_source(model, source, table, clean),
        cells_per_forward=cells_per_forward,
        memory_gb=memory_gb,
        precision=precision,
        layer_window=layer_window,
    )


def _check_pair(model: HookedAudioTransformer, clean: AudioInputs, corrupted: AudioInputs) -> None:
    clean.check_pairs_with(corrupted, "clean", "corrupted")
    if not model.timeline(clean).corresponds_to(model.timeline(corrupted)):
        raise InputError(
            "the audio of clean and corrupted lies at different positions of the prompt, so these "
            "do not correspond: use texts that put it in the same place"
        )


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
        _check_pair(model, like, inputs)
        return inputs
    names = table.hook_names(range(len(table.cells)))
    missing = [name for name in names if name not in source]
    if missing:
        raise ValueError(f"source holds no {', '.join(missing[:3])}: cache what is to be patched")
    return {name: source[name] for name in names}


def _keys(source: Any) -> Sequence[str]:
    return list(source.keys()) if hasattr(source, "keys") else []


@dataclass
class _State:
    """What the unpatched runs gave, and what of the cells is done."""

    route: Route
    readout: Readout
    clean: Float[Tensor, "metrics *batch"]
    corrupted: Float[Tensor, "metrics *batch"]
    values: Float[Tensor, "metrics *batch cells"]
    done: Bool[Tensor, " cells"]
    free_bytes: float | int
    notes: list[str] = field(default_factory=list)

    @property
    def baselines(self) -> Float[Tensor, "2 metrics *batch"]:
        return torch.stack([self.clean, self.corrupted])


@dataclass(eq=False)
class Plan:
    """A sweep laid out and not yet run; made by `patching.plan`.

    An interrupted `run` keeps what it has: running again goes on.
    """

    model: HookedAudioTransformer
    clean: AudioInputs
    corrupted: AudioInputs
    table: CellTable
    metric: Any
    direction: Direction
    source: AudioInputs | Mapping[str, Tensor] | None
    cells_per_forward: int | None
    memory_gb: float | int | None
    precision: Precision
    layer_window: int
    _state: _State | None = field(default=None, repr=False)
    _shrunk: float = field(default=1.0, repr=False)

    def __post_init__(self) -> None:
        positions = self.table.positions.to(self.model.device)
        object.__setattr__(self.table, "positions", positions)
        self.hooked = list(self.model.list_hooks(dir="fwd"))
        places = positions.any(1)
        self._first = torch.where(
            places.any(-1), places.int().argmax(-1), places.shape[-1]
        ).tolist()

    def __len__(self) -> int:
        """How many cells there are."""
        return len(self.table.cells)

    @property
    def base(self) -> AudioInputs:
        """The inputs of the run that is patched."""
        return self.corrupted if self.direction == "denoise" else self.clean

    @property
    def other(self) -> AudioInputs:
        """The inputs of the run that activations come from, unless a source is named."""
        return self.clean if self.direction == "denoise" else self.corrupted

    # ---------------------------------------------------------------- which route, at what cost

    @property
    def _kind(self) -> type[Route]:
        """The route that serves all cells."""
        if self.hooked:
            return HookedRoute
        is_single = len(self.table.sites) == 1 and all(len(c.layers) == 1 for c in self.table.cells)
        by_part = {"decoder": DecoderRoute, "connector": ConnectorRoute, "encoder": EncoderRoute}
        return by_part[self.table.part] if is_single else SuffixRoute

    @property
    def costs(self) -> Costs:
        """What cells cost by their route."""
        model, inputs = self.model, self.base
        by_attention = model.decoder_needs_encoder
        start = 0 if by_attention else int(model.audio_places(inputs).position.min())
        frames = model.encoder_reach(inputs)
        shape = Shape(
            prompts=len(inputs),
            clips=len(inputs.features),
            frames=frames,
            tokens=inputs.tokens.shape[1],
            audio_start=start,
            memory=frames if by_attention else 0,
            logits=inputs.tokens.numel() * model.cfg.decoder.d_vocab if self._reads_all else 8,
        )
        is_whole = self._kind is HookedRoute
        return Costs(model, self.table.part, shape, model.dtype.itemsize, is_whole)

    @property
    def _reads_all(self) -> bool:
        return not all(isinstance(m, metrics.Metric) for m in metrics.named(self.metric).values())

    def _start(self, cell: int) -> int:
        """The first decoder position (or position of the site's part) that a cell patches."""
        return self._first[self.table.cells[cell].positions]

    def _decoder_start(self, cell: int) -> int:
        return self._start(cell) if self.table.site.positions_of == "decoder" else 0

    def _order(self, cell: int) -> tuple:
        """Cells that share work stand side by side."""
        intervention = self.table.cells[cell]
        layer = -1 if intervention.layers[0] is None else intervention.layers[0]
        return layer, self._start(cell), intervention.unit or 0

    def _budget(self) -> float | int:
        """Bytes of working memory."""
        if self.memory_gb is not None:
            return self.memory_gb * 1e9
        if self.model.device.type == "cuda":
            return 0.8 * torch.cuda.mem_get_info(self.model.device)[0]
        try:
            return 0.5 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError):  # not known here
            return 4e9

    def explain(self) -> str:
        """What will run, what is left out and why, expected work and memory."""
        costs, table = self.costs, self.table
        work = [costs.flops(c.layers[0], self._decoder_start(i)) for i, c in enumerate(table.cells)]
        loop = costs.loop * len(table.cells)
        sizes = " x ".join(f"{len(table.coords[axis])} {axis}s" for axis in table.axes)
        lines = [
            f"{len(table.cells)} cells: {' + '.join(map(str, table.sites))}, {sizes}; "
            f"{self.direction}, {len(self.base)} stimuli",
            f"each cell runs {self._kind.what}",
            *(f"left out: {what}" for what in self._left_out()),
            f"work: about {sum(work) / GIGA:,.1f} GFLOP beside two whole forwards; a loop of whole "
            f"forwards takes {loop / GIGA:,.1f} ({loop / max(sum(work), 1):.1f} times more)",
            f"memory: a cell takes up to {self._largest_cell() / 1e6:,.0f} MB of the budget of "
            f"{self._budget() / 1e9:,.1f} GB; about {self._together()} cells run together",
        ]
        return "\n".join(lines)

    def _left_out(self) -> list[str]:
        if self.hooked:
            return [f"nothing, since your hooks are in force: {', '.join(self.hooked)}"]
        left = {
            DecoderRoute: ["the encoder, earlier blocks and earlier positions: they do not change"],
            ConnectorRoute: ["the encoder, and positions before the changed ones"],
            EncoderRoute: ["earlier encoder blocks, and padding that nothing reads"],
            SuffixRoute: ["earlier blocks (and positions): they do not change"],
        }[self._kind]
        if self._reads_all:
            return [*left, "no logits: a metric is a bare function of all of them"]
        return [*left, "logits and last-block rows that no metric reads", "cells without a change"]

    def _largest_cell(self) -> int:
        explicit = self._attn_mode == "explicit"
        starts = [self._decoder_start(cell) for cell in range(len(self))]
        return self.costs.bytes(min(starts), explicit)

    def _together(self) -> int:
        queue = collections.deque(sorted(range(len(self)), key=self._order))
        return len(self._next(queue, self._budget(), self.costs))

    @property
    def _attn_mode(self) -> str:
        is_written_out = any(site.reads_attention for site in self.table.sites)
        return "explicit" if is_written_out else self.model.attn_mode

    # ---------------------------------------------------------------- running

    def run(
        self,
        only: Sequence[int] | None = None,
        progress: bool = True,
        checkpoint: str | Path | None = None,
        verify: int = 0,
    ) -> SweepResult:
        """Compute the cells.

        Args:
            only: some of them, by their places in the flattened axes; the rest is NaN.
            progress, checkpoint, verify: as in `sweep`.

        Raises:
            ValueError: cells that do not exist, a metric of another shape or not finite, or a
                budget too small for one cell.
            VerificationError: a cell that a whole forward does not confirm.
            CheckpointError: a file that belongs to another sweep.
        """
        wanted = range(len(self)) if only is None else [int(cell) for cell in only]
        if any(not 0 <= cell < len(self) for cell in wanted):
            raise ValueError(f"cells are numbered 0 to {len(self) - 1}, got {list(wanted)}")
        if verify and self.model.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"verify compares to rounding and {self.model.dtype} rounds too much to tell: "
                "verify a float32 copy of the model"
            )
        if verify and self.precision != "exact":
            raise ValueError(f"verify needs precision 'exact', not {self.precision!r}")
        if list(self.model.list_hooks(dir="fwd")) != self.hooked:
            raise ValueError("hooks were attached or removed since this was planned: plan it anew")
        file = None if checkpoint is None else Checkpoint(checkpoint, self._identity())
        with self._in_force():
            if self._state is None:
                self._state = self._prepared()
            if file is not None:
                self._resume(file)
            self._compute([cell for cell in wanted if not self._state.done[cell]], progress, file)
            notes = [self._verify(wanted, verify)] if verify else []
        return self._result(set(wanted), notes)

    @contextlib.contextmanager
    def _in_force(self) -> Iterator[None]:
        """Modes of torch and of the model while the plan runs."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            stack.enter_context(self.model.attention(self._attn_mode))
            if self.precision == "bf16":
                kind = self.model.device.type
                stack.enter_context(torch.autocast(kind, torch.bfloat16))
            if self.precision == "tf32":
                before = torch.get_float32_matmul_precision()
                torch.set_float32_matmul_precision("high")
                stack.callback(torch.set_float32_matmul_precision, before)
            yield

    def _compute(self, todo: list[int], progress: bool, file: Checkpoint | None) -> None:
        state, costs = self._state, self.costs
        queue = collections.deque(sorted(todo, key=self._order))
        work = {c: costs.flops(self.table.cells[c].layers[0], self._decoder_start(c)) for c in todo}
        saved_at = time.monotonic()
        try:
            with _bar(sum(work.values()), progress) as bar:
                while queue:
                    cells = self._next(queue, state.free_bytes, costs)
                    if not self._run_together(cells, queue):
                        continue
                    bar.set_postfix_str(f"{len(todo) - len(queue)}/{len(todo)} cells", False)
                    bar.update(sum(work[cell] for cell in cells) / GIGA)
                    if file is not None and time.monotonic() - saved_at > _SAVE_EVERY_S:
                        file.save(state.values, state.done, state.baselines)
                        saved_at = time.monotonic()
        finally:
            if file is not None:
                file.save(state.values, state.done, state.baselines)

    def _run_together(self, cells: list[int], queue: collections.deque) -> bool:
        """Compute cells in one go; out of memory puts them back for smaller goes."""
        state = self._state
        try:
            rows = state.route.run(cells)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            if len(cells) == 1:
                raise MemoryError(
                    f"one cell alone does not fit into memory ({error}): use fewer stimuli or "
                    "shorter clips"
                ) from error
            self._shrunk *= 0.5 * len(cells) / max(1, len(cells) // 2 * 2)
            queue.extendleft(reversed(cells))
        else:
            for cell, of_cell in zip(cells, rows, strict=True):
                state.values[..., cell] = state.readout.measure(of_cell)
                state.done[cell] = True
            return True
        note = "memory ran out: cells went on in smaller batches"
        state.notes += [] if note in state.notes else [note]
        gc.collect()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        return False

    def _next(self, queue: collections.deque, free: float | int, costs: Costs) -> list[int]:
        """The next cells that run together."""
        most = self.cells_per_forward
        if most is None:
            most = 1 if self.hooked else len(queue)
        rows_left = _ROWS_TOGETHER.get(self.model.device.type, 1_024) * self._shrunk
        bytes_left = free * self._shrunk
        explicit = self._attn_mode == "explicit"
        cells: list[int] = []
        while queue and len(cells) < most:
            start = self._decoder_start(queue[0])
            rows_left -= costs.rows(start)
            bytes_left -= costs.bytes(start, explicit)
            if cells and min(rows_left, bytes_left) < 0:
                break
            cells.append(queue.popleft())
        return cells

    # ---------------------------------------------------------------- the unpatched runs

    def _prepared(self) -> _State:
        """Run base and source, and choose the route."""
        return self._with_hooks() if self.hooked else self._without_hooks()

    def _without_hooks(self) -> _State:
        model, part = self.model, self.table.part
        base = Run.of(model, self.base, part)
        other = Run.of(model, self.other, part, heard=base)
        clean_run = other if self.direction == "denoise" else base
        measures = self._measures(lambda: model.decoder.unembed(clean_run.hidden))
        readout = Readout(model, measures, tuple(self.base.tokens.shape))
        values = [readout.measure(readout.of_run(run.hidden)) for run in (base, other)]
        run = other
        if isinstance(self.source, AudioInputs):
            run = Run.of(model, self.source, part, heard=base)
        source = self._source_of(run, base)
        held = base.n_bytes + (0 if isinstance(source, GivenSource) else run.keep(part).n_bytes)
        free = self._free_bytes(held)
        route = self._route(base, readout, source, free)
        return self._fresh_state(route, readout, values, free)

    def _source_of(self, run: Run, base: Run) -> Source:
        part = self.table.part
        if isinstance(self.source, Mapping):
            return self._given(self.source, base)
        return ConnectorSource(run.connector) if part == "connector" else RunSource(run.trace(part))

    def _given(self, activations: Mapping[str, Tensor], base: Run | None) -> GivenSource:
        part = self.table.part
        reach = None if base is None or part == "connector" else base.trace(part).n_positions
        return GivenSource(part, activations, next(self.model.parameters()), reach)

    def _route(self, base: Run, readout: Readout, source: Source, free: float | int) -> Route:
        arguments = (self.model, base, self.table, readout, source)
        if self._kind is not EncoderRoute:
            return self._kind(*arguments)
        cfg = self.model.cfg.encoder
        of_one = base.encoder.n_positions * cfg.n_heads * (cfg.d_head + 1) * 4
        return EncoderRoute(*arguments, n_held=int(_COMPLEMENT_SHARE * free // of_one))

    def _free_bytes(self, held: int) -> float | int:
        """What the unpatched runs leave of the budget.

        Raises:
            ValueError: if that is too little for one cell.
        """
        free = self._budget() - held
        if free < self._largest_cell():
            raise ValueError(
                f"the unpatched runs take {held / 1e9:.2f} GB and one cell up to "
                f"{self._largest_cell() / 1e9:.2f} GB, more than the budget of "
                f"{self._budget() / 1e9:.2f} GB: raise memory_gb, or use fewer stimuli"
            )
        return free

    def _with_hooks(self) -> _State:
        model, part = self.model, self.table.part
        hears = [name for name in self.hooked if name.startswith(("encoder.", "connector."))]
        encoder_out = model.encode(self.base) if part == "decoder" and not hears else None
        base_logits = model(self.base, encoder_out=encoder_out)
        other_logits, activations = self._kept(self.other)
        if isinstance(self.source, AudioInputs):
            _, activations = self._kept(self.source)
        elif self.source is not None:
            activations = self.source
        clean_logits = other_logits if self.direction == "denoise" else base_logits
        measures = self._measures(lambda: clean_logits)
        readout = Readout(model, measures, tuple(self.base.tokens.shape))
        values = [readout.measure(readout.of_logits(x)) for x in (base_logits, other_logits)]
        source = self._given(activations, None)
        route = HookedRoute(model, self.base, base_logits, self.table, readout, source, encoder_out)
        state = self._fresh_state(route, readout, values, self._free_bytes(0))
        state.notes.append(
            f"your hooks were in force: {', '.join(self.hooked)}; so every cell was a whole forward"
            + ("" if encoder_out is None else " (of the decoder: none of them sits before it)")
        )
        return state

    def _kept(
        self, inputs: AudioInputs, cells: Sequence[int] | None = None
    ) -> tuple[Float[Tensor, "b t v"], dict[str, Tensor]]:
        """Logits of a whole run, and the activations that cells patch in."""
        names = self.table.hook_names(range(len(self)) if cells is None else cells)
        return self.model.run_with_cache(inputs, names_filter=names, return_cache_object=False)

    def _measures(self, clean_logits: Callable[[], Tensor]) -> dict[str, Callable]:
        """Every metric, bound; the clean run's logits are made only where one needs them."""
        return {
            name: metrics.bound(
                one,
                self.model,
                self.base,
                clean_logits() if getattr(one, "needs_reference", False) else None,
            )
            for name, one in metrics.named(self.metric).items()
        }

    def _fresh_state(
        self, route: Route, readout: Readout, values: list[Tensor], free: float | int
    ) -> _State:
        clean, corrupted = values[:: -1 if self.direction == "denoise" else 1]
        _check_finite({"clean": clean, "corrupted": corrupted}, readout.names)
        empty = torch.full((*clean.shape, len(self)), torch.nan, dtype=clean.dtype)
        done = torch.zeros(len(self), dtype=torch.bool)
        notes = self._standing_notes()
        return _State(route, readout, clean, corrupted, empty, done, free, notes)

    def _standing_notes(self) -> list[str]:
        notes = []
        if self.layer_window > 1:
            notes.append(
                f"layer l stands for layers l to l+{self.layer_window - 1}, patched as one"
            )
        if self.precision != "exact":
            notes.append(f"computed in {self.precision}: not exact")
        if self.source is not None:
            notes.append("patched from a source of your own, not from the other run")
        return notes

    # ---------------------------------------------------------------- truth, and going on

    def _verify(self, wanted: Sequence[int], count: int) -> str:
        """Compare random cells with whole forwards, hooks and nothing else.

        Raises:
            VerificationError: where one differs.
        """
        state = self._state
        cells = random.Random(0).sample(list(wanted), min(count, len(wanted)))
        base = state.clean if self.direction == "noise" else state.corrupted
        effects = (state.values - base[..., None])[..., state.done]
        largest = effects.abs().nan_to_num().amax()
        worst = 0.0
        for cell in cells:
            exact = self._literally(cell)
            found = state.values[..., cell]
            error = (found - exact).abs()
            is_double = found.dtype == torch.float64 and self.model.dtype == torch.float64
            small = 1e-10 if is_double else 1e-5
            if (error > small * exact.abs().clamp(min=1) + 10 * small * largest).any():
                raise VerificationError(
                    f"cell {cell} ({self.table.cells[cell]}) is {found.tolist()} and a whole "
                    f"forward gives {exact.tolist()}: please report this"
                )
            worst = max(worst, float(error.max()))
        return (
            f"verified {len(cells)} random cells against whole forwards: off by {worst:.1e} at most"
        )

    def _literally(self, cell: int) -> Float[Tensor, "metrics *batch"]:
        """One cell as a whole forward with hooks."""
        model, state = self.model, self._state
        given = self.source
        if not isinstance(given, Mapping):
            _, given = self._kept(self.other if given is None else given, [cell])
        source = self._given(given, None)
        logits = model(self.base)
        route = HookedRoute(model, self.base, logits, self.table, state.readout, source, None)
        return state.readout.measure(route.run([cell])[0])

    def _identity(self) -> dict[str, str]:
        """What makes this sweep differ from any other, for checkpoints."""
        if isinstance(self.source, Mapping):
            source = _digest(self.source)
        else:
            source = "" if self.source is None else self.source.digest()
        cells = hashlib.sha256(repr((self.table.coords, self.table.cells)).encode()).hexdigest()
        return {
            "model": self.model.cfg.model_name,
            "dtype": str(self.model.dtype),
            "precision": self.precision,
            "site": _site_name(self.table),
            "axes": " ".join(self.table.axes),
            "direction": self.direction,
            "cells": cells[:16],
            "metric": ", ".join(metrics.named(self.metric)),
            "hooks": ", ".join(self.hooked),
            "clean": self.clean.digest(),
            "corrupted": self.corrupted.digest(),
            "source": source,
        }

    def _resume(self, file: Checkpoint) -> None:
        """Take over what an earlier run left in the file."""
        state = self._state
        held = file.load(state.baselines)
        if held is not None:
            values, done = held
            new = done & ~state.done
            state.values[..., new], state.done[new] = values[..., new], True

    # ---------------------------------------------------------------- the result

    def _result(self, wanted: set[int], notes: list[str]) -> SweepResult:
        state, table = self._state, self.table
        chosen = torch.tensor([cell in wanted for cell in range(len(self))])
        per_cell = state.values.masked_fill(~(chosen & state.done), torch.nan)
        dims, coords = self._batch_dims()
        if "stimulus" in dims:
            absent = ~table.covered[[cell.positions for cell in table.cells]].T
            per_cell = per_cell.masked_fill(absent, torch.nan)
        batch_shape = [len(coords[dim]) for dim in dims]
        shape = [*batch_shape, *(len(table.coords[axis]) for axis in table.axes)]
        return SweepResult(
            values=per_cell.reshape(shape),
            dims=(*dims, *table.axes),
            coords={**coords, **table.coords},
            clean=state.clean.reshape(batch_shape),
            corrupted=state.corrupted.reshape(batch_shape),
            site=_site_name(table),
            direction=self.direction,
            report=[*state.notes, *notes],
            meta=_provenance(self.model, self.clean, self.corrupted, state.readout.names)
            | {"attn_mode": self._attn_mode, "precision": self.precision, "route": self._kind.what},
        )

    def _batch_dims(self) -> tuple[tuple[str, ...], dict[str, list]]:
        """The dims in front of the axes: several metrics, several stimuli."""
        return _batch_dims(
            self.metric, self._state.readout.names, len(self.base), self._state.clean
        )


def _batch_dims(
    metric: Any, names: Sequence[str], batch: int, baseline: Float[Tensor, "metrics *batch"]
) -> tuple[tuple[str, ...], dict[str, list]]:
    """The dims in front of the axes: several metrics, several stimuli."""
    dims: dict[str, list] = {}
    if isinstance(metric, Mapping):
        dims["metric"] = list(names)
    if baseline.ndim == 2 and batch > 1:
        dims["stimulus"] = list(range(batch))
    return tuple(dims), dims


def _bar(total: float | int, progress: bool) -> tqdm:
    """Progress by work, so that the time left is right although cells differ in cost."""
    shape = "{l_bar}{bar}| {postfix} [{elapsed}<{remaining}]"
    return tqdm(total=total / GIGA, disable=not progress, bar_format=shape)


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(words in str(error) for words in ("can't allocate memory", "not enough memory"))


def _site_name(table: CellTable) -> str:
    return " + ".join(map(str, table.sites))


def _digest(activations: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(activations):
        digest.update(name.encode())
        digest.update(activations[name].detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _check_finite(values: dict[str, Tensor], names: Sequence[str]) -> None:
    """Raise where a metric is NaN or infinite before anything is patched."""
    for run, of_metrics in values.items():
        broken = [
            n for n, value in zip(names, of_metrics, strict=True) if not value.isfinite().all()
        ]
        if broken:
            raise ValueError(f"metric {', '.join(broken)} is not finite on the {run} run")


def _provenance(
    model: HookedAudioTransformer,
    clean: AudioInputs,
    corrupted: AudioInputs,
    names: Sequence[str],
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
