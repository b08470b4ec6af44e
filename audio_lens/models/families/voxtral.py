"""Voxtral: Whisper's encoder on windows of 30 s, four frames to a token, an MLP, and Llama.

Nothing is masked: the encoder hears the padding of a clip's last window, and its tokens stay in the
prompt, 375 for every 30 s that a clip begins.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from audio_lens.models.config import AudioConfig, LoadingError
from audio_lens.models.families.whisper import WhisperEncoder, encoder_config, encoder_weight_names
from audio_lens.models.kinds.audio_llm import FRAME_S, HookedAudioLLM, check_encoder
from audio_lens.models.mixins.templates import chat_prompt
from audio_lens.models.mixins.vocabulary import TokenError
from audio_lens.models.parts.connectors import (
    ConnectedConfig,
    ConnectorConfig,
    StackingConnector,
    connector_weight_names,
)
from audio_lens.models.parts.language_model import language_model_config, weight_names


class StackedAudioLLM(HookedAudioLLM):
    """Audio LLMs that mask nothing in the encoder, and stack several of its frames to a token."""

    cfg: ConnectedConfig
    lends_encoder = True
    mask_key = "input_features_mask"
    masks_padding = False

    def make_connector(self, cfg: ConnectedConfig) -> StackingConnector:
        return StackingConnector(cfg.connector, cfg.need_encoder.d_model, cfg.need_decoder.d_model)

    @property
    def frames_per_token(self) -> int:
        return self.cfg.connector.n_stacked

    def token_count(self, n_valid: int) -> int:
        """One token per whole group of encoder frames."""
        return self.frame_count(n_valid) // self.frames_per_token

    def token_seconds(self, count: int) -> Float[Tensor, " t"]:
        """The middle of the frames of each token: 0.08 j + 0.03 where these are four."""
        first = torch.arange(count, dtype=torch.float64) * self.frames_per_token
        return FRAME_S * (first + (self.frames_per_token - 1) / 2)


def whisper_stacked_config(hf_config: Any, connector: ConnectorConfig) -> ConnectedConfig:
    """The shape of a model whose encoder is Whisper's, on windows of fixed length.

    Raises:
        LoadingError: for a language model that is not implemented.
    """
    ear, name = hf_config.audio_config, hf_config.name_or_path
    decoder = language_model_config(hf_config.text_config, name)
    return ConnectedConfig(
        family=hf_config.model_type,
        model_name=name,
        encoder=encoder_config(ear, name),
        decoder=decoder,
        n_mels=ear.num_mel_bins,
        n_frames=2 * ear.max_source_positions,
        max_segments=decoder.need_n_ctx * connector.n_stacked // ear.max_source_positions,
        connector=connector,
    )


def frames_stacked(ear: Any, n_frames: int) -> int:
    """How many frames of an encoder make up what the MLP of the connector reads.

    Raises:
        LoadingError: if these are no whole number, or do not divide a window.
    """
    width, d_model = ear.intermediate_size, ear.hidden_size
    if width % d_model or n_frames % (width // d_model):
        raise LoadingError(
            f"the connector reads {width} numbers at once (intermediate_size), which are no whole "
            f"number of the {n_frames} encoder frames of {d_model} (hidden_size)"
        )
    return width // d_model


class VoxtralEncoder(WhisperEncoder):
    """Whisper's encoder; its table of positions is float32 even in half precision."""

    def embed(self, features: Float[Tensor, "b mels frames"]) -> Float[Tensor, "b t d"]:
        """The residual stream entering block 0."""
        return super().embed(features).to(self.conv1.weight.dtype)


class HookedVoxtral(StackedAudioLLM):
    """Voxtral with every activation hooked.

    Its processor says nothing of the padding; where inputs are a mapping without
    ``input_features_mask``, times count the whole of the last window as audio.
    """

    model_types = ("voxtral",)
    hf_class = "VoxtralForConditionalGeneration"
    weight_names: ClassVar = {
        **encoder_weight_names("model.audio_tower"),
        **connector_weight_names("model.multi_modal_projector"),
        **weight_names("model.language_model", head="lm_head"),
    }

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> ConnectedConfig:
        """The shape of a `VoxtralConfig`.

        Raises:
            LoadingError: another encoder, a connector that reads no whole number of its frames,
                or a language model that is not implemented.
        """
        ear = hf_config.audio_config
        check_encoder(ear, "voxtral_encoder")
        return whisper_stacked_config(
            hf_config,
            ConnectorConfig(
                d_mid=hf_config.text_config.hidden_size,
                act_fn=hf_config.projector_hidden_act,
                bias=False,
                n_stacked=frames_stacked(ear, ear.max_source_positions),
            ),
        )

    def make_encoder(self, cfg: AudioConfig) -> VoxtralEncoder:
        return VoxtralEncoder(cfg.need_encoder, cfg.need_n_mels)

    def token_count(self, n_valid: int) -> int:
        """All tokens of a window, however little of it is audio."""
        return self.cfg.need_encoder.need_n_ctx // self.frames_per_token

    def valid_count(self, n_valid: int) -> int:
        """The tokens that hold any audio."""
        return -(-self.frame_count(n_valid) // self.frames_per_token)

    def segments_of(
        self, clips: list[Float[Any, " _"]]
    ) -> tuple[Tensor, Bool[Tensor, "segments frames"], tuple[int, ...]]:
        """The features of whole clips (the loudest frame sets their floor), cut into windows."""
        n_frames, features, masks = self.cfg.need_n_frames, [], []
        for clip in clips:
            made = self.extracted(
                [clip],
                padding=True,
                truncation=False,
                pad_to_multiple_of=n_frames * self.cfg.hop,
            )
            features.append(rearrange(made["input_features"], "1 m (w t) -> w m t", t=n_frames))
            masks.append(rearrange(made["attention_mask"], "1 (w t) -> w t", t=n_frames).bool())
        made, mask = torch.cat(features), torch.cat(masks)
        return made.to(self.device), mask.to(self.device), tuple(map(len, features))

    def templated(self, conversation: list) -> str:
        """The prompt of a conversation, by the tokenizer's chat template if it has one.

        Raises:
            TokenError: where it has none; Voxtral's own is in mistral-common.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise TokenError(
                "this tokenizer has no chat template (Voxtral's is in mistral-common): pass a "
                "whole prompt with the audio placeholder where each clip belongs, or give the "
                "model what processor.apply_chat_template(conversation) returns"
            )
        return chat_prompt(self.tokenizer, conversation, add_generation_prompt=True)
