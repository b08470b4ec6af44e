"""Kyutai's speech to text: Moshi's decoder on 32 codes a step, which writes along what is said.

At every step of 80 ms the decoder reads the sum of one text token and 32 codes, all of one table of
embeddings with a range of rows for each stream. The text lags: clips begin with silence and end
with some, and a word is written `audio_delay_seconds` after it is said; the feature extractor of a
checkpoint says how long these are.

The initial text token is the config's ``bos_token_id``, as in transformers. That of the released
config, 48000, lies outside of the text: its row is one of a codebook. Kyutai's own implementation
begins with the last of the text tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import transformers
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import GenerationConfig

from audio_lens.audio import Rates
from audio_lens.inputs import AudioInputs, InputError
from audio_lens.models.config import LoadingError, check_switches
from audio_lens.models.kinds.codec_lm import (
    CodecLMConfig,
    HookedCodecLM,
    MoshiStack,
    block_weight_names,
    decoder_config,
)
from audio_lens.models.kinds.streams import delayed
from audio_lens.models.mixins.settings import GreedyRun, Limit, checked_count

_UNDERSTOOD = """
    audio_bos_token_id audio_pad_token_id codebook_vocab_size codec_config ffn_dim frame_size
    head_dim hidden_act hidden_size max_position_embeddings num_attention_heads num_codebooks
    num_hidden_layers num_key_value_heads rms_norm_eps rope_parameters sliding_window vocab_size
