"""Ears beside the encoder, streams of several blocks and biased attention, started late.

That their cells equal whole forwards, site by site, is held by the tests of every family; here is
that nothing runs again which cannot change.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import loops
import pytest
import torch
from subjects import all_logits, batch, pair, tiny_model

from audio_lens import Edit, edits, intervene, patching
from audio_lens.models.layers import KVCache
from audio_lens.patching.engine import bidirectional, work
from audio_lens.patching.engine.hooked import LateRoute, SuffixRoute
from audio_lens.patching.engine.routes import ConnectorRoute, EncoderRoute
from audio_lens.patching.engine.trace import PackedRows, blocks_of, crosses_of


@contextmanager
def counting(model: Any, *parts: str) -> Iterator[dict[str, list[int]]]:
    """How often every block of some parts runs."""
    counts = {part: [0] * len(getattr(model, part).blocks) for part in parts}
    handles = []
    for part in parts:
        for layer, block in enumerate(getattr(model, part).blocks):

            def count(module: Any, given: Any, own: list[int] = counts[part], at: int = layer):
                own[at] += 1

            handles.append(block.register_forward_pre_hook(count))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize(
    ("name", "site", "route", "idle"),
    [
        ("salmonn", "beats.resid_pre", SuffixRoute, {"encoder": [0, 1, 2], "beats": [0, 1]}),
        ("salmonn", "encoder.resid_pre", EncoderRoute, {"encoder": [0, 1], "beats": [0, 1, 2]}),
        ("desta25", "encoder.resid_pre", EncoderRoute, {"encoder": [0, 1]}),
        ("salmonn", "connector.in", ConnectorRoute, {"encoder": [0, 1, 2], "beats": [0, 1, 2]}),
        ("desta25", "connector.in", ConnectorRoute, {"encoder": [0, 1, 2]}),
    ],
)
def test_what_cannot_change_runs_once(name: str, site: str, route: type, idle: dict) -> None:
    """A patch of block 2, or behind the ears: earlier blocks and other ears run no more."""
    model = tiny_model(name)
    axes = "layer" if "connector" not in site else "position"
    plan = patching.plan(model, **pair(name), site=site, axes=axes, metric=all_logits)
    assert plan.request.route is route
    plan.run(only=[0], progress=False)  # both unpatched runs
    with counting(model, *idle) as counts:
        result = plan.run(only=[2], progress=False)
    for part, blocks in idle.items():
        assert [counts[part][block] for block in blocks] == [0] * len(blocks), counts
    assert not any("whole forward" in note for note in result.report)


@pytest.mark.parametrize("site", ["connector.in", "connector.out"])
def test_in_front_of_a_decoder_of_its_own_kind_the_ear_runs_once(site: str) -> None:
    model = copy.deepcopy(tiny_model("qwen2_audio"))
    for block in model.decoder.blocks:
        kind = type(block)
        own = {
            "forward": lambda self, resid, context, kind=kind: kind.forward(self, resid, context)
        }
        block.__class__ = type("Own", (kind,), own)
    asked = pair("qwen2_audio") | {"site": site, "axes": "time", "metric": all_logits}
    plan = patching.plan(model, **asked, windows=0.04)
    assert plan.request.route is SuffixRoute
    plan.run(only=[0], progress=False)
    with counting(model, "encoder") as counts:
        result = plan.run(only=[1], progress=False)
    assert counts == {"encoder": [0] * len(counts["encoder"])}
    assert any("the decoder is of its own kind" in note for note in result.report)
    loops.assert_exact(model, loops.evenly(4), **asked, windows=0.04)


def test_sweeps_of_a_second_ear_beside_edits_start_late() -> None:
    model, name = tiny_model("salmonn"), "salmonn"
    asked = pair(name) | {"site": "beats.mlp_out", "axes": "layer", "metric": all_logits}
    with intervene(model, Edit("beats.attn_out", edits.Scale(0.5), layer=2)):
        assert patching.plan(model, **asked).request.route is LateRoute
        loops.assert_exact(model, **asked)


def test_runs_with_edits_of_a_second_ear_start_late() -> None:
    model = tiny_model("salmonn")
    inputs = model.as_inputs(batch("salmonn", 0))
    own = [Edit("beats.mlp_out", edits.Scale(0.3), layer=2)]
    with torch.no_grad(), intervene(model, own):
        whole = all_logits(model(inputs))
    found = patching.run(model, inputs, own, all_logits)
    with counting(model, "encoder", "beats") as counts:  # the first call kept what is unedited
        again = patching.run(model, inputs, own, all_logits)
    assert counts == {"encoder": [0, 0, 0], "beats": [0, 0, 1]}
    for one in (found, again):
        torch.testing.assert_close(one, whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("site", ["encoder.resid_pre", "encoder.attn.z"])
def test_windows_share_what_biased_attention_finds_beside_them(
    site: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """WavLM's gate reads the stream: queries in a window are biased otherwise, others are not."""
    made: list[bool] = []
    init = bidirectional.Complement.__init__

    def watched(self: Any, *arguments: Any) -> None:
        init(self, *arguments)
        made.append(self.bias is not None)

    monkeypatch.setattr(bidirectional.Complement, "__init__", watched)
    monkeypatch.setattr(bidirectional, "_WIDEST", 1.0)
    loops.assert_exact(
        tiny_model("wavlm"),
        loops.evenly(9),
        **pair("wavlm"),
        site=site,
        axes=("layer", "time"),
        windows=0.02,
        metric=all_logits,
    )
    assert made and all(made)


def test_a_decoder_hears_several_cells_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One cell fills the encoder, and a prompt of a few tokens asks what several cells give."""
    heard: list[int] = []
    read = EncoderRoute._read_by_attention

    def watched(route: Any, cell: torch.Tensor, *rest: Any) -> Any:
        heard.append(len(cell))
        return read(route, cell, *rest)

    monkeypatch.setattr(EncoderRoute, "_read_by_attention", watched)
    monkeypatch.setattr(work, "_ROWS_TOGETHER", {"cpu": 14})
    asked = pair("whisper", "one") | {"site": "encoder.resid_pre", "axes": ("layer", "time")}
    loops.assert_exact(tiny_model("whisper"), **asked, windows=0.06, metric=all_logits)
    n_tokens = asked["clean"]["decoder_input_ids"].shape[1]
    assert max(heard) == work._ASKING_TOGETHER // n_tokens > 1


@pytest.mark.parametrize("prompts", [[0, 0, 0, 1], [2, 1, 2, 2, 2, 2, 0, 2, 2], [1, 1], [0, 1, 2]])
def test_rows_of_several_prompts_read_their_own_memories(prompts: list[int]) -> None:
    (attn,) = crosses_of(blocks_of(tiny_model("whisper").decoder)[0])
    of_row, heads = torch.tensor(prompts), (attn.n_heads, attn.d_head)
    q = torch.randn(1, len(prompts), *heads, dtype=torch.float64)
    k, v = (torch.randn(3, 7, *heads, dtype=torch.float64) for _ in range(2))
    allowed = torch.ones(3, 1, 1, 7, dtype=torch.bool)
    allowed[1, ..., 4:] = False
    past = KVCache({attn.name: (k, v)})
    context = PackedRows(memory=None, memory_allowed=allowed, past=past, prompts=of_row)
    found = context.read(attn, q)
    for row, prompt in enumerate(prompts):
        own = slice(prompt, prompt + 1)
        alone = attn.mix(q[:, row : row + 1], k[own], v[own], allowed[own])
        torch.testing.assert_close(found[:, row : row + 1], alone, rtol=1e-12, atol=1e-12)
