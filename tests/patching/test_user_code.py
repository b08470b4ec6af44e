"""Hooks of the user's that fail, models in training mode, and threads that share a model."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from audio_lens import HookedAudioTransformer, HookError, InputError, metrics, patching, running
from audio_lens.models.loading.lora import LowRank, attach
from tiny import hf_inputs, tiny_hf
from toys import Cue, Toy, copy_toy, prompt

POINT = "decoder.blocks.1.hook_resid_pre"


def asked(**options: Any) -> dict[str, Any]:
    return {
        "clean": prompt(Cue(1)),
        "corrupted": prompt(Cue(2)),
        "site": "decoder.attn_out",
        "axes": ("layer", "position"),
        "metric": metrics.logit_diff(1, 2),
        "progress": False,
        **options,
    }


# -------------------------------------------------------------------------------- what hooks give

UNFIT: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "a row less": (lambda x: x[:, 1:], r"shape \(1, 12, 15\), got \(1, 11, 15\)"),
    "no batch": (lambda x: x[0], r"shape \(1, 12, 15\), got \(12, 15\)"),
    "one number": (lambda x: x.sum(), r"shape \(1, 12, 15\), got \(\)"),
    "another dtype": (lambda x: x.float(), "dtype torch.float64, got torch.float32"),
    "another device": (lambda x: x.to("meta"), "device cpu, got meta"),
    "an array": (lambda x: x.numpy(), "a tensor, or None .* got ndarray"),
    "a tuple": (lambda x: (x,), "a tensor, or None .* got tuple"),
    "a number": (lambda x: 0.0, "a tensor, or None .* got float"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_cannot_stand_at_a_point_is_named(name: str) -> None:
    toy, (give, message) = copy_toy(), UNFIT[name]
    with pytest.raises(HookError, match=f"a hook on {POINT} must give .*{message}"):
        toy.run_with_hooks(prompt(Cue(1)), fwd_hooks=[(POINT, lambda x, hook: give(x))])
    toy.hook_dict[POINT].add_hook(lambda x, hook: give(x))
    with pytest.raises(HookError, match=message):
        toy(prompt(Cue(1)))


def test_what_fits_passes() -> None:
    toy = copy_toy()
    plain = toy(prompt(Cue(1)))

    def in_place(x: Tensor, hook: Any) -> None:
        x.mul_(1)

    for fn in (in_place, lambda x, hook: x.clone(), lambda x, hook: nn.Parameter(x)):
        assert torch.equal(toy.run_with_hooks(prompt(Cue(1)), fwd_hooks=[(POINT, fn)]), plain)


def test_gradients_are_checked_too() -> None:
    model = HookedAudioTransformer.from_hf(tiny_hf("whisper"))
    name = "decoder.blocks.0.hook_mlp_out"
    with (
        model.hooks(bwd_hooks=[(name, lambda x, hook: x[:, 1:])]),
        pytest.raises(RuntimeError, match=f"a backward hook on {name} must give shape"),
    ):
        model(hf_inputs("whisper"), return_type="loss").backward()


def failing(x: Tensor, hook: Any) -> None:
    raise KeyError("lost")


def test_a_hook_that_fails_says_where() -> None:
    toy = copy_toy()
    with pytest.raises(HookError, match=f"a hook on {POINT} fails: KeyError: 'lost'") as caught:
        toy.run_with_hooks(prompt(Cue(1)), fwd_hooks=[(POINT, failing)])
    assert isinstance(caught.value.__cause__, KeyError)

    def refuses(x: Tensor, hook: Any) -> None:
        raise InputError("no such clip")

    with pytest.raises(InputError, match="no such clip") as found:
        toy.run_with_hooks(prompt(Cue(1)), fwd_hooks=[(POINT, refuses)])
    assert found.value.__notes__ == [f"in a hook on {POINT}"]


@pytest.mark.parametrize("together", [1, 7])
def test_a_hook_that_fails_in_a_sweep_says_on_which_cell(together: int) -> None:
    toy, calls = copy_toy(), []

    def third(x: Tensor, hook: Any) -> None:
        calls.append(len(x))
        if len(calls) == 4:  # two unpatched runs, and two batches of cells
            raise ValueError("too far")

    toy.add_hook(POINT, third)
    more = "" if together == 1 else " and 6 more cells, which run with it as one batch"
    where = rf"\(on cell {together} \(layer 0, position {together}\){more}\)"
    with pytest.raises(HookError, match=f"{POINT} fails: ValueError: too far {where}"):
        patching.sweep(toy, **asked(cells_per_forward=together))
    toy.reset_hooks()
    toy.add_hook(POINT, failing)
    with pytest.raises(HookError, match=r"KeyError: 'lost' \(on an unpatched run\)"):
        patching.sweep(toy, **asked())


def test_a_hook_for_one_row_is_told_of_the_batch() -> None:
    toy = copy_toy()
    _, cache = toy.run_with_cache(prompt(Cue(3)), names_filter=POINT)
    toy.add_hook(POINT, lambda x, hook: cache[POINT])
    with pytest.raises(HookError, match=r"got \(1, 12, 15\) \(on .* more cells"):
        patching.sweep(toy, **asked(cells_per_forward=4))
    assert patching.sweep(toy, **asked(cells_per_forward=1)).values.isfinite().all()


# -------------------------------------------------------------------------------- training mode


def with_dropout() -> Toy:
    toy = copy_toy()
    shape = toy.decoder.blocks[2].attn.q_proj.weight.shape
    low_rank = LowRank(torch.ones(2, shape[1]), torch.ones(shape[0], 2), 0.1, dropout=0.5)
    attach(toy, {"decoder.blocks.2.attn.q_proj": low_rank}, {})
    return toy.double().requires_grad_(False).eval()


class Noisy(nn.Module):
    """Somebody's own connector, random in training."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x) if self.training else x


