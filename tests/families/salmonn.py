"""SALMONN: Whisper and BEATs side by side, a Q-Former over windows, Llama with an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from hypothesis import strategies as st
from torch import Tensor, nn

from audio_lens import AudioInputs, HookedAudioTransformer
from audio_lens.models.families.beats_config import frames_of
from audio_lens.recipes.salmonn import HookedSalmonn
from families.base import (
    AUDIO_TOKEN,
    TINY_LANGUAGE_MODEL,
    Family,
    attending,
    decoder_of,
    entering_blocks,
    length_mask,
    prompts,
    prompts_about,
    random_words,
    randomise,
    recorded,
)
from families.beats import build as build_beats
from families.beats import hooked as hooked_beats
from families.granite_speech import clip_by_clip
from families.whisper import build as build_whisper
from published.beats import SelfAttention
from published.salmonn import WINDOW, BertSelfAttention, Salmonn

N_FRAMES = 200  # mel frames of the tiny Whisper: 2 s
WINDOWS = N_FRAMES // 2 // WINDOW
QUERIES = 1
D_FORMER = 48
N_MELS = 128  # of BEATs


# -------------------------------------------------------------------------------- models


def build(
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    attn: str = "eager",
    former_layers: int = 2,
    rank: int = 8,
    queries: int = QUERIES,
    hears_sounds: bool = True,
    **overrides: Any,
) -> Salmonn:
    """A random model.

    Args:
        hears_sounds: else what BEATs hears does not reach the Q-Former.
        overrides: of Llama, or with ``ear_`` and ``beats_`` before their names of these.
    """
    of_parts: dict[str, dict] = {"ear_": {"max_source_positions": N_FRAMES // 2}, "beats_": {}}
    for prefix, own in of_parts.items():
        for name in [name for name in overrides if name.startswith(prefix)]:
            own[name.removeprefix(prefix)] = overrides.pop(name)
    llama = transformers.LlamaConfig(**{**TINY_LANGUAGE_MODEL, **overrides})
    llama._attn_implementation = attn
    model = Salmonn(
        build_whisper(attn=attn, **of_parts["ear_"]).model,
        build_beats(attn=attn, **{"finetuned_model": False, **of_parts["beats_"]}),
        transformers.LlamaForCausalLM(llama),
        d=D_FORMER,
        d_mlp=40,
        n_layers=former_layers,
        rank=rank,
        n_queries=queries,
        placeholder=AUDIO_TOKEN,
    )
    for module in model.modules():
        if isinstance(module, BertSelfAttention | SelfAttention):
            module.is_fused = attn == "sdpa"
    return about_one(randomise(model, seed), hears_sounds).to(dtype)


@torch.no_grad()
def about_one(model: Salmonn, hears_sounds: bool) -> Salmonn:
    """The gains that `randomise` does not know by name."""
    for name, module in model.named_modules():
        if name.endswith("LayerNorm") or name in ("ln_speech", "ln_audio"):
            module.weight += 1
    if not hears_sounds:
        model.ln_audio.weight.zero_()
    return model


def parts_of(published: Salmonn) -> dict[str, Any]:
    """Whisper, BEATs and Llama as models of their own, sharing the weights."""
    dtype = published.speech_query_tokens.dtype
    whisper = transformers.WhisperForConditionalGeneration(published.speech_encoder.config)
    llama = transformers.LlamaForCausalLM(published.llama.config)
    whisper.to(dtype).model.encoder = published.speech_encoder
    own = {
        name.replace(".base_layer", ""): tensor
        for name, tensor in published.llama.state_dict().items()
        if ".lora_" not in name
    }
    llama.load_state_dict(own, assign=True)
    return {"whisper": whisper, "beats": hooked_beats(published.beats), "llm": llama}


def hooked(published: Salmonn, **options: Any) -> HookedSalmonn:
    """Our model of the published one's checkpoint and parts."""
    ours = HookedSalmonn.of(published.checkpoint()["model"], **parts_of(published), **options)
    ours.audio_token_id = AUDIO_TOKEN
    return ours


# -------------------------------------------------------------------------------- inputs


