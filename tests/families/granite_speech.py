"""Granite-Speech: Conformer blocks in windows, a Q-Former that reads them, and a Granite LM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from audio_lens import AudioInputs, HookedAudioTransformer
from families.base import (
    AUDIO_TOKEN,
    EVERYTHING,
    TINY_LANGUAGE_MODEL,
    Family,
    attending,
    by_layer,
    clips_of,
    decoder_of,
    draw_clips,
    entering_blocks,
    length_mask,
    on_diagonal,
    prompts,
    prompts_about,
    random_words,
    randomise,
    run_hf,
    side_by_side,
)

EAR = {
    "input_dim": 40,
    "num_layers": 3,
    "hidden_dim": 32,
    "feedforward_mult": 2,
    "num_heads": 4,
    "dim_head": 8,
    "output_dim": 11,
    "context_size": 20,
    "max_pos_emb": 24,
    "conv_kernel_size": 7,
}
CONNECTOR = {
    "model_type": "blip_2_qformer",
    "hidden_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 50,
    "encoder_hidden_size": 32,
    "cross_attention_frequency": 1,
}
LANGUAGE = {
    "model_type": "granite",
    **TINY_LANGUAGE_MODEL,
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.6,
    "logits_scaling": 4.0,
}
WINDOW, QUERIES = 15, 3
FRAME_SAMPLES = 320


# -------------------------------------------------------------------------------- models


def build(
    seed: int = 0, dtype: torch.dtype = torch.float32, attn: str = "eager", **overrides: Any
) -> transformers.GraniteSpeechForConditionalGeneration:
    """A random Granite-Speech; ``overrides`` go to the part that has the name, ``former_*`` to the
    connector, or to the whole config."""
    ear = {key: overrides.pop(key, value) for key, value in EAR.items()}
    former = {key: overrides.pop(f"former_{key}", value) for key, value in CONNECTOR.items()}
    text = {key: overrides.pop(key, value) for key, value in LANGUAGE.items()}
    options = {"audio_token_index": AUDIO_TOKEN, "has_lora_adapter": False, **overrides}
    options = {"tie_word_embeddings": False, **options}
    config = transformers.GraniteSpeechConfig(
        encoder_config=ear, projector_config=former, text_config=text, **options
    )
    model = transformers.GraniteSpeechForConditionalGeneration(config)
    for part in (model.model.language_model, model.model.projector.qformer):
        part.set_attn_implementation(attn)  # the encoder's attention is always fused
    return randomise_buffers(randomise(model, seed), seed).to(dtype)


def randomise_buffers(model: nn.Module, seed: int) -> nn.Module:
    """Statistics of batch norms, and the gains that `randomise` does not know by name."""
    generator = torch.Generator().manual_seed(seed + 1)
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm1d):
            noise = torch.rand(2, module.num_features, generator=generator)
            module.running_mean.copy_(noise[0] - 0.5)
            module.running_var.copy_(noise[1] + 0.5)
        if name.endswith("LayerNorm"):
            module.weight.data += 1
    return model


# -------------------------------------------------------------------------------- inputs


def token_count(n_frames: int) -> int:
    """Tokens of so many encoder frames, in windows of 15."""
    return -(-n_frames // WINDOW) * QUERIES


def batch(
    lengths: Sequence[int | Sequence[int]] = (93, 41),
    words: Sequence[int] = (6, 4),
    padding: str = "right",
    n_features: int = 40,
    audio_token: int = AUDIO_TOKEN,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Prompts of so many words about clips of so many encoder frames: one clip each, or several."""
    generator = torch.Generator().manual_seed(seed)
    clips = clips_of(lengths)
    flat = [n for prompt in clips for n in prompt]
    texts = [random_words(count, generator) for count in words]
    placeholders = [[token_count(n) for n in prompt] for prompt in clips]
    counts = [token_count(n) for n in flat]
    return {
        **prompts(texts, placeholders, padding, audio_token),
        "input_features": torch.randn(
            len(flat), max(flat), n_features, generator=generator, dtype=dtype
        ),
        "input_features_mask": length_mask(counts, max(counts)).bool(),
    }


