"""Whether a longer clip in the batch changes what a clip gives: measured, and as models say."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from audio_lens import AudioInputs, HookedAudioTransformer
from audio_lens.inputs import InputError
from audio_lens.models import Connector
from audio_lens.models.parts.connectors import LinearConnector
from families import FAMILIES
from families.base import TINY_LANGUAGE_MODEL, randomise

SECONDS = (0.6, 1.7)
LAYER = {"feat_extract_norm": "layer"}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in FAMILIES if name != "musicgen"),  # it refuses them; see its tests
    *((name, LAYER) for name in ("wav2vec2", "hubert", "unispeech", "wavlm")),
    ("hubert", {**LAYER, "conv_pos_batch_norm": True}),
    ("data2vec_audio", {"num_conv_pos_embeddings": 1}),
]
MIXING = {
    "beats",
    "data2vec_audio",
    "granite_speech",
    "hubert",
    "qwen3_omni",
    "qwen_audio",
    "salmonn",
    "unispeech",
    "wav2vec2",
    "wavlm",
}


def waves(model: HookedAudioTransformer, seconds: tuple[float, ...]) -> list[np.ndarray]:
    rate = model.cfg.sampling_rate
    generator = np.random.default_rng(0)
    return [generator.normal(0, 0.1, int(s * rate)).astype(np.float32) for s in seconds]


def prepared(model: HookedAudioTransformer, clips: list[np.ndarray]) -> AudioInputs:
    """What `prepare` makes, with token ids in place of texts."""
    if model.feature_extractor is None:
        model.feature_extractor = model.make_feature_extractor()
    if not model.takes_question:
        text = {"text": [5, 6]} if model.cfg.family == "whisper" else {}
        return model.prepare(clips, sampling_rate=model.cfg.sampling_rate, **text)
    tokens = torch.tensor([[7, model.audio_token_id, 8, 9]] * len(clips))
    inputs = model._assembled(tokens, None, *model._heard(clips, 1))
    if model.cfg.family != "kimi_audio":
        return inputs
    is_audio = model.is_audio(inputs)
    blank = torch.full_like(inputs.tokens, 4)[:, None]
    tokens = inputs.tokens.masked_fill(is_audio, 3)
    return replace(inputs, tokens=tokens, audio_mask=is_audio, further_tokens=blank)


@torch.no_grad()
def answer(model: HookedAudioTransformer, inputs: AudioInputs, row: int) -> Tensor:
    """The logits of a row, where it holds something."""
    logits = model(inputs)[row]
    return logits[model.output_attended(inputs)[row]] if logits.ndim == 2 else logits


def moved_by(model: HookedAudioTransformer) -> float:
    """By how much of its size the answer to the shorter clip changes beside a longer one."""
    clips = waves(model, SECONDS)
    alone = answer(model, prepared(model, clips[:1]), 0)
    beside = answer(model, prepared(model, clips), 0)
    return float((beside - alone).abs().max() / alone.abs().max())


def variant_id(value: Any) -> str:
    return value if isinstance(value, str) else ", ".join(f"{k}={v}" for k, v in value.items())


@pytest.mark.filterwarnings("ignore:clips of unequal length")
@pytest.mark.mostly_slow(3)
@pytest.mark.parametrize(("name", "overrides"), VARIANTS, ids=variant_id)
def test_models_say_whether_they_mix_lengths(name: str, overrides: dict[str, Any]) -> None:
    family = FAMILIES[name]
    model = family.hooked(family.build(**overrides))
    try:
        moved = moved_by(model)
    except InputError as error:
        assert "would change the answer" in str(error)
        moved = 1.0
    assert (moved > 1e-5) == bool(model.mixes_lengths), moved
    if moved > 1e-5:
        assert name in MIXING
        assert moved > 3e-4  # far from rounding


class Blurring(Connector):
    """Every token reads its neighbours."""

    def __init__(self, d_in: int, d_out: int):
        super().__init__()
        self.conv = nn.Conv1d(d_in, d_out, 5, padding=2)

    def carry(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


@pytest.mark.filterwarnings("ignore:clips of unequal length")
@pytest.mark.parametrize(
    ("ear", "overrides", "connector", "reason"),
    [
        ("wav2vec2", LAYER, LinearConnector, ""),
        ("wav2vec2", LAYER, Blurring, "its connector may read"),
        ("data2vec_audio", {}, LinearConnector, "encoder: of its positional convolutions"),
        ("whisper", {}, Blurring, ""),
    ],
)
def test_composed_models_mix_where_a_part_does(
    ear: str, overrides: dict[str, Any], connector: Any, reason: str
) -> None:
    heard = FAMILIES[ear].build(**overrides)
    text = randomise(transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TINY_LANGUAGE_MODEL)))
    width = HookedAudioTransformer.from_hf(heard).cfg.need_encoder.d_model
    between = randomise(connector(width, TINY_LANGUAGE_MODEL["hidden_size"]))
    model = HookedAudioTransformer.compose(heard, between, text, merge=90)
    assert model.mixes_lengths.startswith(reason)
    assert bool(model.mixes_lengths) == bool(reason)
    assert (moved_by(model) > 1e-5) == bool(reason)


# -------------------------------------------------------------------------------- warnings


def data2vec() -> HookedAudioTransformer:
    return HookedAudioTransformer.from_hf(FAMILIES["data2vec_audio"].build())


def test_prepare_warns_once_of_unequal_clips() -> None:
    model = data2vec()
    clips, rate = waves(model, SECONDS), {"sampling_rate": 16_000}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.prepare(clips[0], **rate)
        model.prepare([clips[0], clips[0]], **rate)
    with pytest.warns(UserWarning, match=r"data2vec_audio: of its positional.*equal length"):
        model.prepare(clips, **rate)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.prepare(clips, **rate)


def test_a_processors_batch_of_unequal_clips_is_told_too() -> None:
    family = FAMILIES["granite_speech"]
    model = HookedAudioTransformer.from_hf(family.build())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(family.batch(lengths=[60], words=[4]))
    with pytest.warns(UserWarning, match="granite_speech: its encoder hears the padding"):
        model(family.batch(lengths=[93, 41]))


def test_models_that_do_not_mix_say_nothing(embedded: HookedAudioTransformer) -> None:
    clips = waves(embedded, SECONDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embedded.prepare(clips, "Which digit is first?", 16_000)
