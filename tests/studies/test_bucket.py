"""Studies in an object store: a server of S3 on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from study_tools import all_items, by_case, same

from audio_lens import Items, studies
from audio_lens.analysis import autoencoders
from audio_lens.buckets import Bucket, BucketError
from audio_lens.files import OutputError
from audio_lens.items import Activations, ActivationsError
from audio_lens.studies import StudyError
from audio_lens.studies.harvest import harvest_study

pytest.importorskip("zarr")
obstore = pytest.importorskip("obstore")
server = pytest.importorskip("moto.server")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The address of an empty bucket."""
    import boto3

    held = server.ThreadedMotoServer(port=0, verbose=False)
    held.start()
    host, port = held.get_host_and_port()
    patch = pytest.MonkeyPatch()
    told = {
        "AWS_ENDPOINT": f"http://{host}:{port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_REGION": "us-east-1",
    }
    for name, value in told.items():
        patch.setenv(name, value)
    client = boto3.client("s3", endpoint_url=told["AWS_ENDPOINT"], region_name="us-east-1")
    client.create_bucket(Bucket="lab")
    yield "s3://lab/study"
    patch.undo()
    held.stop()


def test_a_bucket_holds_objects_by_name(bucket):
    place = Bucket(f"{bucket}-objects")
    assert place.read("a/b") is None and place.names("a") == []
    place.write("a/b", b"1")
    place.write("a/c/d", b"2")
    assert place.names("a") == ["b", "c/d"] and place.read("a/c/d") == b"2"
    place.remove("a/b")
    place.remove("a/b")
    assert place.names("a") == ["c/d"]


def test_a_study_in_a_bucket_is_that_of_a_folder(bucket, tmp_path: Path):
    table = all_items(tmp_path)
    here = by_case(table, tmp_path / "out", unit=3)
    here.run()
    study = by_case(table, bucket, unit=3)
    assert study.run(limit=6).done_units == 2
    assert len(studies.load(bucket)) == 6
    again = by_case(table, bucket, unit=3)
    before = {
        name: again.store.place.read(f"units/{name}") for name in again.store.place.names("units")
    }
    assert again.run().is_done and same(again, here)
    assert all(again.store.place.read(f"units/{name}") == told for name, told in before.items())
    loaded = studies.load(bucket)
    one = loaded.items[0].id
    assert loaded.item(one).values.equal(studies.load(here.out).item(one).values)
    with pytest.raises(StudyError, match="holds another study"):
        by_case(table, bucket, unit=4)


def test_a_bucket_that_is_not_there_is_told(bucket, tmp_path: Path):
    with pytest.raises(OutputError, match=r"s3://nowhere/study.* 404 Not Found$"):
        by_case(all_items(tmp_path), "s3://nowhere/study")


ASKED = {"sites": "decoder.resid_post", "layers": [1], "size": 2, "unit": 3}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t")
    return Items.from_table(all_items(folder))[:6].to_table(folder / "few.jsonl")


@pytest.fixture(scope="module")
def own(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Activations in a folder."""
    folder = tmp_path_factory.mktemp("harvest") / "acts"
    studies.harvest(table, out=folder, **ASKED)
    return folder


@pytest.fixture(scope="module")
def at(bucket: str, table: Path) -> str:
    """The same in an object store, of which a first try was stopped."""
    out = f"{bucket}-acts"
    assert harvest_study(table, out=out, **ASKED).run(limit=3).done_units == 1
    with pytest.raises(ActivationsError, match=r"s3://lab/study-acts lacks 3 of 6 items"):
        Activations.load(out)
    first = Bucket(out).read("units/0000000.json")
    studies.harvest(table, out=out, **ASKED)
    assert Bucket(out).read("units/0000000.json") == first  # not computed again
    return out


def test_activations_in_a_bucket_are_those_of_a_folder(at, own):
    found, mine = Activations.load(at), Activations.load(own)
    for name in ("shard-000000.safetensors", "shard-000001.safetensors"):
        assert Bucket(at).read(name) == (own / name).read_bytes()
    found.check()
    assert len(found) > 100 and torch.equal(found[1], mine[1])
    its, table = found.table(), mine.table()
    assert its.keys() == table.keys() and all((its[x] == table[x]).all() for x in its)
    rows, same_rows = found.dataset(), mine.dataset()
    assert all(torch.equal(rows[k], same_rows[k]) for k in (0, 70, len(rows) - 1))
    pieces, same_pieces = found.pieces(size=50), mine.pieces(size=50)
    assert len(pieces) == len(same_pieces) > 4
    for one, other in zip(pieces, same_pieces, strict=True):
        assert torch.equal(one.read(), other.read()) and torch.equal(one.items(), other.items())
    few = found.filter(lambda item: item["id"] == found.items[0]["id"])
    assert 0 < len(few) < len(found)


def test_autoencoders_are_trained_from_a_bucket(at, own):
    short = {"width": 32, "k": 4, "steps": 20, "batch": 64, "progress": False}
    ours, mine = (autoencoders.train(Activations.load(out), **short) for out in (at, own))
    for name in ("reads", "offsets", "directions", "centre"):
        assert torch.equal(getattr(ours, name), getattr(mine, name))


def test_shards_that_changed_in_a_bucket_are_found(at):
    whole, copy = Bucket(at), Bucket(f"{at}-copy")
    for name in ("activations.json", "shard-000000.safetensors", "shard-000001.safetensors"):
        copy.write(name, whole.read(name))
    data = bytearray(whole.read("shard-000001.safetensors"))
    data[-5] ^= 1
    copy.write("shard-000001.safetensors", bytes(data))
    with pytest.raises(ActivationsError, match=r"1 of 2 shards.*s3://lab/.*-copy/shard-000001"):
        Activations.load(copy.url).check()
    copy.write("shard-000001.safetensors", bytes(data[:20]))
    with pytest.raises(ActivationsError, match=r"shard-000001.safetensors is no whole shard"):
        Activations.load(copy.url)


def test_a_bucket_that_does_not_answer_is_told(bucket, table, monkeypatch):
    with pytest.raises(ActivationsError, match="holds no activations"):
        Activations.load(f"{bucket}-empty")
    monkeypatch.setenv("AWS_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(BucketError, match=r"s3://lab/acts/spec.json cannot be read: .*retries"):
        studies.harvest(table, out="s3://lab/acts")