def with_noise() -> Toy:
    toy = copy_toy()
    toy.decoder.blocks[2].ln1 = Noisy()
    return toy.eval()


@pytest.mark.parametrize("make", [with_dropout, with_noise])
def test_a_model_in_training_mode_gives_the_cells_of_evaluation(
    make: Callable[[], Toy], caplog: pytest.LogCaptureFixture
) -> None:
    toy = make()
    calls: dict[str, Callable[[], Any]] = {
        "sweep": lambda: patching.sweep(toy, **asked()),
        "hooked": lambda: patching.sweep(toy, **asked(layer_window=2)),
        "attribution": lambda: patching.attribute(toy, **asked()),
        "confirmation": lambda: patching.attribute(toy, **asked()).confirm(toy, progress=False),
    }
    patches = [patching.Patch("decoder.attn_out", layer=1, source=prompt(Cue(2)))]
    for name, call in calls.items():
        toy.eval()
        exact = call()
        assert not any("training mode" in note for note in exact.report)
        toy.train()
        found = call()
        assert any("training mode" in note and "blocks.2" in note for note in found.report), name
        assert toy.training and all(one.training for one in toy.modules())
        if name != "confirmation":
            assert torch.equal(found.values, exact.values)
        else:
            assert [row.exact for row in found.rows] == [row.exact for row in exact.rows]
    toy.eval()
    exact = patching.patch(toy, prompt(Cue(1)), patches)
    toy.train()
    caplog.clear()
    assert torch.equal(patching.patch(toy, prompt(Cue(1)), patches), exact)
    assert "in training mode" in caplog.text


def test_training_mode_that_changes_nothing_is_no_note() -> None:
    toy = copy_toy().train()
    assert not any("training mode" in note for note in patching.sweep(toy, **asked()).report)
    assert toy.training


# -------------------------------------------------------------------------------- threads


@pytest.fixture(scope="module")
def model() -> HookedAudioTransformer:
    return HookedAudioTransformer.from_hf(tiny_hf("whisper")).eval()


NAMES = ["decoder.blocks.0.hook_mlp_out", "encoder.blocks.1.hook_attn_out"]


def test_threads_on_one_model_do_not_mix(model: HookedAudioTransformer) -> None:
    """Runs with hooks, with a cache, in a block, plain, and by parts, all at once."""
    inputs = model.as_inputs(hf_inputs("whisper", padding="left"))

    def hooks(factor: float) -> list:
        return [(name, lambda x, hook: x * factor) for name in NAMES]

    def in_a_block(factor: float) -> Tensor:
        with model.hooks(hooks(factor)):
            time.sleep(0.001)
            return model(inputs)

    def in_two_blocks(factor: float) -> Tensor:
        with model.hooks(hooks(factor)[:1]), model.hooks(hooks(factor)[1:]):
            return model(inputs)

    def by_parts(_: float) -> Tensor:
        encoded = model.encode(inputs)
        return model.read_out(model.decode(inputs, encoded), inputs)

    kinds: list[Callable[[float], Tensor]] = [
        lambda factor: model.run_with_hooks(inputs, fwd_hooks=hooks(factor)),
        in_a_block,
        in_two_blocks,
        lambda factor: model.part("decoder")(inputs),
        lambda factor: model.run_with_cache(inputs)[0],
        lambda factor: model.run_with_cache(inputs)[1][NAMES[0]],
        lambda factor: model(inputs),
        by_parts,
        lambda factor: model.generate(inputs, max_new_tokens=2, return_type="tokens"),
    ]
    jobs = [(kind, 0.5 * i) for i in range(3) for kind in kinds]
    with torch.no_grad():
        expected = [kind(factor) for kind, factor in jobs]

        def work(job: tuple[Callable[[float], Tensor], float]) -> Tensor:
            with torch.no_grad():
                return job[0](job[1])

        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(work, jobs))
    assert [torch.equal(a, b) for a, b in zip(found, expected, strict=True)] == [True] * len(jobs)
    assert model.context_level == 0 and model.list_hooks() == {}


def test_sweeps_in_threads_do_not_mix() -> None:
    toy = copy_toy().eval()
    options = [
        asked(site=site, layer_window=window, metric=metrics.logit_diff(1, 2 + extra))
        for site, window in (
            *(("decoder.attn_out", 1), ("decoder.resid_pre", 2), ("decoder.attn.pattern", 1)),
        )
        for extra in (0, 1)
    ]
    for one in options:
        if "pattern" in one["site"]:
            one["axes"] = ("layer", "head")
    sweeps = [lambda one=one: patching.sweep(toy, **one) for one in options]
    sweeps += [lambda one=one: patching.attribute(toy, **one) for one in options]
    expected = [sweep() for sweep in sweeps]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda sweep: sweep(), sweeps))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.values, other.values) and one.report == other.report
        assert one.recipe == other.recipe  # nobody's hooks but one's own
    assert toy.attn_mode == "auto" and not toy.training


def test_a_thread_that_waits_for_long_says_so(
    model: HookedAudioTransformer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(running, "PATIENCE_S", 0.01)
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with model.alone():
            held.set()
            done.wait(5)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(5)
    threading.Timer(0.1, done.set).start()
    model(hf_inputs("whisper"))
    thread.join()
    assert "waiting for another thread" in caplog.text


def test_models_do_not_wait_for_each_other_and_still_pickle(model: HookedAudioTransformer) -> None:
    import copy

    other = copy.deepcopy(model)
    with model.alone(), ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: other(hf_inputs("whisper"))).result(20).isfinite().all()
