"""Time, memory and answers of every method on one task, in turns.

On one thread of a CPU what counts is the CPU time of the process: a busy machine slows all alike.
With several threads, and on a GPU, it is the time on the clock.
"""

from __future__ import annotations

import gc
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from audio_lens import patching
from benchmarks.peers import METHODS, limits
from benchmarks.peers.backward import least_forwards
from benchmarks.peers.method import Method
from benchmarks.peers.own import sweep_arguments
from benchmarks.peers.roofline import Roofline
from benchmarks.peers.tasks import Cell, Task

OWN = "audio_lens"
UNEVEN_SAMPLES = 4  # times as many, where cells cost a method unequal work
PROBE_WIDTH, PROBES = 2048, 3
LEAST_SHARE = 0.2  # of a sweep that its cells take, for the seconds of a cell to be known
MIB = 2**20


# -------------------------------------------------------------------------------- clocks


@dataclass(frozen=True)
class Clock:
    """Seconds that count on this device with this many threads."""

    device: torch.device

    @property
    def name(self) -> str:
        return "CPU time" if self._is_cpu_time else "time on the clock"

    @property
    def _is_cpu_time(self) -> bool:
        return self.device.type == "cpu" and torch.get_num_threads() == 1

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.process_time() if self._is_cpu_time else time.perf_counter()

    def seconds(self, run: Callable[[], Any]) -> float:
        start = self.now()
        run()
        return self.now() - start


