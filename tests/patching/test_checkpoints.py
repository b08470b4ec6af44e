"""Checkpoints: whose they are, and that two processes lose nothing of each other's."""

from __future__ import annotations

import multiprocessing
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from audio_lens import files, metrics, patching
from audio_lens.patching.engine.checkpoint import Checkpoint
from toys import Cue, Toy, copy_toy, prompt

FORK = multiprocessing.get_context("fork")


def asked(**options: Any) -> dict[str, Any]:
    return {
        "clean": prompt(Cue(1)),
        "corrupted": prompt(Cue(2)),
        "site": "decoder.resid_pre",
        "axes": ("layer", "position"),
        "metric": metrics.logit_diff(1, 2),
        "progress": False,
        **options,
    }


def test_metrics_of_one_name_share_no_checkpoint(tmp_path: Path) -> None:
    """Both are '<lambda>', and agree on the unpatched runs."""
    toy, path = copy_toy(), tmp_path / "sweep.ckpt"
    patching.sweep(toy, **asked(metric=lambda x: (x[:, -1, 1] > 0.5).double()), checkpoint=path)
    with pytest.raises(patching.CheckpointError, match="metric differ"):
        patching.sweep(toy, **asked(metric=lambda x: (x[:, -1, 1] > 0.6).double()), checkpoint=path)
    again = asked(metric=lambda x: (x[:, -1, 1] > 0.5).double())
    assert patching.sweep(toy, **again, checkpoint=path).values.isfinite().all()


def hooked(toy: Toy, factor: float) -> Toy:
    toy.reset_hooks()
    toy.add_hook("decoder.blocks.1.hook_attn_out", lambda x, hook: x * factor)
    return toy


def with_torch_hook(toy: Toy) -> Toy:
    toy.decoder.blocks[1].mlp.register_forward_hook(lambda module, args, out: out * 2)
    return toy


def edited(toy: Toy) -> Toy:
    toy.decoder.blocks[4].attn.o_proj.weight.data[0, 0] = 1.0
    return toy


