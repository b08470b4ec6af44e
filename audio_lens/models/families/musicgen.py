"""MusicGen (Copet et al. 2023, arXiv:2306.05284): text in, codes of music out.

T5 reads the text; a decoder reads it by cross-attention and, position by position, the sum of the
codes of all codebooks of EnCodec. Codebook ``k`` lags ``k`` positions behind the first (in stereo,
where the codebooks of both channels alternate, ``k // 2``). The logits of all codebooks stand side
by side: ``model.stream(logits, "audio.2")`` cuts those of one out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, SupportsIndex

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from audio_lens.audio import Rates
from audio_lens.hooks import HookPoint
from audio_lens.inputs import AudioInputs, InputError, padded
from audio_lens.models.base import HookedAudioTransformer
from audio_lens.models.config import LoadingError, check_switches
from audio_lens.models.families.musicgen_config import MusicgenConfig, codec_config, decoder_config
from audio_lens.models.families.musicgen_decoding import MusicDecoding
from audio_lens.models.kinds.streams import CodecStack, CodecTime, CodeTables, delayed
from audio_lens.models.layers import Context, CrossAttentionBlock, KVCache, PartConfig, padding_mask
from audio_lens.models.mixins.vocabulary import TokenError
from audio_lens.models.parts.codecs import Speaking
from audio_lens.models.parts.connectors import LinearConnector
from audio_lens.models.parts.t5 import T5Encoder, t5_config, t5_weight_names
from audio_lens.timeline import Row, Timeline, Track

_UNDERSTOOD = """
    vocab_size max_position_embeddings num_hidden_layers ffn_dim num_attention_heads
    activation_function hidden_size num_codebooks audio_channels initializer_factor is_decoder
    add_cross_attention
