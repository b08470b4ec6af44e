"""Qwen-Audio, the first one (Chu et al. 2023, arXiv 2311.07919): Whisper's ear and Qwen-7B.

The ear hears a clip as far as the longest of the batch reaches, masks what lies behind its own end,
and pools pairs of frames; a linear map leads into the language model. In a prompt each clip stands
between the tags ``<audio>`` and ``</audio>``, which have learned vectors of their own there.

Prompts longer than `seq_length` (2048) are refused: the published code scales attention and changes
the rotary base beyond it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from tokenizers import normalizers
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerFast

from audio_lens.audio import AudioError
from audio_lens.inputs import AudioInputs, InputError
from audio_lens.models.config import AudioConfig, LoadingError
from audio_lens.models.families.qwen2_audio import PooledAudioLLM
from audio_lens.models.layers import Context, KVCache, PartConfig
from audio_lens.models.loading.generation import stored_settings
from audio_lens.models.loading.stored import read_config, reads_checkpoint
from audio_lens.models.loading.weights import fill, read_weights, renamed
from audio_lens.models.parts.connectors import LinearConnector
from audio_lens.models.parts.language_model import LanguageModel
from audio_lens.recipes.openai_whisper import encoder_weight_names
from audio_lens.recipes.tiktoken import tiktoken_tokenizer

_BLOCK = {
    "ln_1": "ln1",
    "attn.q": "attn.q_proj",
    "attn.k": "attn.k_proj",
    "attn.v": "attn.v_proj",
    "attn.c_proj": "attn.o_proj",
    "ln_2": "ln2",
    "mlp.w1": "mlp.fc_in",
    "mlp.w2": "mlp.gate",
    "mlp.c_proj": "mlp.fc_out",
}
WEIGHT_NAMES: dict[str, str | None] = {
    **encoder_weight_names("transformer.audio"),
    "transformer.audio.proj": "connector.linear",
    "transformer.audio.audio_bos_eos_token": "decoder.token_embed.tags",
    "transformer.wte": "decoder.token_embed",
    **{f"transformer.h.{{l}}.{a}": f"decoder.blocks.{{l}}.{b}" for a, b in _BLOCK.items()},
    "transformer.h.{l}.attn.masked_bias": None,  # a constant of older files
    "transformer.ln_f": "decoder.ln_final",
    "lm_head": "decoder.unembed",
}
"""The published names, once queries, keys and values are apart (`without_fused`), to ours."""

_REQUIRED: dict[str, Any] = {"no_bias": True, "rotary_pct": 1.0, "scale_attn_weights": True}
_REQUIRED_OF_EAR: dict[str, Any] = {"avg_pool": True, "add_audio_bos_eos_token": True}


@dataclass(kw_only=True)
class QwenAudioConfig(AudioConfig):
    """Shape of a Qwen-Audio.

    Attributes:
        opening: token id of ``<audio>``; that of ``</audio>`` is the next.
    """

    opening: int


def qwen_audio_config(config: Mapping[str, Any], model_name: str = "") -> QwenAudioConfig:
    """The shape that a published ``config.json`` tells of.

    Raises:
        LoadingError: if it is of another model, or of a variant that is not implemented.
    """
    ear = config.get("audio")
    if ear is None:
        raise LoadingError("this config tells of no audio encoder, so it is no Qwen-Audio")
    for given, required in ((config, _REQUIRED), (ear, _REQUIRED_OF_EAR)):
        others = [f"{k}={given[k]!r}" for k, v in required.items() if given.get(k, v) != v]
        if others:
            raise LoadingError(f"Qwen-Audio with {', '.join(others)} is not implemented")
    n_heads, d_head = config["num_attention_heads"], config["kv_channels"]
    if n_heads * d_head != config["hidden_size"]:
        raise LoadingError(
            f"{n_heads} heads of {d_head} dimensions do not fill a stream of "
            f"{config['hidden_size']}: not implemented"
        )
    return QwenAudioConfig(
        family="qwen_audio",
        model_name=model_name,
        encoder=PartConfig(
            n_layers=ear["n_layer"],
            n_heads=ear["n_head"],
            n_key_value_heads=ear["n_head"],
            d_model=ear["n_state"],
            d_head=ear["n_state"] // ear["n_head"],
            d_mlp=4 * ear["n_state"],
            n_ctx=ear["n_ctx"],
            act_fn="gelu",
            eps=1e-5,
            normalization_type="LN",
            scales_queries=True,
            model_name=model_name,
        ),
        decoder=PartConfig(
            n_layers=config["num_hidden_layers"],
            n_heads=n_heads,
            n_key_value_heads=n_heads,
            d_model=config["hidden_size"],
            d_head=d_head,
            d_mlp=config["intermediate_size"] // 2,
            n_ctx=config["seq_length"],
            act_fn="silu",
            eps=config["layer_norm_epsilon"],
            normalization_type="RMS",
            model_name=model_name,
            d_vocab=config["vocab_size"],
            causal=True,
            gated_mlp=True,
            mlp_bias=False,
            attn_biases=("q", "k", "v"),
            rotary_base=float(config["rotary_emb_base"]),
        ),
        n_mels=ear["n_mels"],
        n_frames=2 * ear["n_ctx"],
        opening=ear["audio_start_id"],
    )


def without_fused(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with queries, keys and values of the language model apart, as views."""
    apart: dict[str, Tensor] = {}
    for name, tensor in state.items():
        before, fused, kind = name.rpartition("c_attn.")
        if fused:
            parts = zip("qkv", tensor.chunk(3), strict=True)
            apart |= {f"{before}{part}.{kind}": piece for part, piece in parts}
        else:
            apart[name] = tensor
    return apart