def set_otherwise(toy: Toy) -> Toy:
    toy.decoder.blocks[4].attn.scale = 0.5
    return toy


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (edited, "other weights"),
        (set_otherwise, "settings differ"),
        (with_torch_hook, "hooks differ"),
        (lambda toy: hooked(toy, 2.0), "hooks differ"),
    ],
)
def test_another_state_of_the_model_is_refused(other: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "sweep.ckpt"
    patching.sweep(copy_toy(), **asked(), checkpoint=path)
    with pytest.raises(patching.CheckpointError, match=message):
        patching.sweep(other(copy_toy()), **asked(), checkpoint=path)


def test_hooks_at_one_point_are_told_apart(tmp_path: Path) -> None:
    toy, path = copy_toy(), tmp_path / "sweep.ckpt"
    patching.sweep(hooked(toy, 0.5), **asked(), checkpoint=path)
    with pytest.raises(patching.CheckpointError, match="hooks differ"):
        patching.sweep(hooked(toy, 0.6), **asked(), checkpoint=path)
    patching.sweep(hooked(toy, 0.5), **asked(), checkpoint=path)


def test_sources_and_attention_modes_are_told_apart(tmp_path: Path) -> None:
    toy, path = copy_toy(), tmp_path / "sweep.ckpt"
    _, cache = toy.run_with_cache(prompt(Cue(3)), names_filter=lambda name: "resid_pre" in name)
    patching.sweep(toy, **asked(source=cache), checkpoint=path)
    for name in cache:
        cache[name][..., 1] += 1
    with pytest.raises(patching.CheckpointError, match="source differ"):
        patching.sweep(toy, **asked(source=cache), checkpoint=path)
    path.unlink()
    patching.sweep(toy, **asked(), checkpoint=path)
    with (
        toy.attention("explicit"),
        pytest.raises(patching.CheckpointError, match="attention differ"),
    ):
        patching.sweep(toy, **asked(), checkpoint=path)


def test_a_metric_without_identity_keeps_no_checkpoint(tmp_path: Path) -> None:
    toy, lock, path = copy_toy(), threading.Lock(), tmp_path / "sweep.ckpt"

    def guarded(logits: torch.Tensor) -> torch.Tensor:
        with lock:
            return logits[:, -1, 1]

    message = r"metric cannot be known again: .*'lock' of .* is a _thread.lock.*metrics.versioned"
    with pytest.raises(patching.CheckpointError, match=message):
        patching.sweep(toy, **asked(metric=guarded), checkpoint=path)
    assert not path.exists()
    named = asked(metric={"answer": metrics.versioned(guarded, "1")})
    result = patching.sweep(toy, **named, checkpoint=path)
    again = patching.sweep(toy, **named, checkpoint=path)
    assert torch.equal(result.values, again.values)
    with pytest.raises(patching.CheckpointError, match="metric differ"):
        other = asked(metric={"answer": metrics.versioned(guarded, "2")})
        patching.sweep(toy, **other, checkpoint=path)
    assert patching.sweep(toy, **asked(metric=guarded)).values.isfinite().all()


def test_a_plan_runs_on_no_other_weights_and_hooks() -> None:
    toy = copy_toy()
    plan = patching.plan(toy, **{k: v for k, v in asked().items() if k != "progress"})
    plan.run(only=[0], progress=False)
    edited(toy)
    with pytest.raises(ValueError, match="weights were changed since this plan ran"):
        plan.run(progress=False)
    hooked(toy, 2.0)
    plan = patching.plan(toy, **{k: v for k, v in asked().items() if k != "progress"})
    hooked(toy, 3.0)
    with pytest.raises(ValueError, match="hooks were attached or removed"):
        plan.run(progress=False)


def test_estimates_are_confirmed_on_their_own_model() -> None:
    toy = copy_toy()
    options = {name: value for name, value in asked().items() if name != "axes"}
    estimate = patching.attribute(toy, **options)
    with pytest.raises(ValueError, match="other weights than the one the estimates are of"):
        estimate.confirm(edited(copy_toy()), top_k=1, progress=False)


# -------------------------------------------------------------------------------- two processes


def half(path: Path, cells: range, toy: Toy, barrier: Any) -> None:
    plan = patching.plan(
        toy, **{k: v for k, v in asked().items() if k != "progress"}, cells_per_forward=1
    )
    barrier.wait()
    plan.run(only=cells, checkpoint=path, checkpoint_every_s=0, progress=False)


def test_two_processes_on_one_checkpoint_lose_nothing(tmp_path: Path) -> None:
    toy, path, barrier = copy_toy(), tmp_path / "sweep.ckpt", FORK.Barrier(2)
    whole = patching.sweep(toy, **asked())
    n = whole.values.numel()
    parts = [range(n // 2), range(n // 3, n)]  # which share some cells
    workers = [FORK.Process(target=half, args=(path, part, toy, barrier)) for part in parts]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    saved = load_file(path)
    assert saved["done"].all()
    torch.testing.assert_close(saved["values"].flatten(), whole.values.flatten())
    assert os.listdir(tmp_path) == ["sweep.ckpt"]


def test_what_another_process_did_is_not_done_again(tmp_path: Path) -> None:
    """It writes its cells while this sweep is under way."""
    toy, path, run = copy_toy(), tmp_path / "sweep.ckpt", []
    whole = patching.sweep(toy, **asked())

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, -1, 1] - logits[:, -1, 2]

    def counted(logits: torch.Tensor) -> torch.Tensor:
        run.append(1)
        if len(run) == 4:
            patching.sweep(toy, **asked(metric=metrics.versioned(metric, 1)), checkpoint=path)
        return metric(logits)

    mine = asked(metric=metrics.versioned(counted, 1, "metric"), cells_per_forward=1)
    result = patching.sweep(toy, **mine, checkpoint=path, checkpoint_every_s=0)
    torch.testing.assert_close(result.values, whole.values)
    assert len(run) < 8 < whole.values.numel()


def test_a_file_of_another_sweep_that_comes_meanwhile_stays(tmp_path: Path) -> None:
    toy, path, runs = copy_toy(), tmp_path / "sweep.ckpt", []

    def metric(logits: torch.Tensor) -> torch.Tensor:
        runs.append(1)
        if len(runs) == 3:
            patching.sweep(toy, **asked(direction="noise"), checkpoint=path)
        return logits[:, -1, 1]

    mine = asked(metric=metrics.versioned(metric, 1), cells_per_forward=1)
    result = patching.sweep(toy, **mine, checkpoint=path, checkpoint_every_s=1000)
    assert result.values.isfinite().all()
    assert any("belongs to another sweep" in note for note in result.report)
    theirs = patching.sweep(toy, **asked(direction="noise"), checkpoint=path)  # goes on from it
    assert not theirs.report or "could not be kept" not in theirs.report[-1]


def test_a_strange_file_is_no_checkpoint(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "x"
    for metadata in (None, {"identity": "[1]"}, {"identity": "no json"}, {"identity": "{}"}):
        save_file({"values": torch.zeros(1)}, path, metadata)
        with pytest.raises(patching.CheckpointError, match="is no checkpoint of a sweep"):
            patching.sweep(copy_toy(), **asked(), checkpoint=path)


def test_values_of_another_shape_are_refused(tmp_path: Path) -> None:
    file = Checkpoint(tmp_path / "x", {"a": "b"})
    done = torch.zeros(3, dtype=torch.bool)
    file.save(torch.zeros(1, 3), done, torch.zeros(2, 1))
    with pytest.raises(patching.CheckpointError, match="other metrics or stimuli"):
        Checkpoint(tmp_path / "x", {"a": "b"}).load(torch.zeros(2, 4))


# -------------------------------------------------------------------------------- locks


def test_a_lock_keeps_others_out_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_PATIENCE_S", 0.05)
    path = tmp_path / "x"
    with files.locked(path):
        with pytest.raises(files.OutputError), files.locked(path):
            pass
        with files.locked(tmp_path / "y"):
            assert sorted(os.listdir(tmp_path)) == [".x.lock", ".y.lock"]
    with files.locked(path):
        pass
    assert os.listdir(tmp_path) == []


def test_a_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    (tmp_path / ".x.lock").touch()
    with files.locked(tmp_path / "x"):
        pass
    assert os.listdir(tmp_path) == []


def test_a_checkpoint_on_a_full_disk_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource

    toy, path = copy_toy(), tmp_path / "sweep.ckpt"
    plan = patching.plan(toy, **{k: v for k, v in asked().items() if k != "progress"})
    plan.run(only=[0], checkpoint=path, progress=False)
    old = path.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        result = plan.run(checkpoint=path, checkpoint_every_s=0, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert result.values.isfinite().all() and path.read_bytes() == old
    assert any("could not be kept" in note for note in result.report)
    assert os.listdir(tmp_path) == ["sweep.ckpt"]
