"""The machine: plans, budgets, interruption, verification, refinement, what is left out."""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny
from audio_lens import HookedAudioTransformer, InputError, metrics, patching
from audio_lens.patching.engine import heap, hooked, routes
from audio_lens.patching.engine.checkpoint import Checkpoint
from audio_lens.patching.refine import streamed
from audio_lens.patching.spec import SweepSpec
from families import FAMILIES
from tiny import hf_inputs
from toys import Cue, copy_toy, prompt

DIFF = metrics.logit_diff(7, 9)


@pytest.fixture(scope="module")
def whisper() -> HookedAudioTransformer:
    return HookedAudioTransformer.from_hf(tiny.tiny_whisper_hf())


@pytest.fixture(scope="module")
def llm() -> HookedAudioTransformer:
    return HookedAudioTransformer.from_hf(tiny.tiny_qwen2_audio_hf())


def pair(family: str, **options) -> dict[str, dict]:
    clean, other = (hf_inputs(family, seed=seed, **options) for seed in (0, 1))
    return {
        "clean": clean,
        "corrupted": {**clean, "input_features": other["input_features"]},
        "metric": DIFF,
    }


def run(model, pair, **options):
    return patching.sweep(model, **{"progress": False, "windows": 0.3, **pair, **options})


def calls_of(model, name: str, work) -> int:
    """How many times a module ran while some work was done."""
    count = []
    module = model.get_submodule(name)
    handle = module.register_forward_hook(lambda *_: count.append(1))
    try:
        work()
    finally:
        handle.remove()
    return len(count)


# -------------------------------------------------------------------------------- plans


@pytest.mark.parametrize(
    ("site", "axes", "left_out"),
    [
        ("decoder.resid_pre", ("layer", "time"), "the encoder, earlier blocks"),
        ("connector.out", ("time",), "the encoder, and positions before"),
        ("encoder.attn.z", ("layer", "head"), "earlier encoder blocks"),
    ],
)
def test_explain_says_what_runs_and_what_does_not(llm, site, axes, left_out):
    options = {"windows": 0.5} if "time" in axes else {}
    told = patching.plan(llm, **pair("qwen2_audio"), site=site, axes=axes, **options).explain()
    assert f"left out: {left_out}" in told
    for word in ("cells", "GFLOP", "MB of a budget", "last-block rows"):
        assert word in told


def test_explain_names_hooks_and_bare_functions(llm):
    given = pair("qwen2_audio") | {"metric": lambda logits: logits[:, -1, 3]}
    assert "no logits" in patching.plan(llm, **given).explain()
    with llm.hooks([("encoder.blocks.0.hook_mlp_out", lambda x, hook: x)], reset_hooks_end=True):
        plan = patching.plan(llm, **given)
        told = plan.explain()
        plan.run(only=[0], progress=False)
    assert "your hooks are in force: encoder.blocks.0.hook_mlp_out" in told


def test_a_plan_runs_only_some_cells_and_goes_on(llm):
    plan = patching.plan(llm, **pair("qwen2_audio"), windows=0.3)
    some = plan.run(only=[0, 5], progress=False)
    flat = some.values.flatten(1)
    assert flat[:, [0, 5]].isfinite().all() and flat[:, 1:5].isnan().all()
    once = calls_of(llm, "encoder.blocks.0", lambda: plan.run(progress=False))
    assert once == 0, "the unpatched runs are kept"
    whole = plan.run(progress=False)
    torch.testing.assert_close(whole.values.flatten(1)[:, [0, 5]], flat[:, [0, 5]])
    with pytest.raises(ValueError, match="cells are numbered"):
        plan.run(only=[len(plan)])


def test_hooks_attached_after_planning_are_not_overlooked(llm):
    plan = patching.plan(llm, **pair("qwen2_audio"))
    with (
        llm.hooks([("decoder.blocks.0.hook_mlp_out", lambda x, hook: x)], reset_hooks_end=True),
        pytest.raises(ValueError, match="plan it anew"),
    ):
        llm(hf_inputs("qwen2_audio"))
        plan.run()


