"""Moshi: text and two voices in codes, and a depth decoder with weights per codebook.

Hugging Face's depth decoder is run by itself, on the tokens of the next position, and causally:
written-out attention only masks later codebooks where it is given a mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from einops import rearrange
from hypothesis import strategies as st
from torch import Tensor, nn

from audio_lens import AudioInputs
from families.base import (
    EVERYTHING,
    Family,
    attending,
    decoder_attended,
    decoder_of,
    draw_decoder,
    entering_blocks,
    on_diagonal,
    padded_rows,
    random_words,
    ready,
    recorded,
)

N_TEXTS, N_CODES, N_VOICE = 100, 16, 4  # text tokens, codes of a codebook, codebooks of a voice
TINY_MIMI = {
    "num_filters": 4,
    "codebook_size": N_CODES,
    "upsampling_ratios": [4, 2],
    "hidden_size": 16,
    "codebook_dim": 8,
    "vector_quantization_hidden_dimension": 8,
    "num_quantizers": N_VOICE,
    "num_hidden_layers": 2,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "upsample_groups": 16,
    "sliding_window": 6,
    "sampling_rate": 200,  # 12.5 steps per second, as in the released one
}
TINY_STACK = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "ffn_dim": 80,
}
TINY_DEPTH = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "ffn_dim": 40,
}


def random_codebooks(codec: nn.Module, seed: int = 0) -> None:
    """The entries of a Mimi's codebooks, which are buffers, at random in place."""
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in codec.named_buffers():
        if name.endswith(".embed_sum"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator))


def build(
    seed: int = 0, dtype: torch.dtype = torch.float32, attn: str = "eager", **overrides: Any
) -> transformers.MoshiForConditionalGeneration:
    depth = {key: overrides.pop(f"depth_{key}", value) for key, value in TINY_DEPTH.items()}
    hf_config = transformers.MoshiConfig(
        audio_encoder_config={"model_type": "mimi", **TINY_MIMI},
        depth_decoder_config=depth,
        **{"vocab_size": N_TEXTS, "num_codebooks": N_VOICE, **TINY_STACK, **overrides},
    )
    model = transformers.MoshiForConditionalGeneration(hf_config)
    random_codebooks(model.audio_encoder, seed)
    model.depth_decoder.set_attn_implementation(attn)
    return ready(model, seed, dtype, attn)


def batch(
    lengths: Sequence[int] = (9, 6),
    padding: str = "right",
    begun: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Text and codes of both voices as they enter, unless ``begun`` behind initial tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens, mask = padded_rows([random_words(n, generator) for n in lengths], padding)
    shape = (2, len(lengths), N_VOICE, tokens.shape[1])
    codes = torch.randint(0, N_CODES, shape, generator=generator)
    if not begun:
        first = mask.argmax(1)
        rows = torch.arange(len(lengths))
        tokens[rows, first] = N_TEXTS
        codes[:, rows, :, first] = N_CODES
        codes[:, rows, 1:, first + 1] = N_CODES
    return {
        "input_ids": tokens,
        "moshi_audio_codes": codes[0],
        "user_audio_codes": codes[1],
        "attention_mask": mask,
    }


# -------------------------------------------------------------------------------- the reference


def depth_ids(made: Mapping[str, Tensor]) -> Tensor:
    """What the depth decoder reads at every position: text and all but the last code of the next.

    Initial tokens where there is none; ``b t k``.
    """
    n_books = made["moshi_audio_codes"].shape[1]
    read = torch.cat([made["input_ids"][:, None], made["moshi_audio_codes"][:, :-1]], dim=1)
    initial = torch.tensor([N_TEXTS] + [N_CODES] * (n_books - 1))[:, None]
    behind = initial.expand(len(read), -1, 1)
    moved = torch.cat([read[..., 1:], behind], dim=2)
    known = torch.cat([made["attention_mask"][:, 1:], torch.zeros(len(read), 1)], dim=1).bool()
    return rearrange(torch.where(known[:, None], moved, initial), "b k t -> b t k")


@torch.no_grad()
def reference(hf: transformers.MoshiForConditionalGeneration, made: dict[str, Any]) -> dict:
    """Everything that Hugging Face's decoder computes, and its depth decoder made causal."""
    depth, n_rows = hf.depth_decoder, len(made["input_ids"])
    ids = rearrange(depth_ids(made), "b t k -> (b t) k")
    mask = None if depth.config._attn_implementation == "sdpa" else torch.ones_like(ids)
    found: dict[str, list[Tensor]] = {}
    with recorded(
        found,
        entering_blocks("depth", depth.layers),
        {"depth.hook_out": depth.layers[-1]},
        attending("depth", depth.layers),
    ):
        out = hf(**made, **EVERYTHING)
        codes = depth(
            input_ids=ids,
            last_hidden_state=out.last_hidden_state.reshape(len(ids), 1, -1),
            attention_mask=mask,
        ).logits
    of_depth = {name: tensors[0] for name, tensors in found.items()}
    return {
        **decoder_of(out),
        "hook_logits": torch.cat(
            [out.logits, rearrange(codes, "(b t) k v -> b t (k v)", b=n_rows)], dim=-1
        ),
        **{
            name: on_diagonal(x, n_rows)
            if name.endswith("hook_pattern")
            else rearrange(x, "(b t) k d -> b (t k) d", b=n_rows)
            for name, x in of_depth.items()
        },
    }


def compared(name: str, tensor: Tensor, inputs: AudioInputs) -> Tensor:
    """The decoder, and the depth decoder's steps, at attended tokens."""
    if not name.startswith("depth"):
        return decoder_attended(name, tensor, inputs)
    by_position = tensor.transpose(1, 2) if name.endswith("hook_pattern") else tensor
    return by_position[inputs.attended.repeat_interleave(N_VOICE, dim=1)]


def draw(data: Any) -> tuple[dict, dict]:
    """A shape of both stacks, and conversations of other lengths."""
    model = {
        **draw_decoder(data),
        "depth_num_hidden_layers": data.draw(st.integers(1, 3), "depth_layers"),
        "depth_num_attention_heads": data.draw(st.sampled_from((4, 6)), "depth_heads"),
    }
    return model, draw_lengths(data)


def draw_lengths(data: Any) -> dict[str, list[int]]:
    """Conversations of other lengths."""
    return {"lengths": data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=3), "lengths")}


MOSHI = Family(
    name="moshi",
    build=build,
    batch=batch,
    reference=reference,
    models={
        "tiny": {},
        "wide heads": {"head_dim": 10},
        "another activation": {"hidden_act": "gelu"},
    },
    batches={
        "right padding": {},
        "left padding": {"padding": "left"},
        "from its beginning": {"lengths": (8, 8), "begun": False},
        "one position": {"lengths": (1,)},
    },
    no_float64=("left padding",),
    mask_of=compared,
    draw=draw,
)
