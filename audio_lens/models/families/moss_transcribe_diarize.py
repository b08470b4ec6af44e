"""MOSS-Transcribe-Diarize: Whisper's encoder, four frames to a token, an MLP with a norm, Qwen3.

Clips are cut into windows of 30 s, in which nothing is masked. Every two seconds the prompt holds
the number of seconds so far as text, between the audio tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import transformers
from jaxtyping import Float
from torch import Tensor

from audio_lens.models.config import AudioConfig
from audio_lens.models.families.voxtral import StackedAudioLLM, whisper_stacked_config
from audio_lens.models.families.whisper import WhisperEncoder, encoder_weight_names
from audio_lens.models.kinds.audio_llm import check_encoder
from audio_lens.models.mixins.features import filled
from audio_lens.models.parts.connectors import (
    ConnectedConfig,
    ConnectorConfig,
    NormedConnector,
    connector_weight_names,
)
from audio_lens.models.parts.language_model import weight_names

MARKER_S, TOKENS_PER_S = 2, 12.5  # of the released processor


class HookedMossTranscribeDiarize(StackedAudioLLM):
    """MOSS-Transcribe-Diarize with every activation hooked."""

    extracted_mask = "input_features_mask"
    model_types = ("moss_transcribe_diarize",)
    hf_class = "MossTranscribeDiarizeForConditionalGeneration"
    weight_names: ClassVar = {
        **encoder_weight_names("model.audio_tower"),
        **connector_weight_names("model.multi_modal_projector"),
        "model.multi_modal_projector.norm": "connector.norm",
        **weight_names("model.language_model", head="lm_head"),
    }

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> ConnectedConfig:
        """The shape of a `MossTranscribeDiarizeConfig`.

        Raises:
            LoadingError: another encoder, or a language model that is not implemented.
        """
        check_encoder(hf_config.audio_config, "moss_transcribe_diarize_audio")
        return whisper_stacked_config(
            hf_config,
            ConnectorConfig(
                d_mid=hf_config.text_config.hidden_size,
                act_fn=hf_config.projector_hidden_act,
                bias=hf_config.projector_bias,
                n_stacked=hf_config.audio_merge_size,
            ),
        )

    def make_encoder(self, cfg: AudioConfig) -> WhisperEncoder:
        return WhisperEncoder(cfg.need_encoder, cfg.need_n_mels)

    def make_connector(self, cfg: ConnectedConfig) -> NormedConnector:
        width, decoder = cfg.need_encoder.d_model, cfg.need_decoder
        return NormedConnector(cfg.connector, width, decoder.d_model, decoder.eps)

    def make_feature_extractor(self) -> Any:
        """The feature extractor that the configuration tells of."""
        return transformers.MossTranscribeDiarizeFeatureExtractor(
            feature_size=self.cfg.need_n_mels, chunk_length=round(self.cfg.segment_s)
        )

    def extract_features(self, clips: list[Float[Any, " _"]]) -> dict[str, Tensor]:
        """As in every model; the extractor takes a lone sample for a number, so it gets silence."""
        return super().extract_features([filled(clip, 2) for clip in clips])

    def token_count(self, n_valid: int) -> int:
        """One token per group of encoder frames; the last one is filled up with padding."""
        return -(-self.frame_count(n_valid) // self.frames_per_token)

    @property
    def known_keys(self) -> tuple[str, ...]:
        return (*super().known_keys, "padding_mask")

    def segments_given(self, given: Mapping[str, Tensor]) -> tuple[int, ...] | None:
        """From the mask of every clip's samples."""
        if "padding_mask" not in given:
            return None
        window = self.cfg.need_n_frames * self.cfg.hop
        return tuple(max(1, -(-n // window)) for n in given["padding_mask"].sum(-1).tolist())

    def placeholders(self, count: int) -> list[int]:
        """The tokens of a clip, with the seconds so far after every two seconds of it."""
        every = getattr(self.processor, "time_marker_every_seconds", MARKER_S)
        per_marker = int(getattr(self.processor, "audio_tokens_per_second", TOKENS_PER_S) * every)
        if per_marker < 1:
            return super().placeholders(count)
        made: list[int] = []
        for marker in range(1, count // per_marker + 1):
            made += super().placeholders(per_marker)
            made += self.need_tokenizer("seconds in the prompt").encode(
                str(marker * every), add_special_tokens=False
            )
        return made + super().placeholders(count % per_marker)
