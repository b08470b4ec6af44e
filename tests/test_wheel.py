"""What users install: the wheel holds the package and its data, no training code and no tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("audio_lens", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no older build leaves files in it."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    pip = [sys.executable, "-m", "pip", "wheel", *options]
    subprocess.run([*pip, "--wheel-dir", str(built), str(source)], check=True)
    return next(built.glob("audio_lens-*.whl"))


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"audio_lens"}
    parts = {part for name in names for part in Path(name).parts}
    assert not [part for part in parts if part == "tests" or part.startswith("test_")]
    package = ROOT / "audio_lens"
    code = {path.relative_to(ROOT).as_posix() for path in package.rglob("*.py")}
    training = {name for name in code if name.startswith("audio_lens/models/embedded/training/")}
    assert training and {name for name in names if name.endswith(".py")} == code - training


def test_wheel_holds_everything_that_is_read_at_run_time(wheel: Path) -> None:
    package = ROOT / "audio_lens"
    files = {path.relative_to(ROOT).as_posix() for path in package.rglob("*") if path.is_file()}
    data = {name for name in files if not name.endswith((".py", ".pyc"))}
    assert "audio_lens/py.typed" in data and len(data) > 20
    assert data <= set(ZipFile(wheel).namelist())


@pytest.mark.slow
def test_the_wheel_alone_makes_a_map(wheel: Path, tmp_path: Path) -> None:
    installed, empty = tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    options = ["--quiet", "--no-deps", "--no-index", "--target", str(installed)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True)
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    code = (
        "import audio_lens, sys; from audio_lens.cli import main; print(audio_lens.__file__); "
        "sys.argv = ['audio-lens', 'map', '--out', 'x.html']; main()"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=empty,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.splitlines()[0] == str(installed / "audio_lens" / "__init__.py")
    assert (empty / "x.html").stat().st_size > 10_000
