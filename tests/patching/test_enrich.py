"""`edits.Enrich`: later layers are given what earlier ones computed in the same run."""

from __future__ import annotations

import pytest
import torch
from subjects import all_logits, batch, tiny_model

from audio_lens import Edit, InputError, edits, intervene, metrics, patching, places
from audio_lens.sites import SiteError

GIVERS, WEIGHTS, TAKERS = [0, 1, 3], [0.5, -0.2, 1.5], [1, 2, 4, 5]


@pytest.fixture(scope="module")
def inputs(embedded):
    noise = torch.randn(32_000, generator=torch.Generator().manual_seed(0)).numpy() * 0.1
    texts = ["Which digit is first?", "Ignore the sound. Which digit is second?"]
    return embedded.prepare([noise[:16_000], noise], texts, 16_000)


def enriched(alpha: float = 0.7, keep_norm: bool = True, **options) -> Edit:
    do = edits.Enrich(GIVERS, WEIGHTS, TAKERS, alpha, keep_norm)
    return Edit("decoder.attn_out", do, **{"where": "last"} | options)


def by_hand(model, inputs, alpha: float, keep_norm: bool):
    """The logits, with one hook function for each layer."""
    last, seen, hooks = places.locate(model, inputs, "decoder.attn_out", "last"), {}, []

    def hook_of(layer):
        def change(x, hook):
            x, seen[layer] = x.clone(), x.clone()
            for row, at in last.nonzero().tolist():
                before = x[row, at].clone()
                for giver, weight in zip(GIVERS, WEIGHTS, strict=True):
                    if layer in TAKERS and giver < layer:
                        x[row, at] += alpha * weight * seen[giver][row, at]
                if keep_norm and layer in TAKERS:
                    x[row, at] *= before.norm() / x[row, at].norm()
            return x

        return change

    for layer in range(6):
        hooks.append((f"decoder.blocks.{layer}.hook_attn_out", hook_of(layer)))
    with torch.no_grad():
        return model.run_with_hooks(inputs, fwd_hooks=hooks)


@pytest.mark.parametrize("keep_norm", [True, False])
def test_it_is_what_hooks_by_hand_make(embedded, inputs, keep_norm):
    expected = by_hand(embedded, inputs, 0.7, keep_norm)
    with torch.no_grad(), intervene(embedded, enriched(0.7, keep_norm)):
        found = embedded(inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[:, -1], embedded(inputs)[:, -1], atol=1e-2)
    run = patching.run(embedded, inputs, enriched(0.7, keep_norm))
    torch.testing.assert_close(run, expected, rtol=1e-4, atol=1e-4)


def test_norms_are_kept_where_it_acts_and_nothing_else_changes(embedded, inputs):
    site = "decoder.blocks.2.hook_attn_out"
    with torch.no_grad():
        _, before = embedded.run_with_cache(inputs, names_filter=site)
        with intervene(embedded, Edit("attn_out", edits.Enrich([0, 1], [1, 2], [2]), where="last")):
            _, after = embedded.run_with_cache(inputs, names_filter=site)
    last = places.locate(embedded, inputs, "decoder.attn_out", "last")
    assert torch.equal(before[site][~last], after[site][~last])
    torch.testing.assert_close(before[site][last].norm(dim=-1), after[site][last].norm(dim=-1))
    assert not torch.allclose(before[site][last], after[site][last], atol=1e-2)


@pytest.mark.parametrize("site", ["attn_out", "mlp_out", "resid_pre", "attn.z"])
def test_none_of_it_changes_nothing_to_the_last_bit(embedded, inputs, site):
    edit = Edit(site, edits.Enrich(GIVERS, WEIGHTS, TAKERS, 0.0))
    with torch.no_grad(), intervene(embedded, edit):
        changed = embedded(inputs)
    with torch.no_grad():
        assert torch.equal(changed, embedded(inputs))


def test_it_is_in_force_while_the_model_writes(embedded, inputs):
    plain = embedded.generate(inputs, max_new_tokens=4)
    with intervene(embedded, enriched(0.0)):
        assert embedded.generate(inputs, max_new_tokens=4) == plain
    with intervene(embedded, enriched(20.0)):
        written = embedded.generate(inputs, max_new_tokens=4)
        first = [embedded.tokenizer.decode(t) for t in embedded(inputs)[:, -1].argmax(-1)]
    assert written != plain
    assert all(text.startswith(one.strip()) for text, one in zip(written, first, strict=True))


def test_files_hold_it(embedded, inputs, tmp_path):
    edits.save(enriched(), tmp_path / "edits.json")
    (again,) = edits.load(tmp_path / "edits.json")
    assert torch.equal(
        patching.run(embedded, inputs, again), patching.run(embedded, inputs, enriched())
    )


@pytest.mark.parametrize("name", ["whisper", "qwen2_audio"])
def test_gradients_pass_from_layer_to_layer(name):
    model = tiny_model(name)
    inputs = model.as_inputs(batch(name, 0))
    alpha = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def value(alpha):
        with intervene(model, Edit("decoder.mlp_out", edits.Enrich([0], [1.0], [1], alpha))):
            return all_logits(model(inputs)).square().mean()

    value(alpha).backward()
    with torch.no_grad():
        slope = (value(alpha + 1e-5) - value(alpha - 1e-5)) / 2e-5
    assert alpha.grad.item() == pytest.approx(slope.item(), rel=1e-4) and slope != 0


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (lambda: edits.Enrich([], [], [1]), InputError, "givers of Enrich"),
        (lambda: edits.Enrich([0], [1.0], [1, 1]), InputError, "takers of Enrich are layers"),
        (lambda: edits.Enrich([0, 1], [1.0], [2]), InputError, "2 givers need as many weights"),
        (lambda: edits.Enrich([0], [1.0], [6]), SiteError, "lie in 0 to 5, got 6"),
    ],
)
def test_layers_that_are_none_are_refused(embedded, inputs, given, kind, message):
    with pytest.raises(kind, match=message):
        patching.run(embedded, inputs, Edit("attn_out", given(), where="last"))


def test_what_it_cannot_reach_is_named(embedded, inputs):
    do = edits.Enrich([0], [1.0], [2])
    with pytest.raises(InputError, match="takes from layer 0, which this edit did not see"):
        patching.run(embedded, inputs, Edit("attn_out", do, layer=2, where="last"))
    with pytest.raises(SiteError, match="lies outside the blocks"):
        patching.run(embedded, inputs, Edit("connector.out", do))
    with pytest.raises(SiteError, match="edits vectors"):
        patching.run(embedded, inputs, Edit("attn.pattern", do))
    with pytest.raises(InputError, match="Enrich goes from block to block"):
        patching.ablate(
            embedded,
            inputs,
            site="attn_out",
            axes="layer",
            value=do,
            metric=metrics.log_prob("one"),
        )