@pytest.mark.parametrize(
    ("family", "site", "kind"),
    [
        ("whisper", "encoder.resid_pre", routes.EncoderRoute),
        ("whisper", "decoder.cross_attn.z", routes.DecoderRoute),
        ("qwen2_audio", "connector.in", routes.ConnectorRoute),
        ("qwen2_audio", ["decoder.attn_out", "decoder.mlp_out"], hooked.SuffixRoute),
    ],
)
def test_cells_take_the_route_that_leaves_most_out(family, site, kind, whisper, llm):
    model = {"whisper": whisper, "qwen2_audio": llm}[family]
    axes = "position" if site == "connector.in" else ("layer", "position")
    assert patching.plan(model, **pair(family), site=site, axes=axes).request.route is kind


def test_the_encoder_runs_once_for_each_input_of_a_decoder_sweep(llm):
    work = calls_of(llm, "encoder.blocks.0", lambda: run(llm, pair("qwen2_audio")))
    assert work == 2
    clean = hf_inputs("qwen2_audio")
    tokens = clean["input_ids"].clone()
    tokens[0, -1] = 33
    same_audio = {"clean": clean, "corrupted": {**clean, "input_ids": tokens}, "metric": DIFF}
    assert calls_of(llm, "encoder.blocks.0", lambda: run(llm, same_audio)) == 1


def test_cells_that_change_nothing_run_nothing(llm):
    """The text before the audio is the same in both runs."""
    given = pair("qwen2_audio", lengths=(101,), words=(5,))
    plan = patching.plan(llm, **given, axes=("layer", "position"))
    plan.run(only=[], progress=False)
    first_text = [i for i, cell in enumerate(plan.table.cells) if cell.positions == 0]
    ran = calls_of(llm, "decoder.blocks.2.mlp", lambda: plan.run(only=first_text, progress=False))
    result = plan.run(only=first_text, progress=False)
    assert ran <= 1  # a table of the block's source rows
    assert (result.values[:, 0] == result.corrupted).all()


# -------------------------------------------------------------------------------- verification


@pytest.mark.parametrize("site", ["encoder.attn.k", "decoder.attn.pattern", "connector.out"])
def test_verified_cells_are_reported(llm, site):
    axes = "time" if site == "connector.out" else ("layer", "head", "time")
    result = run(llm, pair("qwen2_audio"), site=site, axes=axes, verify=3)
    assert "3 random cells verified" in result.report[-1]


def test_verify_finds_a_wrong_cell(llm, monkeypatch):
    honest = routes.DecoderRoute.run
    monkeypatch.setattr(routes.DecoderRoute, "run", lambda self, cells: honest(self, cells) + 1e-2)
    # the difference of two logits does not see a shift; a log-probability does not either: a logit
    given = pair("qwen2_audio") | {"metric": metrics.read_at(lambda logits: logits[:, 3])}
    with pytest.raises(patching.VerificationError, match="please report"):
        run(llm, given, verify=2)


@pytest.mark.parametrize("metric", [metrics.log_prob(4, position=3), metrics.log_prob(4)])
def test_verify_allows_for_what_a_family_computes_in_float32(metric):
    """Norms, and a softmax that rounds otherwise for every number of keys."""
    family = FAMILIES["qwen2_audio"]
    model = family.hooked(family.build(dtype=torch.float64))
    clean, corrupted = (family.batch(seed=seed, dtype=torch.float64) for seed in (0, 1))
    corrupted = clean | {"input_features": corrupted["input_features"]}
    options = {"clean": clean, "corrupted": corrupted, "metric": metric}
    for site in ("decoder.attn.z", "decoder.attn.pattern"):
        plan = patching.plan(model, site=site, axes=("layer", "head"), **options)
        assert not plan.request.is_double
        assert "verified" in plan.run(verify=8, progress=False).report[-1]


def test_verify_is_strict_where_all_is_float64():
    family = FAMILIES["whisper"]
    model = family.hooked(family.build(dtype=torch.float64))
    clean, corrupted = (family.batch(seed=seed, dtype=torch.float64) for seed in (0, 1))
    corrupted = clean | {"input_features": corrupted["input_features"]}
    options = {"clean": clean, "corrupted": corrupted, "metric": metrics.log_prob(4)}
    plan = patching.plan(model, site="decoder.attn.pattern", axes=("layer", "head"), **options)
    assert plan.request.is_double
    assert "verified" in plan.run(verify=8, progress=False).report[-1]


