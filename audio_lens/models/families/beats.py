"""BEATs (arXiv:2212.09058): square patches of a spectrogram, heard by WavLM's kind of blocks.

Patches are counted upwards in frequency first, then along time: eight to every 0.16 s. Blocks are
post-norm and weigh the stream they add to by a constant (deep norm, arXiv:2203.00555). Padding is
masked as published: by the number of patches, whatever their frequency, so that the last patches
of a padded clip that still count are only its lowest ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from audio_lens.audio import Rates
from audio_lens.hooks import HookPoint
from audio_lens.inputs import AudioInputs, InputError, texts_per_clip
from audio_lens.models.base import HookedAudioTransformer
from audio_lens.models.config import AudioConfig, LoadingError
from audio_lens.models.families.audio_spectrogram_transformer import WINDOW, PatchGrid
from audio_lens.models.families.beats_config import (
    HOP,
    N_MELS,
    BeatsConfig,
    BeatsEncoderConfig,
    beats_config,
    heard_frames,
    log_mel,
)
from audio_lens.models.families.wav2vec2 import EPS
from audio_lens.models.families.wavlm import GatedBiasAttention, WavLMEncoder
from audio_lens.models.kinds.ear import Ear
from audio_lens.models.kinds.encoder_only import IGNORED, EncoderOutput
from audio_lens.models.layers import Block, Context, LayerNorm, PostNormBlock, padding_mask
from audio_lens.models.layers.weight_norm import with_gains
from audio_lens.models.loading.stored import told_of
from audio_lens.models.loading.weights import check_finite, fill, read_pickle, renamed
from audio_lens.timeline import Row, Timeline, Track

# -------------------------------------------------------------------------------- parts


class BeatsAttention(GatedBiasAttention):
    """Attention with WavLM's gated bias, whose gate reads the query itself."""

    def forward(self, x: Float[Tensor, "b q d"], context: Context) -> Float[Tensor, "b q d"]:
        q, (k, v) = self.queries(x), self.keys_values(x)
        bias = self.bias(rearrange(q, "b q h e -> b q (h e)"), context)
        return self.output(self.hook_z(self.mix(q, k, v, context.allowed, bias)))


class DeepNormBlock(PostNormBlock):
    """A post-norm block that multiplies the stream by a constant before it adds to it."""

    attention = BeatsAttention

    def __init__(self, cfg: BeatsEncoderConfig):
        super().__init__(cfg)
        self.stream_multiplier = cfg.stream_multiplier

    def forward(self, resid_pre: Float[Tensor, "b t d"], context: Context) -> Tensor:
        resid_pre = self.hook_resid_pre(resid_pre)
        attn_out = self.hook_attn_out(self.attn(resid_pre, context))
        return self.after_attention(self.stream_multiplier * resid_pre + attn_out, context)

    def after_mlp(self, resid: Float[Tensor, "b t d"], mlp_out: Float[Tensor, "b t d"]) -> Tensor:
        return self.leave(self.stream_multiplier * resid + mlp_out)


class BeatsEncoder(WavLMEncoder):
    """Patches, normed and mapped to the width of the blocks, with positions added; blocks."""

    def __init__(self, cfg: BeatsEncoderConfig):
        super().__init__(cfg)
        self.hook_mel = HookPoint(borrowed=True)  # the caller's features
        self.patch_embed = nn.Conv2d(1, cfg.d_patch, cfg.patch, cfg.patch, bias=cfg.patch_bias)
        self.hook_patches = HookPoint()
        self.ln_patches = LayerNorm(cfg.d_patch, EPS)
        is_wide = cfg.d_patch == cfg.d_model
        self.project = nn.Identity() if is_wide else nn.Linear(cfg.d_patch, cfg.d_model)

    @staticmethod
    def block_type(cfg: BeatsEncoderConfig) -> type[Block]:
        return DeepNormBlock

    def embed(
        self, features: Float[Tensor, "b mels frames"], valid: Bool[Tensor, "b t"] | None = None
    ) -> Float[Tensor, "b t d"]:
        """The residual stream entering block 0; patches that are not valid are set to zero."""
        return super().embed(self.patches(features), valid)

    def patches(self, features: Float[Tensor, "b mels frames"]) -> Float[Tensor, "b t d"]:
        """Every patch as one vector."""
        mel = self.hook_mel(features.to(self.patch_embed.weight))
        patches = self.patch_embed(rearrange(mel, "b mel frame -> b 1 frame mel"))
        patches = self.hook_patches(rearrange(patches, "b d column row -> b (column row) d"))
        return self.project(self.ln_patches(patches))


