"""Every notebook runs, as it is and, among the long tests, on a recording of one's own."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient

from audio_lens.models.embedded import CLIPS

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FRESH = "%reset -f\nimport torch\ntorch.set_grad_enabled(True)"
TIMEOUT_S = 300

LONG = ("6_throughput",)  # loops of whole forwards

each_notebook = pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem in LONG))
        for path in NOTEBOOKS
    ],
)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KernelManager]:
    """One kernel for all notebooks: most of the time of each would go into imports."""
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(tmp_path_factory.mktemp("notebooks")))
    yield manager
    manager.shutdown_kernel(now=True)


def run(path: Path, kernel: KernelManager, parameters: str = "") -> str:
    """Everything that a notebook shows, as text, with parameters set behind its own."""
    notebook = nbformat.read(path, as_version=4)
    at = next(
        i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])
    )
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(parameters))
    notebook.cells.insert(0, nbformat.v4.new_code_cell(FRESH))
    NotebookClient(notebook, km=kernel, timeout=TIMEOUT_S).execute()
    return json.dumps([cell.get("outputs", []) for cell in notebook.cells], ensure_ascii=False)


def assert_no_machine_paths(shown: str, *folders: Path | str) -> None:
    for folder in (ROOT, sys.prefix, Path.home(), *folders):
        assert f"{folder}/" not in shown


@pytest.mark.mostly_slow(3)
@each_notebook
def test_runs_as_it_is(path: Path, kernel: KernelManager) -> None:
    shown = run(path, kernel)
    assert_no_machine_paths(shown)
    assert "text/markdown" in shown  # its findings, written with the numbers just computed


@pytest.mark.slow
@each_notebook
def test_runs_on_an_own_recording(path: Path, kernel: KernelManager, tmp_path: Path) -> None:
    own = str(shutil.copy(CLIPS / "four-one-eight.wav", tmp_path / "mine.wav"))
    shown = run(path, kernel, f"AUDIO = {own!r} if not isinstance(AUDIO, list) else [{own!r}]")
    assert_no_machine_paths(shown, tmp_path)


@each_notebook
def test_is_stored_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)


def test_there_are_six() -> None:
    assert [path.stem[0] for path in NOTEBOOKS] == list("123456")
