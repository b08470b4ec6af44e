"""Features of waveforms, in every family: those of `prepare`, with gradients to the sound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from audio_lens import AudioInputs, HookedAudioTransformer, InputError
from audio_lens.models.embedded import default_pair
from audio_lens.models.layers.norms import RMSNorm
from families import FAMILIES

SILENT = ("moshi", "kyutai_stt", "musicgen")  # gradients do not reach what they hear
HEARD = [name for name in FAMILIES if name not in SILENT]
SHAPES = [
    *((name, {}) for name in HEARD),
    *((name, {"feat_extract_norm": "layer"}) for name in ("wav2vec2", "hubert", "wavlm")),
]
CLOSE = 1e-4  # of the spread of features
UNEQUAL = (0.62, 0.91)  # seconds
STEP = 3e-6  # of sound whose samples are about 0.1
pytestmark = pytest.mark.filterwarnings("ignore:clips of unequal length")


def built(
    name: str, dtype: torch.dtype = torch.float32, **overrides: str
) -> HookedAudioTransformer:
    family = FAMILIES[name]
    model = family.hooked(family.build(**overrides)).to(dtype)
    if model.feature_extractor is None:
        model.feature_extractor = model.make_feature_extractor()
    for ear in getattr(model, "ears", {}).values():
        ear.to(dtype)
    return model


def waves(model: HookedAudioTransformer, seconds: Sequence[float]) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    counts = [int(s * model.cfg.sampling_rate) for s in seconds]
    return [generator.normal(0, 0.1, count).astype(np.float32) for count in counts]


def prepared(model: HookedAudioTransformer, clips: list[np.ndarray]) -> AudioInputs:
    """What `prepare` makes, with token ids in place of texts."""
    if not model.takes_question:
        text = {"text": [5, 6]} if model.cfg.family == "whisper" else {}
        return model.prepare(clips, sampling_rate=model.cfg.sampling_rate, **text)
    tokens = torch.tensor([[7, model.audio_token_id, 8, 9]] * len(clips))
    inputs = model._assembled(tokens, None, *model._heard(clips, 1))
    if model.cfg.family != "kimi_audio":
        return inputs
    is_audio, blank = model.is_audio(inputs), torch.full_like(inputs.tokens, 4)[:, None]
    tokens = inputs.tokens.masked_fill(is_audio, 3)
    return replace(inputs, tokens=tokens, audio_mask=is_audio, further_tokens=blank)


def assert_same(made: Tensor, expected: Tensor) -> None:
    assert made.shape == expected.shape
    spread = float(expected.max() - expected.min())
    assert float((made - expected).abs().max()) <= CLOSE * spread


@pytest.mark.parametrize(("name", "overrides"), SHAPES, ids=str)
def test_they_are_those_of_prepare(name: str, overrides: dict) -> None:
    model = built(name, **overrides)
    takes_equal = getattr(getattr(model.cfg, "stem", None), "norm", "") == "group"
    clips = waves(model, UNEQUAL[:1] * 2 if takes_equal else UNEQUAL)
    inputs = prepared(model, clips)
    for dtype in (torch.float32, torch.float64):
        given = [torch.as_tensor(clip).to(dtype) for clip in clips]
        features = model.features(given)
        assert features.dtype == dtype
        assert_same(features, inputs.features)
        again = model.with_waveform(inputs, given)
        assert again.extra.keys() == inputs.extra.keys()
        for key, held in inputs.extra.items():
            assert_same(again.extra[key].float(), held.float())


@pytest.mark.mostly_slow(2)
@pytest.mark.parametrize("name", HEARD)
def test_rows_are_what_they_are_alone(name: str) -> None:
    """As far as the clip reaches: what is behind it, the batch may fill up."""
    model = built(name)
    clip = torch.as_tensor(waves(model, UNEQUAL[:1])[0])
    alone, stacked = model.features(clip), model.features(torch.stack([clip, clip.flip(0)]))
    assert torch.allclose(stacked[: len(alone)], alone, atol=1e-6)
    assert torch.equal(model.features([clip]), alone)


@pytest.mark.mostly_slow(4)
@pytest.mark.parametrize("name", HEARD)
def test_gradients_are_finite_differences(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64 throughout, also where models compute in float32 as Hugging Face does."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(RMSNorm, "precision", torch.float64)
    model = built(name, torch.float64)
    (clip,) = waves(model, UNEQUAL[:1])
    inputs = prepared(model, [clip])
    wave = torch.as_tensor(clip).double().requires_grad_()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        shape = model(inputs).shape
    weights = torch.randn(shape, generator=generator, dtype=torch.float64)

    def measured(sound: Tensor) -> Tensor:
        return (model(model.with_waveform(inputs, sound)) * weights).sum()

    (gradient,) = torch.autograd.grad(measured(wave), wave)
    assert gradient.isfinite().all() and gradient.norm() > 0
    noise = torch.randn(wave.shape, generator=generator, dtype=torch.float64)
    way = noise + 0.3 * noise.norm() * gradient / gradient.norm()
    with torch.no_grad():
        near, far = (
            measured(wave + step * way) - measured(wave - step * way) for step in (STEP, 2 * STEP)
        )
    expected = float((gradient * way).sum())
    assert float(8 * near - far) / (12 * STEP) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", SILENT)
def test_a_model_without_says_why(name: str) -> None:
    model = built(name)
    with pytest.raises(InputError, match="gradients reach: it"):
        model.features(torch.zeros(16_000))


def test_sound_can_be_climbed(embedded: HookedAudioTransformer) -> None:
    """A step along the gradient of an answer makes it likelier; clips in windows, too."""
    pair = default_pair()
    inputs = embedded.prepare(pair.clean, pair.question)
    wave = torch.as_tensor(inputs.audio[0]).requires_grad_()
    token = embedded.to_single_token(pair.against)

    def likely(sound: Tensor) -> Tensor:
        heard = embedded(embedded.with_waveform(inputs, sound))
        assert heard.shape == embedded(inputs).shape
        return heard[0, -1].log_softmax(-1)[token]

    before = likely(wave)
    (gradient,) = torch.autograd.grad(before, wave)
    moved = (wave + 1e-3 * gradient.sign()).clamp(-1, 1)
    assert likely(moved.detach()) > before + 0.3


def test_what_is_no_waveform_is_refused(embedded: HookedAudioTransformer) -> None:
    pair = default_pair()
    inputs = embedded.prepare(pair.clean, pair.question)
    wave = torch.as_tensor(inputs.audio[0])
    with pytest.raises(InputError, match="waveforms are a tensor"):
        embedded.features(wave[None, None])
    with pytest.raises(ValueError, match="NaN"):
        embedded.features(wave * torch.nan)
    with pytest.raises(ValueError, match="full scale"):
        embedded.features(100 * wave)
    with pytest.raises(InputError, match="2 waveforms for 1 clips"):
        embedded.with_waveform(inputs, [wave, wave])
    with pytest.raises(InputError, match=r"features of these inputs: \(1, .*; got"):
        inputs.with_features(inputs.features[:, :-1])
    with pytest.raises(InputError, match="other of these inputs: none"):
        inputs.with_features(inputs.features, {"other": inputs.features})
    embedded.feature_extractor, known = object(), embedded.feature_extractor
    try:
        with pytest.raises(InputError, match="no gradient passes through a object"):
            embedded.features(wave)
    finally:
        embedded.feature_extractor = known