"""
_LAYER = "decoder.model.decoder.layers.{l}"
_BLOCK = {
    **{f"self_attn.{a}_proj": f"attn.{a}_proj" for a in "qkv"},
    "self_attn.out_proj": "attn.o_proj",
    "self_attn_layer_norm": "ln1",
    **{f"encoder_attn.{a}_proj": f"cross_attn.{a}_proj" for a in "qkv"},
    "encoder_attn.out_proj": "cross_attn.o_proj",
    "encoder_attn_layer_norm": "ln_cross",
    "fc1": "mlp.fc_in",
    "fc2": "mlp.fc_out",
    "final_layer_norm": "ln2",
}


class MusicgenDecoder(CodecStack):
    """Codes of all codebooks summed, sinusoidal positions, and blocks that also read the text.

    The tables hold one code more than there are, for where no code has entered yet.
    """

    def __init__(self, cfg: PartConfig, n_codebooks: int, n_codes: int):
        super().__init__(cfg, CrossAttentionBlock, n_codebooks)
        self.code_embed = CodeTables(n_codebooks, n_codes + 1, cfg.d_model)
        self.hook_pos_embed = HookPoint()
        self.unembed = nn.Linear(cfg.d_model, cfg.need_d_vocab, bias=False)

    def code_vectors(self, codes: Int[Tensor, "b k t"]) -> list[Float[Tensor, "b t d"]]:
        return self.code_embed(codes)

    def embed(self, codes: Int[Tensor, "b k t"], first: int) -> Float[Tensor, "b t d"]:
        """The residual stream entering block 0, at positions from ``first`` on."""
        embed = self.hook_embed(self.summed_codes(codes))
        index = torch.arange(first, first + codes.shape[-1], device=codes.device)
        positions = sinusoids(index, self.cfg.d_model).to(embed.dtype)
        return embed + self.hook_pos_embed(positions.repeat(len(codes), 1, 1))


def sinusoids(positions: Int[Tensor, " t"], d_model: int) -> Float[Tensor, "t d"]:
    """Cosines, then sines, of positions; their wavelengths grow from 2 pi by up to 10,000 times."""
    half = d_model // 2
    turns = (torch.arange(half, device=positions.device) * (-math.log(10_000) / (half - 1))).exp()
    angles = positions.float()[:, None] * turns
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, d_model % 2))


class HookedMusicgen(MusicDecoding, Speaking, CodecTime, HookedAudioTransformer):
    """MusicGen with every activation hooked, mono or stereo.

    `AudioInputs.features` are the ids of the text, `tokens` the codes of the first codebook as they
    enter, `further_tokens` (``b k t``) those of the others, of which some may lie ahead: since they
    lag, they enter while the first is already played on. A forward is one pass with the text;
    guidance (see `generate`) adds a second pass without it. Words have no time; a position of the
    decoder lies where the code of the first codebook does that *enters* there, see
    `stream_seconds`.
    """

    cfg: MusicgenConfig
    encoder: T5Encoder
    decoder: MusicgenDecoder
    model_types = ("musicgen",)
    hf_class = "MusicgenForConditionalGeneration"
    features_key = "input_ids"
    no_gradient_because = "its encoder reads text"
    codec_name = "audio_encoder"
    outdated_names = ("decoder.model.decoder.embed_positions.weights",)  # sinusoids
    weight_names: ClassVar = {
        **t5_weight_names("text_encoder", "encoder"),
        "enc_to_dec_proj": "connector.linear",
        "decoder.model.decoder.embed_tokens.{l}": "decoder.code_embed.{l}",
        **{f"{_LAYER}.{a}": f"decoder.blocks.{{l}}.{b}" for a, b in _BLOCK.items()},
        "decoder.model.decoder.layer_norm": "decoder.ln_final",
        "decoder.lm_heads": "decoder.unembed",  # all heads, one below the other
    }

    def __init__(self, cfg: MusicgenConfig):
        super().__init__(cfg)
        self.encoder = T5Encoder(cfg.encoder)
        if cfg.encoder.d_model != cfg.need_decoder.d_model:
            self.connector = LinearConnector(cfg.need_encoder.d_model, cfg.need_decoder.d_model)
        self.decoder = MusicgenDecoder(cfg.need_decoder, len(cfg.streams), cfg.codec.n_codes)
        self.setup()

    # ---------------------------------------------------------------- loading

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> MusicgenConfig:
        """The shape of a Hugging Face `MusicgenConfig`.

        Raises:
            LoadingError: for what is not implemented, or a codec that does not fit.
        """
        text, decoder = hf_config.text_encoder, hf_config.decoder
        if text.model_type != "t5":
            raise LoadingError(f"MusicGen that reads text with {text.model_type!r}, not 't5'")
        check_switches(decoder, _UNDERSTOOD.split())
        n_codes, n_codebooks = decoder.vocab_size, decoder.num_codebooks
        codec = codec_config(hf_config.audio_encoder, decoder)
        return MusicgenConfig(
            family="musicgen",
            model_name=hf_config.name_or_path,
            encoder=t5_config(text, hf_config.name_or_path),
            decoder=decoder_config(decoder, hf_config.name_or_path),
            n_mels=None,
            n_frames=None,
            sampling_rate=codec.sampling_rate,
            hop=codec.hop,
            output_kind="streams",
            streams=tuple((f"audio.{k}", n_codes) for k in range(n_codebooks)),
            codec=codec,
            n_channels=decoder.audio_channels,
        )

    @classmethod
    def adapt_state(cls, state: Mapping[str, Tensor], cfg: MusicgenConfig) -> dict[str, Tensor]:
        """The tensors without those of the codec, the heads of all codebooks as one."""
        heads = [state[f"decoder.lm_heads.{k}.weight"] for k in range(len(cfg.streams))]
        apart = ("audio_encoder.", "decoder.lm_heads.")
        kept = {name: x for name, x in state.items() if not name.startswith(apart)}
        return {**kept, "decoder.lm_heads.weight": torch.cat(heads)}

    @property
    def n_spoken(self) -> int:
        """Codes of one channel per step."""
        return self.cfg.codec.n_codebooks

    def make_feature_extractor(self) -> Any:
        """The feature extractor that the configuration tells of."""
        return transformers.EncodecFeatureExtractor(sampling_rate=self.cfg.sampling_rate)

    # ---------------------------------------------------------------- forward

    def check_features(self, features: Tensor) -> None:
        """Raise unless these are ids of the text's tokens.

        Raises:
            InputError: saying what they should be.
        """
        n_words = self.cfg.encoder.need_d_vocab
        if features.ndim != 2 or features.is_floating_point() or not features.shape[1]:
            raise InputError(
                f"the text is token ids (prompts, words), got {tuple(features.shape)} of "
                f"{features.dtype}"
            )
        unknown = features[(features < 0) | (features >= n_words)]
        if len(unknown):
            raise InputError(f"no word {unknown[0].item()}: the text's vocabulary has {n_words}")

    def encoder_length(self, inputs: AudioInputs) -> int:
        """Words of the longest text."""
        return inputs.features.shape[1]

    def encoder_context(self, inputs: AudioInputs) -> Context:
        """Padding is masked, distances are biased."""
        return Context(
            allowed=_words_allowed(inputs),
            position_bias=self.encoder.position_bias(self.encoder_length(inputs)),
        )

    def send(self, resid: Float[Tensor, "b s d"]) -> Float[Tensor, "b s d_out"]:
        """The encoder's output, as wide as the decoder."""
        out = self.encoder.finish(resid)
        return self.connector(out) if hasattr(self, "connector") else out

    def send_rows(
        self,
        resid: Float[Tensor, "rows s d"],
        inputs: AudioInputs,
        segment: Int[Tensor, " rows"] | None = None,
    ) -> Float[Tensor, "rows s d_out"]:
        """The same of some of the texts, with nothing where they are padded."""
        sent, words = self.send(resid), inputs.feature_mask
        if words is None:
            return sent
        return sent * (words if segment is None else words[segment])[..., None]

    def decoder_context(
        self, inputs: AudioInputs, encoded: Tensor | None, past: KVCache | None = None
    ) -> Context:
        """Masks, and the text as memory."""
        return Context(
            allowed=self.decoder_mask(inputs, past),
            memory=encoded,
            memory_allowed=_words_allowed(inputs),
            past=past,
        )

    def enter_decoder(
        self, inputs: AudioInputs, encoded: Tensor | None, past: KVCache | None = None
    ) -> Float[Tensor, "b t d"]:
        """Embedded codes; the text is read later, by cross-attention."""
        return self.decoder.embed(self.codes_of(inputs), past.length if past is not None else 0)

    def codes_of(self, inputs: AudioInputs) -> Int[Tensor, "b k t"]:
        """The codes of all codebooks as they enter.

        Raises:
            InputError: if there are not as many codebooks as the model has.
        """
        first = inputs.tokens[:, None]
        others = first[:, :0] if inputs.further_tokens is None else inputs.further_tokens
        codes = torch.cat([first, others[..., : first.shape[-1]]], dim=1)
        if codes.shape[1] != len(self.cfg.streams):
            raise InputError(
                f"codes of {codes.shape[1]} codebooks were given, the model has "
                f"{len(self.cfg.streams)}: tokens are those of the first, streams the others"
            )
        return codes

    def loss(self, logits: Float[Tensor, "b t v"], inputs: AudioInputs) -> Float[Tensor, ""]:
        """Cross-entropy of the codes that enter next: the mean of the codebooks' means.

        Raises:
            InputError: if no code enters behind the first position.
        """
        codes, n_codebooks = self.codes_of(inputs), len(self.cfg.streams)
        follows = inputs.attended[:, :-1] & inputs.attended[:, 1:]
        targets = codes[..., 1:].masked_fill(~follows[:, None], self.initial_code)
        each = rearrange(logits[:, :-1], "b t (k v) -> k (b t) v", k=n_codebooks)
        losses = [
            F.cross_entropy(of_book, target.flatten(), ignore_index=self.initial_code)
            for of_book, target in zip(each, targets.unbind(1), strict=True)
            if (target != self.initial_code).any()
        ]
        if not losses:
            raise InputError("no code to predict: the loss needs codes behind the first position")
        return torch.stack(losses).mean()

    # ---------------------------------------------------------------- inputs

    def inputs_from_mapping(self, mapping: Mapping[str, Any]) -> AudioInputs:
        """Inputs from what `MusicgenProcessor` returns, or Hugging Face's model takes.

        ``decoder_input_ids`` (``(b k) t``) are the codes as they enter: delayed, behind an initial
        one. ``input_values`` is audio to continue, encoded and delayed here as ``generate`` of
        transformers does. With neither, the decoder is about to begin.

        Raises:
            InputError: without text, or codes and audio that do not fit it.
        """
        known = (
            "input_ids",
            "attention_mask",
            "decoder_input_ids",
            "decoder_attention_mask",
            "input_values",
            "padding_mask",
        )
        if mapping.get("input_ids") is None:
            raise InputError("inputs hold no input_ids: MusicGen plays what a text says")
        given = self._mapping_tensors(mapping, known)
        words, mask = given["input_ids"], given.get("attention_mask")
        seen = given.get("decoder_attention_mask")
        codes, n_positions = self._codes_given(given, len(words))
        return self._assembled(
            words,
            None if mask is None else mask.bool(),
            codes,
            n_positions,
            attention_mask=None if seen is None else seen.bool(),
        )

    def _codes_given(
        self, given: Mapping[str, Tensor], n_rows: int
    ) -> tuple[Int[Tensor, "b k ahead"], int]:
        """The codes that a processor's mapping tells of as they enter, and their positions."""
        codes, audio, heard = (
            given.get(key) for key in ("decoder_input_ids", "input_values", "padding_mask")
        )
        if codes is not None and audio is not None:
            raise InputError("decoder_input_ids are the codes of the audio: not input_values too")
        if audio is not None:
            if heard is not None and not heard.all():
                raise InputError("clips of unequal length cannot be continued together")
            return self._entering(audio.flatten(0, -2) if audio.shape[-2] == 1 else audio)
        if codes is None:
            return self._beginning(n_rows)
        n_codebooks = len(self.cfg.streams)
        if codes.ndim != 2 or len(codes) != n_rows * n_codebooks:
            raise InputError(
                f"decoder_input_ids are ({n_rows} texts x {n_codebooks} codebooks, positions), got "
                f"{tuple(codes.shape)}"
            )
        return rearrange(codes, "(b k) t -> b k t", k=n_codebooks), codes.shape[1]

    def _assembled(
        self,
        words: Tensor,
        mask: Tensor | None,
        codes: Int[Tensor, "b k ahead"],
        n_positions: int,
        **others: Any,
    ) -> AudioInputs:
        """Inputs of texts, and of codes as they enter, of which some may lie ahead."""
        self.check_features(words)
        if mask is not None and mask.shape != words.shape:
            raise InputError(f"the text is {tuple(words.shape)}, its mask {tuple(mask.shape)}")
        self.check_codes(codes[..., :n_positions])
        if len(codes) != len(words):
            raise InputError(f"{len(words)} texts need as many clips, got {len(codes)}")
        return AudioInputs(
            features=words,
            tokens=codes[:, 0, :n_positions],
            further_tokens=codes[:, 1:],
            clips_per_row=(1,) * len(words),
            feature_mask=mask,
            sampling_rate=self.cfg.sampling_rate,
            **others,
        )

    def check_codes(self, codes: Tensor) -> None:
        """Raise unless every code is in its codebook, or the initial one.

        Raises:
            InputError: naming the first that is not.
        """
        unknown = codes[(codes < 0) | (codes > self.initial_code)]
        if len(unknown):
            raise InputError(
                f"no code {unknown[0].item()}: codebooks have {self.initial_code} entries, and "
                f"{self.initial_code} stands where none has entered yet"
            )

    def prepare(
        self, audio: Any = None, text: Any = None, sampling_rate: Rates = None
    ) -> AudioInputs:
        """Inputs from texts and, if given, the music they go on from.

        Args:
            audio: a path, array or tensor (mono, or mixed to it) or a list of them, equally long;
                None begins.
            text: what to play, or its token ids, or a list of either; None says nothing, which is
                what guidance compares with.
            sampling_rate: of arrays, in Hz, or one per clip; files and mappings know their own.

        Raises:
            AudioError: unusable audio.
            InputError: as many clips as texts are needed, of equal length.
            TokenError: text without a tokenizer.
        """
        begins = audio is None or (isinstance(audio, (list, tuple)) and not audio)
        clips = [] if begins else self.load_clips(audio, sampling_rate)
        is_many = isinstance(text, list | tuple) and not (text and isinstance(text[0], int))
        texts = list(text) if is_many else [text] * max(1, len(clips))
        if not texts or (clips and len(clips) != len(texts)):
            raise InputError(f"{len(texts)} texts need as many clips (or none), got {len(clips)}")
        if len({len(clip) for clip in clips}) > 1:
            raise InputError("clips of unequal length cannot be continued together: cut them")
        written = [self._words_of(text) for text in texts]
        words, mask = padded([own or [0] for own in written], 0, self.device, left=False)
        mask &= torch.tensor([[bool(own)] for own in written], device=self.device)
        heard = torch.tensor(np.stack(clips)) if clips else None
        codes = self._beginning(len(texts)) if heard is None else self._entering(heard)
        return self._assembled(
            words,
            None if mask.all() else mask,
            *codes,
            audio=clips or None,
            text=written,
            remake=self._remade,
        )

    def _remade(self, audio: Any, text: Any, sampling_rate: int | None) -> AudioInputs:
        """`prepare` for counterfactual pairs, which give prompts without a clip as empty lists."""
        is_silent = isinstance(audio, list) and not any(len(clip) for clip in audio)
        return self.prepare(None if is_silent else audio, text, sampling_rate)

    def _words_of(self, text: Any) -> list[int]:
        if text is None:
            return []
        if isinstance(text, str):
            return list(self.need_tokenizer("text").encode(text))
        return [int(token) for token in text]

    def _beginning(self, n_rows: int) -> tuple[Int[Tensor, "b k 1"], int]:
        """The initial codes, at one position."""
        shape = (n_rows, len(self.cfg.streams), 1)
        return torch.full(shape, self.initial_code, device=self.device), 1

    def _entering(
        self, audio: Float[Tensor, "b *c samples"]
    ) -> tuple[Int[Tensor, "b k ahead"], int]:
        """The codes of audio as they enter, and at how many positions; others lie ahead.

        Mono serves both channels of a stereo model.
        """
        channels = audio[:, None] if audio.ndim == 2 else audio
        n_channels = self.cfg.n_channels
        if channels.shape[1] not in (1, n_channels):
            raise InputError(f"{channels.shape[1]} channels of audio, the model has {n_channels}")
        codes = [self.codec.encode(own) for own in channels.unbind(1)]
        codes = codes if len(codes) == n_channels else codes * n_channels
        together = rearrange(codes, "c b k t -> b (k c) t").to(self.device)
        held = delayed(together, self.cfg.delays, self.initial_code)
        return held, 1 + together.shape[-1]

    def to_single_token(self, text: str | SupportsIndex) -> int:
        """A code by its number; words are read, not written.

        Raises:
            TokenError: for a word, or a number outside the logits.
        """
        if isinstance(text, str):
            raise TokenError(f"MusicGen writes codes, and {text!r} is none: say its number")
        return super().to_single_token(text)

    # ---------------------------------------------------------------- time

    @property
    def initial_code(self) -> int:
        """The code that stands where no code has entered yet."""
        return self.cfg.codec.n_codes

    @property
    def lags_s(self) -> dict[str, float]:
        """By stream, how many seconds it lies behind the first in what enters at a position."""
        names = (name for name, _ in self.cfg.streams)
        delays = zip(names, self.cfg.delays, strict=True)
        return {name: delay * self.cfg.step_s for name, delay in delays}

    def first_codes(self, inputs: AudioInputs) -> Int[Tensor, "b t"]:
        """The codes of the first codebook, which are the tokens."""
        return inputs.tokens

    def timeline(self, inputs: AudioInputs | Mapping[str, Any]) -> Timeline:
        """Positions of the decoder by the codes of the first codebook; words have no time."""
        inputs = self.as_inputs(inputs)
        words, mask = inputs.features, inputs.feature_mask
        valid = torch.ones_like(words, dtype=torch.bool) if mask is None else mask
        heard = ("encoder", "connector") if hasattr(self, "connector") else ("encoder",)
        return Timeline(
            [
                Row(
                    {**{part: [Track.of_tokens(own)] for part in heard}, **row.tracks},
                    row.durations_s,
                )
                for row, own in zip(super().timeline(inputs).rows, valid.cpu(), strict=True)
            ]
        )


def _words_allowed(inputs: AudioInputs) -> Bool[Tensor, "b 1 1 s"] | None:
    """The words there are to read; None where none is padding."""
    words = inputs.feature_mask
    if words is None or words.all():
        return None
    return padding_mask(words, n_queries=1, causal=False)
