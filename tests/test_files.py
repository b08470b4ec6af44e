"""Files are written whole or not at all: failures, kills, two processes, links, devices."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from audio_lens import files
from audio_lens.files import OutputError
from audio_lens.patching.result import SweepResult
from audio_lens.report import map_page
from audio_lens.results import Result
from audio_lens.timeline import Span

UNWRITABLE = Path("/proc")  # even for root


def result(label: str = "a", n: int = 3) -> Result:
    return Result(torch.arange(float(n)), ("layer",), {"layer": list(range(n))}, report=[label])


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -------------------------------------------------------------------------------- failures


def full(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_on_the_way_leaves_the_old_file(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = files.write(tmp_path / "map.html", b"old")
    monkeypatch.setattr(os, step, full)
    with pytest.raises(OutputError, match=r"map.html cannot be written .No space left"):
        files.write(path, b"new")
    assert path.read_bytes() == b"old" and left(tmp_path) == ["map.html"]


def test_an_interrupt_on_the_way_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pressed(*_: object) -> None:
        raise KeyboardInterrupt

    path = files.write(tmp_path / "map.html", b"old")
    monkeypatch.setattr(os, "fsync", pressed)
    with pytest.raises(KeyboardInterrupt):
        files.write(path, b"new")
    assert path.read_bytes() == b"old" and left(tmp_path) == ["map.html"]


@pytest.mark.parametrize("label", ["zero \0 byte", "half \ud800 pair"])
def test_a_label_netcdf_cannot_hold_leaves_the_old_file(label: str, tmp_path: Path) -> None:
    path = result("old").save(tmp_path / "map.nc")
    bad = Result(torch.zeros(1), ("word",), {"word": [label]})
    with pytest.raises(ValueError, match="netCDF cannot hold this result"):
        bad.save(path)
    assert Result.load(path).report == ["old"] and left(tmp_path) == ["map.nc"]


def test_a_figure_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "map.pdf"
    result().figure(path)
    old = path.read_bytes()
    with pytest.raises(ValueError, match="not supported"):
        result().figure(tmp_path / "map.xyz")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match="No space left"):
        result().figure(path)
    assert path.read_bytes() == old and old.startswith(b"%PDF") and left(tmp_path) == ["map.pdf"]


def test_a_figure_without_a_suffix_is_a_png(tmp_path: Path) -> None:
    result().figure(tmp_path / "map")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG") and len(left(tmp_path)) == 1


@pytest.fixture
def nearly_full() -> Iterator[None]:
    """No file can grow beyond 2 kB: a write fails in its middle, as on a disk that fills up."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limit[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def page_of(path: Path) -> None:
    map_page(sweep_of(), np.zeros(16_000), path)


def sweep_of() -> SweepResult:
    parts = torch.zeros(1), ("time",), {"time": [Span(0.0, 1.0)]}
    return SweepResult(*parts, torch.tensor(1.0), torch.tensor(0.0), "decoder.resid_pre", "noise")


