"""Studies in an object store: a server of S3 on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from study_tools import all_items, by_case, same

from audio_lens import studies
from audio_lens.files import OutputError
from audio_lens.studies import StudyError
from audio_lens.studies.places import Bucket

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
