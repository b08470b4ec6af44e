"""TransformerLens's direct paths on parts, against hooks on the normed input of one head."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tiny
from audio_lens import HookedAudioTransformer
from audio_lens.errors import InputError
from audio_lens.metrics import logit_diff
from audio_lens.pairs import Pair
from audio_lens.patching import transformer_lens as patching
from families import FAMILIES
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


# -------------------------------------------------------------------------------- the slow way


def spread(logits: torch.Tensor) -> torch.Tensor:
    return logits.double().square().mean()


def held_in(model, part: str) -> list[str]:
    """What every block of a part writes."""
    names = [n for n in model.hook_dict if n.startswith(f"{part}.blocks.")]
    return [n for n in names if n.endswith((".hook_z", ".hook_mlp_out", ".hook_adapter_out"))]


def by_hooks(model, part, pair, caches, source, receiver, component):
    """All that blocks write is held but the source's; then one head alone is given what it reads.

    Cross-attention's writes are held, too, so that only the stream carries the change.
    """
    written = f"{part}.blocks.{source[0]}.attn.hook_z"
    name = f"{part}.blocks.{receiver[0]}.attn.hook_{component}"
    clean, corrupted = caches

    def hold(x, hook):
        x = corrupted[hook.name].clone()
        if hook.name == written:
            x[:, :, source[1]] = clean[written][:, :, source[1]]
        return x

    kept = {}
    keep = (name, lambda x, hook: kept.update({name: x.clone()}))
    freezing = [(n, hold) for n in held_in(model, part)]
    model.run_with_hooks(pair.corrupted, fwd_hooks=[*freezing, keep])

    def put(x, hook):
        x = x.clone()
        x[:, :, receiver[1]] = kept[name][:, :, receiver[1]]
        return x

    return spread(model.run_with_hooks(pair.corrupted, fwd_hooks=[(name, put)]))


def pair_of(model, inputs) -> Pair:
    return Pair(inputs, replace(inputs, features=0.5 * inputs.features))


def check(model, part, pair, component) -> None:
    names = held_in(model, part)
    clean, corrupted = (model.run_with_cache(one, names_filter=names)[1] for one in pair.values())
    found = patching.get_act_patch_direct_path(
        model.part(part), pair.corrupted, clean, corrupted, spread, 0, 1, component, verbose=False
    )
    assert (found[0] == 0).all()
    for layer in range(1, len(found)):
        expected = by_hooks(model, part, pair, (clean, corrupted), (0, 1), (layer, 1), component)
        torch.testing.assert_close(found[layer, 1].double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("family", "part", "component"),
    [("whisper", "encoder", "v"), ("whisper", "decoder", "k"), ("qwen2_audio", "decoder", "q")],
)
@torch.no_grad()
def test_parts_give_what_hooks_give(family, part, component):
    model = HookedAudioTransformer.from_hf(tiny.tiny_hf(family))
    pair = pair_of(model, model.as_inputs(tiny.hf_inputs(family)))
    check(model, part, pair, component)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_every_part_runs_or_says_why_not(name):
    family = FAMILIES[name]
    model = family.hooked(family.build())
    pair = pair_of(model, model.as_inputs(family.batch()))
    for part in ("encoder", "decoder"):
        if model.cfg.parts.get(part) is None:
            continue
        try:
            check(model, part, pair, "q")
        except InputError as error:
            assert "direct paths need blocks that add to one plain" in str(error)
