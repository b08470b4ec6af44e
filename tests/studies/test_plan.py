"""What a study will cost: the engine's counts without weights, and workers by simulation."""

from __future__ import annotations

import importlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from study_tools import all_items

from audio_lens import Items, patching, studies
from audio_lens.models.config import LoadingError
from audio_lens.models.loading.checkpoints import embedded_path
from audio_lens.models.loading.on_paper import on_paper
from audio_lens.provenance import recorded
from audio_lens.studies import StudyError
from audio_lens.studies.counting import Work, counted
from audio_lens.studies.harvest import harvest_study
from audio_lens.studies.jobs import Methods
from audio_lens.studies.planning import HOST_S, START_S, simulated, sizes
from audio_lens.studies.spec import Spec

pytest.importorskip("zarr")
study_module = importlib.import_module("audio_lens.studies.study")
ALONG = {"site": "decoder.resid_pre", "axes": ("layer", "time"), "windows": 0.5}
HEADS = ("layer", "head", "time")
SWEPT = {"site": "decoder.resid_pre", "axes": ("layer", "time"), "windows": 0.5, "stream": "audio"}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return all_items(tmp_path_factory.mktemp("t"))


def large(folder: Path) -> Path:
    """The config of a model of 7 billion numbers, with the shipped processor and no weights."""
    shutil.copytree(embedded_path(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {
        **{"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
        **{"layer_types": ["full_attention"] * 32},
        **{"num_attention_heads": 32, "num_key_value_heads": 32},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_work_is_that_of_the_plan_of_a_model_with_weights(table, tmp_path, embedded):
    study = studies.Study(table, out=tmp_path / "out", unit=4, batch=1, **SWEPT)
    told = study.explain(workers=2)
    work = cells = 0
    for item in study.store.items:
        (batch,) = Items([item]).pairs(stream="audio").batches(embedded, 1)
        plan = patching.plan(
            embedded,
            **batch.pair,
            metric=Items([item]).metrics(embedded)["logit_diff"],
            **{name: SWEPT[name] for name in ("site", "axes", "windows")},
        )
        work += plan.schedule.flops(range(len(plan))) + 2 * plan.schedule.costs.loop
        cells += len(plan)
    assert (told.sampled, told.cells) == (16, cells)
    assert told.tflop == pytest.approx(work / 1e12, rel=1e-9)
    size = sum(x.numel() * x.element_size() for x in embedded.parameters())
    assert told.weights_gb == pytest.approx(size / 1e9)
    assert told.units == 4 and not told.refused and "busy" in str(told)


@pytest.mark.slow
def test_a_large_model_is_planned_without_weights(table, tmp_path):
    folder = large(tmp_path / "large")
    study = studies.Study(
        table, str(folder), out=tmp_path / "out", unit=1, dtype="bfloat16", memory_gb=24, **SWEPT
    )
    one, many = (study.explain(workers=n, tflops=400) for n in (1, 512))
    assert 12 < one.weights_gb < 16 and one.tflop > 100
    assert one.tflop == many.tflop and many.busy < one.busy
    assert many.proposed < 512 and any("512 workers are busy" in x for x in many.warnings)
    assert json.dumps(many.to_dict())
    tight = studies.Study(
        table, str(folder), out=tmp_path / "tight", unit=1, memory_gb=0.001, **SWEPT
    )
    assert any("memory_gb is 0.001" in told for told in tight.explain().warnings)


@pytest.mark.slow
def test_items_that_cannot_be_used_are_counted(table, tmp_path):
    items = list(Items.from_table(table))
    items[2] = items[2].replaced(answer="three four")
    poisoned = Items(items).to_table(tmp_path / "items.jsonl")
    told = studies.Study(poisoned, out=tmp_path / "out", **SWEPT).explain()
    assert sum(told.refused.values()) == 1 and "three four" in next(iter(told.refused))
    assert any("1 of the 16 items" in one for one in told.warnings)


def test_units_and_batches_are_chosen_once_and_told(table, tmp_path, monkeypatch):
    study = studies.Study(table, out=tmp_path / "out", **SWEPT)
    assert (study.spec.unit, study.spec.batch) == (2, 2)  # an eighth of the items, all at once
    assert "8 units of 2" in str(study.explain()) and "up to 2 of equal" in str(study.explain())

    def planned_again(*_: object) -> None:
        raise AssertionError("the place says what was chosen")

    monkeypatch.setattr(study_module, "sizes", planned_again)
    again = studies.Study(table, out=tmp_path / "out", **SWEPT)
    assert again.spec == study.spec
    with pytest.raises(StudyError, match="batch was 2 and is 1"):
        studies.Study(table, out=tmp_path / "out", batch=1, **SWEPT)


def test_what_fills_the_device_is_not_swept_together(table):
    items = Items.from_table(table)
    spec = Spec("", "", "embedded", "patching.sweep", recorded(ALONG), stream="audio")
    assert sizes(spec, items, None, None) == (2, 4)
    on_gpu = replace(spec, device="cuda")
    assert sizes(on_gpu, items, None, None) == (2, 4)  # few cells
    many = recorded(ALONG | {"windows": 0.04, "site": "decoder.attn.z", "axes": HEADS})
    assert sizes(replace(on_gpu, arguments=many), items, None, None) == (2, 1)
    assert sizes(replace(spec, memory_gb=1e-3), items, None, None) == (2, 1)
    assert sizes(replace(spec, case="studied:case"), items, None, None) == (2, 1)
    assert sizes(replace(spec, loader="studied:embedded"), items, None, None) == (2, 1)


def test_units_of_methods_hold_dozens_and_leave_no_item_alone(table):
    items = Items.from_table(table)
    spec = Spec("", "", "embedded", "grounding.answers")
    assert sizes(spec, items, None, None) == (16, 1) and sizes(spec, items, 5, None) == (5, 1)
    many = Items(items[row % 16].replaced(id=str(row)) for row in range(33))
    assert sizes(spec, many, None, None) == (17, 1)


@pytest.mark.parametrize(
    "method, options",
    [
        ("grounding.answers", {}),
        pytest.param("knockout.knock_out", {"layers": [2, 3]}, marks=pytest.mark.slow),
        pytest.param("grounding.stream_share", {}, marks=pytest.mark.slow),
    ],
)
def test_what_a_method_does_is_counted_on_a_stand_in(table, embedded, method, options):
    """Beside the same count on the model itself."""
    items = Items.from_table(table)[[4, 6]]
    spec = Spec("", "", "embedded", method, recorded(options))
    told = counted(spec, embedded, items)
    with Work(embedded, embedded) as work:
        (found,) = Methods(spec).run(embedded, items)
    with Work(embedded, embedded) as forward, torch.no_grad():
        for item in items:
            embedded(Items([item]).prepare(embedded))
    assert told.forwards == pytest.approx(work.flops / forward.flops, rel=0.05)
    assert told.arrays == len(found.values)
    assert told.numbers == sum(x[0].size for x in found.values.values())


def test_a_plan_of_a_method(table, tmp_path):
    study = studies.Study(table, out=tmp_path / "out", method="grounding.answers")
    told = study.explain(workers=4, tflops=1)
    assert told.forwards == pytest.approx(1, abs=0.02) and told.storage_gb > 0
    assert "whole forwards of every item" in str(told) and told.units == 1
    assert told.at(1).tflop == told.tflop and told.at(1).busy > told.busy
    assert json.dumps(told.to_dict())


def test_answers_of_all_items_are_looked_at(table, tmp_path):
    items = [x.replaced(id=f"{x.id} {n}") for n in range(3) for x in Items.from_table(table)]
    items[5] = items[5].replaced(answer="three four")
    poisoned = Items(items).to_table(tmp_path / "items.jsonl")
    told = studies.Study(poisoned, out=tmp_path / "out", method="grounding.answers").explain()
    assert told.misread == 1 and any("1 of all 48 items" in one for one in told.warnings)


def test_workers_are_simulated():
    units = [np.full(8, 10.0)] * 64
    hours, busy = simulated(units, 1)
    spent = START_S + 512 * (10 + HOST_S)
    assert hours == pytest.approx(spent / 3600) and busy == pytest.approx(5120 / spent)
    hours, busy = simulated(units, 8)
    spent = START_S + 64 * (10 + HOST_S)
    assert hours == pytest.approx(spent / 3600) and busy == pytest.approx(640 / spent)
    assert simulated(units, 128)[1] < 0.5  # half of them have nothing to do


def test_what_cannot_be_planned_is_refused(table, tmp_path):
    harvested = harvest_study(table, out=tmp_path / "a")
    with pytest.raises(StudyError, match="one forward of every item"):
        harvested.explain()
    loaded = studies.Study(table, out=tmp_path / "b", loader="studied:embedded", **SWEPT)
    with pytest.raises(StudyError, match="made from a config"):
        loaded.explain()
    fine = studies.Study(table, out=tmp_path / "c", unit=1, batch=1, **SWEPT)
    for rate in (0, float("nan"), -1):
        with pytest.raises(StudyError, match="tflops"):
            fine.explain(tflops=rate)
    with pytest.raises(ValueError, match="workers"):
        fine.explain(workers=0)
    with pytest.raises(LoadingError, match=r"nowhere holds no config\.json"):
        studies.Study(table, "./nowhere", out=tmp_path / "d", **SWEPT)
    assert not (tmp_path / "d").exists()


def test_a_model_on_paper_prepares_what_a_whole_one_does(table, embedded):
    item = Items.from_table(table)[:1]
    paper, whole = item.prepare(on_paper("embedded")), item.prepare(embedded)
    assert paper.tokens.equal(whole.tokens) and paper.features.equal(whole.features)
