"""SALMONN as published (bytedance/SALMONN, models/salmonn.py; arXiv:2310.13289), in plain torch.

Whisper and Llama are transformers', as there; all other parameters have the published names, and
`checkpoint` gives those that the released files hold.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from published.beats import PUBLISHED, Beats

FRAMES_OF_30_S, WINDOW_S = 1500, 0.333333
WINDOW = round(FRAMES_OF_30_S * WINDOW_S / 30)
RANK, ALPHA = 8, 32
N_HEADS = 12  # of the Q-Former, as in BERT-base
TINY_EAR = {
    "d_model": 32,
    "encoder_layers": 3,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "num_mel_bins": 20,
    "max_source_positions": 100,
    "decoder_layers": 1,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 8,
    "vocab_size": 60,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
}
_LAYERS_OF_LORA = ("q_proj", "v_proj")


def published_shapes(d_llama: int = 4096, n_layers: int = 32) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a released checkpoint holds: SALMONN-7B, or with 5120, 40: 13B."""
    whisper = transformers.WhisperConfig(
        **{**TINY_EAR, "d_model": 1280, "encoder_layers": 0, "max_source_positions": 1500}
    )
    llama = transformers.LlamaConfig(
        hidden_size=d_llama,
        num_hidden_layers=n_layers,
        intermediate_size=8,
        vocab_size=8,
        num_attention_heads=d_llama // 128,
    )
    beats = {**PUBLISHED, "encoder_layers": 1}
    with torch.device("meta"):
        model = Salmonn(
            transformers.WhisperModel(whisper), Beats(beats), transformers.LlamaForCausalLM(llama)
        )
        return {name: tuple(x.shape) for name, x in model.checkpoint()["model"].items()}


class Salmonn(nn.Module):
    """From spectrograms and waveforms of clips, and prompts about them, to logits.

    Args:
        d: width of the Q-Former.
        placeholder: the token id in whose places the audio of a prompt stands.
    """

    def __init__(
        self,
        whisper: transformers.WhisperModel,
        beats: Beats,
        llama: transformers.LlamaForCausalLM,
        d: int = 768,
        d_mlp: int = 3072,
        n_layers: int = 2,
        rank: int = RANK,
        n_queries: int = 1,
        placeholder: int = -1,
    ):
        super().__init__()
        self.placeholder = placeholder
        self.speech_encoder, self.beats = whisper.encoder, beats
        widths = whisper.config.d_model, beats.cfg["encoder_embed_dim"]
        self.ln_speech, self.ln_audio = map(nn.LayerNorm, widths)
        self.speech_Qformer = nn.ModuleDict({"bert": Bert(d, d_mlp, sum(widths), n_layers)})
        self.speech_query_tokens = nn.Parameter(torch.zeros(1, n_queries, d))
        self.speech_llama_proj = nn.Linear(d, llama.config.hidden_size)
        for layer in llama.model.layers:
            for name in _LAYERS_OF_LORA:
                linear = getattr(layer.self_attn, name)
                setattr(layer.self_attn, name, LoraLinear(linear, rank))
        self.llama_model = nn.ModuleDict({"base_model": nn.ModuleDict({"model": llama})})

    @property
    def llama(self) -> transformers.LlamaForCausalLM:
        return self.llama_model["base_model"]["model"]

    def checkpoint(self) -> dict[str, dict[str, Tensor]]:
        """What the released files hold: what was trained, and a buffer of BERT's."""
        frozen = ("speech_encoder.", "beats.", "llama_model.")
        trained = {
            name: tensor
            for name, tensor in self.state_dict().items()
            if not name.startswith(frozen) or ".lora_" in name
        }
        positions = torch.arange(512)[None]
        return {"model": {**trained, "speech_Qformer.bert.embeddings.position_ids": positions}}

    def encode_speech(
        self, spectrogram: Tensor, raw_wav: Tensor, padding_mask: Tensor | None
    ) -> Tensor:
        """Audio tokens ``b windows d``, one per window of 0.34 s."""
        speech = self.speech_encoder(spectrogram).last_hidden_state
        return self.encode(speech, self.beats.extract_features(raw_wav, padding_mask)[0])

    def encode(self, speech: Tensor, audio: Tensor) -> Tensor:
        """The same from what both ears heard."""
        speech, audio = self.ln_speech(speech), self.ln_audio(audio)
        length = max(speech.shape[1], audio.shape[1])
        speech, audio = (F.pad(x, (0, 0, 0, length - x.shape[1])) for x in (speech, audio))
        heard = torch.cat([speech, audio], dim=-1)
        n_windows = length // WINDOW
        windows = heard[:, : n_windows * WINDOW].reshape(-1, WINDOW, heard.shape[-1])
        found = self.speech_Qformer["bert"](
            self.speech_query_tokens.expand(len(windows), -1, -1), windows
        )
        return self.speech_llama_proj(found).reshape(len(heard), n_windows, -1)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        audio: Tensor,
        **wanted: Any,
    ) -> Any:
        """Prompts about one clip each, with as many placeholders as it has audio tokens."""
        is_audio = input_ids == self.placeholder
        embeds = self.llama.model.embed_tokens(input_ids.masked_fill(is_audio, 0))
        embeds = embeds.masked_scatter(is_audio[..., None], audio)
        return self.llama(inputs_embeds=embeds, attention_mask=attention_mask, **wanted)


