"""`run` equals whole forwards with the edits in force, and runs nothing that they cannot change."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from subjects import SITES, all_logits, batch, tiny_model

from audio_lens import Edit, InputError, Words, edits, intervene, metrics, patching
from audio_lens.sites import Site, unit_count

QUICK = SITES[5::70]
CASES = [
    pytest.param(name, site, id=f"{name}: {site}", marks=[] if (name, site) in QUICK else slow)
    for slow in [[pytest.mark.slow]]
    for name, site in SITES
]


def edits_at(model, inputs, site: Site) -> list[Edit]:
    """Two edits of a site at the rows' later positions."""
    valid = model.timeline(inputs).mask(site.positions_of)
    where = valid & (valid.cumsum(1) > valid.sum(1, keepdim=True) // 2)
    units = {} if site.unit is None else {site.unit: unit_count(model, site) - 1}
    layers = None if site.n_layers is None else sorted({site.n_layers // 2, site.n_layers - 1})
    place: dict[str, Any] = {"layer": layers, "where": where, **units}
    found = [Edit(str(site), edits.Scale(0.3), **place)]
    if site.last == "attn_scores":
        return [*found, Edit(str(site), edits.Multiply(0.4, "all"), **place)]
    return [*found, Edit(str(site), edits.Scale(-1.2), **place)]


@pytest.mark.parametrize(("name", "site"), CASES)
def test_a_run_equals_a_whole_forward(name: str, site: Site) -> None:
    model = tiny_model(name)
    inputs = model.as_inputs(batch(name, 0))
    own = edits_at(model, inputs, site)
    with torch.no_grad(), intervene(model, own):
        whole = model(inputs)
    for _ in range(2):  # the second starts from what the first kept
        found = patching.run(model, inputs, own, {"all": all_logits})["all"]
        torch.testing.assert_close(found, all_logits(whole), rtol=1e-10, atol=1e-10)
    logits = patching.run(model, inputs, own)
    attended = model.output_attended(inputs) if logits.ndim == 3 else slice(None)
    torch.testing.assert_close(logits[attended], whole[attended], rtol=1e-10, atol=1e-10)
    base = patching.run(model, inputs, [], all_logits)
    assert not torch.allclose(base, found, rtol=1e-9, atol=1e-9)


@pytest.fixture(scope="module")
def inputs(embedded):
    noise = torch.randn(24_000, generator=torch.Generator().manual_seed(0)).numpy() * 0.1
    return embedded.prepare([noise[:16_000], noise], "Which digit is second?", 16_000)


@pytest.fixture
def counted(embedded, monkeypatch) -> dict[str, int]:
    """How often blocks of both parts ran."""
    counts = {"encoder": 0, "decoder": 0}

    def counting(part: str, forward: Any) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            counts[part] += 1
            return forward(*args, **options)

        return run

    for part in counts:
        for block in getattr(embedded, part).blocks:
            monkeypatch.setattr(block, "forward", counting(part, block.forward))
    return counts


METRIC = metrics.logit_diff("two", "seven")


def test_the_encoder_and_earlier_blocks_run_once(embedded, inputs, counted) -> None:
    inputs = embedded.prepare(inputs.audio, "Which digit is second?", 16_000)
    at = [Edit("resid_pre", edits.Scale(0.5), layer=layer, where="last") for layer in range(6)]
    patching.run(embedded, inputs, at[0], METRIC)
    assert counted["encoder"] == embedded.cfg.encoder.n_layers
    counted.update(encoder=0, decoder=0)
    for edit in at:
        patching.run(embedded, inputs, edit, METRIC)
    assert counted["encoder"] == 0
    assert counted["decoder"] == sum(range(1, 7))


def test_several_metrics_and_those_that_compare(embedded, inputs) -> None:
    edit = Edit("decoder.attn.attn_scores", edits.Block("audio"), layer=[3, 4], where="last")
    found = patching.run(embedded, inputs, edit, {"diff": METRIC, "kl": metrics.kl()})
    with torch.no_grad(), intervene(embedded, edit):
        whole = embedded(inputs)
    plain = embedded(inputs).detach()
    expected = metrics.kl().bind(embedded, inputs, plain)(whole)
    torch.testing.assert_close(found["kl"], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        found["diff"], METRIC.bind(embedded, inputs)(whole), atol=1e-4, rtol=1e-4
    )
    assert (found["kl"] > 0).all()
    unedited = patching.run(embedded, inputs, [], {"diff": METRIC, "kl": metrics.kl()})
    torch.testing.assert_close(unedited["kl"], torch.zeros(2), atol=1e-6, rtol=0)


def test_hooks_of_ones_own_stay_in_force(embedded, inputs) -> None:
    edit = Edit("resid_pre", edits.Scale(0.5), layer=3, where="last")
    without = patching.run(embedded, inputs, edit, METRIC)
    hook = ("decoder.blocks.4.hook_mlp_out", lambda x, hook: 0.0 * x)
    with torch.no_grad(), embedded.hooks([hook]):
        found = patching.run(embedded, inputs, edit, METRIC)
        with intervene(embedded, edit):
            expected = METRIC.bind(embedded, inputs)(embedded(inputs))
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, without)
    torch.testing.assert_close(patching.run(embedded, inputs, edit, METRIC), without)


def test_what_changed_since_is_run_again(embedded, inputs) -> None:
    edit = Edit("resid_pre", edits.Scale(0.5), layer=3, where="last")
    before = patching.run(embedded, inputs, edit, METRIC)
    weight = embedded.encoder.blocks[0].attn.v_proj.weight
    with torch.no_grad():
        kept = weight.clone()
        weight.mul_(3)
        changed = patching.run(embedded, inputs, edit, METRIC)
        weight.copy_(kept)
    assert not torch.allclose(changed, before)
    torch.testing.assert_close(patching.run(embedded, inputs, edit, METRIC), before)


def test_what_inputs_keep_goes_with_them(embedded, inputs) -> None:
    patching.run(embedded, inputs, [], METRIC)
    size = len(pickle.dumps(inputs))
    assert size < 2 * sum(x.nbytes for x in (inputs.features, inputs.tokens)) + 1e6
    assert "_unedited" not in vars(copy.copy(inputs))
    other = embedded.prepare(inputs.audio, "Which digit is first?", 16_000)
    patching.run(embedded, other, [], METRIC)
    assert "_unedited" in vars(other)
    assert "_unedited" not in vars(inputs)


def test_a_single_forward_has_no_decoding_steps(embedded, inputs) -> None:
    edit = Edit("resid_pre", edits.Scale(0.5), layer=3, where="last", when="decode")
    with pytest.raises(InputError, match="nothing to edit"):
        patching.run(embedded, inputs, edit, METRIC)
    with pytest.raises(InputError, match="not in the text"):
        patching.run(
            embedded, inputs, Edit("resid_pre", edits.Scale(0), where=Words("xyz")), METRIC
        )
