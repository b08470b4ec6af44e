"""The shape of BEATs, and the features it hears: log-mel frames as Kaldi makes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from audio_lens.models.config import LoadingError
from audio_lens.models.families.audio_spectrogram_transformer import WINDOW
from audio_lens.models.families.wav2vec2 import EPS
from audio_lens.models.families.wav2vec2_config import SpeechEncoderConfig
from audio_lens.models.kinds.encoder_only import EncoderOnlyConfig
from audio_lens.models.mixins.features import filter_bank

N_MELS = 128
HOP = 160  # samples
FULL_SCALE = 2**15  # of Kaldi's samples, which are 16-bit integers
MEAN, DEVIATION = 15.41663, 6.55582  # of the features, over AudioSet


@dataclass
class BeatsEncoderConfig(SpeechEncoderConfig):
    """The blocks of a BEATs, and its patches.

    Attributes:
        patch: mel frames, and mel bins, of a patch.
        d_patch: width in which patches are normed.
        patch_bias: whether the map of a patch to that width has a bias.
        stream_multiplier: of the stream, wherever something is added to it.
    """

    patch: int = 16
    d_patch: int = 512
    patch_bias: bool = False
    stream_multiplier: float = 1.0

    @property
    def n_rows(self) -> int:
        """Patches on top of each other."""
        return N_MELS // self.patch

    def n_patches(self, n_frames: int) -> int:
        """Patches of so many mel frames; what is left over is not heard."""
        return n_frames // self.patch * self.n_rows


@dataclass(kw_only=True)
class BeatsConfig(EncoderOnlyConfig):
    """Shape of a BEATs."""

    encoder: BeatsEncoderConfig


# -------------------------------------------------------------------------------- features


def log_mel(waves: Float[Tensor, "b samples"]) -> Float[Tensor, "b mels frames"]:
    """Kaldi's log-mel features at 16 kHz, normalised as BEATs does.

    A frame reads 400 samples from every 160th on; the mean over AudioSet becomes 0, and two of its
    standard deviations 1. In float32 or better.
    """
    waves = waves.to(torch.promote_types(waves.dtype, torch.float32))
    window = torch.hann_window(WINDOW, periodic=False, dtype=waves.dtype).pow(0.85)  # Povey's
    levels = filter_bank(FULL_SCALE * waves, window.to(waves), N_MELS)
    return ((levels - MEAN) / (2 * DEVIATION)).transpose(-1, -2)


def frames_of(n_samples: int) -> int:
    """Mel frames of so many samples."""
    return max((n_samples - WINDOW) // HOP + 1, 0)


def heard_frames(lengths: list[int], longest: int) -> Bool[Tensor, "b frames"]:
    """Which mel frames count as audio, of clips padded to the longest (in samples).

    As published: samples are dealt out to frames in order, so many to each (a few more than lie
    between frames), and a frame of which all are padding does not count.
    """
    n_frames = frames_of(longest)
    first = longest // n_frames * torch.arange(n_frames)
    return first < torch.tensor(lengths)[:, None]


# -------------------------------------------------------------------------------- configuration


def beats_config(
    cfg: Mapping[str, Any], labels: Mapping[int, str] | None, name: str
) -> BeatsConfig:
    """The shape that the ``cfg`` of a published checkpoint tells.

    Args:
        labels: names of classes by their ids.

    Raises:
        LoadingError: a switch that is not implemented, or a size that is missing.
    """
    cfg = {**_USUAL, **cfg}
    other = [f"{key}={cfg[key]!r}" for key, known in _IMPLEMENTED.items() if cfg[key] not in known]
    if other:
        raise LoadingError(f"a BEATs with {', '.join(other)} is not implemented")
    n_layers, n_heads = cfg["encoder_layers"], cfg["encoder_attention_heads"]
    n_classes = cfg["predictor_class"] if cfg["finetuned_model"] else None
    encoder = BeatsEncoderConfig(
        n_layers=n_layers,
        n_heads=n_heads,
        n_key_value_heads=n_heads,
        d_model=cfg["encoder_embed_dim"],
        d_head=cfg["encoder_embed_dim"] // n_heads,
        d_mlp=cfg["encoder_ffn_embed_dim"],
        n_ctx=None,
        act_fn=cfg["activation_fn"],
        eps=EPS,
        normalization_type="LN",
        attn_biases=("q", "k", "v", "o"),
        final_norm=False,
        d_vocab=n_classes,
        model_name=name,
        position_kernel=cfg["conv_pos"],
        position_groups=cfg["conv_pos_groups"],
        n_buckets=cfg["num_buckets"],
        max_distance=cfg["max_distance"],
        patch=cfg["input_patch_size"],
        d_patch=cfg["embed_dim"],
        patch_bias=cfg["conv_bias"],
        stream_multiplier=(2 * n_layers) ** 0.25 if cfg["deep_norm"] else 1.0,
    )
    names = labels or {label: str(label) for label in range(n_classes or 0)}
    return BeatsConfig(
        family="beats",
        model_name=name,
        encoder=encoder,
        decoder=None,
        n_mels=N_MELS,
        n_frames=None,
        hop=HOP,
        output_kind=None if n_classes is None else "classes",
        labels=tuple(names[label] for label in range(n_classes or 0)),
    )


_IMPLEMENTED: dict[str, Sequence[Any]] = {
    "layer_norm_first": (False,),
    "relative_position_embedding": (True,),
    "gru_rel_pos": (True,),
    "activation_fn": ("gelu", "relu"),
    "input_patch_size": range(12, N_MELS + 1),  # smaller ones have no mask: rows of too many
}
_USUAL = {  # where a checkpoint's cfg is silent
    "input_patch_size": -1,
    "embed_dim": 512,
    "conv_bias": False,
    "encoder_layers": 12,
    "encoder_embed_dim": 768,
    "encoder_ffn_embed_dim": 3072,
    "encoder_attention_heads": 12,
    "activation_fn": "gelu",
    "layer_norm_first": False,
    "deep_norm": False,
    "conv_pos": 128,
    "conv_pos_groups": 16,
    "relative_position_embedding": False,
    "num_buckets": 320,
    "max_distance": 1280,
    "gru_rel_pos": False,
    "finetuned_model": False,
    "predictor_class": 527,
}