def test_verify_does_not_take_nan_for_close(llm, monkeypatch):
    honest = routes.DecoderRoute.run
    broken = lambda self, cells: honest(self, cells) * torch.nan  # noqa: E731
    monkeypatch.setattr(routes.DecoderRoute, "run", broken)
    with pytest.raises(patching.VerificationError, match="please report"):
        run(llm, pair("qwen2_audio"), verify=2)


def test_verify_refuses_what_it_cannot_tell(llm):
    half = HookedAudioTransformer.from_hf(tiny.tiny_qwen2_audio_hf(dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="rounds too much"):
        run(half, pair("qwen2_audio", dtype=torch.bfloat16), verify=1)
    with pytest.raises(ValueError, match="precision 'exact'"):
        run(llm, pair("qwen2_audio"), precision="bf16", verify=1)


# -------------------------------------------------------------------------------- going on


class Stop(Exception):
    """Somebody pressed a key."""


def stop_after(monkeypatch, n_batches: int) -> list:
    """Interrupt the next sweeps after so many batches; returns the cells that were computed."""
    honest, done = routes.DecoderRoute.run, []

    def interrupted(self, cells):
        if len(done) == n_batches:
            raise Stop
        done.append(list(cells))
        return honest(self, cells)

    monkeypatch.setattr(routes.DecoderRoute, "run", interrupted)
    return done


def test_an_interrupted_sweep_goes_on_from_its_checkpoint(llm, tmp_path, monkeypatch):
    given, path = pair("qwen2_audio"), tmp_path / "sweep.ckpt"
    whole = run(llm, given)
    with monkeypatch.context() as patched:
        first = stop_after(patched, 2)
        with pytest.raises(Stop):
            run(llm, given, checkpoint=path, cells_per_forward=2)
    with monkeypatch.context() as patched:
        rest = stop_after(patched, 10_000)
        result = run(llm, given, checkpoint=path, cells_per_forward=2)
    assert not {c for cells in first for c in cells} & {c for cells in rest for c in cells}
    torch.testing.assert_close(result.values, whole.values, equal_nan=True)
    with monkeypatch.context() as patched:
        assert stop_after(patched, 0) == []
        again = run(llm, given, checkpoint=path)
    assert torch.equal(again.values.nan_to_num(), result.values.nan_to_num())


def test_an_interrupted_plan_keeps_what_it_has(llm, monkeypatch):
    plan = patching.plan(llm, **pair("qwen2_audio"), cells_per_forward=3)
    with monkeypatch.context() as patched:
        stop_after(patched, 1)
        with pytest.raises(Stop):
            plan.run(progress=False)
    assert plan._state.done.sum() == 3
    assert plan.run(progress=False).values.isfinite().any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"direction": "noise"}, "direction"),
        ({"site": "decoder.mlp_out"}, "site"),
        ({"windows": 0.2}, "cells"),
        ({"metric": metrics.logit_diff(7, 11)}, "metric"),
    ],
)
def test_a_checkpoint_of_another_sweep_is_refused(llm, tmp_path, change, message):
    given, path = pair("qwen2_audio"), tmp_path / "sweep.ckpt"
    run(llm, given, checkpoint=path)
    with pytest.raises(patching.CheckpointError, match=message):
        run(llm, given | change, checkpoint=path)


def test_a_checkpoint_of_another_model_is_refused(llm, tmp_path):
    given, path = pair("qwen2_audio"), tmp_path / "sweep.ckpt"
    run(llm, given, checkpoint=path)
    other = HookedAudioTransformer.from_hf(tiny.tiny_qwen2_audio_hf(seed=5))
    with pytest.raises(patching.CheckpointError, match="another model"):
        run(other, given, checkpoint=path)


