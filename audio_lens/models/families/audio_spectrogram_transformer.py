"""AST: overlapping patches of a log-mel spectrogram, read by a pre-norm transformer.

Positions lie in time and in frequency. Two more stand before them, for the class of the clip: the
head reads the mean of both. Clips are padded, and nothing is masked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import transformers
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.audio_utils import hertz_to_mel, mel_to_hertz

from audio_lens.audio import Rates
from audio_lens.hooks import HookPoint
from audio_lens.inputs import AudioInputs, InputError, texts_per_clip
from audio_lens.models.base import HookedAudioTransformer
from audio_lens.models.config import LoadingError, check_switches
from audio_lens.models.kinds.encoder_only import EncoderOnlyConfig, EncoderOutput
from audio_lens.models.layers import LayerNorm, PartConfig, PreNormBlock, Stack
from audio_lens.models.mixins.features import heard_of
from audio_lens.timeline import Row, Timeline, Track

N_SPECIAL = 2  # positions before the patches: class and distillation token
WINDOW = 400  # samples that one mel frame reads: 160 m to 160 m + 399 (Kaldi does not centre)
LOWEST_HZ = 20.0  # where the mel filters begin; they end at half the sampling rate


@dataclass(frozen=True)
class PatchGrid:
    """How a spectrogram is cut into square patches, which overlap where strides are smaller.

    Patches are counted along time first, then upwards in frequency.
    """

    patch: int
    frequency_stride: int
    time_stride: int
    n_mels: int
    n_frames: int

    @property
    def n_rows(self) -> int:
        """Patches on top of each other."""
        return (self.n_mels - self.patch) // self.frequency_stride + 1

    @property
    def n_columns(self) -> int:
        """Patches beside each other."""
        return (self.n_frames - self.patch) // self.time_stride + 1

    @property
    def first_frames(self) -> Int[Tensor, " patches"]:
        """The first mel frame of every patch."""
        first = self.time_stride * torch.arange(self.n_columns)
        return repeat(first, "column -> (row column)", row=self.n_rows)

    def hertz(self, sampling_rate: int) -> Float[Tensor, "patches 3"]:
        """Lowest, middle and highest frequency that every patch reads, in Hz.

        Filters are triangles, each from the peak of the one below to the peak of the one above, at
        equal distances on Kaldi's mel scale; the middle is the middle on that scale.
        """
        ends = [float(hertz_to_mel(hertz, "kaldi")) for hertz in (LOWEST_HZ, sampling_rate / 2)]
        step = (ends[1] - ends[0]) / (self.n_mels + 1)
        row = self.frequency_stride * torch.arange(self.n_rows, dtype=torch.float64)
        above = torch.tensor([0, (self.patch + 1) / 2, self.patch + 1])
        mel = ends[0] + step * (row[:, None] + above)
        edges = torch.as_tensor(mel_to_hertz(mel.numpy(), "kaldi"))
        return repeat(edges, "row edge -> (row column) edge", column=self.n_columns)


@dataclass(kw_only=True)
class ASTConfig(EncoderOnlyConfig):
    """Shape of an AST; `is_exclusive` says whether its loss takes a clip to be of one class."""

    grid: PatchGrid
    is_exclusive: bool


# -------------------------------------------------------------------------------- parts


class PatchStem(nn.Module):
    """Every patch of a spectrogram as one vector."""

    def __init__(self, grid: PatchGrid, d_model: int):
        super().__init__()
        strides = (grid.frequency_stride, grid.time_stride)
        self.hook_mel = HookPoint(borrowed=True)  # the caller's features
        self.projection = nn.Conv2d(1, d_model, grid.patch, strides)
        self.hook_out = HookPoint()

    def forward(self, features: Float[Tensor, "b mels frames"]) -> Float[Tensor, "b patches d"]:
        mel = self.hook_mel(features.to(self.projection.weight))
        patches = self.projection(mel[:, None])
        return self.hook_out(rearrange(patches, "b d row column -> b (row column) d"))


class ASTEncoder(Stack):
    """Class and distillation token, then the patches; learned positions, pre-norm blocks."""

    def __init__(self, cfg: PartConfig):
        super().__init__(cfg, PreNormBlock)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, cfg.d_model))
        self.distillation_token = nn.Parameter(torch.zeros(1, 1, cfg.d_model))
        self.position_embeddings = nn.Parameter(torch.zeros(1, cfg.need_n_ctx, cfg.d_model))
        self.hook_pos_embed = HookPoint()

    def embed(self, patches: Float[Tensor, "b patches d"]) -> Float[Tensor, "b t d"]:
        """The residual stream entering block 0."""
        special = torch.cat([self.cls_token, self.distillation_token], dim=1)
        x = self.hook_embed(torch.cat([special.expand(len(patches), -1, -1), patches], dim=1))
        return x + self.hook_pos_embed(self.position_embeddings.repeat(len(x), 1, 1))


class ASTClassifier(nn.Module):
    """The class of a clip, from the mean of its class and distillation token."""

    def __init__(self, cfg: PartConfig):
        super().__init__()
        self.hook_pooled = HookPoint()
        self.ln = LayerNorm(cfg.d_model, cfg.eps)
        self.unembed = nn.Linear(cfg.d_model, cfg.need_d_vocab)

    def forward(self, hidden: Float[Tensor, "b t d"]) -> Float[Tensor, "b labels"]:
        return self.unembed(self.ln(self.hook_pooled((hidden[:, 0] + hidden[:, 1]) / 2)))


# -------------------------------------------------------------------------------- model

_UNDERSTOOD = """
    hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act layer_norm_eps
    patch_size qkv_bias frequency_stride time_stride max_length num_mel_bins head_dim
    hidden_dropout_prob attention_probs_dropout_prob initializer_range
