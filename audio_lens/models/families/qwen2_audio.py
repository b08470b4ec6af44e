"""Qwen2-Audio: a Whisper-style encoder, pooling, a linear connector and a Qwen2 language model.

The clip enters the language model in place of its placeholder tokens, one per 40 ms. Unlike in
Whisper, padding is masked in the encoder, and pairs of frames are pooled before the final norm.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from audio_lens.hooks import HookPoint
from audio_lens.models.config import AudioConfig
from audio_lens.models.families.whisper import WhisperEncoder, encoder_config, encoder_weight_names
from audio_lens.models.kinds.audio_llm import HookedAudioLLM, check_encoder
from audio_lens.models.layers import PartConfig
from audio_lens.models.parts.connectors import LinearConnector
from audio_lens.models.parts.language_model import language_model_config, weight_names

TOKEN_S = 0.04  # one audio token: two encoder frames of 20 ms


class PoolingEncoder(WhisperEncoder):
    """Whisper's encoder with pairs of frames averaged before the final norm."""

    frames_pooled = 2

    def __init__(self, cfg: PartConfig, n_mels: int):
        super().__init__(cfg, n_mels)
        self.hook_pooled = HookPoint()

    def pool(self, frames: Float[Tensor, "b t d"]) -> Float[Tensor, "b t2 d"]:
        """The mean of each pair of frames."""
        return rearrange(F.avg_pool1d(rearrange(frames, "b t d -> b d t"), 2), "b d t -> b t d")

    def finish(self, resid: Float[Tensor, "b t d"]) -> Float[Tensor, "b t2 d"]:
        return super().finish(self.hook_pooled(self.pool(resid)))


class PooledAudioLLM(HookedAudioLLM):
    """Audio LLMs whose tokens are pairs of Whisper frames, pooled."""

    lends_encoder = True

    def make_encoder(self, cfg: AudioConfig) -> PoolingEncoder:
        return PoolingEncoder(cfg.need_encoder, cfg.need_n_mels)

    def token_count(self, n_valid: int) -> int:
        """One token per whole pair of encoder frames."""
        return self.frame_count(n_valid) // 2

    def token_seconds(self, count: int) -> Float[Tensor, " t"]:
        """The middle of the two frames each was pooled from: 0.04 j + 0.01."""
        return TOKEN_S * torch.arange(count, dtype=torch.float64) + 0.01


class HookedQwen2Audio(PooledAudioLLM):
    """Qwen2-Audio with every activation hooked."""

    model_types = ("qwen2_audio",)
    hf_class = "Qwen2AudioForConditionalGeneration"
    weight_names: ClassVar = {
        **encoder_weight_names("model.audio_tower"),
        "model.multi_modal_projector.linear": "connector.linear",
        **weight_names("model.language_model", head="lm_head"),
    }

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> AudioConfig:
        """The shape of a `Qwen2AudioConfig`.

        Raises:
            LoadingError: a language model, or a feature of one, that is not implemented.
        """
        ear, name = hf_config.audio_config, hf_config.name_or_path
        check_encoder(ear, "qwen2_audio_encoder")
        return AudioConfig(
            family="qwen2_audio",
            model_name=name,
            encoder=encoder_config(ear, name),
            decoder=language_model_config(hf_config.text_config, name),
            n_mels=ear.num_mel_bins,
            n_frames=2 * ear.max_source_positions,
        )

    def make_connector(self, cfg: AudioConfig) -> LinearConnector:
        return LinearConnector(cfg.need_encoder.d_model, cfg.need_decoder.d_model)
