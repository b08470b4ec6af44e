"""MusicGen: T5 reads, and codes of several codebooks are written side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from einops import rearrange
from hypothesis import strategies as st
from torch import Tensor, nn

from families.base import (
    EVERYTHING,
    Family,
    encoder_and_decoder_of,
    length_mask,
    padded_rows,
    random_words,
    randomise,
    run_hf,
)

N_WORDS, N_CODES, N_BOOKS = 100, 16, 3  # of the text, of a codebook, codebooks
TINY_ENCODEC = {  # 50 steps of 8 samples per second, as many codebooks as the model writes
    "num_filters": 4,
    "upsampling_ratios": [4, 2],
    "hidden_size": 8,
    "codebook_size": N_CODES,
    "sampling_rate": 400,
    "target_bandwidths": [0.6],
    "use_causal_conv": False,
}
TINY_T5 = {
    "vocab_size": N_WORDS,
    "d_model": 32,
    "d_kv": 6,
    "d_ff": 24,
    "num_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 5,
    "feed_forward_proj": "gated-gelu",  # smooth; released ones have the plain one, with ReLU
}
TINY_DECODER = {
    "vocab_size": N_CODES,
    "pad_token_id": N_CODES,
    "bos_token_id": N_CODES,
    "num_codebooks": N_BOOKS,
    "hidden_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "ffn_dim": 48,
}


def build(
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    attn: str = "eager",
    text: dict[str, Any] | None = None,
    codec: dict[str, Any] | None = None,
    **overrides: Any,
) -> transformers.MusicgenForConditionalGeneration:
    """A random MusicGen; ``overrides`` go to its decoder's config, the others to theirs."""
    decoder = transformers.MusicgenDecoderConfig(**{**TINY_DECODER, **overrides})
    config = transformers.MusicgenConfig(
        text_encoder=transformers.T5Config(**{**TINY_T5, **(text or {})}),
        audio_encoder=transformers.EncodecConfig(**{**TINY_ENCODEC, **(codec or {})}),
        decoder=decoder,
    )
    model = randomise(transformers.MusicgenForConditionalGeneration(config), seed)
    for part in (model.text_encoder, model.decoder):
        part.set_attn_implementation(attn)
    tune(model.audio_encoder, seed)
    model.generation_config.guidance_scale = None
    return model.to(dtype)


@torch.no_grad()
def tune(codec: nn.Module, seed: int = 0) -> None:
    """Make a random EnCodec, in place, choose among its codes and sound different for each."""
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in codec.named_buffers():
        if name.endswith(".codebook.embed"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator))
    for name, parameter in codec.named_parameters():
        if name.endswith("original0"):  # gains of convolutions
            parameter.mul_(8)


def batch(
    words: Sequence[int] = (7, 4),
    steps: Sequence[int] = (6, 6),
    padding: str = "right",
    steps_padding: str = "right",
    n_books: int = N_BOOKS,
    n_channels: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Texts of so many words, and codes of so many steps as they enter: each codebook lags."""
    generator = torch.Generator().manual_seed(seed)
    ids, mask = padded_rows([random_words(count, generator) for count in words], padding)
    width = 1 + max(steps)
    codes = torch.randint(N_CODES, (len(words), n_books, width), generator=generator)
    for k in range(n_books):
        codes[:, k, : 1 + k // n_channels] = N_CODES
    seen = length_mask([1 + count for count in steps], width)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "decoder_input_ids": rearrange(codes, "b k t -> (b k) t"),
        "decoder_attention_mask": seen if steps_padding == "right" else seen.flip(1),
    }


@torch.no_grad()
def reference(hf: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under our names; logits of all codebooks side by side."""
    carried = {"connector.hook_out": hf.enc_to_dec_proj} if hasattr(hf, "enc_to_dec_proj") else {}
    out, found = run_hf(hf, batch, leaving=carried, **EVERYTHING)
    n_books = hf.config.decoder.num_codebooks
    return {
        "hook_logits": rearrange(out.logits, "(b k) t v -> b t (k v)", k=n_books),
        **found,
        **encoder_and_decoder_of(out),
    }


def draw(data: st.DataObject) -> tuple[dict, dict]:
    """Any shape of model, with texts and codes of any length."""
    heads = st.sampled_from((1, 2, 4))
    books = data.draw(st.integers(1, N_BOOKS), "codebooks")
    text = {
        "num_layers": data.draw(st.integers(1, 3), "encoder_layers"),
        "num_heads": data.draw(heads, "encoder_heads"),
        "d_kv": data.draw(st.integers(1, 9), "d_kv"),
        "feed_forward_proj": data.draw(st.sampled_from(("relu", "gated-gelu")), "mlp"),
        "relative_attention_num_buckets": data.draw(st.sampled_from((4, 8, 32)), "buckets"),
        "relative_attention_max_distance": data.draw(st.integers(9, 20), "distance"),
    }
    model = {
        "text": text,
        "num_codebooks": books,
        "hidden_size": data.draw(st.sampled_from((8, 32, 40)), "d_model"),
        "num_hidden_layers": data.draw(st.integers(1, 3), "decoder_layers"),
        "num_attention_heads": data.draw(heads, "decoder_heads"),
        "ffn_dim": data.draw(st.integers(1, 50), "d_mlp"),
    }
    words = data.draw(st.lists(st.integers(1, 12), min_size=2, max_size=2), "words")
    return model, {"words": words, "n_books": books}


MUSICGEN = Family(
    name="musicgen",
    build=build,
    batch=batch,
    reference=reference,
    models={
        "tiny": {},
        "equal widths: no connector": {"hidden_size": 32},
        "plain text encoder": {"text": {"feed_forward_proj": "relu"}},
        "many buckets": {
            "text": {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128}
        },
        "stereo": {"num_codebooks": 2 * N_BOOKS, "audio_channels": 2},
    },
    model_batches={
        "many buckets": {"words": (40, 3)},
        "stereo": {"n_books": 2 * N_BOOKS, "n_channels": 2},
    },
    batches={
        "default": {},
        "one prompt": {"words": [5], "steps": [4]},
        "about to begin": {"steps": (0, 0)},
        "text padded on the left": {"padding": "left"},
        "codes of unequal length": {"steps": (7, 3)},
        "codes padded on the left": {"steps": (7, 3), "steps_padding": "left"},
    },
    bfloat16=["default", "text padded on the left"],
    draw=draw,
)
