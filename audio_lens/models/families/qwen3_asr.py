"""Qwen3-ASR: an ear of 13 tokens per second, an MLP, and Qwen3.

Three convolutions over time and frequency hear 1 s at a time; attention reaches over windows of
8 s, which are the rows of the encoder's batch. Positions count within the second, so attention
sees the eight seconds of a window only by what they hold.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
import transformers
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from audio_lens.hooks import HookPoint
from audio_lens.inputs import AudioInputs
from audio_lens.models.config import LoadingError
from audio_lens.models.families.whisper import encoder_config, encoder_weight_names
from audio_lens.models.kinds.audio_llm import check_encoder
from audio_lens.models.kinds.chunked import ChunkedAudioLLM, Sinusoids
from audio_lens.models.layers import Float16SafeBlock, PartConfig, Stack
from audio_lens.models.parts.connectors import (
    ConnectedConfig,
    ConnectorConfig,
    MLPConnector,
    connector_weight_names,
)
from audio_lens.models.parts.language_model import language_model_config, weight_names
from audio_lens.timeline import Row, Timeline

CHUNK = 100  # mel frames that the convolutions hear at once: 1 s
PER_CHUNK = 13  # positions that become of them, 80 ms apart


def halved(n: int, times: int = 3) -> int:
    """Positions that are left of ``n`` by so many convolutions of stride 2."""
    for _ in range(times):
        n = (n + 1) // 2
    return n


class Conv2dEncoder(Stack):
    """Three convolutions over time and frequency on every second, then pre-norm blocks."""

    def __init__(self, cfg: PartConfig, n_mels: int, n_channels: int):
        super().__init__(cfg, Float16SafeBlock)
        self.hook_mel = HookPoint(borrowed=True)  # the caller's features
        channels = (1, n_channels, n_channels, n_channels)
        self.convs = nn.ModuleList(
            nn.Conv2d(n_in, n_out, kernel_size=3, stride=2, padding=1)
            for n_in, n_out in itertools.pairwise(channels)
        )
        self.conv_out = nn.Linear(n_channels * halved(n_mels), cfg.d_model, bias=False)
        self.pos_embed = Sinusoids(PER_CHUNK, cfg.d_model)
        self.hook_pos_embed = HookPoint()

    def embed(
        self, features: Float[Tensor, "b mels frames"], n_heard: int = CHUNK
    ) -> Float[Tensor, "b t d"]:
        """The residual stream entering block 0; of every second, ``n_heard`` frames are heard."""
        mel = self.hook_mel(features.to(self.conv_out.weight))
        x = rearrange(mel, "b m (chunk w) -> (b chunk) 1 m w", w=CHUNK)[..., :n_heard]
        for conv in self.convs:
            x = F.gelu(conv(x))
        x = F.pad(x, (0, PER_CHUNK - x.shape[-1]))
        x = rearrange(x, "(b chunk) c f t -> b (chunk t) (c f)", b=len(mel))
        x = self.hook_embed(self.conv_out(x))
        positions = self.pos_embed(x).repeat(len(x), x.shape[1] // PER_CHUNK, 1)
        return x + self.hook_pos_embed(positions)


@dataclass(kw_only=True)
class Conv2dConfig(ConnectedConfig):
    """Shape of an audio LLM with this ear.

    Attributes:
        n_channels: of its convolutions.
    """

    n_channels: int


def ear_pieces(ear: Any, decoder: PartConfig, name: str) -> dict[str, Any]:
    """The fields of a `Conv2dConfig` that the ear decides.

    Raises:
        LoadingError: chunks of another length than 1 s, or windows that are not whole chunks.
    """
    if 2 * ear.n_window != CHUNK:
        raise LoadingError(f"chunks of {2 * ear.n_window} mel frames (n_window) and not {CHUNK}")
    if ear.n_window_infer % CHUNK:
        raise LoadingError(f"a window (n_window_infer) of {ear.n_window_infer} cuts a chunk in two")
    n_positions = PER_CHUNK * (ear.n_window_infer // CHUNK)
    encoder = replace(
        encoder_config(ear, name, n_ctx=n_positions),
        attn_biases=("q", "k", "v", "o"),
        softmax_float32=True,
        scales_queries=False,
    )
    return {
        "model_name": name,
        "encoder": encoder,
        "decoder": decoder,
        "n_mels": ear.num_mel_bins,
        "n_frames": ear.n_window_infer,
        "max_segments": max(1, decoder.n_ctx // n_positions),  # as many as have a place to go
        "connector": ConnectorConfig(d_mid=ear.d_model, act_fn=ear.activation_function),
        "n_channels": ear.downsample_hidden_size,
    }


def ear_weight_names(theirs: str) -> dict[str, str]:
    """The name table of the ear with this prefix."""
    return {
        **encoder_weight_names(theirs),
        **{f"{theirs}.conv2d{i + 1}": f"encoder.convs.{i}" for i in range(3)},
        f"{theirs}.conv_out": "encoder.conv_out",
        f"{theirs}.ln_post": "encoder.ln_final",
    }


class Qwen3AudioLLM(ChunkedAudioLLM):
    """Audio LLMs with this ear; every position of it is a token."""

    frames_per_token = 1

    def make_encoder(self, cfg: Conv2dConfig) -> Conv2dEncoder:
        return Conv2dEncoder(cfg.need_encoder, cfg.need_n_mels, cfg.n_channels)

    def make_connector(self, cfg: Conv2dConfig) -> MLPConnector:
        return MLPConnector(cfg.connector, cfg.need_encoder.d_model, cfg.need_decoder.d_model)

    def frame_count(self, n_valid: int) -> int:
        """13 positions of every whole second, and those of the rest."""
        return PER_CHUNK * (n_valid // CHUNK) + halved(n_valid % CHUNK)

    def token_count(self, n_valid: int) -> int:
        """One token per position."""
        return self.frame_count(n_valid)

    def frame_seconds(self, count: int) -> Float[Tensor, " t"]:
        """80 ms apart within every second, the first at its start."""
        index = torch.arange(count)
        return (index // PER_CHUNK).double() + 0.08 * (index % PER_CHUNK).double()

    def token_seconds(self, count: int) -> Float[Tensor, " t"]:
        """As the positions of the encoder."""
        return self.frame_seconds(count)


class HookedQwen3Asr(Qwen3AudioLLM):
    """Qwen3-ASR with every activation hooked.

    What stands behind a clip in its features is heard by the last convolutions, as in Hugging
    Face; a batch of a processor holds silence there, a clip prepared alone nothing.

    Clips under 0.5 s are filled up to that with silence, which is heard and becomes tokens like
    the rest. The positions that hold no more than that are not valid in the timeline, where
    `prepare` made the inputs: those of a processor do not tell how long the clip was.
    """

    model_types = ("qwen3_asr",)
    hf_class = ("Qwen3ASRForConditionalGeneration",)
    mask_key = "input_features_mask"
    weight_names: ClassVar = {
        **ear_weight_names("model.audio_tower"),
        **connector_weight_names("model.multi_modal_projector"),
        **weight_names("model.language_model", head="lm_head"),
    }

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> Conv2dConfig:
        """The shape of a `Qwen3ASRConfig`.

        Raises:
            LoadingError: another encoder, windows that are not implemented, or a language model
                that is not.
        """
        ear, name = hf_config.audio_config, hf_config.name_or_path
        check_encoder(ear, "qwen3_asr_encoder")
        decoder = language_model_config(hf_config.text_config, name)
        return Conv2dConfig(family="qwen3_asr", **ear_pieces(ear, decoder, name))

    def make_feature_extractor(self) -> Any:
        """The feature extractor of the released models."""
        return transformers.Qwen3ASRFeatureExtractor(
            feature_size=self.cfg.need_n_mels, sampling_rate=self.cfg.sampling_rate
        )

    def timeline(self, inputs: AudioInputs | Mapping[str, Any]) -> Timeline:
        """Positions in seconds; a clip that was filled up ends where its own samples do."""
        inputs = self.as_inputs(inputs)
        timeline, clips = super().timeline(inputs), iter(inputs.audio or ())
        for row in timeline.rows if inputs.audio else ():
            for clip, heard_s in enumerate(row.durations_s):
                own = max(1, len(next(clips)) // self.cfg.hop)
                if own * self.cfg.step_s < heard_s:
                    row.durations_s[clip] = own * self.cfg.step_s
                    self._end_at(row, clip, own)
        return timeline

    def _end_at(self, row: Row, clip: int, n_valid: int) -> None:
        """Count what the encoder and the connector hear of a clip behind its samples as padding."""
        for part, count in (("encoder", self.frame_count), ("connector", self.token_count)):
            (track,) = (one for one in row.tracks[part] if (one.clip == clip).any())
            track.valid[count(n_valid) :] = False
