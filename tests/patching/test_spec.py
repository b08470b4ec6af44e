"""What a sweep asks is listed once, checked once, recorded once; and nothing is made twice."""

from __future__ import annotations

import inspect
import logging
from dataclasses import fields
from functools import cached_property

import pytest
import torch

from audio_lens import Span, metrics, patching
from audio_lens.patching import transformer_lens
from audio_lens.patching.cells import CellTable
from audio_lens.patching.engine.request import Request
from audio_lens.patching.plan import Plan
from audio_lens.patching.spec import SweepSpec
from patching.subjects import batch, pair, tiny_model

METRIC = metrics.logit_diff(5, 6)
DERIVED = {"timeline", "sites", "record"}  # of a spec's fields; the others are arguments
HOW = {"verify", "checkpoint", "checkpoint_every_s", "progress"}  # arguments of how a sweep runs


def names_of(function) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "model"]


def test_the_spec_lists_the_arguments_of_the_public_functions():
    arguments = {f.name for f in fields(SweepSpec)} - DERIVED | {"site"}
    assert set(names_of(patching.sweep)) == arguments | HOW
    assert set(names_of(patching.plan)) == arguments - {"refine"}
    own = {"method", "steps", "progress"}
    assert set(names_of(patching.attribute)) - own < arguments


def test_defaults_are_those_of_the_public_functions():
    given = {f.name: f.default for f in fields(SweepSpec)}
    for function in (patching.sweep, patching.plan, patching.attribute):
        for name, parameter in inspect.signature(function).parameters.items():
            if name in given and name not in ("axes", "metric", "clean", "corrupted"):
                assert parameter.default == given[name], name


@pytest.fixture
def asked():
    return {**pair("whisper"), "site": "encoder.resid_pre", "axes": ("layer", "time")}


def test_a_spec_keeps_what_was_asked_and_records_what_matters(asked):
    model = tiny_model("whisper")
    options = {"windows": [Span(0.0, 0.1)], "layers": 1, "memory_gb": 2, "progress": False}
    spec = SweepSpec.of(model, **asked, metric=METRIC, **options)
    assert spec.layers == 1 and spec.memory_gb == 2 and str(spec.sites[0]) == "encoder.resid_pre"
    assert set(spec.record) == {"site", "axes", "metric", "windows", "layers"}
    assert spec.record["site"] == "encoder.resid_pre" and spec.record["layers"] == 1
    again = SweepSpec.of(model, **spec.arguments)
    assert again.windows == spec.windows and again.sites == spec.sites
    with pytest.raises(AttributeError):
        spec.layers = 0
    with pytest.raises(TypeError, match="a sweep takes no layer, window"):
        SweepSpec.of(model, **asked, metric=METRIC, layer=1, window=0.1)


def test_results_keep_the_record_of_the_spec(asked):
    model = tiny_model("whisper")
    planned = patching.plan(model, **asked, metric=METRIC, layers=1)
    result = planned.run()
    assert result.recipe["arguments"] == planned.arguments == planned.request.spec.record
    assert "refine" not in planned.arguments and planned.arguments["precision"] == "exact"
    refined = patching.sweep(model, **asked, metric=METRIC, layers=1, refine=0.5)
    assert refined.recipe["arguments"] == planned.arguments | {"refine": 0.5}


def counted(monkeypatch, owner, name) -> list:
    """The calls of a method or property from now on."""
    honest, calls = inspect.getattr_static(owner, name), []
    function = honest.func if isinstance(honest, cached_property) else honest

    def counting(self, *args):
        calls.append(args)
        return function(self, *args)

    made = cached_property(counting) if isinstance(honest, cached_property) else counting
    if isinstance(made, cached_property):
        made.__set_name__(owner, name)
    monkeypatch.setattr(owner, name, made)
    return calls


@pytest.mark.parametrize("options", [{}, {"refine": 1e-6}])
def test_a_sweep_asks_for_each_timeline_once(asked, monkeypatch, options):
    model = tiny_model("whisper")
    asked |= {name: model.as_inputs(asked[name]) for name in ("clean", "corrupted")}
    calls = counted(monkeypatch, type(model), "timeline")
    patching.sweep(model, **asked, metric=METRIC, windows=0.1, **options)
    assert [inputs for (inputs,) in calls] == [asked["clean"], asked["corrupted"]]


def test_the_route_is_decided_once(asked, monkeypatch):
    calls = counted(monkeypatch, Request, "route")
    planned = patching.plan(tiny_model("whisper"), **asked, metric=METRIC)
    planned.explain()
    planned.run(verify=1)
    assert len(calls) == 1


@pytest.mark.parametrize("level", [logging.WARNING, logging.INFO])
def test_a_plan_explains_itself_where_somebody_reads_it(asked, monkeypatch, caplog, level):
    planned = patching.plan(tiny_model("whisper"), **asked, metric=METRIC)
    calls = counted(monkeypatch, Plan, "explain")
    with caplog.at_level(level, logger="audio_lens.patching.plan"):
        planned.run()
    is_read = level == logging.INFO
    assert len(calls) == is_read and ("each cell runs" in caplog.text) == is_read


def test_a_refined_sweep_tells_of_alike_baselines_once(asked, caplog):
    flat = metrics.read_at(lambda rows: 0.0 * rows.flatten(1).sum(1), -1)
    metric = {"told apart": METRIC, "flat": flat}
    with caplog.at_level(logging.WARNING):
        result = patching.sweep(tiny_model("whisper"), **asked, metric=metric, refine=1e-6)
    assert "rounds" in result.report[-1] and "in 1 rounds" not in result.report[-1]
    assert sum("are alike" in record.message for record in caplog.records) == 1
    assert sum("are alike" in note for note in result.report) == 1


def test_transformer_lens_functions_ask_as_sweeps_do(monkeypatch):
    model = tiny_model("whisper")
    clean, corrupted = (model.as_inputs(one) for one in pair("whisper").values())
    _, cache = model.run_with_cache(clean)
    specs, honest = [], Plan.of

    def noticed(model, spec, table=None, known=()):
        specs.append(spec)
        assert isinstance(table, CellTable)
        return honest(model, spec, table, known)

    monkeypatch.setattr(transformer_lens.Plan, "of", staticmethod(noticed))
    metric = lambda logits: logits[:, -1, 5].sum()  # noqa: E731
    ours = patching.get_act_patch_resid_pre(model.part("decoder"), corrupted, cache, metric)
    (spec,) = specs
    assert isinstance(spec, SweepSpec) and spec.direction == "denoise" and spec.clean is corrupted
    assert ours.shape[0] == model.cfg.decoder.n_layers and torch.isfinite(ours).all()


def test_a_source_is_checked_before_any_work(asked):
    model = tiny_model("whisper")
    with pytest.raises(ValueError, match="source holds no"):
        held = {"encoder.blocks.0.hook_resid_pre": torch.zeros(1)}
        patching.plan(model, **asked, metric=METRIC, source=held)
    other = batch("whisper", 0, "one")
    with pytest.raises(ValueError, match="the source"):
        patching.plan(model, **asked, metric=METRIC, source=other)
