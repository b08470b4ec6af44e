"""Granite-Speech: a Conformer encoder, a Q-Former that reads it in windows, and a Granite LM.

Pairs of mel frames enter the encoder, which attends in blocks of 4 s and hears the padding of a
batch. Three queries read every 0.3 s of it and become three tokens, which have no order in time.
The adapter of the language model is meant for prompts with audio only.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.audio_utils import mel_filter_bank

from audio_lens.audio import AudioError
from audio_lens.hooks import HookPoint
from audio_lens.inputs import AudioInputs, InputError
from audio_lens.models.config import AudioConfig, LoadingError, check_switches
from audio_lens.models.kinds.audio_llm import HookedAudioLLM, Segment
from audio_lens.models.layers import KVCache
from audio_lens.models.mixins.features import heard_of
from audio_lens.models.mixins.settings import GreedyRun
from audio_lens.models.mixins.templates import chat_prompt
from audio_lens.models.parts.conformer import Conformer, ConformerConfig, conformer_weight_names
from audio_lens.models.parts.connectors import Connector
from audio_lens.models.parts.language_model import (
    LanguageModel,
    language_model_config,
    weight_names,
)
from audio_lens.models.parts.qformer import QFormer, QFormerConfig, qformer_weight_names
from audio_lens.timeline import Track

_log = logging.getLogger(__name__)
STACKED = 2  # mel frames that one encoder position hears
_COUNTERS = ".num_batches_tracked"  # of batch norms
_ASKING = re.compile(r"\.qformer\.encoder\.layer\.\d+\.attention\.attention\.(query|key)\.")


@dataclass
class GraniteMel:
    """How the log-mel features are made, in the names of `GraniteSpeechFeatureExtractor`."""

    feature_size: int
    sampling_rate: int

    @property
    def melspec_kwargs(self) -> dict[str, int]:
        return {
            "sample_rate": self.sampling_rate,
            "n_fft": 512,
            "win_length": 400,
            "hop_length": 160,
            "n_mels": self.feature_size,
        }


@dataclass(kw_only=True)
class GraniteSpeechConfig(AudioConfig):
    """Shape of a Granite-Speech model; its connector is a Q-Former."""

    encoder: ConformerConfig
    connector: QFormerConfig


class GraniteEncoder(Conformer):
    """Pairs of mel frames side by side, a linear map, and Conformer blocks."""

    def __init__(self, cfg: ConformerConfig, n_mels: int):
        super().__init__(cfg)
        self.hook_mel = HookPoint(borrowed=True)  # the caller's features
        self.linear = nn.Linear(STACKED * n_mels, cfg.d_model)

    def embed(self, features: Float[Tensor, "b mels frames"]) -> Float[Tensor, "b t d"]:
        """The residual stream entering block 0."""
        mel = self.hook_mel(features.to(self.linear.weight))
        stacked = rearrange(mel, "b m (t k) -> b t (k m)", k=STACKED)
        return self.hook_embed(self.linear(stacked))


class QFormerConnector(Connector, QFormer):
    """A Q-Former over windows of encoder positions, and a map to the language model's width.

    The last window is filled up with zeros, which are read like everything else.
    """

    cfg: QFormerConfig

    def __init__(self, cfg: QFormerConfig, d_out: int):
        super().__init__(cfg)
        self.linear = nn.Linear(cfg.d_model, d_out)

    def carry(self, x: Float[Tensor, "b s d_in"]) -> Float[Tensor, "b t d_out"]:
        memory = F.pad(x, (0, 0, 0, -x.shape[1] % self.cfg.n_window))
        return self.linear(self.listen(memory))


class GraniteLanguageModel(LanguageModel):
    """Granite, which embeds placeholders as token 0: they may lie outside its vocabulary."""

    def merge(
        self,
        tokens: Int[Tensor, "b t"],
        is_audio: Bool[Tensor, "b t"],
        audio: Float[Tensor, "n d"] | None,
    ) -> Float[Tensor, "b t d"]:
        return super().merge(tokens.masked_fill(is_audio, 0), is_audio, audio)


class HookedGraniteSpeech(HookedAudioLLM):
    """Granite-Speech with every activation hooked.

    All three tokens of a window have its middle as their time. What each listens to within the
    window `audio_lens.analysis.time_profile.time_profile` says.

    Logits are those of `GraniteSpeechForConditionalGeneration` in transformers 5.23, which does not
    divide them by the config's `logits_scaling`, as `GraniteForCausalLM` does: divide yourself
    where probabilities matter.
    """

    cfg: GraniteSpeechConfig
    model_types = ("granite_speech",)
    hf_class = "GraniteSpeechForConditionalGeneration"
    mask_key = "input_features_mask"
    masks_padding = False
    mixes_lengths = "its encoder hears the padding of a clip, and its windows end with the longest"
    weight_names: ClassVar = {
        "model.encoder.input_linear": "encoder.linear",
        **conformer_weight_names("model.encoder", "encoder"),
        "model.projector": "connector",  # its query
        "model.projector.qformer.layernorm": "connector.ln_embed",
        **qformer_weight_names("model.projector.qformer.encoder", "connector"),
        "model.projector.linear": "connector.linear",
        **weight_names("model.language_model", head="lm_head"),
    }

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> GraniteSpeechConfig:
        """The shape of a transformers `GraniteSpeechConfig`.

        Raises:
            LoadingError: another connector or language model, or a feature that is not implemented.
        """
        ear, name = hf_config.encoder_config, hf_config.name_or_path
        connector = _connector_config(hf_config)
        return GraniteSpeechConfig(
            family="granite_speech",
            model_name=name,
            encoder=_encoder_config(ear, name),
            decoder=replace(language_model_config(hf_config.text_config, name), logits_divisor=1.0),
            n_mels=ear.input_dim // STACKED,
            n_frames=None,
            connector=connector,
        )

    @classmethod
    def adapt_state(
        cls, state: Mapping[str, Tensor], cfg: GraniteSpeechConfig
    ) -> dict[str, Tensor]:
        """The tensors with keys and values apart, without the counters of batch norms.

        A single query per window sees nothing but itself: what asks and answers there is left out.
        """
        is_alone = cfg.connector.n_queries == 1
        found = {}
        for key, tensor in state.items():
            if key.endswith(".attn.to_kv.weight"):
                for name, half in zip(("to_k", "to_v"), tensor.chunk(2), strict=True):
                    found[key.replace("to_kv", name)] = half
            elif not (key.endswith(_COUNTERS) or (is_alone and _ASKING.search(key))):
                found[key] = tensor
        return found

    def make_encoder(self, cfg: GraniteSpeechConfig) -> GraniteEncoder:
        return GraniteEncoder(cfg.encoder, cfg.need_n_mels)

    def make_connector(self, cfg: GraniteSpeechConfig) -> QFormerConnector:
        return QFormerConnector(cfg.connector, cfg.need_decoder.d_model)

    def make_decoder(self, cfg: GraniteSpeechConfig) -> GraniteLanguageModel:
        return GraniteLanguageModel(cfg.need_decoder)

    def take_special_tokens(self, hf_config: Any) -> None:
        """Remember which token stands for audio; say so if an adapter is missing."""
        super().take_special_tokens(hf_config)
        if hf_config.has_lora_adapter and not hasattr(self, "replaced"):
            _log.warning(
                "the config speaks of a LoRA adapter for audio and no live one was loaded (reading "
                "it beside the model needs peft): unless it was merged, answers will be wrong"
            )

    # ---------------------------------------------------------------- lengths and times

    def frame_count(self, n_valid: int) -> int:
        """Pairs of mel frames."""
        return n_valid // STACKED

    def frame_seconds(self, count: int) -> Float[Tensor, " t"]:
        """The middle of the two mel frames of each: 0.02 i + 0.005."""
        return 0.02 * torch.arange(count, dtype=torch.float64) + 0.005

    def token_count(self, n_valid: int) -> int:
        """So many queries for every window that is begun."""
        cfg = self.cfg.connector
        return -(-self.frame_count(n_valid) // cfg.n_window) * cfg.n_queries

    def token_seconds(self, count: int) -> Float[Tensor, " t"]:
        """The middle of the window that each token was read from: 0.3 w + 0.145."""
        cfg = self.cfg.connector
        n_windows = -(-count // cfg.n_queries)
        middles = self.frame_seconds(n_windows * cfg.n_window).unflatten(0, (n_windows, -1)).mean(1)
        return middles.repeat_interleave(cfg.n_queries)[:count]

    def encoder_length(self, inputs: AudioInputs) -> int:
        return self.frame_count(inputs.features.shape[-1])

    def _heard_seconds(self, n_valid: int, count: int) -> Float[Tensor, " t"]:
        """`token_seconds`; but of the window a clip ends in, the middle of what it holds."""
        cfg, seconds, end = self.cfg.connector, self.token_seconds(count), self.token_count(n_valid)
        held = self.frame_seconds(self.frame_count(n_valid)).split(cfg.n_window)[-1]
        seconds[max(0, end - cfg.n_queries) : end] = held.mean()
        return seconds

    def _connector_track(self, length: int, segment: Segment) -> Track:
        seconds = self._heard_seconds(segment.n_valid, self.token_count(STACKED * length))
        return Track.of_clip(seconds, self.token_count(segment.n_valid), segment.clip)

    def _decoder_track(
        self,
        is_audio: Bool[Tensor, " t"],
        attended: Bool[Tensor, " t"],
        segments: Sequence[Segment],
    ) -> Track:
        track = super()._decoder_track(is_audio, attended, segments)
        heard = [self._heard_seconds(s.n_valid, self.token_count(s.n_valid)) for s in segments]
        track.seconds[is_audio] = torch.cat([track.seconds[:0], *heard])
        return track

    # ---------------------------------------------------------------- forward

    def enter_decoder(
        self, inputs: AudioInputs, encoded: Tensor | None, past: KVCache | None = None
    ) -> Float[Tensor, "b t d"]:
        """Embedded tokens with the audio in its places.

        Raises:
            InputError: prompts without audio while the adapter is enabled.
        """
        if not sum(inputs.clips_per_row) and self._is_adapted():
            raise InputError(
                "these prompts hold no audio, and Granite-Speech answers such with its adapter "
                "off: run them inside `with model.lora_disabled():` (generate does it by itself)"
            )
        return super().enter_decoder(inputs, encoded, past)

    def _is_adapted(self) -> bool:
        return hasattr(self, "replaced") and self.lora.enabled

    def _continue(self, inputs: AudioInputs, run: GreedyRun) -> Int[Tensor, "b t"]:
        """As in every model, with the adapter off if the prompts hold no audio."""
        if sum(inputs.clips_per_row) or not self._is_adapted():
            return super()._continue(inputs, run)
        with self.lora_disabled():
            return super()._continue(inputs, run)

    # ---------------------------------------------------------------- inputs

    def make_feature_extractor(self) -> GraniteMel:
        """The usual settings: `GraniteSpeechFeatureExtractor` itself needs torchaudio."""
        return GraniteMel(self.cfg.need_n_mels, self.cfg.sampling_rate)

    def extract_features(self, clips: list[Float[Any, " _"]]) -> dict[str, Tensor]:
        """Log-mel features as `GraniteSpeechFeatureExtractor` makes them, frame by frame.

        Clips are padded with zeros to the longest and its frames cut to pairs; the loudest place of
        each is its reference.
        """
        options = self.feature_extractor.melspec_kwargs
        waves = [torch.as_tensor(clip) for clip in clips]
        mel = _log_mel(pad_sequence(waves, batch_first=True), **options)
        frames = [STACKED * ((len(w) // options["hop_length"] + 1) // STACKED) for w in waves]
        return {
            "features": mel[..., : max(frames)].to(self.device),
            "mask": heard_of(frames, max(frames)).to(self.device),
        }

    def load_audio(self, source: Any, sampling_rate: int | None) -> Float[Any, " samples"]:
        clip = super().load_audio(source, sampling_rate)
        least = self.feature_extractor.melspec_kwargs["n_fft"] // 2 + 1
        if len(clip) < least:
            raise AudioError(
                f"the clip has {len(clip)} samples, and this model takes {least} or more"
            )
        return clip

    def templated(self, conversation: list) -> str:
        """The prompt of a conversation; Granite's chat template takes turns of plain text."""
        turns = [{**turn, "content": self._written(turn["content"])} for turn in conversation]
        speaker = self.tokenizer if self.tokenizer.chat_template else self.processor
        return chat_prompt(speaker, turns, add_generation_prompt=True)

    def _written(self, content: str | list[dict[str, str]]) -> str:
        """A turn as plain text, with the placeholder where each clip belongs."""
        if isinstance(content, str):
            return content
        placeholder = self.tokenizer.convert_ids_to_tokens(self.audio_token_id)
        return "".join(placeholder if p["type"] == "audio" else p["text"] for p in content)

    def check_tokens(self, tokens: Tensor) -> None:
        """As in every model; the placeholder may lie outside the vocabulary."""
        super().check_tokens(tokens[tokens != self.audio_token_id])

    def check_features(self, features: Tensor) -> None:
        """Raise unless the features are whole pairs of mel frames.

        Raises:
            InputError: naming the shape.
        """
        n_mels = self.cfg.n_mels
        if features.ndim != 3 or features.shape[1] != n_mels or features.shape[2] % STACKED:
            raise InputError(
                f"features must be (clips, {n_mels} mel bins, an even number of frames); got "
                f"{tuple(features.shape)}"
            )

    def cut(
        self, features: Tensor, tokens: Bool[Tensor, "clips t"] | None
    ) -> tuple[Tensor, Bool[Tensor, "clips frames"] | None, None]:
        """Pairs of frames apart (``clips mels frames``), and the mask of tokens as one of frames.

        Raises:
            InputError: features or a mask of another shape than the processor's.
        """
        width = STACKED * self.cfg.need_n_mels
        if features.ndim != 3 or features.shape[2] != width:
            raise InputError(
                f"input_features must be (clips, pairs of frames, {width}); got "
                f"{tuple(features.shape)}"
            )
        frames = rearrange(features, "b t (k m) -> b m (t k)", k=STACKED)
        return frames, None if tokens is None else self._frames_of(tokens, frames.shape[2]), None

    def _frames_of(
        self, tokens: Bool[Tensor, "clips t"], n_frames: int
    ) -> Bool[Tensor, "clips frames"]:
        """The mel frames of windows whose tokens are valid."""
        if tokens.shape[1] != self.token_count(n_frames):
            raise InputError(
                f"{self.mask_key} is of tokens behind the connector: {self.token_count(n_frames)} "
                f"for these features, got {tokens.shape[1]}"
            )
        cfg = self.cfg.connector
        windows = tokens[:, :: cfg.n_queries]
        return windows.repeat_interleave(STACKED * cfg.n_window, dim=1)[:, :n_frames]


