"""Generation settings that tests put on tiny models, and what is written with them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from audio_lens import HookedAudioTransformer
from families.base import PAD

N_NEW = 10
NAMES = [
    "repetition_penalty",
    "no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "encoder_no_repeat_ngram_size",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "sequence_bias",
    "min_new_tokens",
    "min_length",
    "eos_token_id",
    "forced_eos_token_id",
    "exponential_decay_length_penalty",
    "renormalize_logits",
    "remove_invalid_values",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "max_new_tokens",
    "max_length",
    "num_beams",
]


def settings_for(plain: Tensor) -> dict[str, dict[str, Any]]:
    """Settings by a name of their own, which change what is written if that is ``plain`` (b n)."""
    first, second, third, last = plain[0, 0], plain[0, 1], plain[0, 3], plain[1, 2]
    early, late, other, odd = (int(token) for token in (first, third, last, second))
    return {
        "repetition_penalty": {"repetition_penalty": 1.7},
        "ngrams": {"no_repeat_ngram_size": 2},
        "of prompts": {"encoder_repetition_penalty": 30.0},
        "ngrams of prompts": {"encoder_no_repeat_ngram_size": 1},
        "bad words": {"bad_words_ids": [[early], [odd, late]]},
        "suppressed": {"suppress_tokens": [late]},
        "suppressed at first": {"begin_suppress_tokens": [early, other]},
        "bias": {"sequence_bias": [[[20], 9.0], [[20, 21], 30.0]]},
        "ends": {"eos_token_id": [other, late]},
        "least": {"min_new_tokens": 5, "eos_token_id": [early, odd, other]},
        "least in all": {"min_length": 14, "eos_token_id": [early, odd, other]},
        "forced end": {"forced_eos_token_id": 33, "eos_token_id": 33},
        "decay": {"exponential_decay_length_penalty": (2, 3.5), "eos_token_id": 41},
        "normed": {"renormalize_logits": True, "repetition_penalty": 1.2},
        "of sampling": {"temperature": 0.3, "top_k": 2, "top_p": 0.5, "min_p": 0.2},
    }


def with_settings(hf: nn.Module, **settings: Any) -> nn.Module:
    """The model with these settings and none but them."""
    config: Any = hf.generation_config
    for name in NAMES:
        setattr(config, name, None)
    config.pad_token_id = PAD
    for name, value in settings.items():
        setattr(config, name, value)
    return hf


def talkative(hf: nn.Module) -> nn.Module:
    """The model, which does not say one token forever."""
    with torch.no_grad():
        hf.get_input_embeddings().weight.mul_(6)
    return with_settings(hf)


def quiet(run: Callable[..., Any], *given: Any, **options: Any) -> Any:
    """What is run, without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run(*given, **options)


def new_tokens(model: HookedAudioTransformer, batch: Any, **options: Any) -> Tensor:
    """What is written behind prompts."""
    inputs = model.as_inputs(batch)
    tokens = quiet(model.generate, inputs, return_type="tokens", **options)
    return tokens[:, inputs.tokens.shape[1] :]
