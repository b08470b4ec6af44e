"""A model that is cast later computes what one computes that was cast first: nothing was folded."""

from __future__ import annotations

import pytest
import torch
from test_parity import relative_difference

from audio_lens import HookedAudioTransformer
from families import FAMILIES
from families.base import Family


@pytest.mark.mostly_slow(3)
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@torch.no_grad()
def test_a_float32_model_made_float64_is_exact(family: Family) -> None:
    name = next(batch for batch in family.batches if batch not in family.no_float64)
    batch = family.batch(dtype=torch.float64, **family.batches[name])
    theirs = family.reference(family.build(dtype=torch.float64), batch)
    model = family.hooked(family.build(dtype=torch.float32)).to(torch.float64)
    model.attn_mode = "explicit"
    inputs = model.as_inputs(batch)
    _, cache = model.run_with_cache(inputs, names_filter=list(theirs))
    for hook, tensor in theirs.items():
        ours, expected = (family.mask_of(hook, x, inputs) for x in (cache[hook], tensor))
        assert relative_difference(expected, ours) <= 1e-12, hook


@pytest.mark.parametrize("name", ["wav2vec2", "wavlm", "beats"])
def test_weight_norm_is_computed_in_every_run(name: str) -> None:
    """So gains and directions can be trained, and are Hugging Face's own tensors."""
    model = FAMILIES[name].hooked(FAMILIES[name].build())
    conv = model.encoder.positions.convs[0]
    kernel = conv.weight
    expected = conv.weight_g * conv.weight_v / conv.weight_v.norm(dim=(0, 1), keepdim=True)
    assert torch.allclose(kernel, expected, rtol=1e-5)
    with torch.no_grad():
        conv.weight_g *= 2
    assert torch.allclose(conv.weight, 2 * kernel)


def test_a_model_whose_weight_norm_was_removed() -> None:
    family = FAMILIES["wav2vec2"]
    hf = family.build(dtype=torch.float64)
    batch = family.batch(dtype=torch.float64)
    with torch.no_grad():
        expected = hf(**batch).last_hidden_state
    torch.nn.utils.parametrize.remove_parametrizations(hf.encoder.pos_conv_embed.conv, "weight")
    model = HookedAudioTransformer.from_hf(hf)
    with torch.no_grad(), model.attention("explicit"):
        assert relative_difference(expected, model(batch)) < 1e-12
