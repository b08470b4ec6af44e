"""GLM-ASR: a rotary encoder on windows of 30 s, four frames to a token, an MLP, and Llama.

The encoder is Whisper's but for its positions: half of every head turns, and there is no table.
Nothing is masked in it, but tokens of padding are left out of the prompt.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from audio_lens.inputs import AudioInputs
from audio_lens.models.config import AudioConfig, LoadingError
from audio_lens.models.families.voxtral import StackedAudioLLM, frames_stacked
from audio_lens.models.families.whisper import ConvEncoder
from audio_lens.models.kinds.audio_llm import check_encoder
from audio_lens.models.layers import Context, PartConfig, PreNormBlock, Rotary
from audio_lens.models.parts.connectors import (
    ConnectedConfig,
    ConnectorConfig,
    connector_weight_names,
)
from audio_lens.models.parts.language_model import language_model_config, weight_names


class GlmAsrEncoder(ConvEncoder):
    """Two convolutions and pre-norm blocks with rotary positions."""

    def __init__(self, cfg: PartConfig, n_mels: int):
        super().__init__(cfg, n_mels, PreNormBlock)
        self.rotary = Rotary(cfg)


class HookedGlmAsr(StackedAudioLLM):
    """GLM-ASR with every activation hooked. It hears up to 10.5 minutes."""

    model_types = ("glmasr",)
    hf_class = "GlmAsrForConditionalGeneration"
    max_segments: ClassVar[int] = 21  # what the released processor takes of a clip
    weight_names: ClassVar = {
        **{
            f"model.audio_tower.{theirs}": f"encoder.{ours}"
            for theirs, ours in {
                "conv1": "conv1",
                "conv2": "conv2",
                "layers.{l}.self_attn.q_proj": "blocks.{l}.attn.q_proj",
                "layers.{l}.self_attn.k_proj": "blocks.{l}.attn.k_proj",
                "layers.{l}.self_attn.v_proj": "blocks.{l}.attn.v_proj",
                "layers.{l}.self_attn.o_proj": "blocks.{l}.attn.o_proj",
                "layers.{l}.input_layernorm": "blocks.{l}.ln1",
                "layers.{l}.post_attention_layernorm": "blocks.{l}.ln2",
                "layers.{l}.mlp.fc1": "blocks.{l}.mlp.fc_in",
                "layers.{l}.mlp.fc2": "blocks.{l}.mlp.fc_out",
                "norm": "ln_final",
            }.items()
        },
        **connector_weight_names("model.multi_modal_projector"),
        **weight_names("model.language_model", head="lm_head"),
    }

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> ConnectedConfig:
        """The shape of a `GlmAsrConfig`.

        Raises:
            LoadingError: another encoder or kind of rotary positions, a connector that reads no
                whole number of frames, or a language model that is not implemented.
        """
        ear, text, name = hf_config.audio_config, hf_config.text_config, hf_config.name_or_path
        check_encoder(ear, "glmasr_encoder")
        return ConnectedConfig(
            family="glmasr",
            model_name=name,
            encoder=rotary_encoder_config(ear, name),
            decoder=language_model_config(text, name),
            n_mels=ear.num_mel_bins,
            n_frames=2 * ear.max_position_embeddings,
            max_segments=cls.max_segments,
            connector=ConnectorConfig(
                d_mid=2 * text.hidden_size,
                act_fn=hf_config.projector_hidden_act,
                n_stacked=frames_stacked(ear, ear.max_position_embeddings),
            ),
        )

    def make_encoder(self, cfg: AudioConfig) -> GlmAsrEncoder:
        return GlmAsrEncoder(cfg.need_encoder, cfg.need_n_mels)

    def encoder_context(self, inputs: AudioInputs) -> Context:
        """Rotary positions; nothing is masked."""
        positions = torch.arange(self.encoder_length(inputs), device=inputs.device)[None]
        return Context(rotary=self.encoder.rotary(positions, self.dtype))


def rotary_encoder_config(ear: Any, model_name: str) -> PartConfig:
    """The shape of a GLM-ASR encoder.

    Raises:
        LoadingError: for rescaled rotary positions.
    """
    rope = ear.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise LoadingError(
            f"rotary positions of type {rope['rope_type']!r} are not implemented in the encoder"
        )
    d_head = getattr(ear, "head_dim", None) or ear.hidden_size // ear.num_attention_heads
    return PartConfig(
        n_layers=ear.num_hidden_layers,
        n_heads=ear.num_attention_heads,
        n_key_value_heads=ear.num_key_value_heads,
        d_model=ear.hidden_size,
        d_head=d_head,
        d_mlp=ear.intermediate_size,
        n_ctx=ear.max_position_embeddings,
        act_fn=ear.hidden_act,
        eps=1e-5,
        normalization_type="LN",
        softmax_float32=True,
        rotary_base=float(rope["rope_theta"]),
        rotary_dim=int(d_head * rope.get("partial_rotary_factor", 1.0)),
        model_name=model_name,
    )
