"""BEATs as published (microsoft/unilm, beats/; arXiv:2212.09058), in plain torch.

Parameters have the names of the published checkpoints, so that a `state_dict` is one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PUBLISHED: dict[str, Any] = {
    "input_patch_size": 16,
    "embed_dim": 512,
    "conv_bias": False,
    "encoder_layers": 12,
    "encoder_embed_dim": 768,
    "encoder_ffn_embed_dim": 3072,
    "encoder_attention_heads": 12,
    "activation_fn": "gelu",
    "layer_norm_first": False,
    "deep_norm": True,
    "conv_pos": 128,
    "conv_pos_groups": 16,
    "relative_position_embedding": True,
    "num_buckets": 320,
    "max_distance": 800,
    "gru_rel_pos": True,
    "finetuned_model": True,
    "predictor_class": 527,
}
"""The ``cfg`` of the checkpoints tuned on AudioSet, as far as it matters to what they compute."""
TINY = {
    **PUBLISHED,
    "embed_dim": 24,
    "encoder_layers": 3,
    "encoder_embed_dim": 32,
    "encoder_ffn_embed_dim": 48,
    "encoder_attention_heads": 4,
    "conv_pos": 16,
    "conv_pos_groups": 4,
    "num_buckets": 16,
    "max_distance": 12,
    "predictor_class": 7,
}
ALPHA = 32  # scores are divided and multiplied by it
MEAN, DEVIATION = 15.41663, 6.55582
N_MELS, WINDOW, HOP, N_FFT = 128, 400, 160, 512


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of a released checkpoint tuned on AudioSet."""
    with torch.device("meta"):
        return {name: tuple(x.shape) for name, x in Beats(PUBLISHED).state_dict().items()}


# -------------------------------------------------------------------------------- features


def fbank(wave: Tensor) -> Tensor:
    """Kaldi's log-mel features of one waveform, ``frames mels``, normalised as BEATs does.

    In float32 or better.
    """
    wave = wave.to(torch.promote_types(wave.dtype, torch.float32))
    n_frames = 1 + (len(wave) - WINDOW) // HOP
    frames = torch.stack([wave[HOP * i : HOP * i + WINDOW] for i in range(n_frames)]) * 2**15
    frames = frames - frames.mean(1, keepdim=True)
    emphasised = frames.clone()
    emphasised[:, 1:] -= 0.97 * frames[:, :-1]
    emphasised[:, 0] -= 0.97 * frames[:, 0]
    turns = 2 * math.pi * torch.arange(WINDOW, dtype=wave.dtype) / (WINDOW - 1)
    povey = (0.5 - 0.5 * turns.cos()) ** 0.85
    power = torch.fft.rfft(emphasised * povey, n=N_FFT).abs() ** 2
    mel = power[:, :-1] @ mel_banks(wave.dtype).T
    floor = torch.finfo(torch.float32).eps
    return (mel.clamp(min=floor).log() - MEAN) / (2 * DEVIATION)


