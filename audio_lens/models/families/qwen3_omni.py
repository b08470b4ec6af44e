"""Qwen3-Omni: the thinker, with the ear of Qwen3-ASR and a Qwen3 of many experts.

Images and video are refused, and the weights that see and speak are left out, as of Qwen2.5-Omni.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from audio_lens.models.config import LoadingError
from audio_lens.models.families.qwen2_5_omni import HookedThinker, thinker_config
from audio_lens.models.families.qwen3_asr import (
    CHUNK,
    Conv2dConfig,
    Conv2dEncoder,
    Qwen3AudioLLM,
    ear_pieces,
    ear_weight_names,
)
from audio_lens.models.kinds.audio_llm import check_encoder
from audio_lens.models.layers import PartConfig
from audio_lens.models.layers.moe import MixtureBlock
from audio_lens.models.parts.language_model import (
    LanguageModel,
    language_model_config,
    weight_names,
)


class TrimmedEncoder(Conv2dEncoder):
    """Seconds are padded with nothing, and only as far as the longest of the batch.

    As in Hugging Face, so that the end of a clip under 1 s sounds otherwise beside a longer one.
    """

    def embed(
        self,
        features: Float[Tensor, "b mels frames"],
        is_audio: Bool[Tensor, "b frames"] | None,
    ) -> Float[Tensor, "b t d"]:
        """The residual stream entering block 0; all is audio where ``is_audio`` is None."""
        if is_audio is None:
            return super().embed(features)
        longest = int(is_audio.sum(1).max())
        return super().embed(features * is_audio[:, None], min(CHUNK, longest))


class HookedQwen3Omni(HookedThinker, Qwen3AudioLLM):
    """The thinker of Qwen3-Omni with every activation hooked."""

    model_types = ("qwen3_omni_moe", "qwen3_omni_moe_thinker")
    hf_class = "Qwen3OmniMoeThinkerForConditionalGeneration"
    weight_names: ClassVar = {
        **ear_weight_names("model.audio_tower"),
        "model.audio_tower.proj1": "connector.linear_1",
        "model.audio_tower.proj2": "connector.linear_2",
        **weight_names("model.language_model", head="lm_head"),
        "model.language_model.layers.{l}.mlp.gate": "decoder.blocks.{l}.mlp.router",
        "model.language_model.layers.{l}.mlp.experts": "decoder.blocks.{l}.mlp.experts",
    }

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> Conv2dConfig:
        """The shape of a `Qwen3OmniMoeThinkerConfig`, or of the whole config that holds one.

        Raises:
            LoadingError: another encoder, windows that are not implemented, or a language model
                that is not.
        """
        thinker, name = thinker_config(hf_config), hf_config.name_or_path
        ear = thinker.audio_config
        check_encoder(ear, "qwen3_omni_moe_audio_encoder")
        decoder = mixture_config(thinker.text_config, name)
        return Conv2dConfig(family="qwen3_omni", **ear_pieces(ear, decoder, name))

    mixes_lengths = "beside a longer clip, one under a second is heard with silence behind it"

    def make_encoder(self, cfg: Conv2dConfig) -> TrimmedEncoder:
        return TrimmedEncoder(cfg.need_encoder, cfg.need_n_mels, cfg.n_channels)

    def make_decoder(self, cfg: Conv2dConfig) -> LanguageModel:
        return LanguageModel(cfg.need_decoder, MixtureBlock)


def mixture_config(text: Any, name: str) -> PartConfig:
    """The shape of a language model whose MLPs are mixtures of experts.

    Raises:
        LoadingError: if only some of its layers have experts, and what every language model raises.
    """
    if text.mlp_only_layers or text.decoder_sparse_step != 1:
        raise LoadingError("experts in some layers only (mlp_only_layers, decoder_sparse_step)")
    return replace(
        language_model_config(text, name),
        d_mlp=text.moe_intermediate_size,
        n_experts=text.num_experts,
        n_experts_per_token=text.num_experts_per_tok,
        normalizes_experts=text.norm_topk_prob,
    )
