"""A study in this process: equal to a loop, resumed, refused, read back."""

from __future__ import annotations

import functools
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from study_tools import LAYERS, in_memory, layers, numbers, same

from audio_lens import Items, patching, studies
from audio_lens.analysis import knockout
from audio_lens.errors import ExtraError
from audio_lens.items import ItemError, demo_items
from audio_lens.studies import StudyError, worker
from audio_lens.studies.places import Folder

pytest.importorskip("zarr")
CUT = 200  # samples, of 640 that a token of the shipped model lasts
SWEPT = {
    **{"site": "decoder.resid_pre", "axes": ("layer", "time"), "layers": [1, 4]},
    **{"windows": 1.0},
}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six conflict items of unequal lengths, each with files of its own."""
    items = Items(in_memory(item) for item in demo_items()[[0, 1, 4, 5, 12, 13]])
    return items.to_table(tmp_path_factory.mktemp("t") / "items.jsonl")


@pytest.fixture(scope="module")
def done(table: Path, tmp_path_factory: pytest.TempPathFactory) -> studies.Study:
    """A study that ran to its end."""
    study = studies.Study(
        table, out=tmp_path_factory.mktemp("done") / "out", unit=2, batch=1, stream="audio", **SWEPT
    )
    assert study.run().is_done
    return study


def swept(model, item, **options) -> patching.SweepResult:
    (batch,) = Items([item]).pairs(stream="audio").batches(model, 1)
    metric = Items([item]).metrics(model)["logit_diff"]
    return patching.sweep(
        model, **batch.pair, metric=metric, memory_gb=2.0, progress=False, **SWEPT | options
    )


# -------------------------------------------------------------------------------- numbers


def test_a_study_has_the_numbers_of_a_loop_bit_for_bit(done, embedded):
    found = studies.load(done.out)
    assert len(found) == 6 and not found.failed
    for item in found.items:
        alone, mine = swept(embedded, item), found.item(item.id)
        assert torch.equal(mine.values, alone.values.double())
        assert mine.clean == alone.clean and mine.corrupted == alone.corrupted
        assert mine.coords == alone.coords and mine.dims == alone.dims
        assert (mine.site, mine.direction) == (alone.site, alone.direction)


def test_numbers_are_read_by_name(done):
    data = studies.load(done.out).to_xarray()
    assert data["value"].dims == ("item", "layer", "time")
    assert set(data["id"].values) == {item.id for item in done.store.items}
    short = data.isel(item=-1)  # the longest come first
    assert short["value"].isnull().any("layer").values[-1] and short["time_start"].isnull()[-1]
    assert not data.isel(item=0)["value"].isnull().any()


def test_effects_of_all_items_have_intervals(done):
    result = studies.load(done.out).result()
    assert result.axes == ("layer", "time") and result.n_kept == 6
    whole = studies.load(done.out)
    first = [whole.item(item.id) for item in whole.items]
    moved = sum(float(one.values[0, 0] - one.corrupted) for one in first)
    gap = sum(float(one.clean - one.corrupted) for one in first)
    assert float(result.estimate[0, 0]) == pytest.approx(moved / gap)
    assert (result.low <= result.estimate).all()


def test_means_by_a_label_are_of_its_items(done):
    parts = studies.load(done.out).mean(by="answer")
    assert set(parts) == {item.answer for item in done.store.items}
    assert sum(part.n_kept for part in parts.values()) == 6


@pytest.mark.slow
def test_a_study_costs_little_more_than_its_sweeps(table, tmp_path, embedded):
    """Beside the loading of the model, which a loop has too."""
    spent: dict[str, list[float]] = {"loop": [], "study": []}
    for turn in range(3):
        study = studies.Study(
            table, out=tmp_path / f"{turn}", unit=6, batch=1, stream="audio", **SWEPT
        )
        hand = worker.Worker(study.out)
        start = time.process_time()
        hand.run(study.store.left())
        spent["study"].append(time.process_time() - start)
        start = time.process_time()
        for item in study.store.items:
            swept(embedded, item)
        spent["loop"].append(time.process_time() - start)
    assert min(spent["study"]) < 1.05 * min(spent["loop"])


@pytest.mark.slow
def test_a_batch_gives_the_same_within_rounding(table, done, tmp_path):
    several = studies.Study(table, out=tmp_path / "out", unit=6, batch=4, stream="audio", **SWEPT)
    several.run()
    mine, its = numbers(several), numbers(done)
    for name in ("value", "clean", "corrupted"):
        moved = np.abs(mine[name] - its[name])
        assert np.nanmax(moved) < 1e-4 * np.nanmax(np.abs(its["clean"] - its["corrupted"]))
    for name in ("time_start", "time_end"):
        assert np.array_equal(mine[name], its[name], equal_nan=True)


def test_clips_that_end_between_two_tokens_have_their_own_windows_in_a_batch(tmp_path):
    """Of equal layout, and yet not of equal length."""
    whole = in_memory(demo_items()[4])
    cut = {name: getattr(whole, name)[:-CUT] for name in ("audio", "other_audio")}
    table = Items([whole, whole.replaced(id="cut", **cut)]).to_table(tmp_path / "items.jsonl")
    given = {"unit": 2, "stream": "audio", **SWEPT, "layers": [2]}
    one, two = (studies.Study(table, out=tmp_path / f"{n}", batch=n, **given) for n in (1, 2))
    model = one.spec.load()
    assert len(list(one.store.items.pairs(stream="audio").batches(model, 2))) == 1
    one.run()
    two.run()
    mine, its = numbers(one), numbers(two)
    for name in ("time_start", "time_end"):
        assert np.array_equal(mine[name], its[name], equal_nan=True)
    assert np.abs(mine["value"] - its["value"]).max() < 1e-4


@pytest.mark.slow
def test_a_method_is_that_of_its_units(table, tmp_path, embedded):
    study = studies.Study(
        table, out=tmp_path / "out", method=knockout.knock_out, layers=[3, 4], unit=3
    )
    study.run()
    found = studies.load(study.out).result(by="answer")
    for unit in range(2):
        rows = list(study.store.rows(unit))
        alone = knockout.knock_out(embedded, study.store.items[rows], layers=[3, 4], progress=False)
        assert torch.equal(found.values[:, rows], alone.values)
        for name, control in alone.controls.items():
            assert torch.equal(found.controls[name].values[:, rows], control.values)
    assert found.n_kept == 6 and found.low is not None


@pytest.mark.slow
def test_ratios_of_means_are_joined_as_ratios(table, tmp_path, embedded):
    study = studies.Study(table, out=tmp_path / "out", method="grounding.stream_share", unit=3)
    study.run()
    found = studies.load(study.out).result()
    from audio_lens.analysis import grounding

    whole = grounding.stream_share(embedded, study.store.items, progress=False)
    assert float(found.estimate) == pytest.approx(float(whole.estimate), abs=1e-5)
    assert float(found.low) == pytest.approx(float(whole.low), abs=1e-5)


def test_what_is_no_mean_over_items_is_refused_before_anything_runs(table, tmp_path):
    with pytest.raises(StudyError, match=r"no study of grounding\.hand_over.*grounding\.residence"):
        studies.Study(table, out=tmp_path / "out", method="grounding.hand_over")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_case_of_ones_own(table, tmp_path, embedded):
    study = studies.Study(table, out=tmp_path / "out", case="studied:case", **LAYERS)
    study.run()
    found = studies.load(study.out)
    alone = swept(embedded, found.items[0], windows=None, **LAYERS)
    assert not torch.equal(found.item(found.items[0].id).values, alone.values.double())


# -------------------------------------------------------------------------------- stopping


@pytest.mark.slow
def test_stopped_a_study_goes_on_where_it_was(table, tmp_path, monkeypatch):
    whole, stopped = layers(table, tmp_path / "whole"), layers(table, tmp_path / "stopped")
    whole.run()
    count, sweep = [0], patching.sweep

    @functools.wraps(sweep)
    def counted(*args, **options):
        count[0] += 1
        if count[0] == 4:
            raise KeyboardInterrupt
        return sweep(*args, **options)

    monkeypatch.setattr(patching, "sweep", counted)
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    assert 1 <= stopped.status().done_units < 3
    partial = studies.load(stopped.out)
    assert len(partial) in (2, 4) and partial.result().dropped == {"not done yet": 6 - len(partial)}
    again = layers(table, tmp_path / "stopped")
    assert again.run().is_done and count[0] <= 6 + 2 + 1
    assert same(whole, again)
    assert again.store.attempts(0) == 1


def test_a_study_goes_on_where_it_was(table, tmp_path):
    study = layers(table, tmp_path / "out")
    assert study.run(limit=1).done_items == 2
    first = study.store.place.read("units/0000000.json")
    again = layers(table, tmp_path / "out")
    assert again.run(limit=1).done_items == 4
    assert study.store.place.read("units/0000000.json") == first


def test_another_study_is_refused_by_what_differs(table, tmp_path):
    layers(table, tmp_path / "out")
    with pytest.raises(StudyError, match=r"axes was 'layer' and is .*time"):
        studies.Study(table, out=tmp_path / "out", unit=2, stream="audio", **SWEPT)
    with pytest.raises(StudyError, match="dtype was None and is 'float64'"):
        layers(table, tmp_path / "out", dtype="float64")
    fewer = Items.from_table(table)[:4].to_table(tmp_path / "fewer.jsonl")
    with pytest.raises(StudyError, match="digest"):
        layers(fewer, tmp_path / "out")


@pytest.mark.slow
def test_other_weights_are_refused(table, tmp_path, monkeypatch):
    study = layers(table, tmp_path / "out", loader="studied:embedded")
    study.run(limit=2)
    import studied

    monkeypatch.setattr(studied, "embedded", studied.other_weights)
    with pytest.raises(StudyError, match="other weights"):
        study.run()


# -------------------------------------------------------------------------------- what fails


@pytest.mark.slow
def test_items_without_numbers_are_told_by_reason(table, tmp_path):
    moved = Items(map(in_memory, Items.from_table(table))).to_table(tmp_path / "items.jsonl")
    study = layers(moved, tmp_path / "out", unit=3)
    lost = study.store.items[1]
    Path(lost.audio).rename(tmp_path / "lost.wav")
    status = study.run()
    assert status.is_done and status.n_failed == 1
    found = studies.load(study.out)
    assert list(found.failed) == [lost.id] and str(lost.audio) in found.failed[lost.id]
    assert found.result().dropped == {"without numbers": 1}
    with pytest.raises(StudyError, match="has no numbers"):
        found.item(lost.id)
    (tmp_path / "lost.wav").rename(lost.audio)
    assert study.retry() == 1
    assert study.run().n_failed == 0
    whole = layers(table, tmp_path / "whole", unit=3)
    whole.run()
    assert same(study, whole)


@pytest.mark.slow
def test_a_study_of_which_much_fails_is_stopped(table, tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "LOOKED_AT", 3)
    study = studies.Study(
        table, out=tmp_path / "out", unit=2, batch=1, site="decoder.resid_pre", axes="layer"
    )
    with pytest.raises(StudyError, match=r"4 of the first 4 items have no numbers.*choose stream="):
        study.run()


@pytest.mark.parametrize(
    "options, told",
    [
        ({"site": "decoder.resid_pre", "axis": "layer"}, "takes no 'axis'.*axes"),
        ({"method": "knockout.knock"}, "no method 'knockout.knock'.*knockout.knock_out"),
        ({"method": "nothing.at_all"}, "no method"),
        ({"metric": "logit_diff"}, "takes no 'metric'"),
        ({"source": torch.nn.Identity()}, "no file holds source"),
        ({"case": "studied"}, "'module:function'"),
        ({"case": "studied:nothing"}, "can be imported"),
        ({"dtype": "float", "unit": 2, "batch": 1}, None),
        ({"dtype": "half precision"}, "dtype is a name"),
        ({"unit": 0}, "unit"),
    ],
)
def test_what_cannot_run_is_refused_before(table, tmp_path, options, told):
    if told is None:
        assert studies.Study(table, out=tmp_path / "out", **options)
        return
    with pytest.raises(ValueError, match=told):
        studies.Study(table, out=tmp_path / "out", **options)
    assert not (tmp_path / "out" / "spec.json").exists()


def test_clips_in_memory_are_refused(tmp_path):
    with pytest.raises(StudyError, match="to_table"):
        studies.Study(Items([in_memory(demo_items()[0])]), out=tmp_path / "out")


def test_no_study_and_no_table(tmp_path):
    with pytest.raises(StudyError, match="no study at"):
        studies.load(tmp_path)
    with pytest.raises(ItemError, match="no table at"):
        studies.Study(tmp_path / "none.jsonl", out=tmp_path / "out")


def test_nothing_done_has_no_result(table, tmp_path):
    with pytest.raises(StudyError, match="nothing is done yet"):
        studies.load(layers(table, tmp_path / "out").out)


@pytest.mark.parametrize("library, extra", [("zarr", "scale"), ("obstore", "s3")])
def test_a_missing_library_is_named_with_its_extra(table, tmp_path, monkeypatch, library, extra):
    monkeypatch.setitem(sys.modules, library, None)
    out = tmp_path / "out" if library == "zarr" else "s3://bucket/folder"
    with pytest.raises(ExtraError, match=rf"audio_lens\[{extra}\]"):
        layers(table, out)


@pytest.mark.parametrize(
    "engine, library, extra",
    [(studies.Ray(), "ray", "ray"), (studies.Slurm(), "submitit", "slurm")],
)
def test_a_missing_engine_is_named_with_its_extra(
    table, tmp_path, monkeypatch, engine, library, extra
):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ExtraError, match=rf"audio_lens\[{extra}\]"):
        layers(table, tmp_path / "out").run(engine)


def test_a_place_holds_objects_by_name(tmp_path):
    place = Folder(tmp_path)
    assert place.read("a/b") is None and place.names("a") == []
    place.write("a/b", b"1")
    place.write("a/c/d", b"2")
    assert place.names("a") == ["b", "c/d"] and place.read("a/c/d") == b"2"
    place.remove("a/b")
    place.remove("a/b")
    assert place.names("a") == ["c/d"]
