"""TransformerLens's direct paths on parts, against hooks on the normed input of one head."""

from __future__ import annotations

import pytest
import torch

import tiny
from audio_lens import HookedAudioTransformer
from audio_lens.errors import InputError
from audio_lens.metrics import logit_diff
from audio_lens.pairs import Pair
from audio_lens.patching import transformer_lens as patching
from toys import Cue, prompt, two_path_toy

THROUGH = 0.5


@pytest.fixture(scope="module")
def toy():
    return two_path_toy(THROUGH)


def both(model, clean, corrupted):
    names = [f"decoder.blocks.{n}.attn.hook_z" for n in range(model.cfg.decoder.n_layers)]
    return [model.run_with_cache(one, names_filter=names)[1] for one in (clean, corrupted)]


def test_the_planted_path_is_found(toy):
    pair = Pair(prompt(Cue(1)), prompt(Cue(2)))
    part, caches = toy.part("decoder"), both(toy, **pair)
    given = (part, pair.corrupted, *caches, logit_diff(1, 2))
    values = patching.get_act_patch_direct_path(*given, 0, 0, "v", verbose=False)
    expected = torch.full((3, 2), -(1 + THROUGH))
    expected[0] = 0
    expected[1, 1] += 2 * THROUGH
    torch.testing.assert_close(values, expected)
    every = patching.get_act_patch_direct_path_all_sources(*given, "v", verbose=False)
    assert every.shape == (3, 2, 3, 2)
    torch.testing.assert_close(every[0, 0], values)


def test_keys_of_shared_heads_are_refused_by_name(embedded):
    part = embedded.part("decoder")
    with pytest.raises(InputError, match=r"6 heads share 2 key-value heads \(GQA\).*L3G0.k"):
        patching.get_act_patch_direct_path(part, {}, {}, {}, logit_diff(1, 2), 0, 0, "k")
    with pytest.raises(InputError, match="no head 6 of block 0"):
        patching.get_act_patch_direct_path(part, {}, {}, {}, logit_diff(1, 2), 0, 6)
    with pytest.raises(InputError, match="component is"):
        patching.get_act_patch_direct_path(part, {}, {}, {}, logit_diff(1, 2), 0, 0, "z")


def test_blocks_without_one_stream_are_refused_by_name():
    model = HookedAudioTransformer.from_hf(tiny.tiny_hf("wav2vec2"))
    with pytest.raises(InputError, match="one plain residual stream"):
        patching.get_act_patch_direct_path_all_sources(
            model.part("encoder"), {}, {}, {}, lambda logits: logits.mean()
        )
