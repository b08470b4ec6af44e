"""Audio Flamingo 3: windows of 30 s, a Whisper-style encoder that pools, an MLP, and Qwen2.

As in Qwen2-Audio padding is masked in the encoder and pairs of frames are pooled before the final
norm; the windows of a clip stand one after the other in the prompt, one token per 40 ms.
"""

from __future__ import annotations

from typing import Any, ClassVar

from audio_lens.models.config import AudioConfig
from audio_lens.models.families.qwen2_audio import PooledAudioLLM
from audio_lens.models.families.whisper import encoder_config, encoder_weight_names
from audio_lens.models.kinds.audio_llm import check_encoder
from audio_lens.models.parts.connectors import (
    ConnectedConfig,
    ConnectorConfig,
    MLPConnector,
    connector_weight_names,
)
from audio_lens.models.parts.language_model import language_model_config, weight_names


class HookedAudioFlamingo3(PooledAudioLLM):
    """Audio Flamingo 3 with every activation hooked.

    Attributes:
        max_segments: how many windows the released processor takes of a clip: 10 minutes.
    """

    model_types = ("audioflamingo3",)
    hf_class = "AudioFlamingo3ForConditionalGeneration"
    mask_key = "input_features_mask"
    max_segments: ClassVar[int] = 20
    weight_names: ClassVar = {
        **encoder_weight_names("model.audio_tower"),
        **connector_weight_names("model.multi_modal_projector"),
        **weight_names("model.language_model", head="lm_head"),
    }

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> AudioConfig:
        """The shape of an `AudioFlamingo3Config`.

        Raises:
            LoadingError: another encoder, or a language model that is not implemented.
        """
        return ConnectedConfig(**cls.pieces(hf_config))

    @classmethod
    def pieces(cls, hf_config: Any) -> dict[str, Any]:
        """The fields of the configuration; what `config_from_hf` raises."""
        ear, text, name = hf_config.audio_config, hf_config.text_config, hf_config.name_or_path
        check_encoder(ear, "audioflamingo3_encoder")
        return {
            "family": hf_config.model_type,
            "model_name": name,
            "encoder": encoder_config(ear, name),
            "decoder": language_model_config(text, name),
            "n_mels": ear.num_mel_bins,
            "n_frames": 2 * ear.max_source_positions,
            "max_segments": cls.max_segments,
            "connector": ConnectorConfig(
                d_mid=text.hidden_size,
                act_fn=hf_config.projector_hidden_act,
                bias=hf_config.projector_bias,
            ),
        }

    def make_connector(self, cfg: ConnectedConfig) -> MLPConnector:
        return MLPConnector(cfg.connector, cfg.need_encoder.d_model, cfg.need_decoder.d_model)
