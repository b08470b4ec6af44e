"""Self-supervised encoders: wav2vec 2.0 and what is built like it, with their heads."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers
from hypothesis import strategies as st
from torch import Tensor, nn

from audio_lens import AudioInputs, HookedAudioTransformer
from families.base import (
    Family,
    attending,
    by_layer,
    entering_blocks,
    length_mask,
    randomise,
    run_hf,
)

N_LABELS = 20
TINY = {
    "vocab_size": N_LABELS,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": (16,) * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 24,
}
PRE_NORM = {"feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True}
CTC, CLASSES = {"head": "ForCTC"}, {"head": "ForSequenceClassification", "num_labels": 7}
BATCHES = {
    "unequal lengths": {},
    "no mask": {"lengths": (5000, 5000)},
    "one frame": {"lengths": (400, 719)},
    "a sample more than a frame": {"lengths": (5361, 5360, 5359)},
}


def build(
    family: str,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    attn: str = "eager",
    head: str = "Model",
    **overrides: Any,
) -> transformers.PreTrainedModel:
    """A random model of the Hugging Face family, with a head; ``overrides`` go to its config."""
    made = getattr(transformers, f"{family}{head}")
    model = made(made.config_class(**{**TINY, **overrides}))
    model.config._attn_implementation = attn
    for buffer in (b for b in model.buffers() if b.is_floating_point()):  # of batch norms
        buffer.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(seed))
    return randomise(model, seed).to(dtype)


def batch(
    lengths: Sequence[int] = (6000, 4100), seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Waveforms of so many samples, with a mask where they differ."""
    generator = torch.Generator().manual_seed(seed)
    waves = torch.randn(len(lengths), max(lengths), generator=generator, dtype=dtype)
    mask = length_mask(lengths, max(lengths))
    made = {"input_values": waves * mask}
    return made if mask.all() else {**made, "attention_mask": mask}


def body_of(hf: nn.Module) -> nn.Module:
    """The bare encoder of a Hugging Face model."""
    return getattr(hf, hf.base_model_prefix, hf)


