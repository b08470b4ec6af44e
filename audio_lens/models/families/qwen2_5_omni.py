"""Qwen2.5-Omni: the thinker, which hears and writes.

The ear is Whisper's, but hears 2 s at a time: every chunk is convolved, positioned and attended to
by itself, as a row of the encoder's batch. With audio alone the three axes of the language model's
positions are equal, so they are plain rotary positions; images and video are refused. The weights
that see and speak (`visual`, talker, token2wav) are left out.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from audio_lens.inputs import AudioInputs, InputError
from audio_lens.models.config import AudioConfig, LoadingError
from audio_lens.models.families.qwen2_audio import PooledAudioLLM, PoolingEncoder
from audio_lens.models.families.whisper import encoder_config, encoder_weight_names
from audio_lens.models.kinds.audio_llm import check_encoder
from audio_lens.models.kinds.chunked import ChunkedAudioLLM, Sinusoids
from audio_lens.models.layers import PartConfig
from audio_lens.models.parts.connectors import LinearConnector
from audio_lens.models.parts.language_model import language_model_config, weight_names

MAX_AUDIO_S = 300  # what the feature extractor of the released checkpoints takes
_MARGIN = 400  # samples behind a clip that its last frames may read
_SEEN = ("pixel_values", "image", "video")  # pieces of names in a mapping that holds pictures
_log = logging.getLogger(__name__)


def thinker_config(hf_config: Any) -> Any:
    """The config of the thinker: itself, or what the config of a whole Omni model holds."""
    return getattr(hf_config, "thinker_config", hf_config)


class HookedThinker(ChunkedAudioLLM):
    """The part of an Omni model that hears and writes, without what it sees and says.

    Attributes:
        left_out: beginnings of the names of weights that hearing and writing do not need.
    """

    left_out: ClassVar[tuple[str, ...]] = ("model.visual",)

    def __init__(self, cfg: AudioConfig):
        super().__init__(cfg)
        self.unseen: dict[int, str] = {}  # tokens that stand for what it cannot take

    @classmethod
    def adapt_state(cls, state: Mapping[str, Tensor], cfg: AudioConfig) -> dict[str, Tensor]:
        """The tensors that hearing and writing need; the log warns of the others."""
        _log.warning(
            "%s: only the thinker's weights that hear and write are loaded; what sees (visual) "
            "and what speaks (talker and vocoder) is left out",
            cfg.family,
        )
        return {key: x for key, x in state.items() if not key.startswith(cls.left_out)}

    def take_special_tokens(self, hf_config: Any) -> None:
        """Remember which tokens stand for audio, and which for what it cannot take."""
        super().take_special_tokens(hf_config)
        self.unseen = {hf_config.image_token_id: "images", hf_config.video_token_id: "video"}

    def enter_encoder(self, inputs: AudioInputs) -> Float[Tensor, "segments frames d"]:
        """The residual stream entering the encoder's block 0."""
        return self.encoder.embed(inputs.features, inputs.feature_mask)

    def inputs_from_mapping(self, mapping: Mapping[str, Any]) -> AudioInputs:
        """Inputs from what the family's processor returns; single placeholders are expanded.

        Raises:
            InputError: for images or video, and what every audio LLM raises.
        """
        given = {key: value for key, value in mapping.items() if value is not None}
        seen = [key for key in given if any(piece in key for piece in _SEEN)]
        if seen:
            raise InputError(f"{self._without_pictures}: leave out {', '.join(seen)}")
        return super().inputs_from_mapping(given)

    @property
    def _without_pictures(self) -> str:
        return f"{self.cfg.family} is implemented for audio and text, without images and video"

    def _assembled(self, tokens: Tensor, *rest: Any, **options: Any) -> AudioInputs:
        """As of every audio LLM, with positions that count attended tokens only."""
        for token, what in self.unseen.items():
            if (tokens == token).any():
                raise InputError(f"{self._without_pictures}: the prompt has a place for {what}")
        inputs = super()._assembled(tokens, *rest, **options)
        if inputs.attention_mask is None or inputs.position_ids is not None:
            return inputs
        return replace(inputs, position_ids=inputs.counted_positions())


class ChunkEncoder(PoolingEncoder):
    """Whisper's encoder for chunks: its convolutions hear nothing behind the end of a clip."""

    def __init__(self, cfg: PartConfig, n_mels: int):
        super().__init__(cfg, n_mels)
        self.pos_embed = Sinusoids(cfg.need_n_ctx, cfg.d_model)

    def embed(
        self,
        features: Float[Tensor, "chunks mels frames"],
        is_audio: Bool[Tensor, "chunks frames"] | None,
    ) -> Float[Tensor, "chunks t d"]:
        """The residual stream entering block 0; all is audio where ``is_audio`` is None."""
        kept = 1 if is_audio is None else is_audio[:, None]
        mel = self.hook_mel(features.to(self.conv1.weight) * kept)
        x = self.hook_conv1(F.gelu(self.conv1(mel)) * kept)
        x = self.hook_embed(rearrange(F.gelu(self.conv2(x)), "b d t -> b t d"))
        return x + self.hook_pos_embed(self.pos_embed(x).repeat(len(x), 1, 1))


class HookedQwen2_5Omni(HookedThinker, PooledAudioLLM):
    """The thinker of Qwen2.5-Omni with every activation hooked."""

    model_types = ("qwen2_5_omni", "qwen2_5_omni_thinker")
    hf_class = "Qwen2_5OmniThinkerForConditionalGeneration"
    left_out = (*HookedThinker.left_out, "model.audio_tower.audio_bos_eos_token")
    weight_names: ClassVar = {
        **encoder_weight_names("model.audio_tower"),
        "model.audio_tower.ln_post": "encoder.ln_final",
        "model.audio_tower.proj": "connector.linear",
        **weight_names("model.language_model", head="lm_head"),
    }

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> AudioConfig:
        """The shape of a `Qwen2_5OmniThinkerConfig`, or of the `Qwen2_5OmniConfig` that holds one.

        Raises:
            LoadingError: another encoder, chunks that cut tokens in two, or a language model that
                is not implemented.
        """
        thinker, name = thinker_config(hf_config), hf_config.name_or_path
        ear = thinker.audio_config
        check_encoder(ear, "qwen2_5_omni_audio_encoder")
        if ear.n_window % 2:
            raise LoadingError(f"chunks of {ear.n_window} frames (n_window) cut a token in two")
        n_frames = 2 * ear.n_window
        return AudioConfig(
            family="qwen2_5_omni",
            model_name=name,
            encoder=replace(
                encoder_config(ear, name, n_ctx=ear.n_window),
                softmax_float32=True,
                scales_queries=False,
            ),
            decoder=language_model_config(thinker.text_config, name),
            n_mels=ear.num_mel_bins,
            n_frames=n_frames,
            max_segments=MAX_AUDIO_S * 100 // n_frames,
        )

    def make_encoder(self, cfg: AudioConfig) -> ChunkEncoder:
        return ChunkEncoder(cfg.need_encoder, cfg.need_n_mels)

    def make_connector(self, cfg: AudioConfig) -> LinearConnector:
        return LinearConnector(cfg.need_encoder.d_model, cfg.need_decoder.d_model)

    def padding_of(self, clip: Float[Any, " _"]) -> dict[str, Any]:
        """With silence up to what the processor pads to, as far as a frame may read."""
        limit = MAX_AUDIO_S * self.cfg.sampling_rate
        return {"padding": "max_length", "max_length": min(len(clip) + _MARGIN, limit)}
