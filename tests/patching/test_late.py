"""Beside hooks, cells start at the first block that is patched or hooked, and equal whole runs."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import loops
import pytest
import torch
from subjects import SITES, all_logits, pair, tiny_model

from audio_lens import Edit, edits, intervene, patching
from audio_lens.patching.engine.hooked import HookedRoute, LateRoute

IN_BLOCKS = [
    (name, site)
    for name, site in SITES
    if site.n_layers is not None
    and site.part in (*tiny_model(name).cfg.is_heard_in, "decoder")
    and tiny_model(name).cfg.parts[site.part].n_layers > 1
]  # outside them nothing can be left out
QUICK = IN_BLOCKS[::70]
CASES = [
    pytest.param(*one, id=f"{one[0]}: {one[1]}", marks=[] if one in QUICK else pytest.mark.slow)
    for one in IN_BLOCKS
]


@contextmanager
def remembering(model: Any, part: str, first: int):
    """Hooks that know of each other: a later block gets what an earlier one saw, in every run."""
    seen: dict[str, torch.Tensor] = {}
    last = model.cfg.parts[part].n_layers - 1

    def see(x: torch.Tensor, hook: Any) -> None:
        seen["x"] = x

    def add(x: torch.Tensor, hook: Any) -> torch.Tensor:
        return x + 0.5 * seen["x"]

    names = [f"{part}.blocks.{layer}.hook_resid_pre" for layer in (first, last)]
    with model.hooks([(names[0], see), (names[1], add)]):
        yield


@pytest.mark.parametrize(("name", "site"), CASES)
def test_sweeps_beside_hooks_equal_whole_forwards(name, site):
    model = tiny_model(name)
    asked = pair(name) | {"site": str(site), "axes": "layer", "metric": all_logits}
    with remembering(model, site.part, first=1):
        loops.assert_exact(model, **asked)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_what_lies_before_the_first_hook_runs_once(part):
    model = tiny_model("qwen2_audio")
    asked = {"site": f"{part}.resid_pre", "axes": "layer", "metric": all_logits}
    calls = {"n": 0}

    def count(module: Any, given: Any) -> None:
        calls["n"] += 1

    with remembering(model, part, first=1):
        plan = patching.plan(model, **pair("qwen2_audio"), **asked)
        assert plan.request.route is LateRoute and plan.request.first_hooked == 1
        handles = [
            module.register_forward_pre_hook(count)
            for module in (model.encoder.blocks[0], getattr(model, part).blocks[0])
        ]
        try:
            result = plan.run(only=[1, 2], progress=False)
            before = calls["n"]
            plan.run(only=[1, 2], progress=False)
        finally:
            for handle in handles:
                handle.remove()
    assert calls["n"] == before, "cells behind the first hook run no earlier block"
    told = f"from block 1 of the {part} at most"
    assert any(told in note for note in result.report)


@pytest.mark.parametrize(
    ("name", "route"),
    [
        ("decoder.hook_embed", HookedRoute),
        ("encoder.blocks.1.hook_mlp_out", HookedRoute),
        ("decoder.blocks.0.hook_mlp_out", HookedRoute),
        ("decoder.blocks.2.hook_mlp_out", LateRoute),
        ("decoder.ln_final.hook_scale", LateRoute),
    ],
)
def test_hooks_before_the_blocks_leave_nothing_out(name, route):
    model = tiny_model("qwen2_audio")
    assert name in model.hook_dict
    with model.hooks([(name, lambda x, hook: 0.9 * x)]):
        asked = pair("qwen2_audio") | {"site": "decoder.resid_mid", "axes": "layer"}
        plan = patching.plan(model, **asked, metric=all_logits)
        assert plan.request.route is route
        loops.assert_exact(model, **asked, metric=all_logits)


def test_edits_in_force_are_hooks_too():
    model = tiny_model("qwen2_audio")
    asked = pair("qwen2_audio") | {"site": "decoder.resid_pre", "axes": ("layer", "time")}
    with intervene(model, Edit("decoder.mlp_out", edits.Scale(0.5), layer=2)):
        assert patching.plan(model, **asked, metric=all_logits).request.route is LateRoute
        loops.assert_exact(model, **asked, metric=all_logits)
