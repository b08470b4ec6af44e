"""Progress of long work: how much is done, and how much time is left.

A bar in terminals, a line that renews itself in notebooks, and nothing elsewhere unless asked for:
then a line every now and then, as log files like it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Number = float | int
LINE_EVERY_S, NOTEBOOK_EVERY_S = 10.0, 0.2
_heading: ContextVar[str] = ContextVar("heading", default="")


class Advance(Protocol):
    """Takes how much work was finished since the last call, how many are done, and a remark."""

    def __call__(self, work: Number, done: int, note: str = "") -> None: ...


@contextmanager
def heading(text: str) -> Iterator[None]:
    """Everything tracked inside says that it belongs to this, e.g. ``round 2``."""
    token = _heading.set(text)
    try:
        yield
    finally:
        _heading.reset(token)


@contextmanager
def track(
    what: str, count: int, unit: str, work: Number | None = None, show: bool | None = None
) -> Iterator[Advance]:
    """Show progress while the block runs.

    Args:
        what: what is done.
        count: how many there are to do.
        unit: of what, in the plural.
        work: how much work that is, in any measure to which time is proportional; None takes the
            count.
        show: None shows it in terminals and notebooks, True everywhere, False nowhere.

    Yields:
        A function that takes how much work was finished since the last call, how many are done, and
        what else there is to say.
    """
    title = ", ".join(filter(None, (what, _heading.get())))
    total = float(count if work is None else work)
    if show is False or count == 0:
        yield _ignore
    elif (shell := _notebook()) is not None:
        yield _Lines(title, count, unit, total, shell, NOTEBOOK_EVERY_S)
    elif sys.stderr.isatty():
        with _bar(title, count, unit, total) as advance:
            yield advance
    elif show:
        yield _Lines(title, count, unit, total, _write_line, LINE_EVERY_S)
    else:
        yield _ignore


def _ignore(work: Number, done: int, note: str = "") -> None:
    """Progress that nobody sees."""


def _write_line(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def _notebook() -> Callable[[str], None] | None:
    """Shows a line in the notebook's cell in place of the one before; None outside notebooks."""
    if "IPython" not in sys.modules:
        return None
    from IPython import get_ipython
    from IPython.display import display

    if getattr(get_ipython(), "kernel", None) is None:
        return None
    shown: list[Any] = []

    def write(line: str) -> None:
        bundle = {"text/plain": line}
        if shown:
            shown[0].update(bundle, raw=True)
        else:
            shown.append(display(bundle, raw=True, display_id=True))

    return write


class _Lines:
    """Progress as lines of text, not too many of them."""

    def __init__(
        self,
        title: str,
        count: int,
        unit: str,
        total: float,
        write: Callable[[str], None],
        every_s: float,
    ):
        self.title, self.count, self.unit, self.total = title, count, unit, total
        self.write, self.every_s = write, every_s
        self.finished, self.started = 0.0, time.monotonic()
        self.written = self.started

    def __call__(self, work: Number, done: int, note: str = "") -> None:
        self.finished += work
        now = time.monotonic()
        if done < self.count and now - self.written < self.every_s:
            return
        self.written, gone = now, now - self.started
        left = gone * max(self.total - self.finished, 0.0) / max(self.finished, 1e-9)
        rest = f", {_clock(left)} left" if done < self.count else ""
        said = f", {note}" if note else ""
        self.write(
            f"{self.title}: {done:,} of {self.count:,} {self.unit}{said}, {_clock(gone)} gone{rest}"
        )


def _clock(seconds: Number) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


@contextmanager
def _bar(title: str, count: int, unit: str, total: float) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[done]:,} of {task.fields[count]:,} {task.fields[unit]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total, done=0, count=count, unit=unit, note="")

        def advance(work: Number, done: int, note: str = "") -> None:
            bar.update(task, advance=work, done=done, note=note)

        yield advance
