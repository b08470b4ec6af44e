"""wav2vec 2.0 and what is built like it: a stem of convolutions on samples, and blocks.

HuBERT, data2vec-audio, UniSpeech, UniSpeech-SAT, XLS-R and MMS (with its adapters) are the same
network with other switches, and are served from here; WavLM adds a position bias (`wavlm.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
import transformers
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers.activations import ACT2FN

from audio_lens.audio import Rates
from audio_lens.hooks import HookPoint
from audio_lens.inputs import AudioInputs, InputError, texts_per_clip
from audio_lens.models.base import HookedAudioTransformer
from audio_lens.models.families.wav2vec2_config import (
    SpeechConfig,
    SpeechEncoderConfig,
    StemConfig,
    speech_config,
)
from audio_lens.models.kinds.ear import Ear
from audio_lens.models.kinds.encoder_only import IGNORED, EncoderOutput, PooledClassifier
from audio_lens.models.layers import (
    MLP,
    Block,
    Context,
    LayerNorm,
    PostNormBlock,
    PreNormBlock,
    Stack,
    needed,
    padding_mask,
)
from audio_lens.models.layers.weight_norm import WeightNormConv, with_gains
from audio_lens.models.parts.conformer import FrozenBatchNorm
from audio_lens.timeline import Row, Timeline, Track

EPS = 1e-5  # of the norms that the config does not set: stem, adapters, data2vec's positions
_POSITIONS = "encoder.pos_conv_embed.conv"
_BODY = re.compile("^(wav2vec2|hubert|wavlm|data2vec_audio|unispeech_sat|unispeech)[.]")
_UNUSED = re.compile(  # masks and quantisers of pretraining, counters of batch norms
    r"^([a-z0-9_]+[.])?masked_spec_embed$"
    "|^(quantizer|project_q|project_hid|ctc_proj|speaker_proj|layer_norm_for_extract)[.]"
    "|^label_embeddings_concat$"
    "|.*[.]num_batches_tracked$"
)

# -------------------------------------------------------------------------------- parts


class ChannelNorm(nn.GroupNorm):
    """Each channel normalised over the whole length, padding included."""

    def __init__(self, d: int, eps: float):
        super().__init__(d, d, eps)

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class ConvLayer(nn.Module):
    """One convolution of the stem, its norm if it has one, and the activation."""

    def __init__(self, cfg: StemConfig, layer: int):
        super().__init__()
        d_in, d_out = (1, *cfg.dims)[layer : layer + 2]
        kernel, stride = cfg.kernels[layer], cfg.strides[layer]
        self.conv = nn.Conv1d(d_in, d_out, kernel, stride, bias=cfg.bias)
        if cfg.norm == "layer":
            self.ln = LayerNorm(d_out, EPS)
        elif layer == 0:
            self.ln = ChannelNorm(d_out, EPS)
        self.act = ACT2FN[cfg.act_fn]
        self.hook_out = HookPoint()

    def forward(self, x: Float[Tensor, "b s i"]) -> Float[Tensor, "b t o"]:
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = self.ln(x) if hasattr(self, "ln") else x
        return self.hook_out(self.act(x))


class WaveStem(nn.Module):
    """Waveforms to frames: convolutions, a norm, and a projection to the width of the blocks."""

    def __init__(self, cfg: StemConfig, d_model: int):
        super().__init__()
        self.hook_wav = HookPoint(borrowed=True)  # the caller's waveforms
        self.convs = nn.ModuleList(ConvLayer(cfg, layer) for layer in range(len(cfg.dims)))
        if cfg.normed:
            self.ln = LayerNorm(cfg.dims[-1], cfg.eps)
        self.project = nn.Linear(cfg.dims[-1], d_model)
        self.hook_out = HookPoint()

    def forward(self, wav: Float[Tensor, "b samples"]) -> Float[Tensor, "b t d"]:
        x = self.hook_wav(wav.to(self.project.weight))[..., None]
        for conv in self.convs:
            x = conv(x)
        return self.hook_out(self.project(self.ln(x) if hasattr(self, "ln") else x))


class ConvPositions(nn.Module):
    """Positions as wav2vec 2.0 learns them: a wide grouped convolution over the frames."""

    def __init__(self, cfg: SpeechEncoderConfig):
        super().__init__()
        self.cfg, self.act = cfg, ACT2FN[cfg.position_act_fn]
        if cfg.position_batch_norm:
            self.batch_norm = FrozenBatchNorm(cfg.d_model, EPS)
        d, kernel, groups = cfg.d_model, cfg.position_kernel, cfg.position_groups
        if cfg.has_weight_norm:
            convs: list[nn.Module] = [WeightNormConv(d, kernel, kernel // 2, groups)]
        else:
            count = cfg.n_position_convs or 1
            convs = [
                nn.Conv1d(d, d, kernel, padding=kernel // 2, groups=groups) for _ in range(count)
            ]
        self.convs = nn.ModuleList(convs)

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        n_frames = x.shape[1]
        x = self.batch_norm(x) if self.cfg.position_batch_norm else x
        for conv in self.convs:  # an even kernel gives one frame too many
            x = conv(x.transpose(1, 2)).transpose(1, 2)[:, :n_frames]
            if self.cfg.n_position_convs is not None:
                x = nn.functional.layer_norm(x, x.shape[-1:], eps=EPS)
            x = self.act(x)
        return x


class AdapterBlock(PreNormBlock):
    """A pre-norm block with a bottleneck behind it that belongs to one language (MMS).

    `hook_resid_mlp` is the residual stream with the MLP added, which the bottleneck reads.
    """

    writes = ("attn_out", "mlp_out", "adapter_out")

    def __init__(self, cfg: SpeechEncoderConfig):
        super().__init__(cfg)
        self.ln_adapter = LayerNorm(cfg.d_model, EPS)
        self.adapter = MLP(replace(cfg, d_mlp=cfg.d_adapter, act_fn="relu"))
        self.hook_resid_mlp, self.hook_adapter_out = HookPoint(), HookPoint()

    def after_mlp(self, resid: Float[Tensor, "b t d"], mlp_out: Float[Tensor, "b t d"]) -> Tensor:
        resid = self.hook_resid_mlp(resid + mlp_out)
        return self.leave(resid + self.hook_adapter_out(self.adapter(self.ln_adapter(resid))))


class SpeechEncoder(Stack):
    """Frames with positions added, and blocks.

    Where blocks are post-norm, a norm (`ln_embed`) stands before the first; where they are
    pre-norm, behind the last (`ln_final`).
    """

    cfg: SpeechEncoderConfig

    def __init__(self, cfg: SpeechEncoderConfig):
        super().__init__(cfg, self.block_type(cfg))
        self.hook_embed = HookPoint(borrowed=True)  # what the stem gave
        self.positions, self.hook_pos_embed = ConvPositions(cfg), HookPoint()
        if not cfg.final_norm:
            self.ln_embed = LayerNorm(cfg.d_model, cfg.eps)

    @staticmethod
    def block_type(cfg: SpeechEncoderConfig) -> type[Block]:
        """The kind of block that the configuration asks for."""
        if not cfg.final_norm:
            return PostNormBlock
        return PreNormBlock if cfg.d_adapter is None else AdapterBlock

    def embed(
        self, frames: Float[Tensor, "b t d"], valid: Bool[Tensor, "b t"] | None = None
    ) -> Float[Tensor, "b t d"]:
        """The residual stream entering block 0; frames that are not valid are set to zero."""
        frames = frames if valid is None else frames.masked_fill(~valid[..., None], 0)
        embed = self.hook_embed(frames)
        resid = embed + self.hook_pos_embed(self.positions(embed))
        return resid if self.cfg.final_norm else self.ln_embed(resid)

    def position_bias(self, n_frames: int) -> Float[Tensor, "h t t"] | None:
        """What is added to attention scores by distance: nothing, here."""
        return None


# -------------------------------------------------------------------------------- model


def hf_classes(*stems: str) -> tuple[str, ...]:
    """The Hugging Face classes that are taken over, bare and with the heads that all have."""
    heads = ("ForCTC", "ForSequenceClassification", "Model")
    return tuple(f"{stem}{head}" for stem in stems for head in heads)


class HookedWav2Vec2(EncoderOutput, Ear, HookedAudioTransformer):
    """wav2vec 2.0, HuBERT, data2vec-audio, UniSpeech or UniSpeech-SAT, with hooks everywhere.

    The bare encoder, or with a head for CTC or for the class of a clip; what was saved for
    pretraining is taken as a bare encoder. The adapters of MMS are those the Hugging Face model
    holds: load another language there (``hf_model.load_adapter``) before `from_hf`.
    """

    cfg: SpeechConfig
    encoder: SpeechEncoder
    lends_encoder = True
    features_key = "input_values"
    model_types = ("wav2vec2", "hubert", "data2vec-audio", "unispeech", "unispeech-sat")
    hf_class = (
        *hf_classes("Wav2Vec2", "Hubert", "Data2VecAudio", "UniSpeech", "UniSpeechSat"),
        *(f"{stem}ForPreTraining" for stem in ("Wav2Vec2", "UniSpeech", "UniSpeechSat")),
    )
    encoder_type: ClassVar[type[SpeechEncoder]] = SpeechEncoder
    weight_names: ClassVar = {
        "feature_extractor.conv_layers.{l}.conv": "frontend.convs.{l}.conv",
        "feature_extractor.conv_layers.{l}.layer_norm": "frontend.convs.{l}.ln",
        "feature_projection.layer_norm": "frontend.ln",
        "feature_projection.projection": "frontend.project",
        "encoder.pos_conv_embed.batch_norm": "encoder.positions.batch_norm",
        "encoder.pos_conv_embed.conv": "encoder.positions.convs.0",
        "encoder.pos_conv_embed.layers.{l}.conv": "encoder.positions.convs.{l}",
        "encoder.ln_embed": "encoder.ln_embed",
        "encoder.ln_final": "encoder.ln_final",
        "encoder.layers.{l}.attention.q_proj": "encoder.blocks.{l}.attn.q_proj",
        "encoder.layers.{l}.attention.k_proj": "encoder.blocks.{l}.attn.k_proj",
        "encoder.layers.{l}.attention.v_proj": "encoder.blocks.{l}.attn.v_proj",
        "encoder.layers.{l}.attention.out_proj": "encoder.blocks.{l}.attn.o_proj",
        "encoder.layers.{l}.layer_norm": "encoder.blocks.{l}.ln1",
        "encoder.layers.{l}.feed_forward.intermediate_dense": "encoder.blocks.{l}.mlp.fc_in",
        "encoder.layers.{l}.feed_forward.output_dense": "encoder.blocks.{l}.mlp.fc_out",
        "encoder.layers.{l}.final_layer_norm": "encoder.blocks.{l}.ln2",
        "encoder.layers.{l}.adapter_layer.norm": "encoder.blocks.{l}.ln_adapter",
        "encoder.layers.{l}.adapter_layer.linear_1": "encoder.blocks.{l}.adapter.fc_in",
        "encoder.layers.{l}.adapter_layer.linear_2": "encoder.blocks.{l}.adapter.fc_out",
        "lm_head": "encoder.unembed",
        "projector": "head.project",
        "classifier": "head.unembed",
    }

    def __init__(self, cfg: SpeechConfig):
        super().__init__(cfg)
        self.frontend = WaveStem(cfg.stem, cfg.encoder.d_model)
        self.encoder = self.encoder_type(cfg.encoder)
        if cfg.output_kind == "ctc":
            self.encoder.unembed = nn.Linear(cfg.encoder.d_model, cfg.encoder.need_d_vocab)
        elif cfg.output_kind == "classes":
            d_classifier = needed(cfg.d_classifier, "a classifier needs a width to pool in")
            self.head = PooledClassifier(
                cfg.encoder.d_model, d_classifier, cfg.encoder.need_d_vocab
            )
        self.setup()

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> SpeechConfig:
        """The shape of a `Wav2Vec2Config` or of one like it."""
        return speech_config(hf_config)

    @classmethod
    def adapt_state(cls, state: Mapping[str, Tensor], cfg: SpeechConfig) -> dict[str, Tensor]:
        """The tensors that are used, under the names of the bare Hugging Face encoder.

        The encoder's norm is named by where it stands.
        """
        bare = {_BODY.sub("", key): x for key, x in state.items() if not _UNUSED.match(key)}
        if cfg.encoder.has_weight_norm:
            bare = with_gains(bare, _POSITIONS)
        norm = "ln_final" if cfg.need_encoder.final_norm else "ln_embed"
        return {
            key.replace("encoder.layer_norm.", f"encoder.{norm}."): x for key, x in bare.items()
        }

    # ---------------------------------------------------------------- forward

    def enter_encoder(self, inputs: AudioInputs) -> Float[Tensor, "b t d"]:
        """Frames of the stem with positions added."""
        return self.encoder.embed(self.frontend(inputs.features), self._valid(inputs))

    def encoder_length(self, inputs: AudioInputs) -> int:
        """Frames of the longest clip."""
        return self.cfg.stem.n_frames(inputs.features.shape[-1])

    def encoder_context(self, inputs: AudioInputs) -> Context:
        """Padding is not attended to, where a mask says what padding is."""
        valid, length = self._valid(inputs), self.encoder_length(inputs)
        return Context(
            allowed=None if valid is None else padding_mask(valid, length, causal=False),
            position_bias=self.encoder.position_bias(length),
        )

    def read_out(self, hidden: Float[Tensor, "b t d"], inputs: AudioInputs) -> Tensor:
        """Logits of labels (``b t v``) or of classes (``b v``), or the hidden states."""
        if self.cfg.output_kind == "classes":
            return self.head(hidden, self._valid(inputs))
        return super().read_out(hidden, inputs)

    def _valid(self, inputs: AudioInputs) -> Bool[Tensor, "b t"] | None:
        """Which frames hold audio; None where all do."""
        if inputs.feature_mask is None or inputs.feature_mask.all():
            return None
        counts = [self.frame_count(inputs.n_valid(i)) for i in range(len(inputs.features))]
        index = torch.arange(self.encoder_length(inputs), device=inputs.device)
        return index < torch.tensor(counts, device=inputs.device)[:, None]

    def frame_count(self, n_valid: int) -> int:
        """Frames of so many samples."""
        return self.cfg.stem.n_frames(n_valid)

    def frame_seconds(self, count: int) -> Float[Tensor, " t"]:
        """Frame i sees 25 ms centred at 0.02 i + 0.01247 seconds (with the usual strides)."""
        frames = torch.arange(count, dtype=torch.float64)
        return self.cfg.stem.centre(frames) / self.cfg.sampling_rate

    # ---------------------------------------------------------------- inputs

    def make_feature_extractor(self) -> Any:
        """The feature extractor the configuration tells of; waveforms are normalised."""
        return transformers.Wav2Vec2FeatureExtractor(
            sampling_rate=self.cfg.sampling_rate,
            return_attention_mask=self.cfg.stem.norm == "layer",
        )

    def check_features(self, features: Tensor) -> None:
        """Raise unless the features are waveforms that give a frame.

        Raises:
            InputError: naming the shape.
        """
        if features.ndim != 2 or features.shape[-1] < self.cfg.stem.reach:
            raise InputError(
                f"features must be waveforms (clips, samples) of at least {self._least}; got "
                f"{tuple(features.shape)}"
            )

    @property
    def mixes_lengths(self) -> str:
        """Where a norm of the stem or the positions make something of the padding."""
        cfg = self.cfg.encoder
        if self.cfg.stem.norm == "group":
            return "the group norm of its stem runs over padding, too"
        if cfg.position_batch_norm:
            return "the batch norm before its positional convolution makes something of padding"
        if (cfg.n_position_convs or 1) > 1:
            return "of its positional convolutions, later ones read what earlier made of padding"
        return ""

    @property
    def _least(self) -> str:
        reach = self.cfg.stem.reach
        return f"{reach} samples ({1000 * reach / self.cfg.sampling_rate:g} ms)"

    def inputs_from_mapping(self, mapping: Mapping[str, Any]) -> AudioInputs:
        """Inputs from what `Wav2Vec2FeatureExtractor` returns, and ``labels``."""
        given = self._mapping_tensors(mapping, ("input_values", "attention_mask", "labels"))
        waves, mask, labels = (
            given["input_values"],
            given.get("attention_mask"),
            given.get("labels"),
        )
        self.check_features(waves)
        if mask is not None:
            self._check_mask(mask.bool(), waves)
        if labels is not None:
            labels = labels.reshape(len(waves), -1).long()
            self.check_tokens(labels[labels != IGNORED])
        return self._inputs(waves, None if mask is None else mask.bool(), labels)

    def _check_mask(self, mask: Bool[Tensor, "b samples"], waves: Tensor) -> None:
        if mask.shape != waves.shape or (mask[:, 1:] & ~mask[:, :-1]).any():
            raise InputError("attention_mask must mark the samples of each clip, padding last")
        if (mask.sum(-1) < self.cfg.stem.reach).any():
            raise InputError(f"every clip needs at least {self._least}")

    def _inputs(
        self,
        waves: Float[Tensor, "b samples"],
        mask: Bool[Tensor, "b samples"] | None,
        labels: Tensor | None,
        **made: Any,
    ) -> AudioInputs:
        return AudioInputs(
            features=waves,
            tokens=torch.zeros(len(waves), 0, dtype=torch.long, device=waves.device),
            clips_per_row=(1,) * len(waves),
            feature_mask=None if mask is None or mask.all() else mask,
            labels=labels,
            **made,
        )

    def prepare(self, audio: Any, text: Any = None, sampling_rate: Rates = None) -> AudioInputs:
        """Inputs from clips, one per prompt.

        Args:
            audio: a path, array, tensor or mapping (see `audio.load`), or a list of them (a
                batch is a list, not an array).
            text: what the loss compares with: transcripts (CTC) or names of classes, one per clip;
                or label ids.
            sampling_rate: of arrays, in Hz, or one per clip; files and mappings know their own.

        Raises:
            AudioError: unusable audio.
            InputError: clips that are too short, or unequal where the first norm of the stem runs
                over the whole length, padding too (batches would change the answer).
            TokenError: text that the tokenizer cannot write, or no such class.
        """
        clips = self.load_clips(audio, sampling_rate)
        texts = texts_per_clip(text, len(clips))
        made = self.extract_features(clips)
        self.tell_of_lengths([len(clip) for clip in clips])
        return self._inputs(
            made["features"],
            made["mask"],
            None if text is None else self.labels_of(texts),
            audio=clips,
            text=None if text is None else texts,
            sampling_rate=self.cfg.sampling_rate,
            remake=self.prepare,
        )

    def extract_features(self, clips: list[Float[Any, " _"]]) -> dict[str, Tensor]:
        """Waveforms as the model takes them, padded, and the mask of samples with audio."""
        self._check_lengths([len(clip) for clip in clips])
        made = self.extracted(clips, padding=True)
        return {
            "features": made["input_values"].to(self.device),
            "mask": made["attention_mask"].bool().to(self.device),
        }

    def _check_lengths(self, lengths: list[int]) -> None:
        if min(lengths) < self.cfg.stem.reach:
            raise InputError(f"a clip of {min(lengths)} samples: it needs at least {self._least}")
        if self.cfg.stem.norm == "group" and len(set(lengths)) > 1:
            raise InputError(
                f"clips of {sorted(set(lengths))} samples in one batch: the group norm of this "
                "model runs over padding, so batching would change the answer. Use batches of one, "
                "or cut or pad the clips to equal length yourself"
            )

    def timeline(self, inputs: AudioInputs | Mapping[str, Any]) -> Timeline:
        """Where the frames of every clip lie."""
        inputs = self.as_inputs(inputs)
        seconds = self.frame_seconds(self.encoder_length(inputs))
        lengths = [inputs.n_valid(clip) for clip in range(len(inputs))]
        return Timeline(
            [
                Row(
                    {"encoder": [Track.of_clip(seconds, self.frame_count(n), clip=0)]},
                    [n / self.cfg.sampling_rate],
                )
                for n in lengths
            ]
        )
