"""Texts of files are letters wherever they are shown: no tags, links, formulas, or codes."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pages import Page
from typer.testing import CliRunner

from audio_lens import AudioLensError, Band, Span
from audio_lens.cli import shared
from audio_lens.cli.terminal import Terminal
from audio_lens.drawing.labelled import Labelled
from audio_lens.drawing.rows import Rows
from audio_lens.patching import SweepResult
from audio_lens.printable import printable
from audio_lens.report import map_page
from audio_lens.results import Result

EVIL = "<a href='javascript:alert(1)'>$x$</a><script>:100:[bold]\x1b[31m"
CODES = ["\x1b[2J", "\x9b31m", "\x07", "\r", "\x08", "\u202e", "\u2066", "\u2028"]


@dataclass
class Named(Result):
    """A result whose axis has names."""


def sweep() -> SweepResult:
    """A map all of whose texts are evil."""
    spans = [Span(0.0, 0.5, EVIL), Span(0.5, 1.0, EVIL + "2")]
    names = {"metric": [EVIL], "time": spans}
    ends = torch.tensor([1.0]), torch.tensor([0.0])
    values = torch.tensor([[0.5, 0.9]])
    notes = {"report": [EVIL], "meta": {EVIL: EVIL, "metric": EVIL}}
    return SweepResult(values, ("metric", "time"), names, *ends, EVIL, "denoise", **notes)


def texts(data: Any) -> Iterator[str]:
    """Every text of plain data."""
    if isinstance(data, dict):
        for one in data.values():
            yield from texts(one)
    elif isinstance(data, (list, tuple)):
        for one in data:
            yield from texts(one)
    elif isinstance(data, str):
        yield data


def drawn(data: dict[str, Any]) -> list[str]:
    """The texts that plotly is given, but for what says how numbers are told."""
    return [one for one in texts(data) if "%{" not in one]


def clip() -> np.ndarray:
    return 0.5 * np.sin(np.arange(16_000) / 10)


def test_pages_hold_no_tags_of_labels(tmp_path: Path) -> None:
    options = {"words": [Span(0.0, 1.0, EVIL)], "title": EVIL}
    path = map_page({EVIL: sweep()}, clip(), tmp_path / "page.html", **options)
    page = Page(path)
    assert not page.all("a") and all(
        "href" not in attrs for tag, attrs in page.tags if tag != "link"
    )
    assert len(page.all("script")) == 3  # data, plotly.js and the page's own
    shown = [view[part] for view in page.data["views"] for part in ("trace", "layout")]
    shown += [trace for one in page.data["clips"] for trace in one["traces"]]
    assert shown and not [one for data in shown for one in drawn(data) if "<a" in one]


def test_figures_hold_no_tags_of_labels() -> None:
    spans = [Span(0.0, 1.0, EVIL)]
    figures = [
        sweep().plot(metric=EVIL),
        sweep().plot(metric=EVIL, audio=clip(), words=spans),
        Named(torch.ones(2), ("layer",), {"layer": [EVIL, "b"]}).plot(),
        Named(torch.ones(2, 1), (EVIL, "layer"), {EVIL: [0, 1], "layer": [EVIL]}).plot(),
    ]
    for figure in figures:
        assert not [one for one in drawn(json.loads(figure.to_json())) if "<a" in one]


def test_rows_of_labels_are_called_what_they_are_called() -> None:
    from audio_lens.drawing.clips import Clip

    rows = Rows([Clip("clip", clip().astype("float32"), 16_000, {EVIL: [Span(0, 1, "a")]})])
    assert not [one for one in drawn(rows.layout([]).to_plotly_json()) if "<a" in one]


def test_figures_for_papers_write_formulas_as_letters(tmp_path: Path) -> None:
    formula = "$\\frac$"
    result = Named(torch.ones(2), ("layer",), {"layer": [formula, "b"]})
    (ax,) = result.figure(tmp_path / "figure.png").axes[:1]
    assert ax.get_xticklabels()[0].get_text() == r"\$\frac\$"  # which is drawn as the formula


def test_named_results_can_be_drawn() -> None:
    assert isinstance(Named(torch.ones(1), ("layer",), {"layer": ["a"]}), Labelled)


# -------------------------------------------------------------------------------- terminals


@pytest.mark.parametrize("code", CODES)
def test_codes_are_written_out(code: str) -> None:
    written = printable(f"a{code}b\n\tc")
    assert code not in written and re.fullmatch(r"a\\[xur].*b\n\tc", written)
    assert code not in str(AudioLensError(f"a{code}"))
    labelled = Span(0.0, 1.0, f"a{code}")
    result = SweepResult(
        torch.ones(1),
        ("time",),
        {"time": [labelled]},
        torch.ones(()),
        torch.zeros(()),
        "a",
        "noise",
    )
    assert code not in repr(result.top(1)) and code not in str(Band(0, 1, code))


def test_terminals_show_text_as_it_is() -> None:
    file = io.StringIO()
    terminal = Terminal(file=file, force_terminal=True, color_system="standard", width=200)
    terminal.print(f"[bold]{EVIL.replace('[bold]', '')}[/]", highlight=False)
    said = file.getvalue()
    assert ":100:" in said and "\\x1b[31m" in said and "\x1b[31m" not in said
    assert said.startswith("\x1b[1m")  # what the command itself paints stays


def test_json_is_what_was_given(capsys: pytest.CaptureFixture[str]) -> None:
    given = {EVIL: [EVIL, ":smile:", "a" * 500], "n": float("nan")}
    shared.print_json(given)
    assert json.loads(capsys.readouterr().out) == {**given, "n": None}


def test_commands_show_names_of_files_as_they_are(tmp_path: Path) -> None:
    from audio_lens.cli import app

    path = tmp_path / "a\x1b[31m:100:[bold].wav"
    path.write_text("no sound")
    done = CliRunner().invoke(app, ["ask", str(path), "--question", "what?"])
    assert done.exit_code == 2 and "\x1b" not in done.output
    assert r"a\x1b[31m:100:[bold].wav cannot be read" in done.stderr
