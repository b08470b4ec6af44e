"""What a study will cost: the engine's counts without weights, and workers by simulation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from study_tools import all_items

from audio_lens import Items, patching, studies
from audio_lens.models.config import LoadingError
from audio_lens.models.loading.checkpoints import embedded_path
from audio_lens.models.loading.on_paper import on_paper
from audio_lens.studies import StudyError
from audio_lens.studies.harvest import harvest_study
from audio_lens.studies.planning import HOST_S, START_S, simulated

pytest.importorskip("zarr")
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
