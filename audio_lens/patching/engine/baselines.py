"""The unpatched runs of a sweep, and what they leave for the patched ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from audio_lens.inputs import AudioInputs
from audio_lens.patching.checks import check_finite
from audio_lens.patching.engine.changes import kept_for
from audio_lens.patching.engine.hooked import HookedRoute
from audio_lens.patching.engine.readout import Readout
from audio_lens.patching.engine.request import Request
from audio_lens.patching.engine.routes import DecoderRoute, EncoderRoute, Route, Run
from audio_lens.patching.engine.schedule import Schedule
from audio_lens.patching.engine.trace import ConnectorSource, GivenSource, RunSource, Source

_COMPLEMENT_SHARE = 0.4  # of the budget


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
        ValueError: a metric of another shape or not finite, or a budget too small.
    """
    is_hooked = issubclass(request.route, HookedRoute)
    return (_with_hooks if is_hooked else _without_hooks)(request, schedule)


def _without_hooks(request: Request, schedule: Schedule) -> State:
    model, part = request.model, request.table.part
    of_base, of_source = _kept(request)
    is_source = request.source is None
    base = Run.of(model, request.spec.base, part, of_base)
    is_given = isinstance(request.source, Mapping)
    other = base
    if not (is_given and request.spec.other is request.spec.base):
        other = Run.of(model, request.spec.other, part, of_source if is_source else (), heard=base)
    clean_run = other if request.spec.direction == "denoise" else base
    measures = request.measures(lambda: model.read_out(clean_run.hidden, clean_run.inputs))
    readout = Readout(model, measures, request.spec.base)
    values = [readout.measure(readout.of_run(run.hidden)) for run in (base, other)]
    held, source = base.n_bytes, None
    if is_given:
        source = _given(request, request.source, base)
    else:
        run = other
        if request.source is not None:
            run = Run.of(model, request.source, part, of_source, heard=base)
        source, held = _of_run(run.keep(part), part), held + run.n_bytes
    free = schedule.free_beside(held)
    route = _route(request, base, readout, source, free)
    return _state(request, route, readout, values, free)


def _kept(request: Request) -> tuple[list[str], list[str]]:
    """What base and source hold of every block."""
    if request.route not in (DecoderRoute, EncoderRoute):
        return [], []
    blocks = getattr(request.model, request.table.part).blocks
    return kept_for(request.table.site, blocks[0])


def _of_run(run: Run, part: str) -> Source:
    return ConnectorSource(run.connector) if part == "connector" else RunSource(run.trace(part))


def _given(request: Request, activations: Mapping[str, Tensor], base: Run | None) -> GivenSource:
    part = request.table.part
    reach = None if base is None or part == "connector" else base.trace(part).n_positions
    return GivenSource(part, activations, next(request.model.parameters()), reach)


def _route(
    request: Request, base: Run, readout: Readout, source: Source, free: float | int
) -> Route:
    arguments = (request.model, base, request.table, readout, source)
    if request.route is not EncoderRoute:
        return request.route(*arguments)
    cfg = request.model.cfg.encoder
    of_one = base.encoder.n_positions * cfg.n_heads * (cfg.d_head + 1) * 4
    return EncoderRoute(*arguments, n_held=int(_COMPLEMENT_SHARE * free // of_one))


def _with_hooks(request: Request, schedule: Schedule) -> State:
    model, every = request.model, range(len(request.table.cells))
    before_decoder = [n for n in request.hooked if n.startswith(("encoder.", "connector."))]
    is_heard_once = request.table.part == "decoder" and not before_decoder
    encoder_out = model.encode(request.spec.base) if is_heard_once else None
    base_logits = model(request.spec.base, encoder_out=encoder_out)
    is_given = isinstance(request.source, Mapping)
    other_logits, activations = base_logits, request.source
    if not (is_given and request.spec.other is request.spec.base):
        other_logits, activations = request.kept(request.spec.other, every)
    if isinstance(request.source, AudioInputs):
        _, activations = request.kept(request.source, every)
    elif is_given:
        activations = request.source
    clean_logits = other_logits if request.spec.direction == "denoise" else base_logits
    readout = Readout(model, request.measures(lambda: clean_logits), request.spec.base)
    values = [readout.measure(readout.of_logits(x)) for x in (base_logits, other_logits)]
    route = request.route(
        model,
        request.spec.base,
        base_logits,
        request.table,
        readout,
        _given(request, activations, None),
        encoder_out,
    )
    state = _state(request, route, readout, values, schedule.free_beside(0))
    if request.hooked:
        note = f"your hooks were in force: {', '.join(request.hooked)}; so every cell was a whole"
        state.notes.append(f"{note} run of the decoder" if is_heard_once else f"{note} forward")
    return state


def literally(request: Request, readout: Readout, cell: int) -> Float[Tensor, " metrics *batch"]:
    """One cell as a whole forward with hooks, and nothing of what the engine saves."""
    given = request.source
    if not isinstance(given, Mapping):
        _, given = request.kept(request.spec.other if given is None else given, [cell])
    source = _given(request, given, None)
    logits = request.model(request.spec.base)
    route = HookedRoute(
        request.model, request.spec.base, logits, request.table, readout, source, None
    )
    return readout.measure(route.run([cell])[0])


def _state(
    request: Request, route: Route, readout: Readout, values: list[Tensor], free: float | int
) -> State:
    """Nothing done yet. ``values`` are those of the base run and of the other."""
    clean, corrupted = reversed(values) if request.spec.direction == "denoise" else values
    check_finite({"corrupted": corrupted, "clean": clean}, readout.names)
    n_cells = len(request.table.cells)
    empty = torch.full((*clean.shape, n_cells), torch.nan, dtype=clean.dtype)
    done = torch.zeros(n_cells, dtype=torch.bool)
    return State(route, readout, clean, corrupted, empty, done, free, request.notes)
