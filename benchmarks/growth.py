"""How the seconds of a sweep grow with layers, positions, heads and stimuli, as a picture.

    python -m benchmarks.growth
    python -m benchmarks.growth --out growth.html --rounds 3 --json growth.json
    python -m benchmarks.growth --device cuda --llm 1b

One audio language model with random weights in several sizes. The loop runs one whole forward for
each cell, on a sample of them; several stimuli are one batch for audio_lens, and one after the
other for the loop and the script. The dotted line is the least floating-point work of the cells at
the machine's matrix-product rate, measured beside.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.patching_measure import OWN, Clock, chosen_batches, matmul_rate
from benchmarks.peers import METHODS, limits
from benchmarks.peers.tasks import LLMS, LLMShape, Task, WhisperShape, make_task
from benchmarks.several import stacked

EAR = WhisperShape(2, 64, 2, frames=120, n_mels=16)
MIDDLE = LLMShape(4, 192, 4, 2, 768, EAR)
COMPARED = (OWN, "loop-encoder-once", "expert")
LEAST = "least work"
SUFFIXES = (".svg", ".png", ".html")

Lines = dict[str, float]  # seconds of a sweep by method
Grown = dict[str, dict[int, Lines]]  # by what grows and its size


@dataclass(frozen=True)
class Point:
    """One sweep of the picture: what grows, how far, and its task."""

    axis: str
    size: int
    row: str
    shape: LLMShape
    stimuli: int = 1

    def task(self, device: str, dtype: torch.dtype) -> Task:
        """The sweep of one stimulus."""
        return make_task(self.row, self.shape, "growing", device, dtype)


def points(middle: LLMShape) -> Iterator[Point]:
    """Every sweep, from half the size of a model to two or four times of it."""
    ear, steps = middle.ear, (0.5, 1, 2, 4)
    for n in (int(step * middle.layers) for step in steps):
        yield Point("layers", n, "lm-resid", replace(middle, layers=n))
    for n in (int(step * ear.frames) for step in steps):
        longer = replace(middle, ear=replace(ear, frames=n))
        yield Point("audio positions", longer.audio_tokens, "lm-resid", longer)
    for n in (int(step * middle.heads) for step in steps[:3]):
        yield Point("heads", n, "lm-heads", replace(middle, heads=n, kv_heads=max(1, n // 2)))
    for n in (1, 2, 4, 8):
        yield Point("stimuli", n, "lm-heads", middle, stimuli=n)


@torch.no_grad()
def seconds(task: Task, n_stimuli: int, rounds: int, sample: int) -> Lines:
    """Median seconds of a whole sweep by method, the methods in turns, and of the least work."""
    clock, draw = Clock(task.device), random.Random(0)
    methods = {name: METHODS[name](task) for name in COMPARED}
    methods[OWN], times = METHODS[OWN](stacked(task, n_stimuli)), {OWN: 1}
    taken: dict[str, list[float]] = {name: [] for name in (*methods, LEAST)}
    work = limits.mean_work(task) * len(task.cells) * n_stimuli
    for method in methods.values():
        method.warm_up()
    for _ in range(rounds):
        for name, method in methods.items():
            once = _whole_sweep(method, clock, sample, draw)
            taken[name].append(once * times.get(name, n_stimuli))
        taken[LEAST].append(work / matmul_rate(clock, task.model.dtype))
    labels = {name: METHODS[name].label for name in methods} | {LEAST: LEAST}
    return {labels[name]: statistics.median(found) for name, found in taken.items()}


def _whole_sweep(method: Any, clock: Clock, sample: int, draw: random.Random) -> float:
    """Seconds of all cells, scaled where a method ran a sample of them."""
    chosen = chosen_batches(method, method.task.cells, sample, draw)
    if method.takes_every_cell:
        return clock.seconds(lambda: [method.patch(batch) for batch in chosen])
    before = clock.seconds(method.prepare)
    cells = clock.seconds(lambda: [method.patch(batch) for batch in chosen])
    return before + cells * len(method.task.cells) / sum(map(len, chosen))


def measure(middle: LLMShape, device: str, dtype: torch.dtype, rounds: int, sample: int) -> Grown:
    """Seconds of all sweeps."""
    grown: Grown = {}
    console = Console(stderr=True)
    for point in track(list(points(middle)), description="sweeps", console=console):
        task = point.task(device, dtype)
        found = seconds(task, point.stimuli, rounds, sample)
        grown.setdefault(point.axis, {})[point.size] = found
    return grown


# -------------------------------------------------------------------------------- shown


def table(grown: Grown) -> Table:
    """All figures: seconds, and how many times those of audio_lens."""
    own = METHODS[OWN].label
    labels = list(next(iter(next(iter(grown.values())).values())))
    made = Table("grows", "to", *labels, title="seconds a sweep")
    for axis, sizes in grown.items():
        for size, found in sizes.items():
            times = (f"{s:.3g} ({s / found[own]:.1f} x)" for s in found.values())
            made.add_row(axis, str(size), *times)
    return made


def draw(grown: Grown, path: Path) -> None:
    """One panel for each of what grows, both axes logarithmic."""
    (_draw_html if path.suffix == ".html" else _draw_picture)(grown, path)


def _lines(sizes: Mapping[int, Lines]) -> dict[str, tuple[list[int], list[float]]]:
    """By method, sizes and seconds."""
    labels = next(iter(sizes.values()))
    return {label: (list(sizes), [sizes[n][label] for n in sizes]) for label in labels}


def _draw_html(grown: Grown, path: Path) -> None:
    from plotly import colors
    from plotly import graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(1, len(grown), shared_yaxes=True, y_title="seconds a sweep")
    for column, (axis, sizes) in enumerate(grown.items(), start=1):
        for n, (label, (x, y)) in enumerate(_lines(sizes).items()):
            line = {"color": colors.qualitative.D3[n], "dash": "dot" if label == LEAST else "solid"}
            shown = go.Scatter(
                x=x, y=y, name=label, line=line, legendgroup=label, showlegend=column == 1
            )
            figure.add_trace(shown, 1, column)
        figure.update_xaxes(type="log", title=axis, tickvals=list(sizes), row=1, col=column)
    figure.update_yaxes(type="log")
    figure.write_html(path, include_plotlyjs=True)


def _draw_picture(grown: Grown, path: Path) -> None:
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(grown), figsize=(12, 3.6), sharey=True, squeeze=False)
    for panel, (axis, sizes) in zip(panels[0], grown.items(), strict=True):
        for label, (x, y) in _lines(sizes).items():
            style = {"ls": ":", "color": "0.4"} if label == LEAST else {"marker": "o"}
            panel.loglog(x, y, label=label, **style)
        panel.set_xticks(list(sizes), [str(n) for n in sizes])
        panel.set_xticks([], minor=True)
        panel.set_xlabel(axis)
        panel.grid(alpha=0.3)
    panels[0, 0].set_ylabel("seconds a sweep")
    panels[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(
    out: Annotated[Path | None, typer.Option(help=f"The picture ({', '.join(SUFFIXES)}).")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures.")] = None,
    llm: Annotated[
        str | None, typer.Option(help=f"Around one of {', '.join(LLMS)} (default: a small one).")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    rounds: Annotated[int, typer.Option(min=1, help="The median of so many.")] = 3,
    sample: Annotated[int, typer.Option(min=1, help="Cells that the loop runs.")] = 6,
    threads: Annotated[int, typer.Option(min=1, help="With 1, CPU time is measured.")] = 1,
) -> None:
    """Measure, print and draw how sweeps grow."""
    if out is not None and out.suffix not in SUFFIXES:
        raise typer.BadParameter(f"--out ends in one of {', '.join(SUFFIXES)}")
    if llm is not None and llm not in LLMS:
        raise typer.BadParameter(f"--llm is one of {', '.join(LLMS)}")
    torch.set_num_threads(threads)
    grown = measure(MIDDLE if llm is None else LLMS[llm], device, torch.float32, rounds, sample)
    Console(width=None if sys.stdout.isatty() else 125).print(table(grown))
    if out is not None:
        draw(grown, out)
    if json_file is not None:
        json_file.write_text(json.dumps(grown, indent=1))


if __name__ == "__main__":
    typer.run(main)
