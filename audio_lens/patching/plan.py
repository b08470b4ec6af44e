"""A plan: a sweep laid out, that explains itself, runs, goes on and checks itself."""

from __future__ import annotations

import collections
import contextlib
import gc
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens.arguments import numbers, whole
from audio_lens.errors import AudioLensError, InputError
from audio_lens.hooks import HookError
from audio_lens.identity import NoIdentityError
from audio_lens.patching.cells import CellTable
from audio_lens.patching.checks import batch_dims, rounding_notes
from audio_lens.patching.engine.baselines import State, literally, prepared
from audio_lens.patching.engine.checkpoint import EVERY_S, Checkpoint, CheckpointError, unite
from audio_lens.patching.engine.heap import freed_memory_kept
from audio_lens.patching.engine.request import Request
from audio_lens.patching.engine.schedule import Schedule
from audio_lens.patching.known import own_parts
from audio_lens.patching.result import SweepResult
from audio_lens.patching.spec import SweepSpec
from audio_lens.progress import track
from audio_lens.provenance import SEED, edits_in_force, provenance, weights_hash
from audio_lens.running import evaluating

if TYPE_CHECKING:
    from audio_lens.models.base import HookedAudioTransformer

PLURALS = {"frequency": "frequencies"}
_GIGA = 1e9
log = logging.getLogger(__name__)


class VerificationError(AudioLensError, RuntimeError):
    """A cell that a whole forward with hooks does not confirm."""


