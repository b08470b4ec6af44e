"""`audio-lens explore`: what it serves, what it refuses, and that Ctrl-C stops it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request

import pytest
from typer.testing import CliRunner

from audio_lens.cli import app
from audio_lens.explorer import Head, save
from audio_lens.explorer.widget import started
from audio_lens.models.embedded import default_pair

PAIR = default_pair()


@pytest.fixture
def served(monkeypatch):
    """Run the command, up to serving; gives its result and the session that it would serve."""
    found = {}

    def serve(session, port, on_start):
        found.update(session=session, port=port)
        on_start("http://127.0.0.1:1/token/")

    opened = []
    monkeypatch.setattr("audio_lens.explorer.server.serve", serve)
    monkeypatch.setattr("webbrowser.open", opened.append)

    def run(*arguments):
        found.clear()
        result = CliRunner().invoke(app, ["explore", *map(str, arguments)])
        return result, found, opened

    return run


def test_it_serves_clips_and_question(served):
    result, found, opened = served(PAIR.clean, "-q", "Which digit is last?", "--port", 8123)
    assert result.exit_code == 0 and "http://127.0.0.1:1/token/" in result.output
    session = found["session"]
    assert (session.clip.name, session.other, found["port"]) == (PAIR.clean.name, None, 8123)
    assert session.said() == "five" and opened == ["http://127.0.0.1:1/token/"]


def test_it_opens_no_browser_and_takes_the_shipped_clips(served):
    _, found, opened = served("--no-open")
    assert found["session"].other.name == PAIR.corrupted.name and opened == []


def test_it_opens_a_file_of_edits(served, embedded, tmp_path):
    session = started(embedded)
    session.touch(Head("decoder.attn", 2, 4))
    path = save(session, tmp_path / "edits.json")
    _, found, _ = served("--edits", path, "--no-open")
    assert found["session"].touches == session.touches


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nothing.wav"], "there is no file nothing.wav"),
        (["--edits", "nothing.json"], "there is no file nothing.json"),
        (["-q", "?", "--edits", "some.json"], "leave one of them out"),
        (["-q", ""], "--question is empty"),
        (["--model", "./nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_is_refused(served, arguments, message):
    result, found, _ = served(*arguments)
    assert result.exit_code == 2 and not found
    assert message in " ".join(result.stderr.split())


@pytest.mark.slow
def test_ctrl_c_stops_it():
    command = "from audio_lens.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", command, "explore", "--no-open"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "300"},
    )
    line = process.stdout.readline()
    assert line.startswith("explorer at http://127.0.0.1:")
    with urllib.request.urlopen(line.split()[-1], timeout=30) as page:
        assert page.status == 200
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0 and "Traceback" not in err
