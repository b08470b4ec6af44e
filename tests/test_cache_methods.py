"""Every method that `AudioCache` inherits, on every kind of part: right, or refused.

What the methods give is held against what flowed: streams, sublayers and logits of the same run.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformer_lens import ActivationCache

from audio_lens import AudioCache
from families import FAMILIES

NO_SUM, EXPERTS = "every block norms it", "mixture of experts"
NO_VOCABULARY, NO_FINAL_NORM = "has no vocabulary", "no final norm"
SUMS = ("decompose_resid", "get_full_resid_decomposition", "apply_ln_to_stack")
NEURONS = ("get_neuron_results", "stack_neuron_results", "get_full_resid_decomposition")
LOGITS = ("logit_lens", "logit_attrs")
ENCODER = dict.fromkeys(LOGITS, NO_VOCABULARY)
POST_NORM = {
    **dict.fromkeys(SUMS, NO_SUM),
    "logit_lens": "no norm follows|every block norms it",
    "logit_attrs": NO_VOCABULARY,
}
BARE = {
    "apply_ln_to_stack": NO_FINAL_NORM,
    "logit_lens": "no norm follows",
    "logit_attrs": NO_VOCABULARY,
}
POOLED = {"apply_ln_to_stack": "pools pairs", "logit_lens": "pools pairs"}
REFUSED: dict[tuple[str, str], dict[str, str]] = {
    ("whisper", "encoder"): ENCODER,
    ("whisper", "decoder"): {},
    ("qwen2_audio", "encoder"): {**POOLED, "logit_attrs": NO_VOCABULARY},
    ("qwen2_audio", "decoder"): {},
    ("granite_speech", "encoder"): POST_NORM,
    ("granite_speech", "decoder"): {},
    ("qwen3_omni", "decoder"): dict.fromkeys(NEURONS, EXPERTS),
    ("wav2vec2", "encoder"): POST_NORM,
    ("mms", "encoder"): {},
    ("wavlm", "encoder"): POST_NORM,
    ("beats", "encoder"): POST_NORM,
    ("salmonn", "beats"): POST_NORM,
    ("desta2", "encoder"): BARE,
    ("moshi", "decoder"): {},
    ("moshi", "depth"): BARE,
    ("musicgen", "encoder"): ENCODER,
    ("musicgen", "decoder"): {},
}
"""By family and part, the methods that are refused there, and what is said."""


@functools.cache
def run_of(family: str) -> AudioCache:
    entry = FAMILIES[family]
    model = entry.hooked(entry.build(dtype=torch.float64))
    with torch.no_grad():
        return model.run_with_cache(model.as_inputs(entry.batch(dtype=torch.float64)))[1]


def copied(family: str, part: str) -> AudioCache:
    """The activations of a part, which methods may change."""
    local = run_of(family).part(part)
    return AudioCache(dict(local.cache_dict), local.parts, part, prefixed=False)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def stream(cache: AudioCache, layer: int) -> Tensor:
    """What flows into a block, or out of the last."""
    if layer < cache.model.cfg.n_layers:
        return cache["resid_pre", layer]
    return cache[cache.model.blocks[-1].last_stage, layer - 1]


def into_mlp(cache: AudioCache, layer: int) -> Tensor:
    return cache[cache.model.blocks[layer].mlp_stage, layer]


def logits_of(cache: AudioCache) -> Tensor:
    return cache.model.unembed(cache["hook_out"])


def places(cache: AudioCache) -> list[tuple[int, bool]]:
    """Every layer, its MLP, and what follows the last."""
    n_layers = cache.model.cfg.n_layers
    return [*((l, is_mlp) for l in range(n_layers) for is_mlp in (False, True)), (n_layers, False)]


def expected_at(cache: AudioCache, layer: int, is_mlp: bool) -> Tensor:
    return into_mlp(cache, layer) if is_mlp else stream(cache, layer)


# -------------------------------------------------------------------------------- what is right


def decompose_resid(cache: AudioCache) -> None:
    for layer, is_mlp in places(cache):
        stack, labels = cache.decompose_resid(layer, is_mlp, return_labels=True)
        assert len(stack) == len(labels) == len(set(labels))
        close(stack.sum(0), expected_at(cache, layer, is_mlp))


def get_full_resid_decomposition(cache: AudioCache) -> None:
    close(cache.get_full_resid_decomposition().sum(0), stream(cache, cache.model.cfg.n_layers))
    for layer, is_mlp in places(cache):
        for neurons in (True, False):
            options = {"mlp_input": is_mlp, "expand_neurons": neurons}
            stack, labels = cache.get_full_resid_decomposition(layer, return_labels=True, **options)
            assert len(stack) == len(labels) == len(set(labels))
            close(stack.sum(0), expected_at(cache, layer, is_mlp))
    whole = cache.get_full_resid_decomposition(1, apply_ln=True)
    onto = torch.randn(whole.shape[-1], 2, dtype=whole.dtype)
    for vector in (onto, onto[:, 0]):
        projected = cache.get_full_resid_decomposition(1, apply_ln=True, project_output_onto=vector)
        close(projected, whole @ vector)


def accumulated_resid(cache: AudioCache) -> None:
    for layer, is_mlp in places(cache):
        stack, labels = cache.accumulated_resid(layer, True, mlp_input=is_mlp, return_labels=True)
        assert len(stack) == len(labels) == len(set(labels))
        close(stack[-1], expected_at(cache, layer, is_mlp))
        close(stack[labels.index("0_pre")], stream(cache, 0))


def apply_ln_to_stack(cache: AudioCache) -> None:
    final = cache.apply_ln_to_stack(
        stream(cache, cache.model.cfg.n_layers)[None], recompute_ln=True
    )
    close(final[0], cache["hook_out"])
    normed = cache.apply_ln_to_stack(stream(cache, 1)[None], 1)[0]
    close(normed, cache["normalized", 1, "ln1"] * cache.model.blocks[1].ln1.weight)


def compute_head_results(cache: AudioCache) -> None:
    cache.compute_head_results()
    for layer, block in enumerate(cache.model.blocks):
        results = cache[f"blocks.{layer}.attn.hook_result"]
        close(results.sum(-2) + block.attn.b_O, cache["attn_out", layer])


def stack_head_results(cache: AudioCache) -> None:
    stack, labels = cache.stack_head_results(1, return_labels=True)
    own = [i for i, label in enumerate(labels) if "cross" not in label]
    close(stack[own].sum(0) + cache.model.blocks[0].attn.b_O, cache["attn_out", 0])
    assert stack.shape[-1] == stream(cache, 0).shape[-1]


def get_neuron_results(cache: AudioCache) -> None:
    written = cache.get_neuron_results(1)
    close(written.sum(-2) + cache.model.blocks[1].mlp.b_out, cache["mlp_out", 1])
    onto = torch.randn(written.shape[-1], 2, dtype=written.dtype)
    close(cache.get_neuron_results(1, [0, 2], 1, onto), written[:, 1, [0, 2]] @ onto)


def stack_neuron_results(cache: AudioCache) -> None:
    stack, labels = cache.stack_neuron_results(1, return_labels=True)
    assert len(stack) == len(labels) == len(set(labels))
    own = [i for i, label in enumerate(labels) if "_" not in label]
    close(stack[own].sum(0) + cache.model.blocks[0].mlp.b_out, cache["mlp_out", 0])
    few, names = cache.stack_neuron_results(2, 1, [0, 2], return_labels=True)
    assert names == ["L0N0", "L0N2", "L1N0", "L1N2"]
    close(few[:2], stack[[0, 2]][:, :, 1])


def logit_attrs(cache: AudioCache) -> None:
    stack = cache.accumulated_resid()[-1:]
    attrs = cache.logit_attrs(stack, 3, incorrect_tokens=4)[0]
    norm_bias = getattr(cache._module.ln_final, "bias", None)
    share = cache.model.b_U if norm_bias is None else cache.model.unembed(norm_bias)
    logits = logits_of(cache) - share
    close(attrs, logits[..., 3] - logits[..., 4])


def logit_lens(cache: AudioCache) -> None:
    close(cache.logit_lens(positions=None).values[-1], logits_of(cache))


def stack_activation(cache: AudioCache) -> None:
    stack = cache.stack_activation("z")
    assert len(stack) == cache.model.cfg.n_layers
    assert torch.equal(stack[1], cache["z", 1])


def apply_slice_to_batch_dim(cache: AudioCache) -> None:
    one = cache.apply_slice_to_batch_dim(1)
    assert not one.has_batch_dim
    assert torch.equal(one["z", 1], cache["z", 1][1])
    assert torch.equal(one.accumulated_resid()[-1], cache.accumulated_resid()[-1][1])


def remove_batch_dim(cache: AudioCache) -> None:
    with pytest.raises(ValueError, match=r"the batch axis holds \d+ prompts"):
        cache.remove_batch_dim()
    one = cache.apply_slice_to_batch_dim([1])
    assert one.remove_batch_dim() is one and not one.has_batch_dim
    assert torch.equal(one["z", 1], cache["z", 1][1])
    assert one.remove_batch_dim() is one


def to(cache: AudioCache) -> None:
    assert cache.to("meta")["z", 1].device.type == "meta"


def keys(cache: AudioCache) -> None:
    assert list(cache.keys()) == list(cache) and all(key in cache for key in cache)


def values(cache: AudioCache) -> None:
    assert all(a is cache[key] for a, key in zip(cache.values(), cache, strict=True))


def items(cache: AudioCache) -> None:
    assert dict(cache.items()) == cache.cache_dict


def toggle_autodiff(cache: AudioCache) -> None:
    before = torch.is_grad_enabled()
    try:
        cache.toggle_autodiff(not before)
        assert torch.is_grad_enabled() is not before
    finally:
        torch.set_grad_enabled(before)


def ssm_layers(cache: AudioCache) -> None:
    assert cache.ssm_layers() == []


def compute_ssm_state(cache: AudioCache) -> None:
    with pytest.raises(RuntimeError, match="No SSM mixer layers"):
        cache.compute_ssm_state()
    with pytest.raises(TypeError, match="Block 0 has no"):
        cache.compute_ssm_state(0)


def compute_ssm_effective_attention(cache: AudioCache) -> None:
    with pytest.raises(RuntimeError, match="No SSM mixer layers"):
        cache.compute_ssm_effective_attention()
    with pytest.raises(TypeError, match="Block 0 has no SSM mixer"):
        cache.compute_ssm_effective_attention(0)


HELD: dict[str, Callable[[AudioCache], None]] = {
    check.__name__: check
    for check in (
        *(decompose_resid, get_full_resid_decomposition, accumulated_resid, apply_ln_to_stack),
        *(compute_head_results, stack_head_results, get_neuron_results, stack_neuron_results),
        *(logit_attrs, logit_lens, stack_activation, apply_slice_to_batch_dim, remove_batch_dim),
        *(to, keys, values, items, toggle_autodiff),
        *(ssm_layers, compute_ssm_state, compute_ssm_effective_attention),
    )
}


def test_every_inherited_method_is_held() -> None:
    public = inspect.getmembers(ActivationCache, inspect.isfunction)
    assert {name for name, _ in public if not name.startswith("_")} == HELD.keys()


@pytest.mark.mostly_slow(3)
@pytest.mark.parametrize("method", HELD)
@pytest.mark.parametrize("family, part", REFUSED)
@torch.no_grad()
def test_right_or_refused(family: str, part: str, method: str) -> None:
    said = REFUSED[family, part].get(method)
    if said is None:
        HELD[method](copied(family, part))
        return
    with pytest.raises(ValueError, match=said):
        HELD[method](copied(family, part))


@pytest.mark.parametrize("family", ["wav2vec2", "granite_speech"])
@pytest.mark.parametrize("method", ["stack_head_results", "stack_neuron_results"])
def test_nothing_remains_of_a_stream_that_is_no_sum(family: str, method: str) -> None:
    for options in ({"incl_remainder": True}, {"apply_ln": True}):
        with pytest.raises(ValueError, match=NO_SUM):
            getattr(copied(family, "encoder"), method)(2, **options)


def test_neurons_of_adapters_stand_behind_those_of_the_mlp() -> None:
    cache = copied("mms", "encoder")
    stack, labels = cache.stack_neuron_results(1, return_labels=True)
    adapter = [i for i, label in enumerate(labels) if re.fullmatch(r"L0N\d+_adapter", label)]
    assert adapter[-1] == len(labels) - 1
    bias = cache.model.blocks[0].adapter.b_out
    close(stack[adapter].sum(0) + bias, cache["adapter_out", 0])


def test_weights_of_every_codebook_need_whole_steps() -> None:
    cache = copied("moshi", "depth")
    cut = {name: x[:, :3] for name, x in cache.items() if name.endswith("hook_z")}
    with pytest.raises(ValueError, match="3 positions are no whole steps"):
        AudioCache(cut, cache.parts, "depth", prefixed=False).stack_head_results(1)


def test_no_mlp_follows_the_last_block() -> None:
    cache = copied("whisper", "decoder")
    n_layers = cache.model.cfg.n_layers
    for method in ("decompose_resid", "accumulated_resid", "get_full_resid_decomposition"):
        with pytest.raises(ValueError, match=f"no MLP reads layer {n_layers}"):
            getattr(cache, method)(mlp_input=True)
