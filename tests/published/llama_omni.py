"""LLaMA-Omni (Fang et al. 2024, arXiv 2409.06666) and LLaMA-Omni2 (2025, arXiv 2505.02625).

Written from ictnlp/LLaMA-Omni, `omni_speech/model`, and openai/whisper, `whisper/model.py`, with
torch's and transformers' parts; parameters bear the names of the released checkpoints. At the
released sizes (Whisper large-v3: e = 1280, 32 layers; Llama-3.1-8B: d = 4096; u = 1000 units) the
text path of the checkpoint is, beside `lm_head.weight` and Llama's (Qwen2's) own under `model.`:

    model.speech_projector.linear1.weight, bias    (2048, 5 e), (2048)
    model.speech_projector.linear2.weight, bias    (d, 2048), (d)

The encoder is openai's `large-v3.pt`, under `model.speech_encoder.` where a checkpoint holds it:

    conv1, conv2.weight, bias                      (e, 128, 3), (e, e, 3), (e)
    positional_embedding                           (1500, e)
    blocks.{l}.attn.query, key, value, out.weight  (e, e); biases (e), but none of key
    blocks.{l}.attn_ln, mlp_ln.weight, bias        (e)
    blocks.{l}.mlp.0.weight, bias                  (4 e, e), (4 e)
    blocks.{l}.mlp.2.weight, bias                  (e, 4 e), (e)
    ln_post.weight, bias                           (e)

LLaMA-Omni's unit decoder, two Llama layers of d = 4096, 32 heads and 11008 neurons:

    speech_generator.input_proj.weight, bias       (4096, d), (4096)
    speech_generator.layers.{l}.*                  LlamaDecoderLayer's
    speech_generator.output_proj.weight, bias      (u + 1, 4096), (u + 1)

LLaMA-Omni2 has `speech_generator.input_proj.{0,2}`, `gate.0` and a whole Qwen2 under `model.`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

SPEECH = -200


# -------------------------------------------------------------------------------- openai's Whisper


class MultiHeadAttention(nn.Module):
    """Returns what it reads, and its pattern unless it is fused."""

    def __init__(self, width: int, n_heads: int):
        super().__init__()
        self.n_heads, self.fused = n_heads, False
        self.query, self.value, self.out = (nn.Linear(width, width) for _ in range(3))
        self.key = nn.Linear(width, width, bias=False)

    def forward(
        self, x: Tensor, read: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        read = x if read is None else read
        q, k, v = (
            each.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for each in (self.query(x), self.key(read), self.value(read))
        )
        pattern = None
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            scale = q.shape[-1] ** -0.25
            scores = (q * scale) @ (k * scale).transpose(-1, -2)
            pattern = (scores if mask is None else scores + mask).softmax(-1)
            mixed = pattern @ v
        return self.out(mixed.transpose(1, 2).flatten(2)), pattern


class ResidualAttentionBlock(nn.Module):
    """Self-attention, cross-attention where there is something to read, and the MLP."""

    def __init__(self, width: int, n_heads: int, crosses: bool = False):
        super().__init__()
        self.attn, self.attn_ln = MultiHeadAttention(width, n_heads), nn.LayerNorm(width)
        if crosses:
            self.cross_attn = MultiHeadAttention(width, n_heads)
            self.cross_attn_ln = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.mlp_ln = nn.LayerNorm(width)

    def forward(self, x: Tensor, read: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.attn_ln(x), mask=mask)[0]
        if read is not None:
            x = x + self.cross_attn(self.cross_attn_ln(x), read)[0]
        return x + self.mlp(self.mlp_ln(x))


class AudioEncoder(nn.Module):
    """Whisper's ear."""

    def __init__(self, n_mels: int, n_ctx: int, width: int, n_heads: int, n_layers: int):
        super().__init__()
        self.conv1 = nn.Conv1d(n_mels, width, 3, padding=1)
        self.conv2 = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.positional_embedding = nn.Parameter(torch.randn(n_ctx, width))
        self.blocks = nn.ModuleList(ResidualAttentionBlock(width, n_heads) for _ in range(n_layers))
        self.ln_post = nn.LayerNorm(width)

    def forward(self, mel: Tensor) -> Tensor:
        x = F.gelu(self.conv2(F.gelu(self.conv1(mel)))).transpose(1, 2)
        x = x + self.positional_embedding
        for block in self.blocks:
            x = block(x)
        return self.ln_post(x)


class TextDecoder(nn.Module):
    """Whisper's decoder."""

    def __init__(self, n_vocab: int, n_ctx: int, width: int, n_heads: int, n_layers: int):
        super().__init__()
        self.token_embedding = nn.Embedding(n_vocab, width)
        self.positional_embedding = nn.Parameter(torch.randn(n_ctx, width))
        self.blocks = nn.ModuleList(
            ResidualAttentionBlock(width, n_heads, crosses=True) for _ in range(n_layers)
        )
        self.ln = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, heard: Tensor) -> Tensor:
        n = tokens.shape[1]
        x = self.token_embedding(tokens) + self.positional_embedding[:n]
        mask = torch.full((n, n), -torch.inf, dtype=x.dtype).triu(1)
        for block in self.blocks:
            x = block(x, heard, mask)
        return self.ln(x) @ self.token_embedding.weight.T


