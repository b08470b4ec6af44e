"""Qwen-Audio (Chu et al. 2023, arXiv 2311.07919) as published, in plain torch.

Written from QwenLM/Qwen-Audio, `modeling_qwen.py` and `audio.py`; parameters bear the names of the
released checkpoint. At the released size (e = 1280, 32 layers of ear; d = 4096, 32 layers of
Qwen-7B with 22016 / 2 neurons; v = 155947 tokens) these are:

    transformer.wte.weight                              (v, d)
    transformer.h.{l}.ln_1, ln_2.weight                 (d)
    transformer.h.{l}.attn.c_attn.weight, bias          (3 d, d), (3 d)
    transformer.h.{l}.attn.c_proj.weight                (d, d)
    transformer.h.{l}.mlp.w1, w2.weight                 (11008, d)
    transformer.h.{l}.mlp.c_proj.weight                 (d, 11008)
    transformer.ln_f.weight                             (d)
    lm_head.weight                                      (v, d)
    transformer.audio.*                                 openai's Whisper encoder, and
    transformer.audio.proj.weight, bias                 (d, e), (d)
    transformer.audio.audio_bos_eos_token.weight        (2, d)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from published.llama_omni import AudioEncoder, MultiHeadAttention


class RMSNorm(nn.Module):
    """In float32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        precise = x.float()
        size = precise.pow(2).mean(-1, keepdim=True) + self.eps
        return (precise * torch.rsqrt(size)).type_as(x) * self.weight


class QWenAttention(nn.Module):
    """Queries, keys and values by one map; returns what it reads, and its pattern unless fused."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        width = config["hidden_size"]
        self.n_heads, self.base = config["num_attention_heads"], config["rotary_emb_base"]
        self.fused = False
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width, bias=False)

    def turn(self, x: Tensor) -> Tensor:
        """By the place in the row, padding counted: (b, h, t, e)."""
        n, e = x.shape[-2:]
        speeds = 1.0 / (self.base ** (torch.arange(0, e, 2).float() / e))
        angles = torch.outer(torch.arange(n).float(), speeds)
        cos, sin = (torch.cat([f, f], dim=-1).to(x) for f in (angles.cos(), angles.sin()))
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        q, k, v = (
            each.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for each in self.c_attn(x).chunk(3, dim=-1)
        )
        q, k, pattern = self.turn(q), self.turn(k), None
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            pattern = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + mask).softmax(-1)
            mixed = pattern @ v
        return self.c_proj(mixed.transpose(1, 2).flatten(2)), pattern


class QWenMLP(nn.Module):
    """The second map gates the first."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        width, neurons = config["hidden_size"], config["intermediate_size"] // 2
        self.w1, self.w2 = (nn.Linear(width, neurons, bias=False) for _ in range(2))
        self.c_proj = nn.Linear(neurons, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.w1(x) * F.silu(self.w2(x)))


class QWenBlock(nn.Module):
    """Norms before attention and MLP."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.ln_1, self.ln_2 = (
            RMSNorm(config["hidden_size"], config["layer_norm_epsilon"]) for _ in range(2)
        )
        self.attn, self.mlp = QWenAttention(config), QWenMLP(config)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask)[0]
        return x + self.mlp(self.ln_2(x))


class QwenAudioEncoder(AudioEncoder):
    """Hears as much as the longest clip of the batch holds; pads are no keys."""

    def __init__(self, config: dict[str, Any]):
        ear = config["audio"]
        shape = (ear[f"n_{name}"] for name in ("mels", "ctx", "state", "head", "layer"))
        super().__init__(*shape)
        self.avg_pooler = nn.AvgPool1d(2, stride=2)
        self.proj = nn.Linear(ear["n_state"], ear["output_dim"])
        self.audio_bos_eos_token = nn.Embedding(2, ear["output_dim"])

    def forward(self, mel: Tensor, n_frames: Tensor) -> Tensor:
        """Tokens (clips, tokens, d) of clips that have so many frames of 20 ms."""
        longest = int(n_frames.max())
        x = F.gelu(self.conv2(F.gelu(self.conv1(mel[..., : 2 * longest])))).transpose(1, 2)
        x = x + self.positional_embedding[:longest]
        pads = torch.arange(longest) >= n_frames[:, None]
        x = x.masked_fill(pads[..., None], 0)
        mask = torch.zeros_like(pads, dtype=x.dtype).masked_fill(pads, -torch.inf)[:, None, None]
        for block in self.blocks:
            x = block(x, mask=mask)
        return self.proj(self.ln_post(self.avg_pooler(x.transpose(1, 2)).transpose(1, 2)))


class QWenModel(nn.Module):
    """The decoder, and the ear within it."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.wte = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.h = nn.ModuleList(QWenBlock(config) for _ in range(config["num_hidden_layers"]))
        self.ln_f = RMSNorm(config["hidden_size"], config["layer_norm_epsilon"])
        self.audio = QwenAudioEncoder(config)


class QWenLMHeadModel(nn.Module):
    """Prompts of no more than `seq_length` tokens, before which nothing depends on it."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.config = config
        self.transformer = QWenModel(config)
        self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        input_features: Tensor,
        feature_attention_mask: Tensor,
    ) -> Tensor:
        """Logits; audio stands from each opening tag to its closing one."""
        inner, first = self.transformer, self.config["audio"]["audio_start_id"]
        n_mel = feature_attention_mask.sum(1)
        n_frames = (n_mel - 1) // 2 + 1
        begin, end = inner.audio.audio_bos_eos_token.weight[:, None]
        x = inner.wte(input_ids)
        opened, closed = (input_ids == first).nonzero(), (input_ids == first + 1).nonzero()
        heard = inner.audio(input_features, n_frames)
        for tokens, count, (row, start), (_, stop) in zip(
            heard, n_frames, opened.tolist(), closed.tolist(), strict=True
        ):
            x[row, start : stop + 1] = torch.cat([begin, tokens[: count // 2], end])
        n = input_ids.shape[1]
        seen = torch.ones(n, n, dtype=torch.bool).tril() & attention_mask.bool()[:, None, None]
        mask = torch.zeros_like(seen, dtype=x.dtype).masked_fill(~seen, torch.finfo(x.dtype).min)
        for block in inner.h:
            x = block(x, mask)
        return self.lm_head(inner.ln_f(x))


def fuse(model: nn.Module, fused: bool) -> None:
    """Whether attention is fused."""
    for module in model.modules():
        if isinstance(module, (MultiHeadAttention, QWenAttention)):
            module.fused = fused
