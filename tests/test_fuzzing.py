"""Damaged files of every kind that the library reads: only its own errors come out.

Sound files, TextGrids, results and checkpoints of sweeps, and configs of checkpoints are whole ones
with a few bytes or values changed. ``AUDIO_LENS_FUZZ_S`` says for how many seconds all of them
together are tried in the slow tests (600 unless it is set), ``AUDIO_LENS_FUZZ_SEED`` with which
seed (0 unless it is set; the same seed gives the same files); each failure says what made it.
Every file is read in a process of its own kind's, whose end by a signal counts as a failure too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

KINDS = ("sounds", "textgrids", "results", "sweeps", "configs")
BUDGET_S = float(os.environ.get("AUDIO_LENS_FUZZ_S", "600"))
SEED = int(os.environ.get("AUDIO_LENS_FUZZ_SEED", "0"))
SCRIPT = Path(__file__).parent / "fuzzing.py"


def fuzz(kind: str, seconds: float, seed: int) -> str:
    """What the script says of its run; fails with what it found."""
    command = [sys.executable, SCRIPT, kind, f"--seconds={seconds}", f"--seed={seed}"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, f"{kind}, seed {seed}:\n{ran.stdout[-3000:]}{ran.stderr[-3000:]}"
    return ran.stdout


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_raise_errors_of_the_library(kind: str) -> None:
    print(fuzz(kind, BUDGET_S / len(KINDS), SEED))


def test_what_is_no_error_of_the_library_is_told_with_its_seed() -> None:
    said = subprocess.run(
        [sys.executable, SCRIPT, "broken", "--seconds=5", "--seed=3"],
        capture_output=True,
        text=True,
    )
    assert said.returncode == 1
    assert "seed 3" in said.stdout and "ZeroDivisionError" in said.stdout