class Whisper(nn.Module):
    """A whole model of openai's, from the `dims` of its file."""

    def __init__(self, dims: dict[str, int]):
        super().__init__()
        audio, text = (
            (dims[f"n_{of}_ctx"], *(dims[f"n_{of}_{what}"] for what in ("state", "head", "layer")))
            for of in ("audio", "text")
        )
        self.dims = dims
        self.encoder = AudioEncoder(dims["n_mels"], *audio)
        self.decoder = TextDecoder(dims["n_vocab"], *text)

    def forward(self, mel: Tensor, tokens: Tensor) -> Tensor:
        return self.decoder(tokens, self.encoder(mel))


def fuse(model: nn.Module, fused: bool) -> None:
    """Whether attention of openai's kind is fused."""
    for module in model.modules():
        if isinstance(module, MultiHeadAttention):
            module.fused = fused


# -------------------------------------------------------------------------------- LLaMA-Omni


class EncoderProjectorConcat(nn.Module):
    """Neighbouring frames side by side (a remainder is dropped), and an MLP of each group."""

    def __init__(self, stacked: int, d_in: int, d_mid: int, d_out: int):
        super().__init__()
        self.k = stacked
        self.linear1, self.relu = nn.Linear(stacked * d_in, d_mid), nn.ReLU()
        self.linear2 = nn.Linear(d_mid, d_out)

    def forward(self, frames: Tensor) -> Tensor:
        whole = frames.shape[1] // self.k
        groups = frames[:, : whole * self.k].reshape(len(frames), whole, -1)
        return self.linear2(self.relu(self.linear1(groups)))


class Speaking:
    """What LLaMA-Omni adds to a causal language model of transformers."""

    def add_ear(self, ear: dict[str, int], d_mid: int = 24) -> None:
        self.model.speech_encoder = AudioEncoder(**ear)
        self.model.speech_projector = EncoderProjectorConcat(
            5, ear["width"], d_mid, self.config.hidden_size
        )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        input_features: Tensor,
        input_features_mask: Tensor | None = None,
        **wanted: Any,
    ) -> Any:
        """Each placeholder gives way to all positions of a clip, the padding of the clip too."""
        heard = iter(self.model.speech_projector(self.model.speech_encoder(input_features)))
        rows = [
            self.spliced(ids[kept.bool()], heard)
            for ids, kept in zip(input_ids, attention_mask, strict=True)
        ]
        left, width = bool(attention_mask[:, -1].all()), max(map(len, rows))
        gaps = [(width - len(x), 0) if left else (0, width - len(x)) for x in rows]
        padded = list(zip(rows, gaps, strict=True))
        return super().forward(
            inputs_embeds=torch.stack([F.pad(x, (0, 0, *gap)) for x, gap in padded]),
            attention_mask=torch.stack(
                [F.pad(torch.ones(len(x)), gap) for x, gap in padded]
            ).long(),
            **wanted,
        )

    def spliced(self, ids: Tensor, heard: Iterator[Tensor]) -> Tensor:
        """What enters the language model for a prompt, clip after clip in its places."""
        return torch.cat(
            [next(heard) if i == SPEECH else self.model.embed_tokens(i[None]) for i in ids]
        )


class LlamaOmni(Speaking, transformers.LlamaForCausalLM):
    """LLaMA-Omni."""


class LlamaOmni2(Speaking, transformers.Qwen2ForCausalLM):
    """LLaMA-Omni2, without what speaks."""


class SpeechGeneratorCTC(nn.Module):
    """Units from the hidden states that predicted an answer, all at once.

    ``shape`` is layers, width, heads and neurons, as `ctc_decoder_config` says.
    """

    def __init__(
        self,
        config: transformers.LlamaConfig,
        shape: tuple[int, int, int, int],
        upsample: int,
        n_units: int,
    ):
        super().__init__()
        n_layers, width, n_heads, d_mlp = shape
        own = copy.deepcopy(config)
        own.hidden_size, own.intermediate_size, own.head_dim = width, d_mlp, width // n_heads
        own.num_attention_heads = own.num_key_value_heads = n_heads
        self.upsample = upsample
        self.input_proj = nn.Linear(config.hidden_size, width)
        self.layers = nn.ModuleList(LlamaDecoderLayer(own, i) for i in range(n_layers))
        self.output_proj = nn.Linear(width, n_units + 1)
        self.turned = LlamaRotaryEmbedding(own)

    def forward(self, states: Tensor) -> Tensor:
        """Logits (b, 25 n, units + 1) of the states (b, n, d) of answers of equal length."""
        x = self.input_proj(states.repeat_interleave(self.upsample, dim=1))
        n = x.shape[1]
        mask = torch.full((n, n), -torch.inf, dtype=x.dtype).triu(1)[None, None]
        turned = self.turned(x, torch.arange(n)[None])
        for layer in self.layers:
            x = layer(x, attention_mask=mask, position_embeddings=turned)
        return self.output_proj(x)