WRITERS = {
    "save": lambda path: result(n=1000).save(path),
    "page": page_of,
    "figure": lambda path: result().figure(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_that_fills_up_leaves_the_old_file(
    name: str, tmp_path: Path, nearly_full: None
) -> None:
    path = files.write(tmp_path / "map.svg", b"old")
    with pytest.raises(OutputError, match=r"map.svg cannot be written .*what was there is unchang"):
        WRITERS[name](path)
    assert path.read_bytes() == b"old" and left(tmp_path) == ["map.svg"]


# -------------------------------------------------------------------------------- places


@pytest.mark.parametrize("call", [files.try_out, lambda path: files.write(path, b"x")])
def test_a_place_that_cannot_be_written_is_named(call, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "round").symlink_to(tmp_path / "round")
    places = {
        tmp_path: "is a folder",
        tmp_path / "none" / "map.nc": "no folder",
        UNWRITABLE / "map.nc": "cannot be written",
        Path("/dev/null"): "a device",
        Path("/dev/full"): "a device",
        tmp_path / "pipe": "a pipe",
        tmp_path / "round": "leads to itself",
    }
    for path, message in places.items():
        with pytest.raises(OutputError, match=message):
            call(path)
    assert Path("/dev/null").is_char_device() and left(tmp_path) == ["pipe", "round"]


def test_a_protected_file_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = files.write(tmp_path / "map.nc", b"old")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everything
    with pytest.raises(OutputError, match="may not be written"):
        files.write(path, b"new")
    assert path.read_bytes() == b"old"


def test_trying_out_leaves_no_trace(tmp_path: Path) -> None:
    files.try_out(tmp_path / "new.nc")
    assert left(tmp_path) == []
    files.write(tmp_path / "old.nc", b"old")
    files.try_out(tmp_path / "old.nc")
    assert (tmp_path / "old.nc").read_bytes() == b"old" and left(tmp_path) == ["old.nc"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    files.write(tmp_path / "far" / "map.nc", b"old")
    link = tmp_path / "map.nc"
    link.symlink_to("far/map.nc")
    assert files.write(link, b"new") == link
    assert link.is_symlink() and (tmp_path / "far" / "map.nc").read_bytes() == b"new"
    assert left(tmp_path / "far") == ["map.nc"]


def test_permissions_are_those_of_the_old_file_or_the_usual(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = files.write(tmp_path / "map.nc", b"old")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640
    path.chmod(0o604)
    files.write(path, b"new")
    assert path.stat().st_mode & 0o777 == 0o604


def test_long_names_are_written(tmp_path: Path) -> None:
    path = files.write(tmp_path / ("ü" * 120 + ".nc"), b"new")
    assert path.read_bytes() == b"new"


def test_outputs_stay_apart(tmp_path: Path) -> None:
    clip = files.write(tmp_path / "clip.wav", b"sound")
    (tmp_path / "link.nc").symlink_to(clip)
    page, numbers = tmp_path / "map.html", tmp_path / "map.nc"
    files.check_apart({"--out": page, "--save": numbers}, [clip])
    with pytest.raises(OutputError, match="--out and --save are one file"):
        files.check_apart({"--out": page, "--save": tmp_path / "." / "map.html"})
    for over in (clip, tmp_path / "link.nc"):
        with pytest.raises(OutputError, match=r"--save would overwrite .* which is read"):
            files.check_apart({"--out": page, "--save": over}, [clip])


# -------------------------------------------------------------------------------- processes


def test_what_killed_writers_left_is_cleared(tmp_path: Path) -> None:
    """Of this file, and of processes that are no more."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    gone = f".map.nc.{ended.pid}-0123abcd.part"
    stay = [
        f".map.nc.{os.getpid()}-0123abcd.part",  # of a process that runs
        f".map.nc.{os.getppid()}-0123abcd.part",
        ".map.nc.0-0123abcd.part",
        f".map.nc.{10**30}-0123abcd.part",
        f".other.nc.{ended.pid}-0123abcd.part",
        f".map.nc.{ended.pid}-0123abcd.part.txt",
        f"map.nc.{ended.pid}-0123abcd.part",
    ]
    for name in (gone, *stay):
        (tmp_path / name).write_bytes(b"half")
    files.write(tmp_path / "map.nc", b"new")
    assert left(tmp_path) == sorted([*stay, "map.nc"])


def test_what_another_machine_writes_is_left_alone(tmp_path: Path) -> None:
    import fcntl

    ended = subprocess.Popen(["true"])
    ended.wait()
    path = tmp_path / f".map.nc.{ended.pid}-0123abcd.part"
    with open(path, "wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        files.write(tmp_path / "map.nc", b"new")
        assert path.exists()
    files.write(tmp_path / "map.nc", b"newer")
    assert left(tmp_path) == ["map.nc"]


SAVING = """
    import sys, torch
    from audio_lens.results import Result
    path, report, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
    result = Result(torch.zeros(n), ("layer",), {"layer": list(range(n))}, report=[report])
    print("ready", flush=True)
    while True:
        result.save(path)
        print("saved", flush=True)
"""


def saving(path: Path, report: str, n: int) -> subprocess.Popen[str]:
    """A process that saves again and again, once it has saved for the first time."""
    words = [sys.executable, "-c", textwrap.dedent(SAVING), str(path), report, str(n)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.fixture
def ended() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that end with the test."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize("after_s", [0.0, 0.004, 0.013, 0.031, 0.08])
def test_a_kill_leaves_the_old_file_or_the_new_one(
    after_s: float, tmp_path: Path, ended: list
) -> None:
    path = result("old").save(tmp_path / "map.nc")
    ended.append(process := saving(path, "new", 300_000))
    time.sleep(after_s)
    process.send_signal(signal.SIGKILL)
    process.wait()
    loaded = Result.load(path)
    assert (loaded.report, len(loaded.values)) in ((["old"], 3), (["new"], 300_000))


def test_two_processes_on_one_path_take_turns(tmp_path: Path, ended: list) -> None:
    path = result("old").save(tmp_path / "map.nc")
    ended += [saving(path, "one", 1000), saving(path, "two", 2000)]
    whole = {("old", 3), ("one", 1000), ("two", 2000)}
    until = time.monotonic() + 1.0
    while time.monotonic() < until:
        loaded = Result.load(path)
        assert (loaded.report[0], len(loaded.values)) in whole
    assert all(process.poll() is None for process in ended)