def test_a_file_that_is_no_checkpoint_is_refused(llm, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("hello")
    with pytest.raises(patching.CheckpointError, match="no checkpoint"):
        run(llm, pair("qwen2_audio"), checkpoint=path)
    with pytest.raises(patching.CheckpointError, match="no file can be written"):
        run(llm, pair("qwen2_audio"), checkpoint=tmp_path / "missing" / "x")


@pytest.fixture
def full_disk(monkeypatch) -> list:
    """No checkpoint can be written; a list of the attempts."""
    attempts = []

    def fsync(_) -> None:
        attempts.append(1)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    return attempts


def test_a_checkpoint_that_cannot_be_written_stops_nothing(llm, tmp_path, full_disk, caplog):
    given, path = pair("qwen2_audio"), tmp_path / "sweep.ckpt"
    whole = run(llm, given, cells_per_forward=2)
    result = run(llm, given, checkpoint=path, checkpoint_every_s=0, cells_per_forward=2)
    assert torch.equal(result.values.nan_to_num(), whole.values.nan_to_num())
    said = "what is done could not be kept"
    assert len(full_disk) > 2 and sum(said in line for line in caplog.messages) == 1
    (note,) = [note for note in result.report if said in note]
    assert "sweep.ckpt cannot be written (No space left on device)" in note
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_was_written_in_the_end_is_no_note(llm, tmp_path, monkeypatch):
    honest, attempts = os.fsync, []

    def fsync(file) -> None:
        attempts.append(1)
        if len(attempts) == 1:
            raise OSError(28, "No space left on device")
        honest(file)

    monkeypatch.setattr(os, "fsync", fsync)
    result = run(llm, pair("qwen2_audio"), checkpoint=tmp_path / "x", cells_per_forward=2)
    assert not any("could not be kept" in note for note in result.report)


def test_a_checkpoint_that_cannot_be_written_hides_no_error(llm, tmp_path, full_disk, monkeypatch):
    stop_after(monkeypatch, 1)
    with pytest.raises(Stop):
        run(llm, pair("qwen2_audio"), checkpoint=tmp_path / "x", cells_per_forward=2)
    assert len(full_disk) == 2


def test_a_checkpoint_replaces_no_device(llm, tmp_path):
    (tmp_path / "link").symlink_to("/dev/null")
    for path in ("/dev/null", "/dev/full", tmp_path / "link"):
        with pytest.raises(patching.CheckpointError, match="no file can be written"):
            run(llm, pair("qwen2_audio"), checkpoint=path)


@pytest.mark.parametrize(("every_s", "finished"), [(0, [1, 2, 3]), (1e6, [1])])
def test_checkpoints_are_saved_from_the_first_batch_on(
    llm, tmp_path, monkeypatch, every_s, finished
):
    """Whatever kills the process between two batches costs no more than the interval."""
    path, honest, saves = tmp_path / "sweep.ckpt", Checkpoint.save, []

    def save(self, values, done, baselines) -> None:
        honest(self, values, done, baselines)
        saves.append(int(load_file(path)["done"].sum()))

    monkeypatch.setattr(Checkpoint, "save", save)
    stop_after(monkeypatch, 3)
    options = {"cells_per_forward": 1, "checkpoint_every_s": every_s}
    with pytest.raises(Stop):
        run(llm, pair("qwen2_audio"), checkpoint=path, **options)
    assert saves == [*finished, 3]


SWEEPING = """
    import sys
    import tiny
    from audio_lens import HookedAudioTransformer, patching
    from test_engine import pair
    model = HookedAudioTransformer.from_hf(tiny.tiny_qwen2_audio_hf())
    print("ready", flush=True)
    options = {"windows": 0.3, "cells_per_forward": 1, "checkpoint_every_s": 0, "progress": False}
    patching.sweep(model, **pair("qwen2_audio"), **options, checkpoint=sys.argv[1])
"""


@pytest.mark.slow
def test_a_killed_sweep_leaves_a_whole_checkpoint(llm, tmp_path):
    """kill -9 at several times: what is on disk is a checkpoint that the same call goes on from."""
    given, whole = pair("qwen2_audio"), run(llm, pair("qwen2_audio"), cells_per_forward=1)
    here = os.pathsep.join([str(Path(tiny.__file__).parent), str(Path(__file__).parent)])
    for after_s in (0.0, 0.01, 0.03):
        path = tmp_path / f"{after_s}.ckpt"
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(SWEEPING), str(path)],
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{here}"},
        )
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        while not path.exists() and process.poll() is None:
            time.sleep(0.001)
        time.sleep(after_s)
        process.kill()
        process.wait()
        assert load_file(path)["done"].any()
        result = run(llm, given, checkpoint=path, cells_per_forward=1)
        torch.testing.assert_close(result.values, whole.values, equal_nan=True)