def _log_mel(
    waves: Float[Tensor, "b samples"],
    sample_rate: int,
    n_fft: int,
    win_length: int,
    hop_length: int,
    n_mels: int,
) -> Float[Tensor, "b mels frames"]:
    """Log power in mel bands, 80 dB below the loudest of the clip at least, scaled."""
    window = torch.hann_window(win_length).to(waves)
    spectrum = torch.stft(waves, n_fft, hop_length, win_length, window, return_complex=True)
    bands = mel_filter_bank(n_fft // 2 + 1, n_mels, 0.0, sample_rate / 2, sample_rate)
    size = spectrum.real.square() + spectrum.imag.square()
    power = torch.as_tensor(bands).to(waves).T @ size
    levels = power.clamp(min=1e-10).log10()
    return levels.clamp(min=levels.amax((1, 2), keepdim=True) - 8.0) / 4 + 1


def _encoder_config(ear: Any, model_name: str) -> ConformerConfig:
    """The shape of a `GraniteSpeechEncoderConfig`.

    Raises:
        LoadingError: a feature that is not implemented.
    """
    _check_kind(ear, "granite_speech_encoder")
    check_switches(ear, _ENCODER.split())
    if ear.input_dim % STACKED or ear.num_layers < 2:
        raise LoadingError(
            f"an encoder of {ear.num_layers} layers that reads {ear.input_dim} features is not "
            "implemented: it takes pairs of mel frames and has a middle"
        )
    return ConformerConfig(
        n_layers=ear.num_layers,
        n_heads=ear.num_heads,
        n_key_value_heads=ear.num_heads,
        d_model=ear.hidden_dim,
        d_head=ear.dim_head,
        d_mlp=ear.hidden_dim * ear.feedforward_mult,
        n_ctx=None,
        act_fn="silu",
        eps=1e-5,
        normalization_type="LN",
        model_name=model_name,
        attn_biases=("o",),
        final_norm=False,
        n_window=ear.context_size,
        max_distance=ear.max_pos_emb,
        d_conv=ear.hidden_dim * ear.conv_expansion_factor,
        conv_kernel=ear.conv_kernel_size,
        d_ctc=ear.output_dim,
    )


def _connector_config(hf_config: Any) -> QFormerConfig:
    """The shape of the connector of a `GraniteSpeechConfig`.

    Raises:
        LoadingError: another connector than BLIP-2's Q-Former, or one that also reads text.
    """
    former = hf_config.projector_config
    _check_kind(former, "blip_2_qformer")
    check_switches(former, _CONNECTOR.split())
    if hf_config.window_size % hf_config.downsample_rate:
        raise LoadingError(
            f"windows of {hf_config.window_size} positions cannot be read by one query for "
            f"{hf_config.downsample_rate}"
        )
    return QFormerConfig(
        n_layers=former.num_hidden_layers,
        n_heads=former.num_attention_heads,
        n_key_value_heads=former.num_attention_heads,
        d_model=former.hidden_size,
        d_head=former.hidden_size // former.num_attention_heads,
        d_mlp=former.intermediate_size,
        n_ctx=None,
        act_fn=former.hidden_act,
        eps=former.layer_norm_eps,
        normalization_type="LN",
        model_name=hf_config.name_or_path,
        attn_biases=("q", "k", "v", "o"),
        final_norm=False,
        n_queries=hf_config.window_size // hf_config.downsample_rate,
        n_window=hf_config.window_size,
        d_memory=former.encoder_hidden_size,
        cross_every=former.cross_attention_frequency,
    )


_ENCODER = """
    input_dim num_layers hidden_dim feedforward_mult num_heads dim_head output_dim context_size
    max_pos_emb conv_kernel_size conv_expansion_factor dropout
"""
_CONNECTOR = """
    vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act
    hidden_dropout_prob attention_probs_dropout_prob max_position_embeddings initializer_range
    layer_norm_eps pad_token_id cross_attention_frequency encoder_hidden_size
"""


def _check_kind(config: Any, kind: str) -> None:
    if config.model_type != kind:
        raise LoadingError(f"{config.model_type!r} is not implemented; implemented: {kind!r}")
