"""Disks, buckets and memory that fail: a clear error, nothing lost, and the same call goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from study_tools import LAYERS, all_items, layers, same

from audio_lens import Items, buckets, studies
from audio_lens.files import OutputError
from audio_lens.models import HookedAudioTransformer
from audio_lens.studies import StudyError

zarr = pytest.importorskip("zarr")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four items."""
    folder = tmp_path_factory.mktemp("t")
    return Items.from_table(all_items(folder))[:4].to_table(folder / "four.jsonl")


def full(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


def denied(*_: Any, **__: Any) -> None:
    raise PermissionError(13, "Permission denied")


def test_a_place_without_permission_is_told_and_left_empty(table, tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(OutputError, match=r"out cannot be made: Permission denied"):
        layers(table, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.unchecked
def test_a_disk_that_is_full_on_the_way_loses_nothing(table, tmp_path, monkeypatch):
    study = layers(table, tmp_path / "out")
    assert study.run(limit=2).done_units == 1
    with monkeypatch.context() as patch:
        patch.setattr(zarr.storage.LocalStore, "set", full)
        with pytest.raises(OutputError, match=r"out cannot be written: .*No space left"):
            study.run()
    assert study.status().done_units == 1 and len(studies.load(study.out)) == 2
    assert layers(table, tmp_path / "out").run().is_done
    whole = layers(table, tmp_path / "whole")
    whole.run()
    assert same(study, whole)


def test_a_bucket_that_cannot_be_reached_is_told(table, monkeypatch):
    pytest.importorskip("obstore")
    told = {"ENDPOINT": "http://127.0.0.1:9", "ALLOW_HTTP": "true", "REGION": "us-east-1"}
    for name, value in {**told, "ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "x"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setattr(buckets, "RETRIES", {"max_retries": 0})
    with pytest.raises(buckets.BucketError, match=r"s3://lab/study/.* cannot be read: "):
        layers(table, "s3://lab/study")


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("tried 17 GB\nmore")])
def test_a_model_that_does_not_fit_is_told(table, tmp_path, monkeypatch, error):
    study = layers(table, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(HookedAudioTransformer, "from_pretrained", lambda *_, **__: _raised(error))
        with pytest.raises(StudyError, match=r"embedded does not fit into the memory of cpu"):
            study.run()
    assert study.status().done_units == 0 and not study.store.attempts(0)


@pytest.mark.unchecked
@pytest.mark.slow
def test_memory_that_ends_on_the_way_leaves_items_to_run_alone(table, tmp_path, monkeypatch):
    """Two items together are too much, one is not: all have numbers."""
    from audio_lens import patching

    sweep = patching.sweep

    def tight(model: Any, *, clean: Any, **options: Any) -> Any:
        if len(clean) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sweep(model, clean=clean, **options)

    whole = layers(table, tmp_path / "whole")
    whole.run()
    study = layers(table, tmp_path / "out", batch=2)
    monkeypatch.setattr(patching, "sweep", tight)
    assert study.run().n_failed == 0
    assert same(study, whole)


def test_a_budget_too_small_for_a_cell_is_told_by_item(table, tmp_path):
    study = studies.Study(
        table, out=tmp_path / "out", unit=2, batch=1, stream="audio", memory_gb=1e-5, **LAYERS
    )
    status = study.run(limit=2)
    assert status.n_failed == 2 and "raise memory_gb" in next(iter(status.failed))


def _raised(error: BaseException) -> Any:
    raise error