@pytest.mark.parametrize("every_s", [-1, math.nan])
def test_the_interval_of_checkpoints_is_a_number_of_seconds(llm, tmp_path, every_s):
    options = {"checkpoint": tmp_path / "x", "checkpoint_every_s": every_s}
    with pytest.raises(InputError, match="number of seconds"):
        run(llm, pair("qwen2_audio"), **options)


# -------------------------------------------------------------------------------- memory


def test_out_of_memory_halves_the_batch_and_goes_on(llm, monkeypatch):
    given = pair("qwen2_audio")
    whole = run(llm, given)
    honest, sizes = routes.DecoderRoute.run, []

    def limited(self, cells):
        sizes.append(len(cells))
        if len(cells) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return honest(self, cells)

    monkeypatch.setattr(routes.DecoderRoute, "run", limited)
    result = run(llm, given)
    assert max(sizes) > 3 and sizes[-1] <= 3
    torch.testing.assert_close(result.values, whole.values, equal_nan=True)
    assert "smaller batches" in result.report[-1]


def test_one_cell_that_does_not_fit_says_so(llm, monkeypatch):
    def never(self, cells):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")

    monkeypatch.setattr(routes.DecoderRoute, "run", never)
    with pytest.raises(MemoryError, match="one cell alone"):
        run(llm, pair("qwen2_audio"))


