"""Activations as a study: those of `collect`, in the same bytes whoever computes them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from study_tools import all_items

from audio_lens import Items, studies
from audio_lens.items import Activations, ActivationsError, collect
from audio_lens.studies import StudyError
from audio_lens.studies.harvest import harvest_study

pytest.importorskip("zarr")
ASKED = {"sites": ["decoder.resid_post", "connector.out"], "size": 2, "unit": 3}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t")
    return Items.from_table(all_items(folder))[:6].to_table(folder / "few.jsonl")


@pytest.fixture(scope="module")
def out(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Activations that were harvested."""
    folder = tmp_path_factory.mktemp("harvest") / "out"
    one = {"sites": "decoder.resid_post", "layers": [1, 3], "size": 2, "unit": 3}
    studies.harvest(table, out=folder, **one)
    return folder


def shards(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.glob("shard-*.safetensors")
    }


def test_rows_are_those_of_collect(out, table, embedded):
    found = Activations.load(out)
    order = [item["id"] for item in found.items]
    items = {item.id: item for item in Items.from_table(table)}
    whole = collect(
        embedded,
        Items(items[name] for name in order),
        "decoder.resid_post",
        layers=[1, 3],
        size=2,
        dtype=torch.bfloat16,
        progress=False,
    )
    assert found.layers() == [1, 3] and len(shards(out)) == 2
    for layer in (1, 3):
        assert torch.equal(found[layer], whole[layer])
    mine, its = found.table(), whole.table()
    assert all((mine[name] == its[name]).all() for name in ("item", "row", "position"))
    assert found.array(layer=1).dtype == torch.bfloat16
    found.check()


def test_a_flipped_byte_is_found(out, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    path = sorted(copy.glob("shard-*.safetensors"))[1]
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ActivationsError, match=r"1 of 2 shards.*shard-000001"):
        Activations.load(copy).check()


@pytest.mark.slow
def test_other_activations_are_refused_and_bad_ones_too(out, table):
    with pytest.raises(StudyError, match=r"layers was \[1, 3\] and is \[2\]"):
        studies.harvest(table, sites="decoder.resid_post", layers=[2], size=2, unit=3, out=out)
    for options, told in [
        ({"keep": "tiny"}, "keep is a name"),
        ({"pool": "sum"}, "pool is 'mean'"),
        ({"site": "decoder.resid_post"}, "takes no 'site'.*sites"),
        ({"size": 0}, "size"),
    ]:
        with pytest.raises(ValueError, match=told):
            studies.harvest(table, out=out.parent / "other", **options)


@pytest.mark.slow
def test_stopped_and_by_others_the_bytes_are_the_same(table, tmp_path):
    studies.harvest(table, out=tmp_path / "one", **ASKED)
    stopped = harvest_study(table, out=tmp_path / "two", **ASKED)
    assert stopped.run(limit=3).done_units == 1
    with pytest.raises(ActivationsError, match="lacks 3 of 6"):
        Activations.load(tmp_path / "two")
    studies.harvest(table, out=tmp_path / "two", **ASKED)
    assert shards(tmp_path / "one") == shards(tmp_path / "two")


@pytest.mark.slow
def test_two_actors_write_the_bytes_of_one(table, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    engine = studies.Ray(workers=2, options={"num_cpus": 2, "object_store_memory": 100_000_000})
    try:
        studies.harvest(table, out=tmp_path / "one", **ASKED)
        studies.harvest(table, out=tmp_path / "two", engine=engine, **ASKED)
    finally:
        ray.shutdown()
    assert shards(tmp_path / "one") == shards(tmp_path / "two")


@pytest.mark.slow
def test_items_without_activations_are_told(table, tmp_path):
    items = list(Items.from_table(table))
    clip = tmp_path / "lost.wav"
    clip.write_bytes(Path(items[2].audio).read_bytes())
    items[2] = items[2].replaced(audio=clip)
    lost = Items(items).to_table(tmp_path / "items.jsonl")
    study = harvest_study(lost, out=tmp_path / "out", **ASKED)
    clip.unlink()
    with pytest.raises(ValueError, match=r"lost\.wav"):
        harvest_study(lost, out=tmp_path / "out", **ASKED)
    assert study.run().n_failed == 1