# -------------------------------------------------------------------------------- Q-Former


class Bert(nn.Module):
    """BERT for queries alone, each layer of which also reads a window."""

    def __init__(self, d: int, d_mlp: int, d_memory: int, n_layers: int):
        super().__init__()
        layers = nn.ModuleList(BertLayer(d, d_mlp, d_memory) for _ in range(n_layers))
        self.embeddings = nn.ModuleDict({"LayerNorm": nn.LayerNorm(d, eps=1e-12)})
        self.encoder = nn.ModuleDict({"layer": layers})

    def forward(self, queries: Tensor, windows: Tensor) -> Tensor:
        x = self.embeddings["LayerNorm"](queries)
        for layer in self.encoder["layer"]:
            x = layer(x, windows)
        return x


class BertLayer(nn.Module):
    def __init__(self, d: int, d_mlp: int, d_memory: int):
        super().__init__()
        self.attention, self.crossattention = BertAttention(d, d), BertAttention(d, d_memory)
        self.intermediate_query = nn.ModuleDict({"dense": nn.Linear(d, d_mlp)})
        self.output_query = BertOutput(d_mlp, d)

    def forward(self, x: Tensor, windows: Tensor) -> Tensor:
        x = self.attention(x, x)
        x = self.crossattention(x, windows)
        return self.output_query(F.gelu(self.intermediate_query["dense"](x)), x)


class BertAttention(nn.Module):
    def __init__(self, d: int, d_memory: int):
        super().__init__()
        self.self = BertSelfAttention(d, d_memory)
        self.output = BertOutput(d, d)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.output(self.self(x, memory)[0], x)


class BertSelfAttention(nn.Module):
    is_fused = False

    def __init__(self, d: int, d_memory: int):
        super().__init__()
        self.query = nn.Linear(d, d)
        self.key, self.value = nn.Linear(d_memory, d), nn.Linear(d_memory, d)

    def forward(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor | None]:
        """What is found, and the pattern ``b heads q k`` (None if fused)."""
        q, k, v = (
            y.unflatten(-1, (N_HEADS, -1)).transpose(1, 2)
            for y in (self.query(x), self.key(memory), self.value(memory))
        )
        if self.is_fused:
            z, pattern = F.scaled_dot_product_attention(q, k, v), None
        else:
            pattern = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
            z = pattern @ v
        return z.transpose(1, 2).flatten(2), pattern


class BertOutput(nn.Module):
    def __init__(self, d_in: int, d: int):
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(d_in, d), nn.LayerNorm(d, eps=1e-12)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x) + residual)


# -------------------------------------------------------------------------------- LoRA


class LoraLinear(nn.Module):
    """A frozen linear map and its adapter, under peft's names."""

    def __init__(self, linear: nn.Linear, rank: int):
        super().__init__()
        self.base_layer, self.scale = linear, ALPHA / rank
        self.lora_A = nn.ModuleDict({"default": nn.Linear(linear.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, linear.out_features, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        added = self.lora_B["default"](self.lora_A["default"](x))
        return self.base_layer(x) + self.scale * added
