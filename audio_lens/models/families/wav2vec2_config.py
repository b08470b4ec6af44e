"""The shape of self-supervised speech encoders, and how a Hugging Face config tells it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from audio_lens.models.config import LoadingError, check_switches, declared
from audio_lens.models.kinds.encoder_only import CTCConfig, EncoderOnlyConfig
from audio_lens.models.layers import PartConfig, needed


@dataclass(frozen=True)
class StemConfig:
    """Convolutions from samples to frames, one entry per layer, and the projection behind them.

    Attributes:
        norm: "group" normalises the first layer over the whole length of each channel (so padding
            changes every frame), "layer" every layer frame by frame.
        normed: whether a layer norm stands before the projection.
    """

    dims: tuple[int, ...]
    kernels: tuple[int, ...]
    strides: tuple[int, ...]
    norm: Literal["group", "layer"]
    bias: bool
    act_fn: str
    normed: bool
    eps: float

    @property
    def stride(self) -> int:
        """Samples from one frame to the next."""
        return math.prod(self.strides)

    @property
    def reach(self) -> int:
        """Samples that one frame sees."""
        steps = [math.prod(self.strides[:layer]) for layer in range(len(self.strides))]
        return 1 + sum((k - 1) * step for k, step in zip(self.kernels, steps, strict=True))

    def n_frames(self, n_samples: int) -> int:
        """Frames made of so many samples."""
        return max((n_samples - self.reach) // self.stride + 1, 0)

    def centre(self, frame: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """The middle of what a frame sees, in samples."""
        return self.stride * frame + (self.reach - 1) / 2


@dataclass
class SpeechEncoderConfig(PartConfig):
    """The blocks of a self-supervised speech encoder, and its convolution over positions.

    Attributes:
        position_kernel, position_groups: shape of the positional convolution.
        n_position_convs: how many of them follow each other, each with a norm; None for a
            single one without.
        position_batch_norm: whether a batch norm stands before it.
        d_adapter: width of the bottleneck behind every block (MMS); None for none.
        n_buckets, max_distance: of the relative position bias (WavLM); None for none.
    """

    position_kernel: int = 128
    position_groups: int = 16
    n_position_convs: int | None = None
    position_batch_norm: bool = False
    position_act_fn: str = "gelu"
    d_adapter: int | None = None
    n_buckets: int | None = None
    max_distance: int | None = None

    @property
    def has_weight_norm(self) -> bool:
        """Whether the convolution over positions has weight norm: a single one without a norm."""
        return self.n_position_convs is None and not self.position_batch_norm

    @property
    def need_distances(self) -> tuple[int, int]:
        """Buckets, and the largest distance, of the relative position bias.

        Raises:
            InputError: where there is none.
        """
        none = "these blocks have no relative position bias: n_buckets or max_distance is None"
        return needed(self.n_buckets, none), needed(self.max_distance, none)


@dataclass(kw_only=True)
class SpeechConfig(EncoderOnlyConfig):
    """Shape of a self-supervised speech model.

    Attributes:
        d_classifier: width in which its classifier pools, if it has one.
    """

    encoder: SpeechEncoderConfig
    stem: StemConfig
    d_classifier: int | None = None


# -------------------------------------------------------------------------------- from Hugging Face

_HEADS = {
    "ForCTC": "ctc",
    "ForSequenceClassification": "classes",
    "ForPreTraining": None,
    "Model": None,
}
_UNDERSTOOD = """
    vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act
    layer_norm_eps feat_extract_norm feat_extract_activation conv_dim conv_stride conv_kernel
    conv_bias num_feat_extract_layers num_conv_pos_embeddings num_conv_pos_embedding_groups
    conv_pos_kernel_size conv_pos_batch_norm do_stable_layer_norm feat_proj_layer_norm
    adapter_attn_dim num_buckets max_bucket_distance ctc_loss_reduction ctc_zero_infinity
    classifier_proj_size
"""
_OF_PRETRAINING = """
    feat_quantizer_dropout num_codevectors_per_group num_codevector_groups
    contrastive_logits_temperature num_negatives codevector_dim proj_codevector_dim
    diversity_loss_weight num_ctc_classes replace_prob num_clusters
"""
_OF_WHAT_IS_REFUSED = """
    tdnn_dim tdnn_kernel tdnn_dilation xvector_output_dim adapter_kernel_size adapter_stride
    num_adapter_layers output_hidden_size