"""
_ONE_CLASS = "single_label_classification"  # a problem_type of transformers
_BODY = {
    "embeddings": "encoder",
    "embeddings.patch_embeddings.projection": "frontend.projection",
    "layers.{l}.attention.q_proj": "encoder.blocks.{l}.attn.q_proj",
    "layers.{l}.attention.k_proj": "encoder.blocks.{l}.attn.k_proj",
    "layers.{l}.attention.v_proj": "encoder.blocks.{l}.attn.v_proj",
    "layers.{l}.attention.o_proj": "encoder.blocks.{l}.attn.o_proj",
    "layers.{l}.layernorm_before": "encoder.blocks.{l}.ln1",
    "layers.{l}.layernorm_after": "encoder.blocks.{l}.ln2",
    "layers.{l}.mlp.fc1": "encoder.blocks.{l}.mlp.fc_in",
    "layers.{l}.mlp.fc2": "encoder.blocks.{l}.mlp.fc_out",
    "layernorm": "encoder.ln_final",
}


class HookedAST(EncoderOutput, HookedAudioTransformer):
    """Audio Spectrogram Transformer with every activation hooked, bare or with its class head."""

    cfg: ASTConfig
    encoder: ASTEncoder
    features_key = "input_values"
    model_types = ("audio-spectrogram-transformer",)
    hf_class = ("ASTForAudioClassification", "ASTModel")
    weight_names: ClassVar = {
        **_BODY,
        **{f"audio_spectrogram_transformer.{theirs}": ours for theirs, ours in _BODY.items()},
        "classifier.layernorm": "classifier.ln",
        "classifier.dense": "classifier.unembed",
    }

    def __init__(self, cfg: ASTConfig):
        super().__init__(cfg)
        self.frontend = PatchStem(cfg.grid, cfg.need_encoder.d_model)
        self.encoder = ASTEncoder(cfg.need_encoder)
        if cfg.output_kind is not None:
            self.classifier = ASTClassifier(cfg.need_encoder)
        self.setup()

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> ASTConfig:
        """The shape of an `ASTConfig` of transformers.

        Raises:
            LoadingError: patches whose size is not one number, a head without classes, or a
                feature that is not implemented.
        """
        check_switches(hf_config, _UNDERSTOOD.split())
        if not isinstance(hf_config.patch_size, int):
            raise LoadingError(f"patch_size {hf_config.patch_size} is not one number")
        grid = PatchGrid(
            patch=hf_config.patch_size,
            frequency_stride=hf_config.frequency_stride,
            time_stride=hf_config.time_stride,
            n_mels=hf_config.num_mel_bins,
            n_frames=hf_config.max_length,
        )
        is_bare = (hf_config.architectures or [None])[0] == "ASTModel"
        if not (is_bare or hf_config.num_labels):
            raise LoadingError("num_labels 0: a head with no classes is not implemented")
        n_heads = hf_config.num_attention_heads
        encoder = PartConfig(
            n_layers=hf_config.num_hidden_layers,
            n_heads=n_heads,
            n_key_value_heads=n_heads,
            d_model=hf_config.hidden_size,
            d_head=getattr(hf_config, "head_dim", None) or hf_config.hidden_size // n_heads,
            d_mlp=hf_config.intermediate_size,
            n_ctx=N_SPECIAL + grid.n_rows * grid.n_columns,
            act_fn=hf_config.hidden_act,
            eps=hf_config.layer_norm_eps,
            normalization_type="LN",
            attn_biases=("q", "k", "v", "o") if hf_config.qkv_bias else ("o",),
            softmax_float32=True,
            d_vocab=None if is_bare else hf_config.num_labels,
            model_name=hf_config.name_or_path,
        )
        labels = [hf_config.id2label[label] for label in range(hf_config.num_labels)]
        return ASTConfig(
            family="audio_spectrogram_transformer",
            model_name=hf_config.name_or_path,
            encoder=encoder,
            decoder=None,
            n_mels=grid.n_mels,
            n_frames=grid.n_frames,
            output_kind=None if is_bare else "classes",
            labels=() if is_bare else tuple(labels),
            grid=grid,
            is_exclusive=len(labels) > 1 and hf_config.problem_type in (None, _ONE_CLASS),
        )

    # ---------------------------------------------------------------- forward

    def enter_encoder(self, inputs: AudioInputs) -> Float[Tensor, "b t d"]:
        """Both special positions and all patches, with their places."""
        return self.encoder.embed(self.frontend(inputs.features))

    def read_out(self, hidden: Float[Tensor, "b t d"], inputs: AudioInputs) -> Tensor:
        """Logits of the classes, ``b labels``, or the hidden states of a bare encoder."""
        return hidden if self.cfg.output_kind is None else self.classifier(hidden)

    def loss(self, logits: Float[Tensor, "b labels"], inputs: AudioInputs) -> Float[Tensor, ""]:
        """Cross-entropy of the class.

        Raises:
            InputError: inputs without labels, or a head that was trained for something else.
        """
        if not self.cfg.is_exclusive:
            raise InputError(
                "this head was not trained to tell one class: compute its loss from the logits"
            )
        return super().loss(logits, inputs)

    # ---------------------------------------------------------------- inputs

    def make_feature_extractor(self) -> Any:
        """The feature extractor the configuration tells of, with the mean and scale of AudioSet."""
        return transformers.ASTFeatureExtractor(
            sampling_rate=self.cfg.sampling_rate,
            num_mel_bins=self.cfg.need_n_mels,
            max_length=self.cfg.need_n_frames,
        )

    def inputs_from_mapping(self, mapping: Mapping[str, Any]) -> AudioInputs:
        """Inputs from what `ASTFeatureExtractor` returns (``b frames mels``), and ``labels``.

        It does not say what is padding, so all frames count as audio; `prepare` knows.
        """
        given = self._mapping_tensors(mapping, ("input_values", "labels"))
        features, labels = given["input_values"].transpose(-1, -2), given.get("labels")
        if labels is not None:
            if labels.is_floating_point() or labels.numel() != len(features):
                raise InputError("labels must be the id of one class for every clip")
            labels = labels.reshape(-1, 1)
            self.check_tokens(labels)
        return self._inputs(features, labels)

    def _inputs(
        self, features: Float[Tensor, "b mels frames"], labels: Tensor | None, **made: Any
    ) -> AudioInputs:
        self.check_features(features)
        return AudioInputs(
            features=features,
            tokens=torch.zeros(len(features), 0, dtype=torch.long, device=features.device),
            clips_per_row=(1,) * len(features),
            labels=labels,
            **made,
        )

    def prepare(self, audio: Any, text: Any = None, sampling_rate: Rates = None) -> AudioInputs:
        """Inputs from clips, one per prompt.

        Args:
            audio: a path, array, tensor or mapping (see `audio.load`), or a list of them (a
                batch is a list, not an array).
            text: what the loss compares with: the class of each clip, by name or as ``[id]``.
            sampling_rate: of arrays, in Hz, or one per clip; files and mappings know their own.

        Raises:
            AudioError: unusable audio, or a clip that is too long.
            InputError: no clip, or one shorter than one mel frame (25 ms).
            TokenError: no such class.
        """
        clips = self.load_clips(audio, sampling_rate)
        texts = texts_per_clip(text, len(clips))
        made = self.extract_features(clips)
        return self._inputs(
            made["features"],
            None if text is None else self.labels_of(texts),
            feature_mask=made["mask"],
            audio=clips,
            text=None if text is None else texts,
            sampling_rate=self.cfg.sampling_rate,
            remake=self.prepare,
        )

    def extract_features(self, clips: list[Float[Any, " _"]]) -> dict[str, Tensor]:
        """Spectrograms of a fixed length, and the mask of frames with audio.

        Raises:
            InputError: a clip shorter than one mel frame.
        """
        shortest = min(map(len, clips))
        if shortest < WINDOW:
            raise InputError(f"a clip of {shortest} samples: one mel frame reads {WINDOW}")
        made = self.extracted(clips)["input_values"].transpose(-1, -2)
        frames = [(len(clip) - WINDOW) // self.cfg.hop + 1 for clip in clips]
        mask = heard_of(frames, self.cfg.need_n_frames)
        return {"features": made.to(self.device), "mask": mask.to(self.device)}

    def timeline(self, inputs: AudioInputs | Mapping[str, Any]) -> Timeline:
        """The patch of frames m to m + 15 is centred at 0.01 m + 0.0875 s; classes have no time.

        A patch is valid if its first frame holds audio; its frequencies are those of its mel
        filters.
        """
        inputs = self.as_inputs(inputs)
        return Timeline([self._row(inputs.n_valid(clip)) for clip in range(len(inputs))])

    def _row(self, n_valid: int) -> Row:
        cfg, grid = self.cfg, self.cfg.grid
        centre = (grid.patch - 1) / 2 * cfg.hop + WINDOW / 2  # in samples of the patch
        seconds = (grid.first_frames.double() * cfg.hop + centre) / cfg.sampling_rate
        nowhere = torch.full((N_SPECIAL,), math.nan, dtype=torch.float64)
        track = Track(
            seconds=torch.cat([nowhere, seconds]),
            clip=torch.zeros(cfg.need_encoder.need_n_ctx, dtype=torch.long),
            valid=torch.cat([nowhere.isnan(), grid.first_frames < n_valid]),
            hertz=torch.cat([nowhere[:, None].expand(-1, 3), grid.hertz(cfg.sampling_rate)]),
        )
        return Row({"encoder": [track]}, [((n_valid - 1) * cfg.hop + WINDOW) / cfg.sampling_rate])