@dataclass(eq=False)
class Plan:
    """A sweep laid out and not yet run; made by `patching.plan`.

    An interrupted `run` keeps what it has: running again goes on.
    """

    request: Request
    schedule: Schedule
    _known: Sequence[str] = ()
    _state: State | None = field(default=None, repr=False)
    _weights: str = ""

    @staticmethod
    def of(
        model: HookedAudioTransformer,
        spec: SweepSpec,
        table: CellTable | None = None,
        known: Sequence[str] = (),
    ) -> Plan:
        """The plan of a spec.

        Args:
            table: the cells; None lays out those that the spec asks for.
            known: the report of an earlier run of the same inputs, which the result's goes on from.

        Raises:
            SiteError, ValueError: as `CellTable.of`, and activations that lack a patched site.
        """
        with model.alone():  # without the hooks of another thread's run
            table = CellTable.of(model, spec) if table is None else table
            request = Request.of(model, spec, table)
            _ = request.attached  # now, to be compared with later
            return Plan(request, Schedule(request), known)

    @property
    def arguments(self) -> dict[str, Any]:
        """What was asked, as results keep it."""
        return dict(self.request.spec.record)

    @property
    def table(self) -> CellTable:
        """The cells, in the order of the axes."""
        return self.request.table

    def __len__(self) -> int:
        """How many cells there are."""
        return len(self.table.cells)

    def explain(self) -> str:
        """What will run, what is left out and why, expected work and memory."""
        request, schedule, table = self.request, self.schedule, self.table
        work, loop = schedule.flops(range(len(self))), schedule.loop
        together = len(schedule.next(schedule.queue(range(len(self))), schedule.budget))
        sizes = " x ".join(
            f"{len(table.coords[axis])} {PLURALS.get(axis, axis + 's')}" for axis in table.axes
        )
        return "\n".join(
            [
                f"{len(self)} cells: {table.site_name}, {sizes}; {request.spec.told_direction}, "
                f"{len(request.spec.base)} stimuli",
                f"each cell runs: {request.route.what}",
                *(f"left out: {what}" for what in self._left_out()),
                f"work: about {work / _GIGA:,.1f} GFLOP beside two whole forwards; a loop of whole "
                f"forwards takes {loop / _GIGA:,.1f} ({loop / max(work, 1):.1f} times as much)",
                f"memory: a cell takes up to {schedule.largest_cell / 1e6:,.0f} MB of a budget of "
                f"{schedule.budget / 1e9:,.1f} GB; about {together} cells run together",
                *rounding_notes(request.model),
            ]
        )

    def _left_out(self) -> list[str]:
        request = self.request
        if request.hooked:
            return [f"nothing, since your hooks are in force: {', '.join(request.hooked)}"]
        left = [request.route.left_out]
        if request.spec.reads_all:
            return [*left, "no logits: a metric is a bare function of all of them"]
        return [*left, "last-block rows and logits that no metric reads", "what does not differ"]

    # ---------------------------------------------------------------- running

    def run(
        self,
        only: Sequence[int] | None = None,
        progress: bool | None = None,
        checkpoint: str | Path | None = None,
        verify: int = 0,
        checkpoint_every_s: float | int = EVERY_S,
    ) -> SweepResult:
        """Compute the cells.

        Args:
            only: some of them, by their places in the flattened axes; the rest is NaN.
            progress, checkpoint, verify, checkpoint_every_s: as in `sweep`.

        Raises:
            ValueError: cells that do not exist, or a budget too small for one cell.
            MetricError: as `sweep`.
            VerificationError: a cell that a whole forward does not confirm.
            CheckpointError: a file that belongs to another sweep, or a sweep that cannot be known
                again.
            HookError: a hook of yours that fails; it names the point and the cells.
        """
        wanted = range(len(self)) if only is None else numbers("only", only)
        with self.request.model.alone():
            self._check(wanted, verify)
            if log.isEnabledFor(logging.INFO):
                log.info("%s", self.explain())
            with self._in_force() as notes:
                own = own_parts(self.request.model, self.request.spec)
                self._check_weights()
                file = None
                if checkpoint is not None:
                    file = Checkpoint(checkpoint, self._identity(), checkpoint_every_s)
                state = self._started(file)
                todo = [cell for cell in wanted if not state.done[cell]]
                if len(todo) < len(wanted):
                    log.info(
                        "%d of %d cells were done before", len(wanted) - len(todo), len(wanted)
                    )
                self._compute(state, todo, progress, file)
                notes += [file.failure] if file is not None and file.failure is not None else []
                notes += [self._verified(state, wanted, verify)] if verify else []
            return self._result(state, wanted, notes, own)

    def _identity(self) -> dict[str, str]:
        """What a checkpoint of this sweep says it is of.

        Raises:
            CheckpointError: where something of it cannot be known again.
        """
        try:
            return self.request.identity(self._weights)
        except NoIdentityError as error:
            raise CheckpointError(f"this sweep cannot go on from a checkpoint: {error}") from error

    def values(self, progress: bool | None = None) -> Float[Tensor, "metrics *batch cells"]:
        """The metrics of every cell's run, without anything around them."""
        with self._in_force():
            self._check_weights()
            state = self._started(None)
            todo = [cell for cell in range(len(self)) if not state.done[cell]]
            self._compute(state, todo, progress, None)
        return state.values

    def _check(self, wanted: Sequence[int], verify: int) -> None:
        model = self.request.model
        if any(not 0 <= cell < len(self) for cell in wanted):
            raise InputError(f"cells are numbered 0 to {len(self) - 1}, got {list(wanted)}")
        whole("verify", verify, least=0, unit="cells")
        if verify and model.dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"verify compares up to rounding, and {model.dtype} rounds too much to tell: "
                "verify a float32 copy of the model"
            )
        if verify and self.request.spec.precision != "exact":
            raise InputError(f"verify needs precision 'exact', not {self.request.spec.precision!r}")
        if model.hook_functions() != self.request.attached:
            raise InputError("hooks were attached or removed since this was planned: plan it anew")

    def _check_weights(self) -> None:
        """Raise for other weights than those of the cells that are done.

        Raises:
            ValueError: where cells are done, and the weights were changed since.
        """
        weights = weights_hash(self.request.model)
        if self._state is not None and self._weights != weights:
            raise InputError("the weights were changed since this plan ran: plan it anew")
        self._weights = weights

    def _started(self, file: Checkpoint | None) -> State:
        """The unpatched runs, and what an earlier run left in the file."""
        if self._state is None:
            try:
                self._state = prepared(self.request, self.schedule)
            except HookError as error:
                raise HookError(f"{error} (on an unpatched run)") from error
        state = self._state
        held = None if file is None else file.load(state.baselines)
        if held is not None:
            unite(state.values, state.done, *held)
        return state

    @contextlib.contextmanager
    def _in_force(self) -> Iterator[list[str]]:
        """Modes of torch and of the model while the plan runs, and what a report says of them."""
        model, precision = self.request.model, self.request.spec.precision
        with contextlib.ExitStack() as stack:
            notes = stack.enter_context(evaluating(model))
            stack.enter_context(torch.inference_mode())
            written_out = self.request.parts_written_out
            if written_out:  # what lies before the sites stays as it is: the encoder runs fused
                stack.enter_context(model.written_out(written_out))
            if model.device.type == "cpu":
                stack.enter_context(freed_memory_kept())
            if precision == "bf16":
                stack.enter_context(torch.autocast(model.device.type, torch.bfloat16))
            if precision == "tf32":
                before = torch.get_float32_matmul_precision()
                torch.set_float32_matmul_precision("high")
                stack.callback(torch.set_float32_matmul_precision, before)
            yield notes

    def _compute(
        self, state: State, todo: list[int], progress: bool | None, file: Checkpoint | None
    ) -> None:
        queue = self.schedule.queue(todo)
        work = self.schedule.flops(todo)
        try:
            with track(self.table.site_name, len(todo), "cells", work, progress) as advance:
                while queue:
                    cells = self.schedule.next(queue, state.free_bytes)
                    if self._run_together(state, cells, queue):
                        advance(self.schedule.flops(cells), len(todo) - len(queue))
                    if file is not None:
                        file.keep(state.values, state.done, state.baselines)
                        elsewhere = [cell for cell in queue if state.done[cell]]
                        for cell in elsewhere:  # another process has them
                            queue.remove(cell)
        finally:
            if file is not None:
                file.keep(state.values, state.done, state.baselines, at_once=True)

    def _run_together(self, state: State, cells: list[int], queue: collections.deque[int]) -> bool:
        """Compute cells in one go; out of memory puts them back for smaller goes."""
        try:
            rows = state.route.run(cells)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError, AudioLensError) as error:
            if not _is_out_of_memory(error):
                self._raise_placed(error, cells)
            if len(cells) == 1:
                raise MemoryError(
                    f"one cell alone does not fit into memory ({error}): use fewer stimuli or "
                    "shorter clips"
                ) from error
        else:
            self._measure(state, cells, rows)
            return True
        queue.extendleft(reversed(cells))
        self.schedule.shrink(len(cells))
        note = "memory ran out on the way: cells went on in smaller batches"
        state.notes += [] if note in state.notes else [note]
        gc.collect()
        if self.request.model.device.type == "cuda":
            torch.cuda.empty_cache()
        return False

    def _measure(self, state: State, cells: list[int], rows: Float[Tensor, "n b r c"]) -> None:
        """Take the metrics of cells that ran, at once where these allow."""
        if state.readout.by_row:
            run = self.table.described(cells[0])
            state.values[..., cells] = state.readout.measure_together(rows, run)
            state.done[cells] = True
            return
        for cell, of_cell in zip(cells, rows, strict=True):
            run = self.table.described(cell)
            state.values[..., cell] = state.readout.measure(of_cell, run)
            state.done[cell] = True  # what is measured stays, whatever the next one does

    def _raise_placed(self, error: BaseException, cells: list[int]) -> NoReturn:
        """Raise an error of a run with the cells it happened on.

        Raises:
            HookError: for one of a hook.
        """
        where = self.table.described(cells[0])
        if len(cells) > 1:
            where += f" and {len(cells) - 1} more cells, which run with it as one batch"
        if isinstance(error, HookError):
            raise HookError(f"{error} (on {where})") from error
        error.add_note(f"on {where}")
        raise error

    # ---------------------------------------------------------------- truth

    def _verified(self, state: State, wanted: Sequence[int], count: int) -> str:
        """Compare random cells with whole forwards; says how far off they were.

        Raises:
            VerificationError: where one differs by more than rounding.
        """
        cells = random.Random(SEED).sample(list(wanted), min(count, len(wanted)))
        base = state.clean if self.request.spec.direction == "noise" else state.corrupted
        effects = (state.values - base[..., None])[..., state.done]
        largest = effects[effects.isfinite()].abs().amax() if effects.isfinite().any() else 0.0
        small = 1e-10 if self.request.is_double else 1e-5
        worst = 0.0
        for cell in cells:
            exact, found = literally(self.request, state.readout, cell), state.values[..., cell]
            is_same = (found == exact) | (found.isnan() & exact.isnan())
            error = (found - exact).abs().masked_fill(is_same, 0.0)
            allowed = small * exact.abs().clamp(min=1) + 10 * small * largest
            if not (is_same | (error <= allowed)).all():  # NaN on one side is neither
                raise VerificationError(
                    f"{self.table.described(cell)} is {found.tolist()} and a whole forward gives "
                    f"{exact.tolist()}: please report this"
                )
            worst = max(worst, float(error.max()))
        return f"{len(cells)} random cells verified by whole forwards: off by {worst:.1e} at most"

    # ---------------------------------------------------------------- the result

    def _result(
        self, state: State, wanted: Sequence[int], notes: list[str], own: dict[str, str]
    ) -> SweepResult:
        request, table = self.request, self.table
        chosen = torch.zeros(len(self), dtype=torch.bool)
        chosen[list(wanted)] = True
        per_cell = state.values.masked_fill(~chosen, torch.nan)
        names = state.readout.names
        dims, coords = batch_dims(request.spec.metric, names, len(request.spec.base), state.clean)
        if "stimulus" in dims:
            absent = ~table.covered[table.cells.positions].T
            per_cell = per_cell.masked_fill(absent, torch.nan)
        batch_shape = [len(coords[dim]) for dim in dims]
        shape = [*batch_shape, *(len(table.coords[axis]) for axis in table.axes)]
        spec = request.spec
        meta = provenance(request.model, spec.clean, spec.corrupted, names, self._weights)
        return SweepResult(
            values=per_cell.reshape(shape),
            dims=(*dims, *table.axes),
            coords={**coords, **table.coords},
            clean=state.clean.reshape(batch_shape),
            corrupted=state.corrupted.reshape(batch_shape),
            site=table.site_name,
            direction=request.spec.told_direction,
            report=list(dict.fromkeys([*self._known, *state.notes, *notes])),
            meta=meta | {"attn_mode": request.attn_mode, "precision": request.spec.precision},
            recipe={
                "arguments": self.arguments,
                "hooks": list(request.hooked),
                "edits": edits_in_force(request.model),
                "own": own,
            },
        )


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(words in str(error) for words in ("can't allocate memory", "not enough memory"))