def clips(model: HookedAudioTransformer, waves: list[np.ndarray]) -> AudioInputs:
    """Features as the model makes them, which equal those of the real feature extractor."""
    made = model.extract_features(waves)
    counts = [token_count((len(wave) // 160 + 1) // 2) for wave in waves]
    texts = prompts_about(counts)
    return AudioInputs(
        features=made["features"],
        tokens=texts["input_ids"],
        clips_per_row=(1,) * len(waves),
        attention_mask=texts["attention_mask"].bool(),
        feature_mask=made["mask"],
    )


# -------------------------------------------------------------------------------- reference


class FusedPatterns(TorchFunctionMode):
    """Records what the encoder's fused attention hides: its patterns, from its own arguments.

    With ``is_eager`` all other attention is written out, so that every fused call is the encoder's.
    """

    def __init__(self, is_eager: bool) -> None:
        super().__init__()
        self.is_eager, self.found = is_eager, []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.is_eager and func is F.scaled_dot_product_attention:
            q, k = args[:2]
            scores = q @ k.transpose(-1, -2) * kwargs["scale"] + kwargs["attn_mask"]
            self.found.append(scores.softmax(-1))
        return func(*args, **kwargs)


def reference(hf: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under our names: what windows compute side by side, clip by clip and one after the other."""
    ear, former = hf.model.encoder, hf.model.projector.qformer.encoder.layer
    is_eager = hf.config.projector_config._attn_implementation == "eager"
    crosses = {i: layer for i, layer in enumerate(former) if layer.has_cross_attention}
    with FusedPatterns(is_eager) as fused:
        out, found = run_hf(
            hf,
            batch,
            entering={
                **entering_blocks("encoder", ear.layers),
                **entering_blocks("connector", former),
            },
            leaving={
                "encoder.hook_out": ear,
                "encoder.ctc.hook_logits": ear.out,
                "encoder.ctc.hook_out": ear.out_mid,
                **by_layer("encoder.blocks.{l}.hook_attn_out", [x.attn for x in ear.layers]),
                **by_layer("encoder.blocks.{l}.hook_conv_out", [x.conv for x in ear.layers]),
                "connector.hook_out": hf.model.projector,
            },
            patterns={
                **attending("connector", former, "attention.attention"),
                **{
                    f"connector.blocks.{i}.cross_attn.hook_pattern": x.crossattention.attention
                    for i, x in crosses.items()
                },
            },
            **EVERYTHING,
        )
    n_clips, n_frames = batch["input_features"].shape[:2]
    for name in [name for name in found if name.startswith("connector.blocks")]:
        found[name] = clip_by_clip(found[name], n_clips, -(-n_frames // hf.config.window_size))
    for layer, pattern in enumerate(fused.found):
        whole = on_diagonal(pattern, n_clips)[..., :n_frames, :n_frames]
        found[f"encoder.blocks.{layer}.attn.hook_pattern"] = whole
    return {**found, **decoder_of(out)}


def clip_by_clip(tensor: Tensor, n_clips: int, n_windows: int) -> Tensor:
    """What the Q-Former computes for a window (or once for all), side by side for each clip."""
    return side_by_side(tensor.expand(n_clips * n_windows, *tensor.shape[1:]), n_clips)


def draw(data: st.DataObject) -> tuple[dict, dict]:
    """Any shape of encoder and connector, and clips over several windows."""
    window = data.draw(st.integers(2, 25), "context_size")
    model = {
        "num_layers": data.draw(st.integers(2, 5), "n_layers"),
        "num_heads": data.draw(st.sampled_from((1, 2, 4)), "n_heads"),
        "dim_head": data.draw(st.sampled_from((4, 10)), "d_head"),
        "context_size": window,
        "max_pos_emb": window + data.draw(st.integers(0, 3), "beyond"),
        "conv_kernel_size": data.draw(st.integers(1, 10), "kernel"),
        "former_num_hidden_layers": data.draw(st.integers(1, 3), "former_layers"),
        "former_cross_attention_frequency": data.draw(st.integers(1, 3), "cross_every"),
        "num_hidden_layers": data.draw(st.integers(1, 2), "decoder_layers"),
    }
    return model, draw_clips(data, st.integers(1, 70))


GRANITE_SPEECH = Family(
    name="granite_speech",
    build=build,
    batch=batch,
    reference=reference,
    models={
        "tiny": {},
        "tied": {"tie_word_embeddings": True},
        "80 mels": {"input_dim": 160},
        "even kernel, narrow convolution": {"conv_kernel_size": 8, "conv_expansion_factor": 1},
        "two layers": {"num_layers": 2},
        "five layers, as many distances as positions": {"num_layers": 5, "max_pos_emb": 20},
        "wide heads": {"dim_head": 12},
        "every second block of the Q-Former reads": {
            "former_cross_attention_frequency": 2,
            "former_num_hidden_layers": 3,
        },
        "another activation in the Q-Former": {"former_hidden_act": "relu"},
        "no GQA": {"num_key_value_heads": 6},
        "placeholder outside the vocabulary": {"audio_token_index": 100},
    },
    model_batches={
        "80 mels": {"n_features": 160},
        "placeholder outside the vocabulary": {"audio_token": 100},
    },
    batches={
        "unequal clips, left padding": {"padding": "left"},
        "unequal clips, right padding": {"lengths": [47, 100]},
        "whole windows and whole blocks": {"lengths": [60], "words": [4]},
        "a frame over a block and a window": {"lengths": [61], "words": [4]},
        "less than a window": {"lengths": [13], "words": [4]},
        "between a window and a block": {"lengths": [17], "words": [4]},
        "one frame": {"lengths": [1], "words": [3]},
        "several clips": {"lengths": [[33, 61], [90, 5, 18]], "words": [4, 8]},
    },
    no_float64=("unequal clips, left padding",),
    draw=draw,
    clips=clips,
    durations=[(0.75,), (2.0,), (0.62, 1.9)],
    reach_s=0.005,
    connector_reach_s=0.3,
    chunk_s=0.3,
)
