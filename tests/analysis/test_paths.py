"""Path patching: planted paths, the slow obvious way, real speech, and what is refused."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

import tiny
from audio_lens import HookedAudioTransformer, metrics
from audio_lens.analysis import paths
from audio_lens.analysis.paths import Nodes
from audio_lens.edits import Edit, Scale, intervene
from audio_lens.errors import InputError
from audio_lens.items import rerun
from audio_lens.pairs import Pair
from audio_lens.timeline import Span
from items.speech import spoken_items
from toys import Cue, prompt, two_path_toy

THROUGH = 0.5
SHARE = 1 / (1 + THROUGH)  # of the direct way
CLASSES = metrics.logit_diff(1, 2)


@pytest.fixture(scope="module")
def toy():
    return two_path_toy(THROUGH)


@pytest.fixture(scope="module")
def cues() -> Pair:
    return Pair(prompt(Cue(1)), prompt(Cue(2)))


@pytest.fixture(scope="module")
def double() -> HookedAudioTransformer:
    return HookedAudioTransformer.from_pretrained("embedded", dtype=torch.float64)


@pytest.fixture(scope="module")
def spoken():
    """Two pairs of unseen speakers, as a batch."""
    return spoken_items(2).pairs()


# -------------------------------------------------------------------------------- toys


@pytest.mark.parametrize("strict", [True, False])
def test_shares_of_two_paths_add_up(toy, cues, strict):
    receivers = ["logits", "L1H1.v", "L1H1.q", "L1H0.v", "L2.mlp"]
    found = paths.path(toy, cues, ["L0H0"], receivers, metric=CLASSES, strict=strict)
    shares = found.estimate[0, 0]
    expected = torch.tensor([SHARE, 1 - SHARE, 0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(shares, expected, rtol=0, atol=1e-8)
    assert abs(shares.sum() - 1) < 1e-8
    assert found.controls["identity"].estimate.abs().max() < 1e-12


def test_all_senders_at_once_are_the_whole_effect(toy, cues):
    found = paths.path(toy, cues, "all", "logits", metric=CLASSES)
    singles = dict(zip(found.coords["sender"], found.estimate[0, :, 0].tolist(), strict=True))
    assert {name for name, share in singles.items() if abs(share) > 1e-12} == {"L0H0", "L1H1"}
    assert singles["L0H0"] == pytest.approx(SHARE)
    assert found.controls["together"].estimate.item() == pytest.approx(1, abs=1e-12)
    assert "most comes directly from L0H0 0.67, L1H1 0.33" in found.report[0]
    assert "all senders at once give 1.00, the single ones add up to 1.00" in found.report[0]


def test_audio_positions_send(toy, cues):
    cue = Span(0.24, 0.28)  # of audio token 6
    senders = {
        "cue": cue,
        "before": Span(0.0, 0.2),
        "audio": "connector",
        "both": ["audio", "text"],
    }
    found = paths.path(toy, cues, senders, "L0H0.v", metric=CLASSES)
    assert found.coords["sender"] == list(senders)
    assert found.estimate.flatten().tolist() == pytest.approx([1, 0, 1, 1], abs=1e-12)


def test_receivers_are_replaced_together(toy, cues):
    both = {"both": ["L1H1.v", "L2.mlp"]}
    found = paths.path(toy, cues, "heads", both, metric=CLASSES)
    assert found.select(sender="L0H0").estimate.item() == pytest.approx(1 - SHARE)
    assert found.select(sender="L2H0").estimate.isnan().sum() == 0  # its MLP runs behind


def test_a_receiver_before_its_sender_is_none(toy, cues):
    found = paths.path(toy, cues, ["L0H0", "L2H1"], ["L1H1.v", "logits"], metric=CLASSES)
    assert found.estimate[0].isnan().tolist() == [[False, False], [True, False]]


# -------------------------------------------------------------------------------- the slow way


def by_hooks(model, batch, senders, receiver, strict, metric):
    """Everything but the senders is held by hooks; then the receiver alone is given its input."""
    clean, corrupted = batch.pair.clean, batch.pair.corrupted
    layers = range(model.cfg.decoder.n_layers)
    names = [
        f"decoder.blocks.{layer}.{x}" for layer in layers for x in ("attn.hook_z", "hook_mlp_out")
    ]
    names.append("decoder.hook_embed")
    heard = model.encode(clean)
    held, other = (
        model.run_with_cache(one, names_filter=names, return_cache_object=False)[1]
        for one in (clean, corrupted)
    )

    def hold(x, hook):
        x = held[hook.name].clone()
        for sender in senders:
            if sender == "embed" and hook.name == "decoder.hook_embed":
                return other[hook.name]
            if hook.name == f"decoder.blocks.{sender[1:].partition('.')[0]}.hook_mlp_out":
                return other[hook.name]
            layer, _, head = sender[1:].partition("H")
            if hook.name == f"decoder.blocks.{layer}.attn.hook_z":
                x[:, :, int(head)] = other[hook.name][:, :, int(head)]
        return x

    sent = [f"decoder.blocks.{s[1:-4]}.hook_mlp_out" for s in senders if s.endswith(".mlp")]
    held_names = [n for n in names if strict or n in sent or not n.endswith("mlp_out")]
    freezing = [(name, hold) for name in held_names]
    if receiver == "logits":
        return metric(model.run_with_hooks(clean, encoder_out=heard, fwd_hooks=freezing))
    block, _, side = receiver[1:].partition(".")
    block, head = (int(x) for x in re.split("[HG]", block)) if side != "mlp" else (int(block), 0)
    name = f"decoder.blocks.{block}.attn.hook_{side}"
    if receiver.endswith(".mlp"):
        name = f"decoder.blocks.{block}.hook_mlp_out"
        freezing = [(n, f) for n, f in freezing if n != name]
    kept = {}
    keep = (name, lambda x, hook: kept.update({name: x.clone()}))
    model.run_with_hooks(clean, encoder_out=heard, fwd_hooks=[*freezing, keep])

    def put(x, hook):
        if receiver.endswith(".mlp"):
            return kept[name]
        x = x.clone()
        x[:, :, head] = kept[name][:, :, head]
        return x

    return metric(model.run_with_hooks(clean, encoder_out=heard, fwd_hooks=[(name, put)]))


@pytest.mark.slow
@pytest.mark.parametrize("strict", [True, False])
@torch.no_grad()
def test_the_fast_way_gives_what_hooks_give(double, spoken, strict):
    kept = spoken.kept(double)[0]
    batch = next(kept.batches(double))
    metric = metrics.log_prob([kept.clean[row].answer for row in batch.rows])
    read = metric.bind(double, batch.pair.clean)
    senders = [["embed"], ["L1H0", "L2.mlp", "L2H3"]]
    receivers = ["logits", "L3H2.q", "L3G1.k", "L3.mlp"]
    found = paths.path(
        double, batch.pair, senders, receivers, metric=metric, strict=strict, controls=[]
    )
    clean, corrupted = (read(double(one)) for one in batch.pair.values())
    for sent, name in zip(senders, found.coords["sender"], strict=True):
        for receiver in receivers:
            slow = by_hooks(double, batch, sent, receiver, strict, read)
            share = found.select(sender=name, receiver=receiver).values[0]
            lost = (share * (clean - corrupted)).double()
            torch.testing.assert_close(
                lost, clean - slow, rtol=0, atol=1e-10, msg=f"{name} {receiver}"
            )


# -------------------------------------------------------------------------------- real speech


def test_of_real_speech_the_whole_input_is_the_whole_effect(embedded, spoken):
    found = paths.path(embedded, spoken, "all", "logits", progress=False)
    assert found.controls["together"].estimate.tolist() == [[pytest.approx(1, abs=1e-4)]] * 2
    assert found.controls["identity"].estimate.abs().max() < 1e-4
    assert found.meta["method"] == "paths.path"
    assert found.n_kept == len(found.coords["stimulus"])
    again = rerun(found, embedded, spoken)
    assert torch.equal(again.values, found.values)


def test_whispers_decoder_hears_by_heads_of_cross_attention():
    model = HookedAudioTransformer.from_hf(tiny.tiny_hf("whisper"))
    clean = model.as_inputs(tiny.hf_inputs("whisper"))
    pair = Pair(clean, replace(clean, features=clean.features.flip(-1)))
    receivers = ["logits", "L1C0.q", "L1.mlp"]
    found = paths.path(model, pair, "all", receivers, metric=metrics.logit_diff(5, 6))
    assert {"embed", "L0H0", "L0C1", "L1.mlp"} <= set(found.coords["sender"])
    at_once = found.controls["together"].values
    torch.testing.assert_close(at_once[..., 0], torch.ones_like(at_once[..., 0]), atol=1e-3, rtol=0)
    assert found.select(sender="L0C1").values.isfinite().all()
    with pytest.raises(InputError, match="hears by cross-attention"):
        paths.path(model, pair, "audio", "logits", metric=metrics.logit_diff(5, 6))
    with pytest.raises(InputError, match="read the encoder, not the stream"):
        paths.path(model, pair, "heads", "L1C0.k", metric=metrics.logit_diff(5, 6))


# -------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("senders", "receivers", "told"),
    [
        (["L9H0"], "logits", "the decoder has 6 blocks"),
        (["L1H6"], "logits", "there are 6 heads"),
        (["nobody"], "logits", "'nobody' is no sender"),
        (["L1G0.k"], "logits", "is no sender"),
        (["L1C0"], "logits", "has no cross-attention"),
        ([], "logits", "senders names at least one"),
        (["L1H0"], ["L2H3.k"], "share 2 key-value heads.*L2G1.k"),
        (["L1H0"], [(2, 3, "v")], "share 2 key-value heads.*L2G1.v"),
        (["L1H0"], ["L2G1.q"], "queries are of a head"),
        (["L1H0"], ["L2G2.k"], "2 heads with a k"),
        (["L1H0"], ["L2H0"], "is no receiver"),
        (["L1H0"], ["L1H0.q"], "no receiver runs behind a sender"),
        (["L1H0"], [["logits", "L2.mlp"]], "logits are a receiver of their own"),
    ],
)
def test_what_is_not_there_is_named(embedded, spoken, senders, receivers, told):
    with pytest.raises(InputError, match=told):
        paths.path(embedded, spoken, senders, receivers)


def test_what_cannot_be_followed_is_refused(embedded, spoken, toy, cues):
    with pytest.raises(InputError, match="pass metric="):
        paths.path(toy, cues, "heads", "logits")
    with pytest.raises(InputError, match="no control 'nothing'"):
        paths.path(embedded, spoken, "heads", "logits", controls=["nothing"])
    with pytest.raises(InputError, match="a pair is Pairs"):
        paths.path(embedded, 3, "heads", "logits")
    with pytest.raises(InputError, match="one value for each prompt"):
        paths.path(toy, cues, "heads", "logits", metric=lambda logits: logits.mean())
    off = Edit("decoder.attn.z", Scale(0.0), layer=1)
    with intervene(toy, off):
        toy(cues.clean)
        with pytest.raises(InputError, match="take hooks and edits off"):
            paths.path(toy, cues, "heads", "logits", metric=CLASSES)


def test_models_without_one_stream_are_named():
    model = HookedAudioTransformer.from_hf(tiny.tiny_hf("wav2vec2"))
    with pytest.raises(InputError, match="has none"):
        Nodes(model)
