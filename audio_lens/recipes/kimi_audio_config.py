"""The shape of Kimi-Audio, its special tokens and the names of its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from transformers import Qwen2Config, WhisperConfig

from audio_lens.models.config import LoadingError
from audio_lens.models.families.whisper import HookedWhisper, encoder_config, encoder_weight_names
from audio_lens.models.parts.connectors import ConnectedConfig, ConnectorConfig
from audio_lens.models.parts.language_model import language_model_config, weight_names

TEXT, AUDIO = "text", "audio"
WHISPER_FOLDER = "whisper-large-v3"
Answer = Literal["text", "both"]
SpeechTokenizer = Callable[[np.ndarray], Sequence[int]]

# -------------------------------------------------------------------------------- names

_NAMES = weight_names("model", head="lm_head")
WEIGHT_NAMES: dict[str, str | None] = {
    **_NAMES,
    **{
        theirs.replace(".layers.", ".mimo_layers."): ours.replace("decoder.", "speaker.")
        for theirs, ours in _NAMES.items()
        if "{l}" in theirs
    },
    "model.mimo_norm": "speaker.ln_final",
    "mimo_output": "speaker.unembed",
    "model.vq_adaptor.layers.0": "connector.linear_1",
    "model.vq_adaptor.layers.3": "connector.linear_2",
    "model.vq_adaptor.layers.4": "connector.norm",
    "model.layers.{l}.self_attn.rotary_emb": None,  # frequencies, which the config tells
    "model.mimo_layers.{l}.self_attn.rotary_emb": None,
}
"""The names of the published safetensors to ours."""

WHISPER_WEIGHT_NAMES: dict[str, str | None] = {
    **dict.fromkeys(HookedWhisper.weight_names),
    **encoder_weight_names("model.encoder"),
}
"""Those of the Whisper that is published with them, whose decoder is left out."""

_NAMED = {
    0: "[BOS]",
    1: "[EOS]",
    2: "<|im_msg_end|>",
    3: "<|im_user_msg_start|>",
    4: "<|im_assistant_msg_start|>",
    9: "[EOT]",
    18: "<|im_media_begin|>",
    20: "<|im_media_end|>",
    23: "<|im_kimia_text_blank|>",
    24: "<|im_kimia_text_eos|>",
    27: "<|im_kimia_user_msg_start|>",
    28: "<|im_kimia_assistant_msg_start|>",
    32: "<|im_kimia_speech_ct_id|>",
    33: "<|im_kimia_speech_ctd_id|>",
}
"""Special tokens, by how many stand before them in the vocabulary; the others are reserved."""

_PLACE_OF = {name: place for place, name in _NAMED.items()}
BEGIN, END = "<|im_media_begin|>", "<|im_media_end|>"
BLANK, TEXT_END = "<|im_kimia_text_blank|>", "<|im_kimia_text_eos|>"
CLIP = BEGIN + END
ANSWERS = {"text": "<|im_kimia_speech_ct_id|>", "both": "<|im_kimia_speech_ctd_id|>"}
CHAT = (
    "{% for message in messages %}{% set content = message['content'] %}"
    "{% if message['role'] not in ('user', 'assistant') %}"
    "{{ raise_exception('Kimi-Audio knows the roles user and assistant') }}{% endif %}"
    "<|im_kimia_{{ message['role'] }}_msg_start|>"
    "{% if content is string %}{{ content }}{% else %}{% for piece in content %}"
    "{% if piece['type'] == 'audio' %}" + CLIP + "{% else %}{{ piece['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if content is not string and content[-1]['type'] == 'audio' %}" + ANSWERS["text"] + ""
    "{% elif message['role'] == 'assistant' %}" + TEXT_END + "{% endif %}<|im_msg_end|>"
    "{% endfor %}<|im_kimia_assistant_msg_start|>"
)


def special_tokens(count: int) -> list[str]:
    """The first special tokens of the vocabulary, in order."""
    reserved = iter(range(count))
    return [_NAMED.get(i) or f"<|reserved_token_{next(reserved)}|>" for i in range(count)]


# -------------------------------------------------------------------------------- the shape


@dataclass(kw_only=True)
class KimiAudioConfig(ConnectedConfig):
    """Shape of a Kimi-Audio.

    Attributes:
        fork: the last block that both streams share.
        delay: how many tokens of text are written before the first of speech.
        first_special, first_code: ids of the first special token and of discrete audio token 0.
    """

    fork: int
    delay: int
    first_special: int
    first_code: int

    @property
    def d_stream(self) -> int:
        """Tokens that either stream may hold: words, special tokens and discrete audio tokens."""
        return self.columns(TEXT).stop

    @property
    def n_codes(self) -> int:
        """Discrete audio tokens."""
        return self.d_stream - self.first_code

    def special(self, name: str) -> int:
        """The id of a special token."""
        return self.first_special + _PLACE_OF[name]


def kimi_audio_config(
    config: Mapping[str, Any], ear: Mapping[str, Any], model_name: str = ""
) -> KimiAudioConfig:
    """The shape that a published ``config.json``, and that of its Whisper, tell of.

    Raises:
        LoadingError: if they are of another model, or of a variant that is not implemented.
    """
    if "kimia_mimo_layers" not in config:
        raise LoadingError("this config tells of no blocks that speak, so it is no Kimi-Audio")
    begin, end = config["kimia_media_begin"], config["kimia_media_end"]
    first_special = begin - _PLACE_OF[BEGIN]
    if end - first_special != _PLACE_OF[END]:
        raise LoadingError(f"clips between the tokens {begin} and {end}: not implemented")
    if config.get("tie_word_embeddings") or not config.get("use_whisper_feature", True):
        raise LoadingError("tied embeddings, or no Whisper: not implemented")
    whisper = WhisperConfig(**_without_kind(ear))
    text = Qwen2Config(**_without_kind(config))
    decoder = language_model_config(text, model_name)
    width = config["kimia_adaptor_input_dim"]
    n_stacked, rest = divmod(width, whisper.d_model)
    if rest or whisper.max_source_positions % n_stacked:
        raise LoadingError(f"{width} numbers are no whole frames of {whisper.d_model}")
    fork, n_layers = config["kimia_mimo_transformer_from_layer_index"], decoder.n_layers
    if not 0 <= fork < n_layers:
        raise LoadingError(f"streams that part behind layer {fork} of {n_layers}")
    return KimiAudioConfig(
        family="kimi_audio",
        model_name=model_name,
        encoder=encoder_config(whisper, model_name),
        decoder=replace(decoder, d_vocab=2 * text.vocab_size),
        further_decoders={"speaker": replace(decoder, n_layers=config["kimia_mimo_layers"])},
        output_kind="streams",
        streams=((TEXT, text.vocab_size), (AUDIO, text.vocab_size)),
        n_mels=whisper.num_mel_bins,
        n_frames=2 * whisper.max_source_positions,
        max_segments=decoder.n_ctx * n_stacked // whisper.max_source_positions,
        connector=ConnectorConfig(d_mid=decoder.d_model, act_fn="silu", n_stacked=n_stacked),
        fork=fork,
        delay=config["kimia_mimo_audiodelaytokens"],
        first_special=first_special,
        first_code=config["kimia_token_offset"],
    )


def _without_kind(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without what says of which class of Hugging Face it is."""
    return {key: value for key, value in config.items() if key != "model_type"}