"""


@dataclass(kw_only=True)
class KyutaiConfig(CodecLMConfig):
    """Shape of Kyutai's speech to text.

    Attributes:
        initial_text, initial_code: the tokens that stand where nothing was said yet.
        padding_code: what stands for no code, in any codebook; it is a row of the whole table.
    """

    initial_text: int
    initial_code: int
    padding_code: int


class KyutaiDecoder(MoshiStack):
    """A stack that reads text and codes from one table, ranges of rows one after the other."""

    def __init__(self, cfg: KyutaiConfig):
        n_tokens = cfg.n_texts + cfg.n_codebooks * cfg.n_codes + 1
        super().__init__(cfg.need_decoder, cfg.n_codebooks, n_tokens, cfg.n_texts)
        self.padding_code = cfg.padding_code
        self.first_rows = range(cfg.n_texts, n_tokens - 1, cfg.n_codes)

    def code_vectors(self, codes: Int[Tensor, "b k t"]) -> list[Float[Tensor, "b t d"]]:
        return [
            self.token_embed(self._rows(of_book, first))
            for of_book, first in zip(codes.unbind(1), self.first_rows, strict=True)
        ]

    def _rows(self, codes: Int[Tensor, "b t"], first: int) -> Int[Tensor, "b t"]:
        """The rows of the table that codes have; that for padding is the same in every codebook."""
        return torch.where(codes == self.padding_code, codes, codes + first)


class HookedKyutaiSTT(HookedCodecLM):
    """Kyutai's speech to text with every activation of its decoder hooked.

    Streams that enter are "audio.0" to "audio.31"; logits are those of the text. `stream_seconds`
    says which second of the clip a text token tells of.
    """

    cfg: KyutaiConfig
    decoder: KyutaiDecoder
    features_key = "audio_codes"
    model_types = ("kyutai_speech_to_text",)
    hf_class = "KyutaiSpeechToTextForConditionalGeneration"
    codec_name = "codec_model"
    weight_names: ClassVar = {
        "model.embed_tokens.embed_tokens": "decoder.token_embed",
        **block_weight_names("model", "decoder"),
        "model.norm": "decoder.ln_final",
        "lm_head": "decoder.unembed",
    }

    def __init__(self, cfg: KyutaiConfig):
        super().__init__(cfg)
        self.decoder = KyutaiDecoder(cfg)
        self.setup()

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> KyutaiConfig:
        """The shape of a `KyutaiSpeechToTextConfig` of transformers.

        Raises:
            LoadingError: for what is not implemented, or tokens that the table does not hold.
        """
        check_switches(hf_config, _UNDERSTOOD.split())
        if hf_config.tie_word_embeddings:
            raise LoadingError("a head tied to the table of all streams is not implemented")
        n_texts, codec = hf_config.vocab_size, hf_config.codec_config
        n_rows = n_texts + hf_config.num_codebooks * hf_config.codebook_vocab_size + 1
        initial = n_texts - 1 if hf_config.bos_token_id is None else hf_config.bos_token_id
        special = {
            "bos_token_id": (initial, n_rows),
            "audio_bos_token_id": (hf_config.audio_bos_token_id, hf_config.codebook_vocab_size),
            "audio_pad_token_id": (hf_config.audio_pad_token_id, n_rows),
        }
        for name, (token, n_known) in special.items():
            if token is None or token >= n_known:
                raise LoadingError(f"{name} is {token}; there are {n_known} such tokens")
        return KyutaiConfig(
            family="kyutai_speech_to_text",
            model_name=hf_config.name_or_path,
            encoder=None,
            decoder=decoder_config(hf_config, d_vocab=n_texts),
            n_mels=None,
            n_frames=None,
            sampling_rate=codec.sampling_rate,
            hop=hf_config.frame_size,
            n_codebooks=hf_config.num_codebooks,
            n_codes=hf_config.codebook_vocab_size,
            n_texts=n_texts,
            window=hf_config.sliding_window,
            initial_text=initial,
            initial_code=hf_config.audio_bos_token_id,
            padding_code=hf_config.audio_pad_token_id,
        )

    def make_feature_extractor(self) -> Any:
        """The feature extractor that the configuration tells of: it adds a second of silence."""
        return transformers.KyutaiSpeechToTextFeatureExtractor(sampling_rate=self.cfg.sampling_rate)

    @property
    def n_spoken(self) -> int:
        return self.cfg.n_codebooks

    @property
    def initial_text(self) -> int:
        return self.cfg.initial_text

    @property
    def initial_code(self) -> int:
        return self.cfg.initial_code

    @property
    def lags_s(self) -> dict[str, float]:
        prefix_s = float(getattr(self.feature_extractor, "audio_silence_prefix_seconds", 0.0))
        delay_s = float(getattr(self.feature_extractor, "audio_delay_seconds", 0.0))
        codes = {f"audio.{k}": prefix_s for k in range(self.cfg.n_codebooks)}
        return {"text": prefix_s + delay_s, **codes}

    def is_code(self, codes: Int[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
        """Which codes can be read: those of a codebook, and padding."""
        return super().is_code(codes) | (codes == self.cfg.padding_code)

    # ---------------------------------------------------------------- inputs

    def inputs_from_mapping(self, mapping: Mapping[str, Any]) -> AudioInputs:
        """Inputs from text and codes as they enter, or from what the feature extractor returns.

        The one is ``input_ids`` (``b t``), ``audio_codes`` (``b k t``) and ``attention_mask``, or,
        as the forward of transformers takes them, ``input_ids`` of both (``b t 1+k``). The other is
        ``input_values`` (``b 1 samples``) and ``padding_mask``, whose text is not known: prompts
        are the initial position, and the codes lie ahead.

        Raises:
            InputError: if there is neither, or for what the model cannot read.
        """
        if mapping.get("input_values") is not None:
            return self._heard(mapping)
        keys = ("input_ids", "audio_codes", "attention_mask")
        given = self._mapping_tensors(_taken_apart(mapping), keys)
        if "input_ids" not in given:
            raise InputError("inputs hold no input_ids: pass text beside the codes")
        return self.assembled(given["input_ids"], given["audio_codes"], given.get("attention_mask"))

    def _heard(self, mapping: Mapping[str, Any]) -> AudioInputs:
        """Inputs from what the feature extractor returns."""
        unknown = mapping.keys() - {"input_values", "padding_mask"}
        if unknown:
            raise InputError(f"unknown beside input_values: {', '.join(sorted(unknown))}")
        values = torch.as_tensor(mapping["input_values"])
        if mapping.get("padding_mask") is None:
            return self.transcribed(values)
        masks = torch.as_tensor(mapping["padding_mask"]).bool().cpu()
        clips = [
            wave[0][mask].float().numpy() for wave, mask in zip(values.cpu(), masks, strict=True)
        ]
        return self.transcribed(values, audio=clips, sampling_rate=self.cfg.sampling_rate)

    def transcribed(
        self,
        values: Float[Tensor, "b 1 samples"],
        text: Any = None,
        **made: Any,
    ) -> AudioInputs:
        """Inputs from waveforms as the feature extractor gives them, and the text known of them.

        A last step that is not full is not heard.

        Raises:
            InputError: for a waveform shorter than one step, or more text than steps.
        """
        n_steps = values.shape[-1] // self.cfg.hop
        if n_steps == 0:
            raise InputError(f"{values.shape[-1]} samples: one step has {self.cfg.hop}")
        codes = self.codec.encode(values[:, 0, : n_steps * self.cfg.hop]).to(self.device)
        streams = delayed(codes, (0,) * self.cfg.n_codebooks, self.initial_code)
        return self.assembled(self.texts_before(text, len(values)), streams, text=text, **made)

    def prepare(self, audio: Any, text: Any = None, sampling_rate: Rates = None) -> AudioInputs:
        """Inputs from clips, with silence about them, and what is written along.

        With audio alone no text is known: prompts are one position, behind which the codes lie
        ahead. ``model.continued(inputs)`` writes the text, and is the whole clip with it.

        Args:
            audio: a path, array or tensor, or a list of them (a batch is a list, not an array);
                shorter ones are filled up with silence.
            text: the token ids of the steps of 80 ms from the first, in a list per clip.
            sampling_rate: of arrays, in Hz, or one per clip; files and mappings know their own.

        Raises:
            AudioError: unusable audio.
            InputError: no clip, text that is no ids, or more text than steps.
        """
        clips = self.load_clips(audio, sampling_rate)
        rate = self.cfg.sampling_rate
        made = self.feature_extractor(clips, sampling_rate=rate, return_tensors="pt")
        return self.transcribed(
            made["input_values"], text, audio=clips, sampling_rate=rate, remake=self.prepare
        )

    # ---------------------------------------------------------------- generation

    def _limit(
        self, settings: GenerationConfig, inputs: AudioInputs, asked: int | None = None
    ) -> Limit:
        """All codes that lie ahead, or as many of them as asked; settings state no other limit.

        Raises:
            InputError: if there are not as many.
        """
        n_ahead = self._n_ahead(inputs)
        if n_ahead == 0 or (asked or 0) > n_ahead:
            raise InputError(f"{n_ahead} steps of audio lie ahead, so there is no more to write")
        if asked is None:
            return Limit(n_ahead, "the end of the codes")
        return Limit(checked_count(asked), "max_new_tokens")

    def choose(
        self, hidden: Float[Tensor, "b 1 d"], ahead: Int[Tensor, "b k 1"], run: GreedyRun
    ) -> tuple[Int[Tensor, " b"], Int[Tensor, "b k 1"]]:
        """The most probable text, and the codes that lie ahead."""
        return run.choose(self.hook_logits(self.decoder.unembed(hidden))[:, -1]), ahead


def _taken_apart(mapping: Mapping[str, Any]) -> Mapping[str, Any]:
    """The mapping, with ids of text and codes together as the one and the other."""
    if mapping.get("input_ids") is None or torch.as_tensor(mapping["input_ids"]).ndim != 3:
        return mapping
    ids = torch.as_tensor(mapping["input_ids"])
    codes = {"audio_codes": ids[..., 1:].transpose(1, 2)}
    return {**mapping, "input_ids": ids[..., 0], **codes}
