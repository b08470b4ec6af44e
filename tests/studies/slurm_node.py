"""A real Slurm of one node, which is this machine, for as long as a test runs."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

NEEDED = ("sbatch", "squeue", "scancel", "slurmctld", "slurmd", "munged", "mungekey")
PATIENCE_S = 60.0


def lacking() -> str:
    """Why no Slurm can be started here; empty where one can."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        return f"no {', '.join(missing)} (on Debian: apt-get install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "Slurm's daemons are started as root"


@contextmanager
def slurm_node(folder: Path) -> Iterator[None]:
    """Start munge and Slurm with all they write in a folder, and end them and their tasks."""
    for name in ("state", "spool"):
        (folder / name).mkdir()
    conf = folder / "slurm.conf"
    conf.write_text(_filled_in(folder))
    key = folder / "munge.key"
    subprocess.run(["mungekey", "--create", f"--keyfile={key}"], check=True)
    own = {
        "key-file": key,
        "socket": folder / "munge.socket",
        "pid-file": folder / "munged.pid",
        "seed-file": folder / "munged.seed",
    }
    munged = ["munged", "--foreground", "--force", *(f"--{name}={at}" for name, at in own.items())]
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("SLURM_CONF", str(conf))
        stack.enter_context(_daemon(munged, folder / "munged.log"))
        until(own["socket"].exists, PATIENCE_S)
        stack.enter_context(_daemon(["slurmctld", "-D", "-f", conf], folder / "controller.out"))
        stack.enter_context(_daemon(["slurmd", "-D", "-f", conf], folder / "node.out"))
        until(lambda: asked("sinfo", "-h", "-o", "%T") == ["idle"], PATIENCE_S)
        try:
            yield
        finally:
            subprocess.run(["scancel", "--partition=main", "--quiet"], check=False, timeout=30)
            until(lambda: not asked("squeue", "-h", "-o", "%i"), PATIENCE_S)


def asked(*command: str) -> list[str]:
    """What a command of Slurm prints, by words; nothing where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.split() if done.returncode == 0 else []


def until(happens: Callable[[], object], seconds: float) -> None:
    """Wait until something holds."""
    limit = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < limit, f"waited for {seconds} s"
        time.sleep(0.2)


@contextmanager
def _daemon(command: list[str | Path], log: Path) -> Iterator[None]:
    with (
        log.open("wb") as told,
        subprocess.Popen(list(map(str, command)), stdout=told, stderr=told) as process,
    ):
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def _filled_in(folder: Path) -> str:
    text = (Path(__file__).parent / "slurm.conf").read_text()
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        told = {
            "CONTROLLER_PORT": str(one.getsockname()[1]),
            "NODE_PORT": str(other.getsockname()[1]),
            "HOST(": f"{_host()}(",
            "=HOST": f"={_host()}",
            "FOLDER": str(folder),
        }
    for name, value in told.items():
        text = text.replace(name, value)
    return text


def _host() -> str:
    return socket.gethostname().partition(".")[0]
