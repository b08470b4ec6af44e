"""Whisper from openai's own files: `large-v3.pt` and its siblings (Radford et al. 2022).

Also the table of openai's weight names, which models that build on openai's code share.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, WhisperConfig
from transformers.models.whisper.configuration_whisper import (
    NON_SPEECH_TOKENS,
    NON_SPEECH_TOKENS_MULTI,
)
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from audio_lens.models.config import LoadingError
from audio_lens.models.families.whisper import HookedWhisper
from audio_lens.models.loading.stored import reads_checkpoint
from audio_lens.models.loading.weights import fill, read_pickle, read_weights, renamed

_BLOCK = {
    "attn.query": "attn.q_proj",
    "attn.key": "attn.k_proj",
    "attn.value": "attn.v_proj",
    "attn.out": "attn.o_proj",
    "attn_ln": "ln1",
    "mlp.0": "mlp.fc_in",
    "mlp.2": "mlp.fc_out",
    "mlp_ln": "ln2",
}
_CROSSING = {
    "cross_attn.query": "cross_attn.q_proj",
    "cross_attn.key": "cross_attn.k_proj",
    "cross_attn.value": "cross_attn.v_proj",
    "cross_attn.out": "cross_attn.o_proj",
    "cross_attn_ln": "ln_cross",
}


def encoder_weight_names(theirs: str) -> dict[str, str]:
    """The name table of an encoder of openai's kind with this prefix."""
    return {
        f"{theirs}.conv1": "encoder.conv1",
        f"{theirs}.conv2": "encoder.conv2",
        f"{theirs}.positional_embedding": "encoder.pos_embed.weight",
        **{f"{theirs}.blocks.{{l}}.{a}": f"encoder.blocks.{{l}}.{b}" for a, b in _BLOCK.items()},
        f"{theirs}.ln_post": "encoder.ln_final",
    }


WEIGHT_NAMES: dict[str, str | None] = {
    **encoder_weight_names("encoder"),
    "decoder.token_embedding": "decoder.token_embed",
    "decoder.positional_embedding": "decoder.pos_embed.weight",
    **{
        f"decoder.blocks.{{l}}.{theirs}": f"decoder.blocks.{{l}}.{ours}"
        for theirs, ours in {**_BLOCK, **_CROSSING}.items()
    },
    "decoder.ln": "decoder.ln_final",
}


@reads_checkpoint
def openai_whisper(path: str | Path, dtype: torch.dtype | None = None) -> HookedWhisper:
    """A whole Whisper from one of openai's ``.pt`` files, which is read without running its code.

    The file holds no tokenizer: for texts, give the model that of the same size on the hub
    (``model.tokenizer = ...``).

    Args:
        path: such as ``large-v3.pt``.
        dtype: of the weights; None keeps the file's (float16 in openai's).

    Raises:
        LoadingError: a file that cannot be read, is of another kind, or lacks weights.
    """
    dims = _dims(path)
    cfg = HookedWhisper.config_from_hf(_config(dims, str(path)))
    with torch.device("meta"):
        model = HookedWhisper(cfg)
    tensors = renamed(read_weights(path, "model_state_dict"), WEIGHT_NAMES)
    tensors = {name: x.to(dtype or x.dtype) for name, x in tensors.items()}
    if "decoder.token_embed.weight" in tensors:
        tensors["decoder.unembed.weight"] = tensors["decoder.token_embed.weight"]
    fill(model, tensors)
    model.feature_extractor = model.make_feature_extractor()
    model.generation_config = _generation(dims["n_vocab"])
    return model.eval()


def openai_ear(state: Mapping[str, Tensor], prefix: str) -> HookedWhisper:
    """A Whisper to compose with, of which only the encoder has weights.

    Args:
        state: of an encoder of openai's kind, whose heads have 64 dimensions.
        prefix: of the names.

    Raises:
        LoadingError: weights that are missing or without a place.
    """
    tensors = renamed(state, encoder_weight_names(prefix))
    names = ("encoder.conv1.weight", "encoder.pos_embed.weight")
    if any(name not in tensors for name in names):
        raise LoadingError(f"no whole encoder of Whisper's under {prefix}")
    (width, n_mels, _), (n_ctx, _) = (tensors[name].shape for name in names)
    layers = {int(name.split(".")[2]) for name in tensors if ".blocks." in name}
    ear = WhisperConfig(
        num_mel_bins=n_mels,
        d_model=width,
        max_source_positions=n_ctx,
        encoder_layers=len(layers),
        encoder_attention_heads=width // 64,
        encoder_ffn_dim=4 * width,
    )
    with torch.device("meta"):
        model = HookedWhisper(HookedWhisper.config_from_hf(ear))
    fill(model, tensors, parts=("encoder",))
    model.feature_extractor = model.make_feature_extractor()
    return model


def _dims(path: str | Path) -> Mapping[str, int]:
    held = read_pickle(path)
    if not isinstance(held, Mapping) or "dims" not in held:
        raise LoadingError(f"{path} holds no 'dims', so it is no Whisper of openai's")
    return held["dims"]


def _config(dims: Mapping[str, int], name: str) -> WhisperConfig:
    if dims["n_audio_state"] != dims["n_text_state"]:
        raise LoadingError(
            f"an encoder of width {dims['n_audio_state']} and a decoder of width "
            f"{dims['n_text_state']} are not implemented"
        )
    width = dims["n_audio_state"]
    config = WhisperConfig(
        num_mel_bins=dims["n_mels"],
        d_model=width,
        max_source_positions=dims["n_audio_ctx"],
        encoder_layers=dims["n_audio_layer"],
        encoder_attention_heads=dims["n_audio_head"],
        encoder_ffn_dim=4 * width,
        vocab_size=dims["n_vocab"],
        max_target_positions=dims["n_text_ctx"],
        decoder_layers=dims["n_text_layer"],
        decoder_attention_heads=dims["n_text_head"],
        decoder_ffn_dim=4 * width,
    )
    config.name_or_path = name
    return config


def _generation(n_vocab: int) -> GenerationConfig:
    """The control tokens: behind the words come start, languages, tasks, marks, and 1501 times."""
    is_multilingual = n_vocab >= 51_865  # the others lack a word, and do not use the languages
    n_languages = n_vocab - 51_765 - is_multilingual
    end = 50_256 + is_multilingual
    start, tasks = end + 1, end + 2 + n_languages
    languages = list(LANGUAGES)[:n_languages] if is_multilingual else []
    silent = NON_SPEECH_TOKENS_MULTI if is_multilingual else NON_SPEECH_TOKENS
    return GenerationConfig(
        decoder_start_token_id=start,
        eos_token_id=end,
        pad_token_id=end,
        lang_to_id={f"<|{code}|>": start + 1 + i for i, code in enumerate(languages)},
        task_to_id={"translate": tasks, "transcribe": tasks + 1},
        task="transcribe" if is_multilingual else None,
        is_multilingual=is_multilingual,
        no_timestamps_token_id=tasks + 5,
        begin_suppress_tokens=[220, end],
        suppress_tokens=[*(i for i in silent if i < end), start, *range(tasks, tasks + 5)],
    )
