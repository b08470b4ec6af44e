"""The shape of MusicGen, and how a Hugging Face config tells it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from audio_lens.models.config import AudioConfig, LoadingError
from audio_lens.models.layers import PartConfig
from audio_lens.models.parts.codecs import CODECS, CodecConfig
from audio_lens.models.parts.t5 import T5Config


@dataclass(kw_only=True)
class MusicgenConfig(AudioConfig):
    """Shape of a MusicGen.

    Attributes:
        codec: of the codec it speaks through.
        n_channels: 1, or 2 for stereo, where the codebooks of both channels alternate.
    """

    encoder: T5Config
    codec: CodecConfig
    n_channels: int = 1

    @property
    def delays(self) -> tuple[int, ...]:
        """By how many positions each codebook lags."""
        return tuple(k // self.n_channels for k in range(len(self.streams)))


def decoder_config(hf_config: Any, model_name: str) -> PartConfig:
    """The shape of the decoder of a Hugging Face `MusicgenDecoderConfig`."""
    return PartConfig(
        n_layers=hf_config.num_hidden_layers,
        n_heads=hf_config.num_attention_heads,
        n_key_value_heads=hf_config.num_attention_heads,
        d_model=hf_config.hidden_size,
        d_head=hf_config.hidden_size // hf_config.num_attention_heads,
        d_mlp=hf_config.ffn_dim,
        d_vocab=hf_config.num_codebooks * hf_config.vocab_size,
        n_ctx=None,
        act_fn=hf_config.activation_function,
        eps=1e-5,
        normalization_type="LN",
        attn_biases=(),
        mlp_bias=False,
        causal=True,
        model_name=model_name,
    )


def codec_config(hf_codec: Any, hf_decoder: Any) -> CodecConfig:
    """The shape of the codec, of as many codebooks per channel as the decoder writes.

    Raises:
        LoadingError: if the two do not fit, or the decoder's initial code is of another kind.
    """
    if hf_codec.model_type not in CODECS:
        raise LoadingError(f"MusicGen that speaks through {hf_codec.model_type!r}")
    n_codes, n_codebooks = hf_decoder.vocab_size, hf_decoder.num_codebooks
    if {hf_decoder.pad_token_id, hf_decoder.bos_token_id} != {n_codes}:
        raise LoadingError(f"the initial code is {n_codes} (vocab_size), for bos and padding alike")
    codec = CODECS[hf_codec.model_type].config_from_hf(hf_codec)
    if codec.n_codes != n_codes:
        raise LoadingError(f"the decoder writes {n_codes} codes, the codec has {codec.n_codes}")
    return codec.coarsest(n_codebooks // hf_decoder.audio_channels)
