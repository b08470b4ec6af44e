"""Equal to transformers: logits, every hidden state and every pattern, every parameter random."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import N_FRAMES, audio_tokens, hf_inputs, tiny_hf
from torch import Tensor

from audio_lens import AudioCache, HookedAudioTransformer

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}  # relative to the largest value

WHISPER_MODELS = {
    "tiny": {},
    "distil: one decoder layer": {"encoder_layers": 4, "decoder_layers": 1},
    "large-v3: 128 mels": {"num_mel_bins": 128},
    "untied": {"tie_word_embeddings": False},
    "other head counts": {"encoder_attention_heads": 2, "decoder_attention_heads": 8},
}
QWEN_MODELS = {
    "tiny": {},
    "128 mels": {"num_mel_bins": 128},
    "no GQA": {"num_key_value_heads": 6},
    "one key-value head": {"num_key_value_heads": 1},
    "wide heads": {"head_dim": 16},
    "slow rotation": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
}
WHISPER_INPUTS = {
    "one prompt": {"lengths": [N_FRAMES], "words": [5]},
    "one token": {"lengths": [N_FRAMES, N_FRAMES], "words": [0, 0]},
    "right padding": {"padding": "right"},
    "left padding": {"padding": "left"},
}
QWEN_INPUTS = {
    "one prompt, 173 mel frames": {"lengths": [173], "words": [5]},
    "one prompt, 199 mel frames": {"lengths": [199], "words": [5]},
    "one prompt, 201 mel frames": {"lengths": [201], "words": [5]},
    "the whole clip": {"lengths": [N_FRAMES], "words": [5]},
    "right padding": {"lengths": [199, 173], "padding": "right"},
    "left padding": {"lengths": [199, 173], "padding": "left"},
    "several clips": {"lengths": [[60, 101], [173, 40, 7]], "words": [4, 8], "padding": "right"},
    "one-token clip": {"lengths": [4], "words": [4]},
    "one placeholder": {"lengths": [173], "words": [4], "single_placeholder": True},
    "one placeholder per clip, right": {
        "lengths": [[60, 101], 199],
        "words": [3, 6],
        "padding": "right",
        "single_placeholder": True,
    },
    "one placeholder per clip, left": {
        "lengths": [[60, 101], 4],
        "words": [6, 3],
        "padding": "left",
        "single_placeholder": True,
    },
}
MODELS = [("whisper", name, options) for name, options in WHISPER_MODELS.items()] + [
    ("qwen2_audio", name, options) for name, options in QWEN_MODELS.items()
]
INPUTS = [("whisper", name, options) for name, options in WHISPER_INPUTS.items()] + [
    ("qwen2_audio", name, options) for name, options in QWEN_INPUTS.items()
]


def cases(table: list[tuple[str, str, dict]]) -> Any:
    return [
        pytest.param(family, options, id=f"{family}: {name}") for family, name, options in table
    ]


# -------------------------------------------------------------------------------- the reference


@torch.no_grad()
def reference(family: str, hf: torch.nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What Hugging Face computes, under our hook names (patterns only from eager attention)."""
    wanted = {"output_hidden_states": True, "output_attentions": True}
    if family == "whisper":
        out = hf(**batch, **wanted)
        cross = {
            f"decoder.blocks.{layer}.cross_attn.hook_pattern": pattern
            for layer, pattern in enumerate(out.cross_attentions)
        }
        return {
            "hook_logits": out.logits,
            **named("encoder", out.encoder_hidden_states, out.encoder_attentions),
            **named("decoder", out.decoder_hidden_states, out.decoder_attentions),
            **cross,
        }
    tower, states, patterns, mapped = hf.model.audio_tower, [], [], []
    handles = [
        hook
        for layer in tower.layers
        for hook in (
            layer.register_forward_pre_hook(lambda _, args: states.append(args[0])),
            layer.self_attn.register_forward_hook(lambda _, args, out: patterns.append(out[1])),
        )
    ]
    handles += [
        tower.register_forward_hook(lambda _, args, out: states.append(out.last_hidden_state)),
        hf.model.multi_modal_projector.register_forward_hook(lambda _, a, out: mapped.append(out)),
    ]
    out = hf(**batch, **wanted)
    for handle in handles:
        handle.remove()
    return {
        "hook_logits": out.logits,
        **named("encoder", states, patterns),
        **named("decoder", out.hidden_states, out.attentions),
        "connector.hook_out": mapped[0],
    }


