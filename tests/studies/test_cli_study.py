"""`audio-lens study` and `audio-lens harvest`: a file in, numbers out, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from audio_lens import studies
from audio_lens.cli import BAD_INPUT, app

pytest.importorskip("zarr")
SWEPT = """
items = "demo"
out = "out"
stream = "audio"
site = "decoder.resid_pre"
axes = "layer"
layers = [2]
unit = 2
"""


def run(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, [str(one) for one in arguments])
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "study.toml"
    path.write_text(SWEPT)
    return path


def test_a_study_from_a_file(file, tmp_path):
    code, told, _ = run("study", "run", file, "--limit", 2, "--json", "--no-progress")
    held = json.loads(told)
    assert code == 0 and (held["done_items"], held["items"], held["is_done"]) == (2, 16, False)
    assert held["out"] == str(tmp_path / "out")
    code, told, _ = run("study", "status", tmp_path / "out")
    assert code == 0 and "2 of 16 items" in told
    code, told, _ = run("study", "collect", tmp_path / "out", "--json")
    found = json.loads(told)
    assert code == 0 and found["n_kept"] == 2 and found["dropped"] == {"not done yet": 14}
    code, told, _ = run("study", "retry", tmp_path / "out")
    assert code == 0 and "0 units taken back" in told


@pytest.mark.slow
def test_what_a_study_found_is_written(file, tmp_path):
    assert run("study", "run", file, "--limit", 2)[0] == 0
    assert run("study", "run", file, "--limit", 2)[0] == 0
    paths = tmp_path / "all.nc", tmp_path / "result.nc"
    code, told, _ = run(
        "study", "collect", tmp_path / "out", "--netcdf", paths[0], "--save", paths[1]
    )
    assert code == 0 and "all.nc" in told
    import xarray

    from audio_lens import Result

    assert xarray.open_dataset(paths[0])["value"].sizes["item"] == 4
    assert Result.load(paths[1]).n_kept == 4


@pytest.mark.slow
def test_the_example_runs(tmp_path):
    example = Path(__file__).parents[2] / "docs" / "study.toml"
    (tmp_path / "study.toml").write_text(example.read_text())
    assert run("study", "run", tmp_path / "study.toml")[0] == 0
    assert len(studies.load(tmp_path / "results" / "demo")) == 16


@pytest.mark.slow
def test_activations_from_a_file(tmp_path):
    path = tmp_path / "harvest.toml"
    path.write_text('items = "demo"\nout = "acts"\nsites = "decoder.resid_post"\nlayers = [2]\n')
    code, told, _ = run("harvest", path, "--json")
    assert code == 0 and json.loads(told)["is_done"]
    from audio_lens.items import Activations

    assert Activations.load(tmp_path / "acts").layers() == [2]


@pytest.mark.parametrize(
    "text, told",
    [
        (None, "no study file"),
        ("items = ", "cannot be read as TOML"),
        ('items = "demo"', "does not say out"),
        (SWEPT + 'axis = "layer"', "takes no 'axis'"),
        (SWEPT + "engine = 3", "engine is a table"),
        (SWEPT + '[engine]\nkind = "dask"', "no engine 'dask'"),
        (SWEPT + '[engine]\nkind = "ray"\ngpu = 1', "takes no 'gpu'"),
        (SWEPT + "[engine]\ngpus = 1", "takes no options"),
        (SWEPT.replace("demo", "none.jsonl"), "no table at"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, text, told):
    path = tmp_path / "study.toml"
    if text is not None:
        path.write_text(text)
    code, _, said = run("study", "run", path)
    assert code == BAD_INPUT and told in " ".join(said.replace("│", " ").split())


def test_workers_are_of_engines_that_have_some(file):
    code, _, said = run("study", "run", file, "--workers", 2)
    assert code == BAD_INPUT and "takes no options" in said


def test_no_study_there(tmp_path):
    for command in ("status", "retry", "collect"):
        code, _, said = run("study", command, tmp_path)
        assert code == BAD_INPUT and "no study at" in said