def mel_banks(dtype: torch.dtype) -> Tensor:
    """Triangles from 20 Hz to 8 kHz, equally far apart in mel: ``mels bins``."""

    def mel(hertz: Tensor) -> Tensor:
        return 1127 * (1 + hertz / 700).log()

    ends = mel(torch.tensor([20.0, 8000.0], dtype=torch.float64))
    step = (ends[1] - ends[0]) / (N_MELS + 1)
    left = ends[0] + step * torch.arange(N_MELS, dtype=torch.float64)[:, None]
    bins = mel(16000 / N_FFT * torch.arange(N_FFT // 2, dtype=torch.float64))
    rising, falling = (bins - left) / step, (left + 2 * step - bins) / step
    return torch.minimum(rising, falling).clamp(min=0).to(dtype)


def coarser(is_padding: Tensor, n: int) -> Tensor:
    """A mask of padding (``b t``) as one of ``n`` positions: those of which all is padding."""
    extra = is_padding.shape[1] % n
    kept = is_padding[:, : is_padding.shape[1] - extra]
    return kept.reshape(len(kept), n, -1).all(-1)


# -------------------------------------------------------------------------------- model


class Beats(nn.Module):
    """From waveforms at 16 kHz to hidden states, or to class logits (before their sigmoid)."""

    def __init__(self, cfg: dict[str, Any]):
        super().__init__()
        self.cfg, d = cfg, cfg["encoder_embed_dim"]
        patch, d_patch = cfg["input_patch_size"], cfg["embed_dim"]
        self.patch_embedding = nn.Conv2d(1, d_patch, patch, patch, bias=cfg["conv_bias"])
        self.layer_norm = nn.LayerNorm(d_patch)
        if d_patch != d:
            self.post_extract_proj = nn.Linear(d_patch, d)
        self.encoder = Encoder(cfg)
        if cfg["finetuned_model"]:
            self.predictor = nn.Linear(d, cfg["predictor_class"])

    def forward(self, source: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Class logits ``b classes``, or of a model that was not tuned its hidden states."""
        hidden, is_padding = self.extract_features(source, padding_mask)
        if not hasattr(self, "predictor"):
            return hidden
        logits = self.predictor(hidden)
        if is_padding is None:
            return logits.mean(1)
        kept = ~is_padding[..., None]
        return (logits * kept).sum(1) / kept.sum(1)

    def extract_features(
        self, source: Tensor, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states ``b patches d`` and which of the patches are padding."""
        mel = torch.stack([fbank(wave) for wave in source])
        if padding_mask is not None:
            padding_mask = coarser(padding_mask, mel.shape[1])
        return self.hear(mel, padding_mask)

    def hear(self, mel: Tensor, is_padding: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The same from features, ``b frames mels``, and which of the frames are padding."""
        patches = self.patch_embedding(mel.to(self.patch_embedding.weight)[:, None])
        x = self.layer_norm(patches.flatten(2).transpose(1, 2))
        if is_padding is not None:
            is_padding = coarser(is_padding, x.shape[1])
        if hasattr(self, "post_extract_proj"):
            x = self.post_extract_proj(x)
        return self.encoder(x, is_padding), is_padding


class Encoder(nn.Module):
    def __init__(self, cfg: dict[str, Any]):
        super().__init__()
        d = cfg["encoder_embed_dim"]
        self.pos_conv = nn.Sequential(PositionConv(d, cfg["conv_pos"], cfg["conv_pos_groups"]))
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg["encoder_layers"]))
        for layer in self.layers:  # one table, named in every layer
            first = self.layers[0].self_attn.relative_attention_bias
            layer.self_attn.relative_attention_bias = first
        self.layer_norm = nn.LayerNorm(d)

    def forward(self, x: Tensor, is_padding: Tensor | None) -> Tensor:
        if is_padding is not None:
            x = x.masked_fill(is_padding[..., None], 0)
        x = self.layer_norm(x + self.pos_conv(x))
        bias = self.layers[0].self_attn.position_bias(x.shape[1])
        for layer in self.layers:
            x = layer(x, bias, is_padding)
        return x


class PositionConv(nn.Module):
    """A grouped convolution over positions with a norm of its weights, and GELU."""

    def __init__(self, d: int, kernel: int, groups: int):
        super().__init__()
        self.groups = groups
        self.weight_g = nn.Parameter(torch.ones(1, 1, kernel))
        self.weight_v = nn.Parameter(torch.randn(d, d // groups, kernel))
        self.bias = nn.Parameter(torch.zeros(d))

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.weight_v.shape[-1]
        weight = self.weight_g * self.weight_v / self.weight_v.norm(dim=(0, 1), keepdim=True)
        out = F.conv1d(x.mT, weight, self.bias, padding=kernel // 2, groups=self.groups)
        return F.gelu(out[..., : x.shape[1]].mT)


class Layer(nn.Module):
    def __init__(self, cfg: dict[str, Any]):
        super().__init__()
        d, d_mlp = cfg["encoder_embed_dim"], cfg["encoder_ffn_embed_dim"]
        self.self_attn = SelfAttention(cfg)
        self.self_attn_layer_norm = nn.LayerNorm(d)
        self.fc1, self.fc2 = nn.Linear(d, d_mlp), nn.Linear(d_mlp, d)
        self.final_layer_norm = nn.LayerNorm(d)
        self.act = {"gelu": F.gelu, "relu": F.relu}[cfg["activation_fn"]]
        self.alpha = (2 * cfg["encoder_layers"]) ** 0.25 if cfg["deep_norm"] else 1.0

    def forward(self, x: Tensor, bias: Tensor, is_padding: Tensor | None) -> Tensor:
        x = self.self_attn_layer_norm(self.alpha * x + self.self_attn(x, bias, is_padding)[0])
        return self.final_layer_norm(self.alpha * x + self.fc2(self.act(self.fc1(x))))


class SelfAttention(nn.Module):
    """Attention with a bias by distance, gated by the query; ``is_fused`` by torch's kernel."""

    is_fused = False

    def __init__(self, cfg: dict[str, Any]):
        super().__init__()
        d, self.n_heads = cfg["encoder_embed_dim"], cfg["encoder_attention_heads"]
        self.n_buckets, self.max_distance = cfg["num_buckets"], cfg["max_distance"]
        self.relative_attention_bias = nn.Embedding(self.n_buckets, self.n_heads)
        self.k_proj, self.v_proj = nn.Linear(d, d), nn.Linear(d, d)
        self.q_proj, self.out_proj = nn.Linear(d, d), nn.Linear(d, d)
        self.grep_linear = nn.Linear(d // self.n_heads, 8)
        self.grep_a = nn.Parameter(torch.ones(1, self.n_heads, 1, 1))

    def position_bias(self, n: int) -> Tensor:
        """``heads n n``."""
        distance = torch.arange(n)[None, :] - torch.arange(n)[:, None]
        buckets = torch.tensor([[self.bucket(k) for k in row] for row in distance.tolist()])
        return self.relative_attention_bias(buckets).permute(2, 0, 1)

    def bucket(self, distance: int) -> int:
        half = self.n_buckets // 2
        near, size = half // 2, abs(distance)
        if size >= near:
            far = math.log(size / near) / math.log(self.max_distance / near)
            size = min(half - 1, near + int(far * (half - near)))
        return size + (half if distance > 0 else 0)

    def forward(
        self, x: Tensor, bias: Tensor, is_padding: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """What is written, and the pattern ``b heads n n`` (None if fused)."""
        q, k, v = (
            proj(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        first, second = self.grep_linear(q).unflatten(-1, (2, 4)).sum(-1).sigmoid().split(1, -1)
        bias = (first * (second * self.grep_a - 1) + 2) * bias
        if is_padding is not None:
            bias = bias.masked_fill(is_padding[:, None, None], -torch.inf)
        if self.is_fused:
            z, pattern = F.scaled_dot_product_attention(q, k, v, attn_mask=bias), None
        else:
            scores = (q * q.shape[-1] ** -0.5 / ALPHA) @ k.mT
            pattern = ((scores - scores.amax(-1, keepdim=True)) * ALPHA + bias).softmax(-1)
            z = pattern @ v
        return self.out_proj(z.transpose(1, 2).flatten(2)), pattern