def with_positions(family: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The positions we count from a mask, said to Hugging Face's Whisper (which counts padding)."""
    mask = batch.get("decoder_attention_mask")
    if family != "whisper" or mask is None or mask[:, 0].all():
        return batch
    return {**batch, "decoder_position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def named(part: str, states: Any, patterns: Any) -> dict[str, Tensor]:
    *before, last = states
    found = {f"{part}.blocks.{i}.hook_resid_pre": state for i, state in enumerate(before)}
    found[f"{part}.hook_out"] = last
    for i, pattern in enumerate(patterns or ()):
        if pattern is not None:
            found[f"{part}.blocks.{i}.attn.hook_pattern"] = pattern
    return found


def worst_difference(
    theirs: dict[str, Tensor], cache: AudioCache, attended: Tensor
) -> dict[str, float]:
    """Largest difference by name, relative to the largest value; at attended positions only."""
    return {
        name: relative_difference(
            at_attended(name, tensor, attended), at_attended(name, cache[name], attended)
        )
        for name, tensor in theirs.items()
    }


def at_attended(name: str, tensor: Tensor, attended: Tensor) -> Tensor:
    is_decoder = name.startswith("decoder") or name == "hook_logits"
    if not is_decoder:
        return tensor
    return (tensor.transpose(1, 2) if name.endswith("hook_pattern") else tensor)[attended]


def relative_difference(theirs: Tensor, ours: Tensor) -> float:
    assert theirs.shape == ours.shape
    return ((theirs - ours).abs().max() / theirs.abs().max()).item()


def compare(
    family: str,
    dtype: torch.dtype,
    model_options: dict,
    input_options: dict,
    attn: str = "eager",
) -> dict[str, float]:
    """Build both models with the same weights and give the differences by hook name."""
    hf = tiny_hf(family, dtype=dtype, attn=attn, **model_options)
    model = HookedAudioTransformer.from_hf(hf)
    model.attn_mode = "explicit" if attn == "eager" else "sdpa"
    n_mels = model_options.get("num_mel_bins", 20)
    batch = hf_inputs(family, dtype=dtype, n_mels=n_mels, **input_options)
    theirs = reference(family, hf, with_positions(family, batch))
    inputs = model.as_inputs(batch)
    attended = inputs.attention_mask
    if attended is None:
        attended = torch.ones_like(inputs.tokens, dtype=torch.bool)
    with torch.no_grad():
        _, cache = model.run_with_cache(batch, names_filter=list(theirs))
    return worst_difference(theirs, cache, attended)


def patterns_in(differences: dict[str, float]) -> list[str]:
    return [name for name in differences if name.endswith("hook_pattern")]


# -------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family, options", cases(MODELS))
def test_shapes_of_model(family: str, options: dict, dtype: torch.dtype) -> None:
    differences = compare(family, dtype, options, {})
    n_patterns = sum(
        {"whisper": [3, 3, 3], "qwen2_audio": [3, 3]}[family]
        if "decoder_layers" not in options
        else [4, 1, 1]
    )
    assert len(patterns_in(differences)) == n_patterns
    assert max(differences.values()) <= TOLERANCE[dtype], differences


@pytest.mark.parametrize("family, options", cases(INPUTS))
def test_inputs(family: str, options: dict) -> None:
    for dtype, tolerance in TOLERANCE.items():
        if dtype == torch.float64 and options.get("padding") == "left":
            continue  # Hugging Face's eager attention gives NaN there
        differences = compare(family, dtype, {}, options)
        assert max(differences.values()) <= tolerance, differences


@pytest.mark.parametrize("family, options", cases(INPUTS))
def test_fused_attention(family: str, options: dict) -> None:
    differences = compare(family, torch.float32, {}, options, attn="sdpa")
    assert not patterns_in(differences)
    assert max(differences.values()) <= 1e-5, differences


@pytest.mark.parametrize("padding", ["left", "right"])
def test_bfloat16_is_as_close_as_hugging_face_to_itself(family: str, padding: str) -> None:
    batch = hf_inputs(family, padding=padding, dtype=torch.bfloat16)
    logits = {}
    for attn, mode in (("eager", "explicit"), ("sdpa", "sdpa")):
        hf = tiny_hf(family, dtype=torch.bfloat16, attn=attn)
        model = HookedAudioTransformer.from_hf(hf)
        model.attn_mode = mode
        inputs = model.as_inputs(batch)
        with torch.no_grad():
            logits[attn] = hf(**with_positions(family, batch)).logits.float()[inputs.attention_mask]
            logits[mode + " ours"] = model(inputs).float()[inputs.attention_mask]
    spread = (logits["eager"] - logits["sdpa"]).abs().max()
    assert (logits["eager"] - logits["explicit ours"]).abs().max() <= 2 * spread
    assert (logits["sdpa"] - logits["sdpa ours"]).abs().max() <= 2 * spread


def test_float16_stays_finite_where_the_residual_stream_overflows(family: str) -> None:
    hf = tiny_hf(family, dtype=torch.float16)
    layers = hf.model.encoder.layers if family == "whisper" else hf.model.audio_tower.layers
    with torch.no_grad():
        layers[0].fc2.bias += 60_000
        layers[1].fc2.bias += 60_000
    model = HookedAudioTransformer.from_hf(hf)
    batch = hf_inputs(family, dtype=torch.float16)
    _, cache = model.run_with_cache(batch, names_filter="encoder.blocks.1.hook_resid_post")
    assert cache["encoder.blocks.1.hook_resid_post"].max() == torch.tensor(64504.0).half()


divisors = {4: (1, 2, 4), 6: (1, 2, 3, 6)}


@settings(max_examples=10)
@given(data=st.data())
def test_any_whisper(data: st.DataObject) -> None:
    heads = st.sampled_from((1, 2, 4))
    options = {
        "d_model": data.draw(st.sampled_from((8, 24, 40)), "d_model"),
        "encoder_layers": data.draw(st.integers(1, 3), "encoder_layers"),
        "decoder_layers": data.draw(st.integers(1, 3), "decoder_layers"),
        "encoder_attention_heads": data.draw(heads, "encoder_heads"),
        "decoder_attention_heads": data.draw(heads, "decoder_heads"),
        "encoder_ffn_dim": data.draw(st.integers(1, 50), "d_mlp"),
        "activation_function": data.draw(st.sampled_from(("gelu", "relu")), "act"),
    }
    inputs = {"words": data.draw(st.lists(st.integers(0, 8), min_size=2, max_size=2), "words")}
    differences = compare("whisper", torch.float64, options, inputs)
    assert max(differences.values()) <= TOLERANCE[torch.float64], differences


@settings(max_examples=10)
@given(data=st.data())
def test_any_qwen2_audio(data: st.DataObject) -> None:
    heads = data.draw(st.sampled_from((4, 6)), "heads")
    options = {
        "d_model": data.draw(st.sampled_from((8, 24)), "d_model"),
        "hidden_size": data.draw(st.sampled_from((24, 48)), "hidden_size"),
        "encoder_layers": data.draw(st.integers(1, 3), "encoder_layers"),
        "num_hidden_layers": data.draw(st.integers(1, 3), "decoder_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": data.draw(st.sampled_from(divisors[heads]), "kv_heads"),
        "head_dim": data.draw(st.sampled_from((4, 10)), "head_dim"),
    }
    clips = st.lists(st.integers(4, N_FRAMES), min_size=1, max_size=2)
    lengths = data.draw(st.lists(clips, min_size=1, max_size=2), "lengths")
    inputs = {"lengths": lengths, "words": [3 + len(prompt) for prompt in lengths]}
    assert all(audio_tokens(n) >= 1 for prompt in lengths for n in prompt)
    differences = compare("qwen2_audio", torch.float64, options, inputs)
    assert max(differences.values()) <= TOLERANCE[torch.float64], differences