# -------------------------------------------------------------------------------- the model


class TaggedEmbedding(nn.Embedding):
    """Token embeddings in which two tags have vectors of another table, `tags`."""

    def __init__(self, d_vocab: int, d_model: int, opening: int):
        super().__init__(d_vocab, d_model)
        self.tags, self.opening = nn.Embedding(2, d_model), opening

    def forward(self, tokens: Int[Tensor, "b t"]) -> Float[Tensor, "b t d"]:
        tag = tokens - self.opening
        is_tag = (tag == 0) | (tag == 1)
        return super().forward(tokens).where(~is_tag[..., None], self.tags(tag.clamp(0, 1)))


class HookedQwenAudio(PooledAudioLLM):
    """Qwen-Audio with every activation hooked; `hook_token_embed` holds the tags' own vectors."""

    lends_encoder = False  # what it hears of a clip depends on the others of its batch
    cfg: QwenAudioConfig

    def __init__(self, cfg: QwenAudioConfig):
        super().__init__(cfg)
        self.audio_token_id = cfg.opening - _AUDIO_TOKENS.index(_OPENING)

    def make_connector(self, cfg: QwenAudioConfig) -> LinearConnector:
        return LinearConnector(cfg.need_encoder.d_model, cfg.need_decoder.d_model)

    def make_decoder(self, cfg: QwenAudioConfig) -> LanguageModel:
        shape = cfg.need_decoder
        decoder = LanguageModel(shape)
        decoder.token_embed = TaggedEmbedding(shape.need_d_vocab, shape.d_model, cfg.opening)
        return decoder

    def decoder_context(
        self, inputs: AudioInputs, encoded: Tensor | None, past: KVCache | None = None
    ) -> Context:
        """Masks and rotary positions.

        Raises:
            InputError: for prompts longer than those that attention is computed plainly for.
        """
        n_tokens = inputs.tokens.shape[1] + (past.length if past is not None else 0)
        n_ctx = self.cfg.need_decoder.need_n_ctx
        if n_tokens > n_ctx:
            raise InputError(
                f"{n_tokens} tokens are more than the {n_ctx} (seq_length) up to "
                "which Qwen-Audio attends plainly; what it does beyond is not implemented: use "
                "shorter clips and prompts"
            )
        return super().decoder_context(inputs, encoded, past)

    # ---------------------------------------------------------------- what it hears

    mixes_lengths = "its encoder hears silence behind a clip, as far as the longest reaches"

    def encoder_length(self, inputs: AudioInputs) -> int:
        """Two mel frames to a position."""
        return inputs.features.shape[-1] // 2

    def check_features(self, features: Tensor) -> None:
        """Raise unless the features are log-mel frames, an even number of at most 30 s.

        Raises:
            InputError: naming both shapes.
        """
        n_mels, most = self.cfg.n_mels, self.cfg.need_n_frames
        fits = features.ndim == 3 and features.shape[1] == n_mels
        if not fits or features.shape[2] % 2 or not 0 < features.shape[2] <= most:
            raise InputError(
                f"features must be (clips, {n_mels} mel bins, an even number of frames, at most "
                f"{most}); got {tuple(features.shape)}"
            )

    def cut(
        self, features: Tensor, frames: Bool[Tensor, "clips frames"] | None
    ) -> tuple[Tensor, Bool[Tensor, "clips n"] | None, None]:
        """Features and masks as far as the longest clip reaches, in whole encoder frames."""
        if frames is None:
            return features, None, None
        width = 2 * self.frame_count(int(frames.sum(1).max()))
        return features[..., :width], frames[:, :width], None

    def segments_of(
        self, clips: list[Float[Any, " _"]]
    ) -> tuple[Tensor, Bool[Tensor, "segments frames"] | None, tuple[int, ...]]:
        """Features of clips as far as the longest reaches, and their masks."""
        made = self.extract_features(clips)
        features, frames, _ = self.cut(made["features"], made["mask"])
        return features, frames, (1,) * len(clips)

    def extract_features(self, clips: list[Float[Any, " _"]]) -> dict[str, Tensor]:
        """Log-mel features of clips padded to 30 s; only whole steps of 10 ms count as audio."""
        made = super().extract_features(clips)
        lengths = torch.tensor([len(clip) // self.cfg.hop for clip in clips], device=self.device)
        steps = torch.arange(made["features"].shape[-1], device=self.device)
        return {**made, "mask": steps < lengths[:, None]}

    def load_audio(self, source: Any, sampling_rate: int | None) -> Float[Any, " samples"]:
        """One clip, mono at the model's rate, checked to fit the model.

        Raises:
            AudioError: if it cannot be read, is longer than the model takes, or too short for one
                audio token.
        """
        samples: np.ndarray = super().load_audio(source, sampling_rate)
        if self.token_count(len(samples) // self.cfg.hop) < 1:
            raise AudioError(f"the clip has {len(samples)} samples, too few for one audio token")
        return samples

    def _prompt_of(self, text: Any, n_clips: int) -> str:
        """Prompts may also name their clips between the tags, as the published code has it."""
        if isinstance(text, str):
            text = re.sub(f"{_OPENING}.*?{_CLOSING}", lambda match: _CLIP, text)
        return super()._prompt_of(text, n_clips)


@reads_checkpoint
def qwen_audio(checkpoint: str | Path, dtype: torch.dtype | None = None) -> HookedQwenAudio:
    """Qwen-Audio or Qwen-Audio-Chat, from a directory with the published files.

    Args:
        checkpoint: holds ``config.json``, the safetensors, and for texts ``qwen.tiktoken``.
        dtype: of the weights; None keeps the checkpoint's.

    Raises:
        LoadingError: a file that is missing or corrupt, a config of another model, or weights
            without a place.
    """
    folder = Path(checkpoint)
    if not (folder / "config.json").is_file():
        raise LoadingError(f"{folder} holds no config.json, so it is no directory of Qwen-Audio")
    config = read_config(folder / "config.json")
    cfg = qwen_audio_config(config, str(checkpoint))
    model = qwen_audio_of(cfg, read_weights(folder), dtype)
    words = folder / "qwen.tiktoken"
    if words.is_file():
        model.tokenizer = model.processor = qwen_tokenizer(words)
    else:
        model.tokenizer_problem = f"{folder} holds no qwen.tiktoken"
    settings = stored_settings(folder)
    if settings is not None:
        model.generation_config = _with_ends(settings)
    return model


def qwen_audio_of(
    cfg: QwenAudioConfig, state: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> HookedQwenAudio:
    """The model of published weights.

    Raises:
        LoadingError: for weights that are missing, misshapen or without a place.
    """
    with torch.device("meta"):
        model = HookedQwenAudio(cfg)
    tensors = renamed(without_fused(state), WEIGHT_NAMES)
    fill(model, {name: x.to(dtype or x.dtype) for name, x in tensors.items()})
    model.feature_extractor = model.make_feature_extractor()
    return model.eval()


def _with_ends(settings: GenerationConfig) -> GenerationConfig:
    """The settings, ending texts also with a turn where the model was trained to chat.

    Raises:
        LoadingError: if they do not say what ends a text.
    """
    end = settings.eos_token_id
    if not isinstance(end, int):
        raise LoadingError(f"eos_token_id of the generation settings is {end!r}, not one token")
    chats = getattr(settings, "chat_format", None) == "chatml"
    settings.eos_token_id = [end, end + 1, end + 2] if chats else [end]
    if settings.pad_token_id is None:
        settings.pad_token_id = end
    return settings


# -------------------------------------------------------------------------------- the tokenizer

_PLACEHOLDER, _OPENING, _CLOSING = "[[[AUDIO:modality]]]", "<audio>", "</audio>"
_CLIP = f"{_OPENING}{_PLACEHOLDER}{_CLOSING}"
_TASKS = """
    startoftranscript startofanalysis translate transcribe caption keyword unknown
    en zh de es ko fr ja it zh_tr notimestamps sil timestamps
"""
_STYLES = """
    caption_audiocaps caption_clotho audioset_ontology caption_plain itn wo_itn startofentityvalue
    endofentityvalue startofentitytype endofentitytype named_entity_recognition audio_grounding
    startofword endofword delim emotion_recognition music_description note_analysis pitch
"""
_TOPICS = """
    sonic instrument speaker_meta song_meta question answer choice scene event vocal_classification
    speech_understanding scenario action entities speech_edit
"""


def _marked(names: str) -> list[str]:
    return [f"<|{name}|>" for name in names.split()]


_TEXT_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|extra_{i}|>" for i in range(205)),
)
_AUDIO_TOKENS = (
    _PLACEHOLDER,
    *_marked(_TASKS),
    *(f"<|{step * 0.01:.2f}|>" for step in range(3001)),  # seconds
    *_marked(_STYLES),
    *(f"<|midi_pitch_{i}|>" for i in range(128)),
    "<|velocity|>",
    *(f"<|midi_velocity_{i}|>" for i in range(128)),
    *_marked(_TOPICS),
    _OPENING,
    _CLOSING,
)
_CHAT = (
    "{% set heard = namespace(count=0) %}"
    "{% if messages[0]['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for piece in message['content'] %}{% if piece['type'] == 'audio' %}"
    "{% set heard.count = heard.count + 1 %}Audio {{ heard.count }}:" + _CLIP + "\n"
    "{% else %}{{ piece['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a published ``qwen.tiktoken``, with Qwen-Audio's chat template."""
    end = _TEXT_TOKENS[0]
    special = (*_TEXT_TOKENS, *_AUDIO_TOKENS)
    made = tiktoken_tokenizer(path, special, eos_token=end, pad_token=end, chat_template=_CHAT)
    made.backend_tokenizer.normalizer = normalizers.NFC()
    return made