"""
_KNOWN = {*_UNDERSTOOD.split(), *_OF_PRETRAINING.split(), *_OF_WHAT_IS_REFUSED.split()}


def speech_config(hf_config: Any) -> SpeechConfig:
    """The shape of a `Wav2Vec2Config` or of one like it.

    Raises:
        LoadingError: naming what is switched on and not implemented.
    """
    head = _head(hf_config)
    is_classifier = head == "classes"
    sums = () if is_classifier else ("use_weighted_layer_sum",)  # of what a classifier reads
    check_switches(hf_config, (*_KNOWN, *sums))
    sizes = {"ctc": hf_config.vocab_size, "classes": hf_config.num_labels, None: None}
    names = hf_config.id2label if is_classifier else {}
    return SpeechConfig(
        family=hf_config.model_type.replace("-", "_"),
        model_name=hf_config.name_or_path,
        encoder=replace(encoder_config(hf_config), d_vocab=sizes[head]),
        decoder=None,
        n_mels=None,
        n_frames=None,
        hop=1,
        output_kind=head,
        labels=tuple(names[i] for i in sorted(names)),
        stem=stem_config(hf_config),
        ctc=ctc_config(hf_config) if head == "ctc" else None,
        d_classifier=hf_config.classifier_proj_size if is_classifier else None,
    )


def _head(hf_config: Any) -> Literal["ctc", "classes"] | None:
    """The head of the Hugging Face class the configuration is of; none where it names no class."""
    name = (hf_config.architectures or ["Model"])[0]
    for ending, head in _HEADS.items():
        if name.endswith(ending):
            return head
    raise LoadingError(f"the head of {name} is not implemented; there are {', '.join(_HEADS)}")


def stem_config(hf_config: Any) -> StemConfig:
    """The shape of the convolutions on samples."""
    norm = declared(hf_config, "feat_extract_norm", "layer")  # data2vec has no switch
    if norm not in ("group", "layer"):
        raise LoadingError(f"feat_extract_norm={norm!r} is not implemented")
    return StemConfig(
        dims=tuple(hf_config.conv_dim),
        kernels=tuple(hf_config.conv_kernel),
        strides=tuple(hf_config.conv_stride),
        norm=norm,
        bias=hf_config.conv_bias,
        act_fn=hf_config.feat_extract_activation,
        normed=declared(hf_config, "feat_proj_layer_norm", True),
        eps=hf_config.layer_norm_eps,
    )


def encoder_config(hf_config: Any) -> SpeechEncoderConfig:
    """The shape of the blocks and of the convolution over positions."""
    is_pre_norm = declared(hf_config, "do_stable_layer_norm", False)
    stacked_kernel = declared(hf_config, "conv_pos_kernel_size", None)  # data2vec
    n_convs = hf_config.num_conv_pos_embeddings if stacked_kernel else None
    return SpeechEncoderConfig(
        n_layers=hf_config.num_hidden_layers,
        n_heads=hf_config.num_attention_heads,
        n_key_value_heads=hf_config.num_attention_heads,
        d_model=hf_config.hidden_size,
        d_head=hf_config.hidden_size // hf_config.num_attention_heads,
        d_mlp=hf_config.intermediate_size,
        n_ctx=None,
        act_fn=hf_config.hidden_act,
        eps=hf_config.layer_norm_eps,
        normalization_type="LN",
        attn_biases=("q", "k", "v", "o"),
        final_norm=is_pre_norm,
        model_name=hf_config.name_or_path,
        position_kernel=stacked_kernel or hf_config.num_conv_pos_embeddings,
        position_groups=hf_config.num_conv_pos_embedding_groups,
        n_position_convs=n_convs,
        position_batch_norm=declared(hf_config, "conv_pos_batch_norm", False),
        position_act_fn=hf_config.feat_extract_activation,
        d_adapter=_adapter_width(hf_config) if is_pre_norm else None,
        n_buckets=declared(hf_config, "num_buckets", None),
        max_distance=declared(hf_config, "max_bucket_distance", None),
    )


def _adapter_width(hf_config: Any) -> int | None:
    """Width of the bottlenecks behind blocks, which all models but WavLM build if a config has it.

    Only the class of wav2vec 2.0's own configs declares it.
    """
    return None if hf_config.model_type == "wavlm" else getattr(hf_config, "adapter_attn_dim", None)


def ctc_config(hf_config: Any) -> CTCConfig:
    """How the CTC head is trained; the blank is the tokenizer's padding."""
    if hf_config.ctc_loss_reduction not in ("sum", "mean"):
        raise LoadingError(f"ctc_loss_reduction={hf_config.ctc_loss_reduction!r} is no one number")
    return CTCConfig(
        blank=hf_config.pad_token_id,
        reduction=hf_config.ctc_loss_reduction,
        zero_infinity=hf_config.ctc_zero_infinity,
    )
