"""Progress: a bar in terminals, a line in notebooks, and nothing elsewhere unless asked for."""

import io
import sys
from types import SimpleNamespace

import pytest

from audio_lens import progress
from audio_lens.progress import heading, track


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(show=None, count=4, work=None):
    with track("encoder.attn.z", count, "cells", work, show) as advance:
        for done in range(1, count + 1):
            advance((work or count) / count, done)


def test_it_is_quiet_where_nobody_looks(capsys):
    run()
    run(show=False)
    assert capsys.readouterr().err == ""


def test_asked_for_it_writes_lines_into_a_log(capsys, monkeypatch):
    clock = iter(range(0, 100, 20))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with heading("round 2"):
        run(show=True, work=8.0)
    lines = capsys.readouterr().err.splitlines()
    first, last = lines[0], lines[-1]
    assert first == "encoder.attn.z, round 2: 1 of 4 cells, 0:20 gone, 1:00 left"
    assert last == "encoder.attn.z, round 2: 4 of 4 cells, 1:20 gone"


def test_lines_are_few(capsys):
    run(show=True, count=1000)
    assert capsys.readouterr().err.count("\n") == 1


def test_a_terminal_shows_a_bar_with_the_time_left(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    run()
    shown = terminal.getvalue()
    assert "encoder.attn.z" in shown and "4 of 4 cells" in shown and "left" in shown
    run(show=False)
    assert terminal.getvalue() == shown


def test_a_notebook_renews_one_line(monkeypatch, capsys):
    shown = []

    def display(bundle, raw, display_id):
        shown.append(bundle["text/plain"])
        return SimpleNamespace(update=lambda bundle, raw: shown.append(bundle["text/plain"]))

    ipython = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=object()))
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    monkeypatch.setattr(progress, "NOTEBOOK_EVERY_S", 0.0)
    run(count=2)
    assert [line.split(",")[0] for line in shown] == [
        "encoder.attn.z: 1 of 2 cells",
        "encoder.attn.z: 2 of 2 cells",
    ]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("seconds, clock", [(0, "0:00"), (75.4, "1:15"), (3661, "1:01:01")])
def test_clock(seconds, clock):
    assert progress._clock(seconds) == clock
