"""The unpatched runs of a sweep, and what they leave for the patched ones."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from audio_lens.patching.checks import check_finite
from audio_lens.patching.engine.changes import kept_for
from audio_lens.patching.engine.edited import EditedSource
from audio_lens.patching.engine.hooked import HookedRoute, LateRoute
from audio_lens.patching.engine.readout import Readout
from audio_lens.patching.engine.request import Request
from audio_lens.patching.engine.routes import DecoderRoute, EncoderRoute, FromBase, Route, Run
from audio_lens.patching.engine.schedule import Schedule
from audio_lens.patching.engine.trace import (
    ConnectorSource,
    GivenSource,
    RunSource,
    Source,
    blocks_of,
    stack_of,
)


@dataclass
class State:
    """What the unpatched runs gave, and what of the cells is done.

    Attributes:
        free_bytes: what they leave of the memory budget.
        notes: what happened on the way that a reader of the result must know.
    """

    route: Route
    readout: Readout
    clean: Float[Tensor, " metrics *batch"]
    corrupted: Float[Tensor, " metrics *batch"]
    values: Float[Tensor, "metrics *batch cells"]
    done: Bool[Tensor, " cells"]
    free_bytes: float | int
    notes: list[str] = field(default_factory=list)

    @property
    def baselines(self) -> Float[Tensor, "2 metrics *batch"]:
        return torch.stack([self.clean, self.corrupted])


def prepared(request: Request, schedule: Schedule) -> State:
    """Run both inputs unpatched and set up the route.

    Raises:
        MetricError: a metric that fails, or gives something else than finite numbers.
        ValueError: a budget too small.
    """
    kind = request.route
    if issubclass(kind, HookedRoute):
        return _with_hooks(request, schedule, kind)
    return _without_hooks(request, schedule, kind)


def _without_hooks(request: Request, schedule: Schedule, kind: type[FromBase]) -> State:
    model, spec, part = request.model, request.spec, request.table.part
    of_base, of_source = _kept(request)
    base = Run.of(model, spec.base, part, of_base)
    given = request.source
    other, is_patched = base, given is None and spec.do is None
    if not (spec.other is spec.base and not is_patched):
        other = Run.of(model, spec.other, part, of_source if is_patched else (), heard=base)
    clean_run = other if spec.direction == "denoise" else base
    clean_logits = functools.cache(lambda: model.read_out(clean_run.hidden, clean_run.inputs))
    readouts = [request.readout(run.inputs, clean_logits) for run in (base, other)]
    # before the source drops what it does not need: it may be the run that is measured here
    both = zip(readouts, (base, other), strict=True)
    values = _measured(request, readouts, [one.of_run(run.hidden) for one, run in both])
    held = base.n_bytes
    if spec.do is not None:
        source = _edited(request, _of_run(base, part))
    elif isinstance(given, Mapping):
        source = _given(request, given, base)
    else:
        run = other if given is None else Run.of(model, given, part, of_source, heard=base)
        source, held = _of_run(run.keep(part), part), held + run.n_bytes
    free = schedule.free_beside(held)
    route = kind(model, base, request.table, readouts[0], source, free)
    return _state(request, route, readouts[0], values, free)


def _kept(request: Request) -> tuple[list[str], list[str]]:
    """What base and source hold of every block."""
    if request.route not in (DecoderRoute, EncoderRoute):
        return [], []
    blocks = blocks_of(stack_of(request.model, request.table.part))
    return kept_for(request.table.site, blocks[0])


def _of_run(run: Run, part: str) -> Source:
    return ConnectorSource(run.connector) if part == "connector" else RunSource(run.trace(part))


def _edited(request: Request, base: Source | None) -> EditedSource:
    """What the edit of a sweep makes of the run that is patched."""
    table, spec = request.table, request.spec
    reached = table.positions.any(0)
    return EditedSource.of(request.model, spec.need_do, spec.base, table.sites, reached, base)


def _given(request: Request, activations: Mapping[str, Tensor], base: Run | None) -> GivenSource:
    part = request.table.part
    reach = None if base is None or part == "connector" else base.trace(part).n_positions
    return GivenSource(part, activations, next(request.model.parameters()), reach)


def _with_hooks(request: Request, schedule: Schedule, kind: type[HookedRoute]) -> State:
    model, spec, every = request.model, request.spec, range(len(request.table.cells))
    before_decoder = [n for n in request.hooked if n.startswith(("encoder.", "connector."))]
    is_heard_once = request.table.part == "decoder" and not before_decoder
    encoder_out = model.encode(spec.base) if is_heard_once else None
    base_logits = model(spec.base, encoder_out=encoder_out)
    given = request.source
    other_logits, activations = base_logits, {}
    if not (spec.other is spec.base and (given is not None or spec.do is not None)):
        other_logits, activations = request.kept(spec.other, every)
    if isinstance(given, Mapping):
        activations = given
    elif given is not None:
        _, activations = request.kept(given, every)
    clean_logits = other_logits if spec.direction == "denoise" else base_logits
    other = spec.base if other_logits is base_logits else spec.other
    readouts = [request.readout(inputs, lambda: clean_logits) for inputs in (spec.base, other)]
    both = zip(readouts, (base_logits, other_logits), strict=True)
    values = _measured(request, readouts, [one.of_logits(logits) for one, logits in both])
    source = _edited(request, None) if spec.do else _given(request, activations, None)
    route = kind(model, spec.base, request.table, readouts[0], source, encoder_out)
    if isinstance(route, LateRoute):
        route.keep_until(request.first_hooked)
    state = _state(request, route, readouts[0], values, schedule.free_beside(0))
    if request.hooked:
        in_force = f"your hooks were in force: {', '.join(request.hooked)}"
        state.notes.append(f"{in_force}; so every cell was {_ran(route, is_heard_once)}")
    return state


def _ran(route: Route, is_heard_once: bool) -> str:
    """What every cell was, for people."""
    if isinstance(route, LateRoute):
        at_most = f"block {route.first} of the {route.table.part} at most"
        return f"a run from its first patched block on, from {at_most}"
    return "a whole run of the decoder" if is_heard_once else "a whole forward"


def literally(request: Request, readout: Readout, cell: int) -> Float[Tensor, " metrics *batch"]:
    """One cell as a whole forward with hooks, and nothing of what the engine saves."""
    given = request.source
    if request.spec.do is not None:
        source: Source = _edited(request, None)
    else:
        if not isinstance(given, Mapping):
            _, given = request.kept(request.spec.other if given is None else given, [cell])
        source = _given(request, given, None)
    route = HookedRoute(request.model, request.spec.base, request.table, readout, source)
    return readout.measure(route.run([cell])[0], f"{request.table.described(cell)}, run whole")


def _measured(
    request: Request, readouts: list[Readout], rows: list[Tensor]
) -> dict[str, Float[Tensor, " metrics *batch"]]:
    """The metrics of the clean and the corrupted run.

    Args:
        readouts: of the base run and of the other, each bound to its own inputs.
        rows: what these read.

    Raises:
        MetricError: a metric that fails, or gives something else than finite numbers.
    """
    is_denoise = request.spec.direction == "denoise"
    runs = ("corrupted", "clean") if is_denoise else ("clean", "corrupted")
    values = {
        run: readout.measure(read, f"the {run} run")
        for run, readout, read in zip(runs, readouts, rows, strict=True)
    }
    check_finite(values, readouts[0].names)
    return values


def _state(
    request: Request,
    route: Route,
    readout: Readout,
    values: dict[str, Tensor],
    free: float | int,
) -> State:
    """Nothing done yet. ``values`` are those of the clean and the corrupted run."""
    clean, n_cells = values["clean"], len(request.table.cells)
    empty = torch.full((*clean.shape, n_cells), torch.nan, dtype=clean.dtype)
    done = torch.zeros(n_cells, dtype=torch.bool)
    return State(
        route, readout, **values, values=empty, done=done, free_bytes=free, notes=request.notes
    )