def test_other_errors_are_not_taken_for_memory(llm, monkeypatch):
    def broken(self, cells):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(routes.DecoderRoute, "run", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        run(llm, pair("qwen2_audio"))


def test_a_budget_too_small_for_one_cell_raises_early(llm):
    with pytest.raises(ValueError, match="raise memory_gb"):
        run(llm, pair("qwen2_audio"), memory_gb=1e-5)
    with pytest.raises(ValueError, match="must be a positive number"):
        run(llm, pair("qwen2_audio"), memory_gb=0)


@pytest.mark.parametrize("site", ["decoder.attn.z", "encoder.attn.z"])
def test_a_small_budget_gives_small_batches_and_the_same_values(llm, site):
    given = pair("qwen2_audio")
    axes = {"site": site, "axes": ("layer", "head", "time")}
    plenty = patching.plan(llm, **given, **axes, windows=0.3)
    tight = patching.plan(llm, **given, **axes, windows=0.3, memory_gb=4e-3)
    few, many = (
        len(p.schedule.next(p.schedule.queue(range(len(p))), p.schedule.budget / 2))
        for p in (tight, plenty)
    )
    assert few < many
    values = [p.run(progress=False).values for p in (tight, plenty)]
    torch.testing.assert_close(*values, equal_nan=True, rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------- precision


def test_bf16_is_close_and_says_that_it_is_not_exact(llm):
    given = pair("qwen2_audio")
    exact, rough = run(llm, given), run(llm, given, precision="bf16")
    assert "bf16: not exact" in rough.report[0] and rough.meta["precision"] == "bf16"
    scale = exact.values.nan_to_num().abs().max()
    assert 0 < (exact.values - rough.values).nan_to_num().abs().max() < 0.1 * scale


@pytest.mark.parametrize("site", ["encoder.resid_pre", "connector.in", "decoder.attn.k"])
def test_bf16_runs_on_every_part(llm, site):
    axes = "time" if site == "connector.in" else ("layer", "time")
    result = run(llm, pair("qwen2_audio"), site=site, axes=axes, precision="bf16")
    assert result.values.isfinite().any()


def test_precision_that_cannot_take_effect_raises(llm):
    with pytest.raises(ValueError, match="CUDA only"):
        run(llm, pair("qwen2_audio"), precision="tf32")
    double = HookedAudioTransformer.from_hf(tiny.tiny_qwen2_audio_hf(dtype=torch.float64))
    with pytest.raises(ValueError, match="float32 models"):
        run(double, pair("qwen2_audio", dtype=torch.float64), precision="bf16")


# -------------------------------------------------------------------------------- sources


def test_a_source_of_inputs_takes_the_place_of_the_other_run(llm):
    given = pair("qwen2_audio")
    third = {**given["clean"], "input_features": hf_inputs("qwen2_audio", seed=7)["input_features"]}
    from_third = run(llm, given, source=third)
    as_clean = run(llm, given | {"clean": third})
    torch.testing.assert_close(from_third.values, as_clean.values, equal_nan=True)
    torch.testing.assert_close(from_third.clean, run(llm, given).clean)
    assert "source of your own" in from_third.report[0]


@pytest.mark.parametrize("site", ["decoder.attn.z", "encoder.attn.pattern", "encoder.mlp_out"])
def test_a_cache_as_source_equals_its_run(llm, site):
    given = pair("qwen2_audio")
    with llm.attention("explicit"):
        _, cache = llm.run_with_cache(given["clean"], attention=True)
        from_cache = run(llm, given, site=site, source=cache, verify=2)
        from_run = run(llm, given, site=site)
    torch.testing.assert_close(
        from_cache.values, from_run.values, equal_nan=True, rtol=1e-4, atol=1e-5
    )


def test_a_source_without_the_site_raises(llm):
    given = pair("qwen2_audio")
    _, cache = llm.run_with_cache(given["clean"], names_filter="blocks.0.attn.hook_z")
    with pytest.raises(ValueError, match=r"source holds no decoder\.blocks\.1"):
        run(llm, given, site="decoder.attn.z", source=cache)


def test_identity_source_changes_nothing(llm):
    given = pair("qwen2_audio")
    result = run(llm, given, source=given["corrupted"])
    assert torch.equal(
        result.values.nan_to_num(),
        result.corrupted[:, None, None].expand_as(result.values) * result.values.isfinite(),
    )


# -------------------------------------------------------------------------------- several layers


def test_layer_windows_are_patched_as_one(llm):
    given = pair("qwen2_audio", lengths=(101,), words=(5,))
    result = run(llm, given, site="decoder.attn_out", layer_window=2, verify=3)
    assert result.coords["layer"] == [0, 1]
    assert any("layers l to l+1" in note for note in result.report)
    single = run(llm, given, site="decoder.attn_out", layer_window=1)
    assert (result.values - single.values[:2]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_window": 4}, "must lie in 1 to 3"),
        ({"layer_window": 2, "axes": "time"}, "goes with axis 'layer'"),
        ({"layer_window": 2, "layers": [2]}, "0 to 1"),
        ({"site": ["decoder.attn_out", "encoder.attn_out"]}, "same positions"),
        ({"site": ["connector.in", "connector.out"], "axes": "time"}, "follow each other"),
        ({"site": ["decoder.attn.q", "decoder.attn.k"], "axes": ("layer", "head")}, "same heads"),
        ({"site": ["decoder.attn.q", "decoder.attn.q"]}, "named twice"),
        ({"site": []}, "no site"),
    ],
)
def test_unions_and_windows_of_layers_that_make_no_sense_raise(llm, options, message):
    with pytest.raises(ValueError, match=message):
        run(llm, pair("qwen2_audio"), **{"windows": None, **options})


# -------------------------------------------------------------------------------- coarse to fine


def test_refinement_finds_the_single_cue_and_computes_little():
    toy = copy_toy()
    given = {
        "clean": prompt(Cue(heard=1)),
        "corrupted": prompt(Cue(heard=3)),
        "metric": lambda logits: logits[:, -1, 1] - logits[:, -1, 3],
    }
    coarse = run(toy, given, windows=0.2, refine=0.5)
    fine = run(toy, given, windows="position")
    cue = [i for i, span in enumerate(coarse.coords["time"]) if span.start_s <= 0.25 < span.end_s]
    assert coarse.select(time=0.25).effect.tolist() == pytest.approx(fine.select(time=0.25).effect)
    assert coarse.widths[0, cue].item() == pytest.approx(0.04, abs=0.03)
    assert coarse.widths[0, 0] == pytest.approx(0.2)
    assert len(coarse.coords["time"]) < len(fine.coords["time"])
    # behind the copying layer nothing passes the threshold, so nothing there was split
    assert (coarse.widths[3:] >= 0.1 - 1e-9).all() or (coarse.widths[3:] == 0.2).all()


def test_refined_values_equal_sweeps_of_those_windows(llm):
    given = pair("qwen2_audio", lengths=(101, 90), words=(5, 4))
    result = run(llm, given, refine=0.05, windows=0.5)
    spans = result.coords["time"]
    for i, span in enumerate(spans):
        whole = (result.widths[:, i] - (span.end_s - span.start_s)).abs() < 1e-9
        if layers := whole.nonzero().flatten().tolist():
            alone = run(llm, given, windows=[span], layers=layers)
            torch.testing.assert_close(
                result.values[:, layers, i], alone.values[:, :, 0], equal_nan=True
            )
    assert "refined in" in result.report[-1]


def test_what_is_streamed_ends_as_what_is_refined(llm):
    given = pair("qwen2_audio", lengths=(101, 90), words=(5, 4))
    whole = run(llm, given, refine=0.05, windows=0.5)
    asked = {"site": "resid_pre", "axes": ("layer", "time"), "refine": 0.05, "windows": 0.5}
    first, *between, last = streamed(llm, SweepSpec.of(llm, **(given | asked)), together=3)
    assert between and first.values.isnan().any()
    torch.testing.assert_close(last.values, whole.values, equal_nan=True)
    torch.testing.assert_close(last.widths, whole.widths)
    assert last.coords == whole.coords and last.report == whole.report


def test_refined_results_survive_the_disk_and_selection(llm, tmp_path):
    given = pair("qwen2_audio", lengths=(101,), words=(5,))
    result = run(llm, given, refine=0.05, windows=0.5)
    loaded = patching.load(result.save(tmp_path / "map.nc"))
    assert torch.equal(loaded.widths, result.widths)
    assert torch.equal(result.select(layer=1).widths, result.widths[1])
    assert "width_s" in result.to_xarray()


def test_refinement_is_interrupted_and_goes_on(llm, tmp_path, monkeypatch):
    given = pair("qwen2_audio", lengths=(101,), words=(5,))
    options = {"refine": 0.05, "windows": 0.5, "cells_per_forward": 2}
    whole = run(llm, given, **options)
    with monkeypatch.context() as patched:
        stop_after(patched, 5)
        with pytest.raises(Stop):
            run(llm, given, **options, checkpoint=tmp_path / "x")
    again = run(llm, given, **options, checkpoint=tmp_path / "x")
    torch.testing.assert_close(again.values, whole.values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refine": 0.0}, "positive number"),
        ({"refine": 0.1, "windows": (0.3, 0.1)}, "do not overlap"),
        ({"refine": 0.1, "windows": None, "axes": ("layer", "position")}, "axis 'time'"),
    ],
)
def test_refinement_that_makes_no_sense_raises(llm, options, message):
    with pytest.raises(ValueError, match=message):
        run(llm, pair("qwen2_audio"), **options)


