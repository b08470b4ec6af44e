"""Attention rollout: against the product by hand, and a toy whose copying is known."""

from __future__ import annotations

import pytest
import torch

from analysis import answering
from audio_lens.analysis import knockout
from audio_lens.errors import InputError
from audio_lens.items import demo_items


def test_rollout_is_the_product_of_patterns(embedded):
    items = demo_items()[:2]
    result = knockout.rollout(embedded, items, residual=0.3, progress=False)
    for item in items:
        inputs = embedded.prepare([item.clip], [item.text])
        _, cache = embedded.run_with_cache(inputs, attention=True)
        rolled = torch.eye(inputs.tokens.shape[1]).double()
        is_audio = inputs.tokens[0] == embedded.audio_token_id
        for layer in range(6):
            mean = cache[f"decoder.blocks.{layer}.attn.hook_pattern"][0].double().mean(0)
            rolled = (0.3 * torch.eye(len(rolled)).double() + 0.7 * mean) @ rolled
            at = {"stimulus": item.id, "layer": layer}
            for name, mask in (("audio", is_audio), ("text", ~is_audio)):
                wanted = float(rolled[-1, mask].sum())
                assert float(result.select(group=name, **at).values) == pytest.approx(wanted)


def test_one_head_of_two_brings_a_quarter_of_the_copied_frame():
    toy = answering.copying(n_layers=3, layer=1)
    frame = 6  # the toy's head attends to it alone; all others attend evenly
    result = knockout.rollout(toy, answering.items(1), keys={"cue": frame}, progress=False)
    even = result.controls["even"].mean().values[0].tolist()
    share = result.mean().values[0].tolist()
    last = 0.5 / 12  # of the question after block 0, in which all attend evenly
    own = 0.5 + 0.5 / 7  # of the frame itself
    all_others = (0.5 + sum(0.5 / (place + 1) for place in range(6, 12))) / 12
    assert share[0] == pytest.approx(last) and even[0] == pytest.approx(last)
    assert share[1] == pytest.approx(0.5 * last + 0.25 * own + 0.25 * all_others)
    assert even[1] == pytest.approx(0.5 * last + 0.5 * all_others)


def test_all_positions_together_hold_everything():
    toy = answering.copying()
    result = knockout.rollout(toy, answering.items(1), keys="all", progress=False)
    torch.testing.assert_close(result.values, torch.ones_like(result.values))


def test_what_cannot_be_rolled_out_says_why(embedded):
    items = demo_items()[:2]
    with pytest.raises(InputError, match="keys name at least one"):
        knockout.rollout(embedded, items, keys={})
    with pytest.raises(InputError, match="residual must be"):
        knockout.rollout(embedded, items, residual=1.5)