class BeatsClassifier(nn.Module):
    """Logits of classes of every patch, and their mean over a clip."""

    def __init__(self, cfg: BeatsEncoderConfig):
        super().__init__()
        self.unembed = nn.Linear(cfg.d_model, cfg.need_d_vocab)
        self.hook_patch_logits = HookPoint()

    def forward(
        self, hidden: Float[Tensor, "b t d"], valid: Bool[Tensor, "b t"] | None
    ) -> Float[Tensor, "b v"]:
        logits = self.hook_patch_logits(self.unembed(hidden))
        if valid is None:
            return logits.mean(1)
        return logits.masked_fill(~valid[..., None], 0).sum(1) / valid.sum(1, keepdim=True)


# -------------------------------------------------------------------------------- model

_TABLE = "self_attn.relative_attention_bias.weight"  # of a layer; all share it


class HookedBeats(EncoderOutput, Ear, HookedAudioTransformer):
    """BEATs with every activation hooked, bare or with its head for the classes of AudioSet.

    Classes do not exclude each other: ``logits.sigmoid()`` are their probabilities.
    """

    cfg: BeatsConfig
    encoder: BeatsEncoder
    lends_encoder = True
    features_key = "source"  # as the published model calls it
    mixes_lengths = "padding is heard in its last patches and by its positional convolution"
    weight_names: ClassVar = {
        "patch_embedding": "encoder.patch_embed",
        "layer_norm": "encoder.ln_patches",
        "post_extract_proj": "encoder.project",
        "encoder.pos_conv.0": "encoder.positions.convs.0",
        "encoder.layer_norm": "encoder.ln_embed",
        f"encoder.layers.0.{_TABLE}": "encoder.distance_embed.weight",
        f"encoder.layers.{{l}}.{_TABLE}": None,  # the same once more
        "encoder.layers.{l}.self_attn.grep_a": "encoder.blocks.{l}.attn.gru_rel_pos_const",
        "encoder.layers.{l}.self_attn.grep_linear": "encoder.blocks.{l}.attn.gru_rel_pos_linear",
        "encoder.layers.{l}.self_attn.q_proj": "encoder.blocks.{l}.attn.q_proj",
        "encoder.layers.{l}.self_attn.k_proj": "encoder.blocks.{l}.attn.k_proj",
        "encoder.layers.{l}.self_attn.v_proj": "encoder.blocks.{l}.attn.v_proj",
        "encoder.layers.{l}.self_attn.out_proj": "encoder.blocks.{l}.attn.o_proj",
        "encoder.layers.{l}.self_attn_layer_norm": "encoder.blocks.{l}.ln1",
        "encoder.layers.{l}.fc1": "encoder.blocks.{l}.mlp.fc_in",
        "encoder.layers.{l}.fc2": "encoder.blocks.{l}.mlp.fc_out",
        "encoder.layers.{l}.final_layer_norm": "encoder.blocks.{l}.ln2",
        "predictor": "classifier.unembed",
    }

    def __init__(self, cfg: BeatsConfig):
        super().__init__(cfg)
        self.encoder = BeatsEncoder(cfg.encoder)
        if cfg.output_kind is not None:
            self.classifier = BeatsClassifier(cfg.encoder)
        self.setup()

    # ---------------------------------------------------------------- loading

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> HookedBeats:
        """Load a published checkpoint: a ``.pt`` file with ``cfg`` and ``model``.

        Args:
            dtype: of the weights; None keeps the checkpoint's.
            device: where to put the model; None is the CPU.

        Raises:
            LoadingError: no such file, or one that is no checkpoint of BEATs; a shape that is not
                implemented; missing or unexpected weights.
        """
        with told_of(path):
            model = cls.from_published(read_pickle(path), str(path))
        return model.to(device=device, dtype=dtype)

    @classmethod
    def from_published(cls, checkpoint: Mapping[str, Any], name: str = "beats") -> HookedBeats:
        """The model of what a published checkpoint holds; the weights are shared, not copied.

        Raises:
            LoadingError: as `from_checkpoint`.
        """
        missing = [key for key in ("cfg", "model") if key not in checkpoint]
        if missing:
            raise LoadingError(
                f"{name} holds no {' and no '.join(missing)}: BEATs's checkpoints (not its "
                "tokenizers) hold both"
            )
        cfg = beats_config(checkpoint["cfg"], checkpoint.get("label_dict"), name)
        with torch.device("meta"):
            model = cls(cfg)
        check_finite(checkpoint["model"], name)
        fill(model, renamed(cls.adapt_state(checkpoint["model"], cfg), cls.weight_names))
        return model.eval()

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> AudioConfig:
        """Not to be had.

        Raises:
            LoadingError: always; transformers has no BEATs.
        """
        raise LoadingError(
            "transformers has no BEATs: load a published checkpoint, "
            "HookedBeats.from_checkpoint(path)"
        )

    @classmethod
    def adapt_state(cls, state: Mapping[str, Tensor], cfg: AudioConfig) -> dict[str, Tensor]:
        """The published tensors.

        Raises:
            LoadingError: if layers hold different tables of biases.
        """
        found = with_gains(dict(state), "encoder.pos_conv.0")
        tables = {key: table for key, table in found.items() if key.endswith(_TABLE)}
        for key, table in tables.items():
            if not torch.equal(table, next(iter(tables.values()))):
                raise LoadingError(f"{key} differs from that of other layers, and all share one")
        return found

    # ---------------------------------------------------------------- forward

    def enter_encoder(self, inputs: AudioInputs) -> Float[Tensor, "b t d"]:
        """Patches with positions added."""
        return self.encoder.embed(inputs.features, self._valid(inputs))

    def encoder_length(self, inputs: AudioInputs) -> int:
        """Patches of the longest clip."""
        return self.cfg.encoder.n_patches(inputs.features.shape[-1])

    def encoder_context(self, inputs: AudioInputs) -> Context:
        """Padding is not attended to, where a mask says what padding is."""
        valid, length = self._valid(inputs), self.encoder_length(inputs)
        return Context(
            allowed=None if valid is None else padding_mask(valid, length, causal=False),
            position_bias=self.encoder.position_bias(length),
        )

    def read_out(self, hidden: Float[Tensor, "b t d"], inputs: AudioInputs) -> Tensor:
        """Logits of the classes, ``b labels``, or the hidden states of a bare encoder."""
        return (
            hidden if self.cfg.output_kind is None else self.classifier(hidden, self._valid(inputs))
        )

    def _valid(self, inputs: AudioInputs) -> Bool[Tensor, "b t"] | None:
        """Which patches count; None where all do.

        As published: mel frames are dealt out to patches in order, so many to each, and a patch of
        which all are padding does not count.
        """
        if inputs.feature_mask is None or inputs.feature_mask.all():
            return None
        length = self.encoder_length(inputs)
        per_patch = inputs.features.shape[-1] // length
        first = per_patch * torch.arange(length, device=inputs.device)
        return first < inputs.feature_mask.sum(1, keepdim=True)

    def loss(self, logits: Float[Tensor, "b labels"], inputs: AudioInputs) -> Float[Tensor, ""]:
        """Binary cross-entropy, averaged over clips and classes.

        Raises:
            InputError: inputs without labels.
        """
        if inputs.labels is None:
            raise InputError("the loss compares with labels: prepare(audio, text=...) gives them")
        row, column = (inputs.labels != IGNORED).nonzero(as_tuple=True)
        wanted = torch.zeros_like(logits)
        wanted[row, inputs.labels[row, column]] = 1
        return F.binary_cross_entropy_with_logits(logits, wanted)

    # ---------------------------------------------------------------- inputs

    def check_features(self, features: Tensor) -> None:
        """Raise unless the features are log-mel frames that give a patch.

        Raises:
            InputError: naming the shape.
        """
        least = self.cfg.encoder.patch
        if features.ndim != 3 or features.shape[1] != N_MELS or features.shape[2] < least:
            raise InputError(
                f"features must be (clips, {N_MELS} mel bins, frames), {least} frames or more; got "
                f"{tuple(features.shape)}"
            )

    def inputs_from_mapping(self, mapping: Mapping[str, Any]) -> AudioInputs:
        """Inputs from what the published model takes, and ``labels``.

        ``source`` is waveforms at 16 kHz (``b samples``), ``padding_mask`` True at padding.
        """
        given = self._mapping_tensors(mapping, ("source", "padding_mask", "labels"))
        waves, is_padding, labels = given["source"], given.get("padding_mask"), given.get("labels")
        lengths = [waves.shape[-1]] * len(waves)
        if is_padding is not None:
            lengths = self._lengths(is_padding.bool(), waves)
        if labels is not None:
            labels = labels.reshape(len(waves), -1).long()
            self.check_tokens(labels[labels != IGNORED])
        return self._inputs(self._heard(waves, lengths), labels)

    @staticmethod
    def _lengths(is_padding: Bool[Tensor, "b samples"], waves: Tensor) -> list[int]:
        """Samples of every clip."""
        if is_padding.shape != waves.shape or (is_padding[:, :-1] & ~is_padding[:, 1:]).any():
            raise InputError("padding_mask must be True at the padding of each clip, which is last")
        return (~is_padding).sum(-1).tolist()

    def _heard(
        self, waves: Float[Tensor, "b samples"], lengths: list[int]
    ) -> dict[str, Float[Tensor, "b mels frames"] | Bool[Tensor, "b frames"]]:
        """Features of padded clips that hold so many samples, and the mask of their frames."""
        least = (self.cfg.encoder.patch - 1) * HOP + WINDOW
        if min(lengths) < least:
            raise InputError(
                f"a clip of {min(lengths)} samples: a patch reads {least} "
                f"({1000 * least / self.cfg.sampling_rate:g} ms)"
            )
        mask = heard_frames(lengths, waves.shape[-1])
        return {"features": log_mel(waves), "mask": mask.to(waves.device)}

    def _inputs(self, heard: dict[str, Tensor], labels: Tensor | None, **made: Any) -> AudioInputs:
        n_clips, mask = len(heard["features"]), heard["mask"]
        return AudioInputs(
            features=heard["features"],
            tokens=torch.zeros(n_clips, 0, dtype=torch.long, device=mask.device),
            clips_per_row=(1,) * n_clips,
            feature_mask=None if mask.all() else mask,
            labels=labels,
            **made,
        )

    def extract_features(self, clips: list[Float[Any, " _"]]) -> dict[str, Tensor]:
        """Log-mel features of clips, padded with silence to the longest, and the mask of frames."""
        waves = pad_sequence([torch.as_tensor(clip) for clip in clips], batch_first=True)
        return self._heard(waves.to(self.device), [len(clip) for clip in clips])

    def prepare(self, audio: Any, text: Any = None, sampling_rate: Rates = None) -> AudioInputs:
        """Inputs from clips, one per prompt.

        Args:
            audio: a path, array, tensor or mapping (see `audio.load`), or a list of them (a
                batch is a list, not an array).
            text: what the loss compares with: the class of each clip, by name, or the ids of its
                classes.
            sampling_rate: of arrays, in Hz, or one per clip; files and mappings know their own.

        Raises:
            AudioError: unusable audio.
            InputError: no clip, or one shorter than a patch.
            TokenError: no such class.
        """
        clips = self.load_clips(audio, sampling_rate)
        self.tell_of_lengths([len(clip) for clip in clips])
        texts = texts_per_clip(text, len(clips))
        return self._inputs(
            self.extract_features(clips),
            None if text is None else self.labels_of(texts),
            audio=clips,
            text=None if text is None else texts,
            sampling_rate=self.cfg.sampling_rate,
            remake=self.prepare,
        )

    # ---------------------------------------------------------------- time and frequency

    def frame_count(self, n_valid: int) -> int:
        """Patches of so many mel frames."""
        return self.cfg.encoder.n_patches(n_valid)

    def frame_seconds(self, count: int) -> Float[Tensor, " t"]:
        """Centres of the first so many patches: 0.16 c + 0.0875 in column c (patches of 16)."""
        cfg = self.cfg.encoder
        column = torch.arange(count, dtype=torch.float64) // cfg.n_rows
        first = column * cfg.patch * HOP  # sample
        return (first + ((cfg.patch - 1) * HOP + WINDOW) / 2) / self.cfg.sampling_rate

    def frame_hertz(self, count: int) -> Float[Tensor, "t 3"]:
        """Lowest, middle and highest frequency that the first so many patches read, in Hz."""
        patch = self.cfg.encoder.patch
        column = PatchGrid(patch, patch, patch, n_mels=N_MELS, n_frames=patch)
        n_columns = -(-count // column.n_rows)
        return column.hertz(self.cfg.sampling_rate).repeat(n_columns, 1)[:count]

    def encoder_track(self, length: int, n_valid: int, clip: int, start_s: float | int) -> Track:
        """As in every model, with the frequencies of patches; of clips of two columns or more."""
        cfg = self.cfg.encoder
        return self._track(length, -(-n_valid // (cfg.patch // cfg.n_rows)), clip, start_s)

    def _track(self, length: int, n_heard: int, clip: int, start_s: float | int) -> Track:
        track = Track.of_segment(self.frame_seconds(length), min(length, n_heard), clip, start_s)
        return replace(track, hertz=self.frame_hertz(length))

    def timeline(self, inputs: AudioInputs | Mapping[str, Any]) -> Timeline:
        """A patch has the centre of its mel frames, and the frequencies of its mel filters."""
        inputs = self.as_inputs(inputs)
        length, valid = self.encoder_length(inputs), self._valid(inputs)
        counts = [length] * len(inputs) if valid is None else valid.sum(1).tolist()
        samples = [(inputs.n_valid(clip) - 1) * HOP + WINDOW for clip in range(len(inputs))]
        return Timeline(
            [
                Row({"encoder": [self._track(length, n, 0, 0.0)]}, [end / self.cfg.sampling_rate])
                for n, end in zip(counts, samples, strict=True)
            ]
        )