def matmul_rate(clock: Clock, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large square product, the best of a few."""
    x = torch.randn(PROBE_WIDTH, PROBE_WIDTH).to(clock.device, dtype)
    return 2 * PROBE_WIDTH**3 / min(clock.seconds(lambda: x @ x) for _ in range(PROBES))


# -------------------------------------------------------------------------------- rounds


@dataclass
class Rounds:
    """What one method took and answered, round by round.

    Attributes:
        setup_s: both unpatched runs and what is kept of them.
        cell_s: mean of a cell beyond these.
        sweep_s: the whole sweep, end to end.
        rate: of the matrix products just before and after, per second.
        values: the metric of every cell that ran.
    """

    setup_s: list[float] = field(default_factory=list)
    cell_s: list[float] = field(default_factory=list)
    sweep_s: list[float] = field(default_factory=list)
    rate: list[float] = field(default_factory=list)
    values: dict[Cell, float] = field(default_factory=dict)

    def add(self, method: Method, setup_s: float, cells_s: float, n_run: int) -> None:
        """Take a round in which `prepare` and the cells' `patch` took so long."""
        n_cells = len(method.task.cells)
        if method.takes_every_cell:
            self.cell_s.append((cells_s - setup_s) / max(1, n_cells - 1))
            self.sweep_s.append(cells_s)
        else:
            self.cell_s.append(cells_s / n_run)
            self.sweep_s.append(setup_s + n_cells * self.cell_s[-1])
        self.setup_s.append(setup_s)


def run_rounds(
    task: Task, methods: dict[str, Method], repeats: int, sample: int, seed: int
) -> dict[str, Rounds]:
    """Every method once a round, in a new order each; slow ones on a sample of the cells.

    Args:
        sample: batches of cells that a method runs a round; four times as many where cells are
            of unequal cost, all where 0.
    """
    shuffler, clock = random.Random(seed), Clock(task.device)
    rounds = {name: Rounds() for name in methods}
    for method in methods.values():
        method.warm_up()
    rate = matmul_rate(clock, task.model.dtype)
    console = Console(stderr=True)
    for _ in track(range(repeats), description=task.row.site, console=console):
        gc.collect()
        for name in shuffler.sample(list(methods), len(methods)):
            method, found = methods[name], rounds[name]
            chosen = chosen_batches(method, task.cells, sample, shuffler)
            setup_s = clock.seconds(method.prepare)
            start = clock.now()
            answers = [method.patch(batch) for batch in chosen]
            found.add(method, setup_s, clock.now() - start, sum(map(len, chosen)))
            before, rate = rate, matmul_rate(clock, task.model.dtype)
            found.rate.append((before + rate) / 2)
            for batch, values in zip(chosen, answers, strict=True):
                found.values.update(zip(batch, values, strict=True))
    return rounds


def chosen_batches(
    method: Method, cells: Sequence[Cell], sample: int, draw: random.Random
) -> list[list[Cell]]:
    """Batches to run: all, or one at random out of each of so many equal stretches."""
    if method.takes_every_cell:
        return [list(cells)]
    batches = method.batches(cells)
    count = sample if method.is_even else UNEVEN_SAMPLES * sample
    if not 0 < count < len(batches):
        return batches
    return [batches[int((i + draw.random()) / count * len(batches))] for i in range(count)]


# -------------------------------------------------------------------------------- outcomes


@dataclass(frozen=True)
class Outcome:
    """What one method did on one task; `absent` says why the rest is missing.

    Attributes:
        cells_run: distinct cells that ran; the times of the others are scaled from these.
        setup_s: both unpatched runs and what is kept of them.
        cell_s: a cell beyond these; None where the cells drown in the unpatched runs.
        sweep_s: the whole sweep, end to end.
        cells_per_s: end to end.
        times_own, times_own_cell: seconds of the whole sweep, and of a cell beyond the unpatched
            runs, over those of audio_lens.
        over_limit: `cell_s` over the least work at the machine's matrix-product rate.
        over_roofline: `cell_s` over what that work takes when attention runs at its own rate and
            every row passes through memory for norms, additions and activations.
        error: largest difference to audio_lens, over the largest effect of the sweep.
        peak_mib: memory beyond model and inputs, at most.
    """

    label: str
    absent: str | None = None
    cells_run: int = 0
    setup_s: float | None = None
    cell_s: float | None = None
    sweep_s: float | None = None
    cells_per_s: float | None = None
    times_own: float | None = None
    times_own_cell: float | None = None
    over_limit: float | None = None
    over_roofline: float | None = None
    error: float | None = None
    peak_mib: float | None = None


@dataclass(frozen=True)
class Comparison:
    """All methods on one task, and attribution of all its cells in forwards.

    Attributes:
        gflops: of a large square product.
        rows_together, gflops_here: rows that a block's products can be given at once, and the rate
            of products of this shape.
        attention_gflops: of fused attention at the row's shape.
        most: so many times the roofline a cell may take.
        runs_s, cells_s: the least time of both unpatched runs, and of all cells.
    """

    name: str
    size: str
    n_cells: int
    gflop_per_cell: float
    gflops: float
    rows_together: int
    gflops_here: float
    attention_gflops: float
    most: float
    runs_s: float
    cells_s: float
    clock: str
    attribution_forwards: float
    least_attribution_forwards: float
    outcomes: dict[str, Outcome]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def over_floor(self) -> float:
        """Seconds of audio_lens's whole sweep over the least that any could take."""
        taken = self.outcomes[OWN].sweep_s or 0.0
        return taken / (self.runs_s + self.cells_s)

    @property
    def disagreeing(self) -> list[str]:
        """Methods whose answers are not those of audio_lens, within a thousandth of the effects."""
        errors = {name: outcome.error for name, outcome in self.outcomes.items()}
        return [name for name, e in errors.items() if e is not None and not e <= 1e-3]


@torch.no_grad()
def compare(
    name: str,
    task: Task,
    wanted: Sequence[str],
    repeats: int,
    sample: int,
    seed: int = 0,
    peak_of: Callable[[str], float] | None = None,
) -> Comparison:
    """Measure the wanted methods (audio_lens among them) on a task.

    Args:
        peak_of: gives the peak memory of a method in MiB; None leaves it out.
    """
    absent = {key: METHODS[key].absence(task) for key in wanted}
    methods = {key: METHODS[key](task) for key in wanted if absent[key] is None}
    rounds = run_rounds(task, methods, repeats * task.row.rounds, sample, seed)
    work, roofline = limits.mean_work(task), Roofline.of(task, Clock(task.device).seconds)
    largest, rate = largest_effect(task, rounds[OWN]), statistics.median(rounds[OWN].rate)
    outcomes = {}
    for key in wanted:
        if absent[key] is not None:
            outcomes[key] = Outcome(METHODS[key].label, absent=absent[key])
            continue
        peak = peak_of(key) if peak_of else None
        outcomes[key] = summarise(
            methods[key], rounds[key], rounds[OWN], task, work, roofline, largest, peak
        )
    return Comparison(
        name=name,
        size=task.size,
        n_cells=len(task.cells),
        gflop_per_cell=work / 1e9,
        gflops=rate / 1e9,
        rows_together=roofline.together,
        gflops_here=roofline.rate(rate) / 1e9,
        attention_gflops=roofline.attention_rate / 1e9,
        most=task.row.most,
        runs_s=roofline.runs_seconds(task, rate),
        cells_s=len(task.cells) * roofline.seconds(rate),
        clock=Clock(task.device).name,
        attribution_forwards=attribution_forwards(task, repeats),
        least_attribution_forwards=least_forwards(task),
        outcomes=outcomes,
    )


def largest_effect(task: Task, own: Rounds) -> float:
    """The largest change any cell makes to the metric."""
    base = task.difference(task.hf_model(**task.whole_call(task.corrupted)).logits)
    return max(abs(value - base) for value in own.values.values())


def summarise(
    method: Method,
    found: Rounds,
    own: Rounds,
    task: Task,
    work: float,
    roofline: Roofline,
    largest: float,
    peak_mib: float | None,
) -> Outcome:
    """Medians over the rounds; ratios are taken within a round."""
    sweep_s, cell_s = statistics.median(found.sweep_s), statistics.median(found.cell_s)
    pairs = list(zip(found.cell_s, found.rate, strict=True))
    errors = [abs(value - own.values[cell]) for cell, value in found.values.items()]
    per_cell = {}
    if cells_show(own):
        per_cell["times_own_cell"] = cell_s / statistics.median(own.cell_s)
    if not method.takes_every_cell or cells_show(own):
        per_cell["cell_s"] = cell_s
        per_cell["over_limit"] = statistics.median(s * rate / work for s, rate in pairs)
        per_cell["over_roofline"] = statistics.median(s / roofline.seconds(r) for s, r in pairs)
    return Outcome(
        label=method.label,
        cells_run=len(found.values),
        setup_s=statistics.median(found.setup_s),
        sweep_s=sweep_s,
        cells_per_s=len(task.cells) / sweep_s,
        times_own=statistics.median(a / b for a, b in zip(found.sweep_s, own.sweep_s, strict=True)),
        error=max(errors) / largest,
        peak_mib=peak_mib,
        **per_cell,
    )


def cells_show(own: Rounds) -> bool:
    """Whether the cells of a sweep can be told from its unpatched runs by their seconds."""
    setup_s, sweep_s = statistics.median(own.setup_s), statistics.median(own.sweep_s)
    return sweep_s - setup_s > LEAST_SHARE * sweep_s


@torch.no_grad()
def attribution_forwards(task: Task, rounds: int) -> float:
    """Least time of attribution patching for every cell over that of a plain forward."""
    clock, given = Clock(task.device), sweep_arguments(task)
    plain, taken = [], []
    for _ in range(rounds + 1):  # the first warms up
        plain.append(clock.seconds(lambda: task.model(task.corrupted)))
        taken.append(clock.seconds(lambda: patching.attribute(task.model, progress=False, **given)))
    return min(taken[1:]) / min(plain[1:])


# -------------------------------------------------------------------------------- memory


@torch.no_grad()
def peak_mib(task: Task, method_name: str, sample: int, seed: int = 0) -> float:
    """Most memory that a method holds beyond model and inputs while it runs its cells.

    On a CPU this is resident memory and needs a process of its own: what earlier work has left to
    the allocator would hide it.
    """
    method = METHODS[method_name](task)
    chosen = chosen_batches(method, task.cells, sample, random.Random(seed))
    gc.collect()
    with _watched(task.device) as peak_bytes:
        method.prepare()
        for batch in chosen:
            method.patch(batch)
    return peak_bytes[0] / MIB


@contextmanager
def _watched(device: torch.device) -> Iterator[list[int]]:
    """A list that receives the peak above the start."""
    found: list[int] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        yield found
        found.append(torch.cuda.max_memory_allocated(device) - start)
        return
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far (Linux)
    start = _status_bytes("VmRSS")
    yield found
    found.append(_status_bytes("VmHWM") - start)


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return 1024 * int(line.split()[1])
    raise OSError("peak memory on a CPU is read from /proc, so it needs Linux")


def in_fresh_process(options: Sequence[str], method_name: str) -> float:
    """`peak_mib` of a method, by ``python -m benchmarks.patching`` with these options."""
    command = [sys.executable, "-m", "benchmarks.patching", *options, "--probe", method_name]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])