def batch(
    lengths: Sequence[int] = (19_000, 13_000),
    words: Sequence[int] = (6, 4),
    padding: str = "right",
    queries: int = QUERIES,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Prompts of so many words about one clip each, of so many samples."""
    generator = torch.Generator().manual_seed(seed)
    texts = [random_words(n, generator) for n in words]
    frames = [frames_of(n) for n in lengths]
    shapes = {"input_features": (20, N_FRAMES), "beats": (N_MELS, max(frames))}
    features = {
        name: torch.randn(len(lengths), *shape, generator=generator, dtype=dtype)
        for name, shape in shapes.items()
    }
    return {
        **prompts(texts, [[WINDOWS * queries]] * len(words), padding),
        **features,
        "feature_attention_mask": length_mask([n // 160 for n in lengths], N_FRAMES).bool(),
        "beats.mask": length_mask(frames, max(frames)).bool(),
    }


def clips(model: HookedAudioTransformer, waves: list[np.ndarray]) -> AudioInputs:
    """Features as the model makes them."""
    made, beside = model.extract_features(waves), model.heard_beside(waves)
    texts = prompts_about([WINDOWS * QUERIES] * len(waves))
    return AudioInputs(
        features=made["features"],
        tokens=texts["input_ids"],
        clips_per_row=(1,) * len(waves),
        attention_mask=texts["attention_mask"].bool(),
        feature_mask=made["mask"],
        extra={name: x.double() if x.is_floating_point() else x for name, x in beside.items()},
    )


# -------------------------------------------------------------------------------- reference


@torch.no_grad()
def reference(published: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under our names: what the Q-Former computes for windows, clip by clip."""
    ear, sounds = published.speech_encoder, published.beats.encoder
    former, is_eager = published.speech_Qformer["bert"], ear.config._attn_implementation == "eager"
    blocks = former.encoder["layer"]
    found: dict[str, list[Tensor]] = {}
    entering = {
        **entering_blocks("encoder", ear.layers),
        **entering_blocks("beats", sounds.layers),
        **entering_blocks("connector", blocks),
    }
    leaving = {
        "encoder.hook_out": ear,
        "beats.hook_out": sounds,
        "connector.hook_out": published.speech_llama_proj,
    }
    patterns = {
        **attending("encoder", ear.layers),
        **attending("beats", sounds.layers),
        **attending("connector", blocks, "attention.self"),
        **attending("connector", blocks, "crossattention.self", "cross_attn"),
    }
    with recorded(found, entering, leaving, patterns):
        speech = ear(batch["input_features"]).last_hidden_state
        audio, _ = published.beats.hear(batch["beats"].mT, ~batch["beats.mask"])
        out = published(
            batch["input_ids"],
            batch["attention_mask"],
            published.encode(speech, audio),
            output_hidden_states=True,
            output_attentions=is_eager,
        )
    n_clips, whole = len(speech), {name: torch.cat(x) for name, x in found.items()}
    for name in [name for name in whole if name.startswith("connector")]:
        whole[name] = clip_by_clip(whole[name], n_clips, WINDOWS)
    return {**whole, **decoder_of(out)}


def draw(data: st.DataObject) -> tuple[dict, dict]:
    """Any depth of the parts, and clips of any length."""
    model = {
        "former_layers": data.draw(st.integers(1, 3), "former_layers"),
        "rank": data.draw(st.integers(1, 4), "rank"),
        "ear_encoder_layers": data.draw(st.integers(1, 3), "ear_layers"),
        "beats_encoder_layers": data.draw(st.integers(1, 3), "beats_layers"),
        "beats_finetuned_model": data.draw(st.booleans(), "tuned"),
        "num_hidden_layers": data.draw(st.integers(1, 2), "decoder_layers"),
    }
    lengths = data.draw(st.lists(st.integers(5_300, 31_900), min_size=1, max_size=3), "lengths")
    return model, {"lengths": lengths, "words": [4] * len(lengths)}


SALMONN = Family(
    name="salmonn",
    build=build,
    hooked=hooked,
    batch=batch,
    reference=reference,
    models={
        "tiny": {},
        "three queries, which see each other": {"queries": 3},
        "three layers of the Q-Former": {"former_layers": 3},
        "another rank": {"rank": 3},
        "BEATs with its head": {"beats_finetuned_model": True},
        "no GQA": {"num_key_value_heads": 6},
    },
    model_batches={"three queries, which see each other": {"queries": 3}},
    batches={
        "unequal clips, left padding": {"padding": "left"},
        "unequal clips, right padding": {"lengths": (32_000, 6_000), "words": (4, 7)},
        "one clip": {"lengths": (20_003,), "words": (5,)},
    },
    no_float64=("unequal clips, left padding",),
    draw=draw,
    clips=clips,
    durations=((1.2,), (1.9,), (0.6, 1.9)),
    impulse_model={"hears_sounds": False},
    connector_reach_s=0.18,
)