def reference(hf: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under our names."""
    body = body_of(hf)
    layers, convs = body.encoder.layers, body.feature_extractor.conv_layers
    out, found = run_hf(
        hf,
        batch,
        entering={
            "encoder.hook_embed": body.encoder.pos_conv_embed,
            **entering_blocks("encoder", layers),
        },
        leaving={
            "encoder.hook_pos_embed": body.encoder.pos_conv_embed,
            "encoder.hook_out": body.encoder,
            **by_layer("frontend.convs.{l}.hook_out", convs),
        },
        patterns=attending("encoder", layers, "attention"),
    )
    for name in by_layer("frontend.convs.{l}.hook_out", convs):
        found[name] = found[name].transpose(1, 2)
    is_bare = hf is body or type(hf).__name__.endswith("ForPreTraining")
    return found if is_bare else {"hook_logits": out.logits, **found}


def draw(data: st.DataObject) -> tuple[dict, dict]:
    """Other strides and kernels, either norm of the stem and of the blocks, any lengths."""
    n_convs = data.draw(st.integers(1, 3), "n_convs")
    shapes = data.draw(
        st.lists(st.integers(1, 5), min_size=2 * n_convs, max_size=2 * n_convs), "shapes"
    )
    model = {
        "conv_dim": (8,) * n_convs,
        "conv_kernel": tuple(shapes[:n_convs]),
        "conv_stride": tuple(shapes[n_convs:]),
        "feat_extract_norm": data.draw(st.sampled_from(("group", "layer")), "norm"),
        "do_stable_layer_norm": data.draw(st.booleans(), "pre_norm"),
        "num_conv_pos_embeddings": data.draw(st.integers(1, 9), "position_kernel"),
        "num_hidden_layers": data.draw(st.integers(1, 3), "n_layers"),
        "num_attention_heads": data.draw(st.sampled_from((1, 2, 4)), "n_heads"),
        "head": data.draw(st.sampled_from(("Model", "ForCTC", "ForSequenceClassification"))),
    }
    lengths = st.lists(st.integers(200, 600), min_size=1, max_size=3)
    return model, {"lengths": data.draw(lengths, "lengths")}


def clips(model: HookedAudioTransformer, waveforms: list[np.ndarray]) -> AudioInputs:
    """Through the real feature extractor, which must not divide by the deviation of a clip."""
    model.feature_extractor.do_normalize = False
    return model.prepare(waveforms, sampling_rate=model.cfg.sampling_rate)


def family(
    name: str,
    stem: str,
    models: dict[str, dict],
    usual: dict[str, Any] | None = None,
    **options: Any,
) -> Family:
    """An entry for the models of a Hugging Face family; ``usual`` are overrides of all of them."""
    return Family(
        name=name,
        build=partial(build, stem, **(usual or {})),
        batch=batch,
        reference=options.pop("reference", reference),
        models={"tiny": {}, **models},
        batches=BATCHES,
        clips=clips,
        durations=((0.3,), (0.1, 0.25)),
        impulse_model=options.pop("impulse_model", {"feat_extract_norm": "layer"}),
        stem=lambda model, inputs: model.frontend(inputs.features),
        reach_s=199.5 / 16_000,
        step_s=1 / 16_000,
        window_s=0.0,
        **options,
    )


WAV2VEC2 = family(
    "wav2vec2",
    "Wav2Vec2",
    {
        "layer norms in the stem": {"feat_extract_norm": "layer", "conv_bias": True},
        "large: pre-norm": PRE_NORM,
        "for pretraining": {"head": "ForPreTraining"},
        "odd positional kernel": {"num_conv_pos_embeddings": 15},
        "other activations and eps": {
            "hidden_act": "relu",
            "feat_extract_activation": "relu",
            "layer_norm_eps": 1e-3,
        },
        "fewer, longer strides": {
            "conv_dim": (8, 16),
            "conv_kernel": (30, 4),
            "conv_stride": (20, 3),
        },
    },
    draw=draw,
)
WAV2VEC2_CTC = family("wav2vec2_ctc", "Wav2Vec2", {"post-norm": CTC}, {**PRE_NORM, **CTC})
MMS = family("mms", "Wav2Vec2", {}, {**PRE_NORM, **CTC, "adapter_attn_dim": 6})
HUBERT = family(
    "hubert",
    "Hubert",
    {
        "large: pre-norm": PRE_NORM,
        "bare": {"head": "Model"},
        "ctc": CTC,
        "no norm before the projection": {"feat_proj_layer_norm": False},
        "batch norm before positions": {"conv_pos_batch_norm": True},
        "adapters": {**PRE_NORM, "adapter_attn_dim": 6},
    },
    CLASSES,
)
_DATA2VEC = {"num_conv_pos_embeddings": 3, "conv_pos_kernel_size": 7}
DATA2VEC_AUDIO = family(
    "data2vec_audio",
    "Data2VecAudio",
    {
        "ctc": CTC,
        "classes": CLASSES,
        "even positional kernels": {"conv_pos_kernel_size": 8, "conv_bias": True},
    },
    _DATA2VEC,
    impulse_model={},
)
UNISPEECH = family(
    "unispeech",
    "UniSpeech",
    {"classes": CLASSES, "pre-norm": PRE_NORM, "for pretraining": {"head": "ForPreTraining"}},
    CTC,
)
UNISPEECH_SAT = family(
    "unispeech_sat",
    "UniSpeechSat",
    {"bare": {"head": "Model"}, "ctc": CTC, "for pretraining": {"head": "ForPreTraining"}},
    {**PRE_NORM, **CLASSES},
)
SPEECH_ENCODERS = (
    WAV2VEC2,
    WAV2VEC2_CTC,
    MMS,
    HUBERT,
    DATA2VEC_AUDIO,
    UNISPEECH,
    UNISPEECH_SAT,
)