# -------------------------------------------------------------------------------- metrics


def test_several_metrics_read_their_own_positions(llm, caplog):
    given = pair("qwen2_audio", lengths=(101, 102), words=(6, 6))
    together = {
        "last": DIFF,
        "earlier": metrics.logit_diff(5, 6, position=-2),
        "kl": metrics.kl(),
        "mine": metrics.read_at(lambda logits: logits[:, 4], position=-3, name="mine"),
    }
    with caplog.at_level(logging.ERROR):
        result = run(llm, given | {"metric": together})
    for name, metric in together.items():
        alone = run(llm, given | {"metric": metric})
        torch.testing.assert_close(
            result.select(metric=name).values, alone.values, equal_nan=True, rtol=1e-4, atol=1e-5
        )


def test_read_at_equals_the_bare_function(llm):
    given = pair("qwen2_audio", lengths=(101,), words=(6,))
    bare = run(llm, given | {"metric": lambda logits: logits[:, -1].amax(-1)})
    read = run(llm, given | {"metric": metrics.read_at(lambda logits: logits.amax(-1))})
    torch.testing.assert_close(bare.values, read.values, rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------- freed memory


def test_freed_memory_is_kept_only_inside(monkeypatch):
    calls = []

    class Libc:
        def mallopt(self, parameter, value):
            calls.append((parameter, value))

        def malloc_trim(self, pad):
            calls.append("trimmed")

    monkeypatch.setattr(heap, "_glibc", Libc)
    with heap.freed_memory_kept():
        assert len(calls) == 2 and all(value == 1 << 30 for _, value in calls)
    assert calls[-1] == "trimmed" and {p for p, _ in calls[2:4]} == {-1, -3}


def test_without_glibc_nothing_happens(monkeypatch):
    monkeypatch.setattr(heap, "_glibc", lambda: None)
    with heap.freed_memory_kept():
        pass
