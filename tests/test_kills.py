"""kill -9 at random times: nothing is lost but the current batch, and no file is half written.

The times are drawn anew each day and printed, as a seed; set AUDIO_LENS_SEED to draw them again.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from audio_lens import HookedAudioTransformer, cli, files, metrics, patching
from audio_lens.cli import shared
from audio_lens.patching.engine.checkpoint import Checkpoint
from audio_lens.patching.result import SweepResult
from audio_lens.report import map_page
from audio_lens.results import Result
from audio_lens.timeline import Span
from toys import Cue, Toy, copy_toy, prompt

pytestmark = pytest.mark.slow
FORK = multiprocessing.get_context("fork")
KILLS = 20


@pytest.fixture
def times() -> Callable[[float], list[float]]:
    """As many random times within some seconds as there are kills."""
    seed = int(os.environ.get("AUDIO_LENS_SEED", date.today().toordinal()))
    print(f"AUDIO_LENS_SEED={seed}")
    draw = random.Random(seed)
    return lambda seconds: [draw.uniform(0, seconds) for _ in range(KILLS)]


def killed(work: Callable[..., None], after_s: float, *arguments: Any) -> None:
    """Do some work in a process of its own, and kill that once it has begun for so long."""
    begun = FORK.Event()

    def begin() -> None:
        begun.set()
        work(*arguments)

    process = FORK.Process(target=begin)
    process.start()
    assert begun.wait(30)
    time.sleep(after_s)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def seconds_of(work: Callable[..., None], *arguments: Any) -> float:
    started = time.monotonic()
    process = FORK.Process(target=work, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - started


# -------------------------------------------------------------------------------- sweeps


def asked() -> dict[str, Any]:
    return {
        "clean": prompt(Cue(1)),
        "corrupted": prompt(Cue(2)),
        "site": "decoder.resid_pre",
        "axes": ("layer", "position"),
        "metric": metrics.logit_diff(1, 2),
        "cells_per_forward": 1,
    }


def sweep(toy: Toy, path: Path, kept: Any, wait_s: float = 0.0) -> SweepResult:
    """A sweep that counts, where its killer can see it, the cells whose save has returned."""
    honest = Checkpoint.save

    def save(self: Checkpoint, values: Any, done: Any, baselines: Any) -> None:
        honest(self, values, done, baselines)
        kept.value = int(done.sum())
        time.sleep(wait_s)

    Checkpoint.save = save
    try:
        return patching.plan(toy, **asked()).run(
            checkpoint=path, checkpoint_every_s=0, progress=False
        )
    finally:
        Checkpoint.save = honest


def assert_whole(path: Path, whole: SweepResult, at_least: int) -> None:
    saved = load_file(path)
    done = saved["done"]
    assert int(done.sum()) >= at_least
    torch.testing.assert_close(saved["values"][..., done].flatten(), whole.values.flatten()[done])


def test_a_killed_sweep_loses_its_current_batch_alone(tmp_path: Path, times: Any) -> None:
    toy, kept = copy_toy(), FORK.Value("i", 0)
    whole = sweep(toy, tmp_path / "whole", kept)
    within = seconds_of(sweep, toy, tmp_path / "timed", kept)
    for number, after_s in enumerate(times(within)):
        path, kept.value = tmp_path / f"{number}.ckpt", 0
        killed(sweep, after_s, toy, path, kept)
        if kept.value or path.exists():
            assert_whole(path, whole, kept.value)
        result = sweep(toy, path, kept)
        torch.testing.assert_close(result.values, whole.values)
        names = [name for name in os.listdir(tmp_path) if f"{number}.ckpt" in name]
        assert names == [f"{number}.ckpt"]  # what the killed one left is gone


def test_kill_after_kill_on_one_checkpoint(tmp_path: Path, times: Any) -> None:
    """Two processes at a time, of which one is killed; each goes on where both were."""
    toy, kept, path = copy_toy(), FORK.Value("i", 0), tmp_path / "sweep.ckpt"
    whole = sweep(toy, tmp_path / "whole", kept)
    done = 0
    for after_s in times(0.1):
        beside = FORK.Process(target=sweep, args=(toy, path, FORK.Value("i", 0), 0.02))
        beside.start()
        kept.value = 0
        killed(sweep, after_s, toy, path, kept, 0.02)
        assert beside.pid is not None
        os.kill(beside.pid, signal.SIGKILL)
        beside.join()
        done = max(done, kept.value)
        if path.exists():
            assert_whole(path, whole, done)
            done = int(load_file(path)["done"].sum())
    torch.testing.assert_close(sweep(toy, path, kept).values, whole.values)
    assert sorted(os.listdir(tmp_path)) == ["sweep.ckpt", "whole"]


# -------------------------------------------------------------------------------- a command


def command(folder: Path) -> None:
    os.chdir(folder)
    words = ["map", "--site", "connector.out", "--axes", "time"]
    words += ["--window", "0.2", "--checkpoint", "map.ckpt", "--checkpoint-every", "0"]
    outcome = CliRunner().invoke(cli.app, [*words, "--save", "map.nc", "--out", "map.html"])
    assert outcome.exit_code == 0, outcome.output


def test_a_killed_command_goes_on(
    embedded: HookedAudioTransformer, tmp_path: Path, times: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "load", lambda *_, **__: embedded)
    (whole := tmp_path / "whole").mkdir()
    within = seconds_of(command, whole)
    expected = patching.load(whole / "map.nc")
    (folder := tmp_path / "killed").mkdir()
    for after_s in times(within):
        killed(command, after_s, folder)
        assert_outputs(folder, expected)
        if (folder / "map.html").exists():
            for path in folder.iterdir():
                path.unlink()
    assert seconds_of(command, folder) > 0
    assert sorted(os.listdir(folder)) == ["map.ckpt", "map.html", "map.nc"]
    assert_outputs(folder, expected)


def assert_outputs(folder: Path, expected: SweepResult) -> None:
    if (folder / "map.ckpt").exists():
        assert_whole(folder / "map.ckpt", expected, 1)
    if (folder / "map.nc").exists():
        torch.testing.assert_close(patching.load(folder / "map.nc").values, expected.values)
    if (folder / "map.html").exists():
        assert (folder / "map.html").read_text().rstrip().endswith("</html>")


# -------------------------------------------------------------------------------- files


def saves(path: Path) -> None:
    while True:
        Result(torch.zeros(100_000), ("layer",), {"layer": list(range(100_000))}).save(path)


def pages(path: Path) -> None:
    parts = torch.zeros(1), ("time",), {"time": [Span(0.0, 1.0)]}
    result = SweepResult(*parts, torch.tensor(1.0), torch.tensor(0.0), "decoder.resid_pre", "noise")
    while True:
        map_page(result, np.zeros(16_000), path)


def is_result(path: Path) -> bool:
    return len(Result.load(path).values) in (3, 100_000)


def is_page(path: Path) -> bool:
    return path.read_text() == "old" or path.read_text().rstrip().endswith("</html>")


@pytest.mark.parametrize(("write", "is_fit"), [(saves, is_result), (pages, is_page)])
def test_a_killed_save_leaves_the_old_file_or_the_new_one(
    write: Any, is_fit: Any, tmp_path: Path, times: Any
) -> None:
    path, left = tmp_path / "map", 0
    if write is saves:
        Result(torch.zeros(3), ("layer",), {"layer": [0, 1, 2]}).save(path)
    else:
        files.write(path, b"old")
    for after_s in times(0.2):
        killed(write, after_s, path)
        assert is_fit(path)
        left = max(left, len(os.listdir(tmp_path)))
    files.write(path, b"new")
    assert os.listdir(tmp_path) == ["map"]
    print(f"{left - 1} files were left beside it at most")
