"""Families enter themselves: every entry loads, and a family of one's own is one class."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from test_omni import whole_omni

from audio_lens import HookedAudioTransformer
from audio_lens.models.compose.model import HookedComposed
from audio_lens.models.config import LoadingError
from audio_lens.models.families.whisper import HookedWhisper
from audio_lens.models.registry import FAMILIES, family_of
from families import FAMILIES as TESTED

BUILDERS = {
    hf.config.model_type: name
    for name, family in reversed(TESTED.items())  # of several heads the first stands
    if family.is_hf
    for hf in [family.build()]
}
WHOLE = {"qwen2_5_omni": "qwen2_5_omni", "qwen3_omni_moe": "qwen3_omni"}  # with what they say


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_every_entry_loads(model_type: str, tmp_path: Path) -> None:
    is_whole = model_type in WHOLE
    hf = whole_omni(WHOLE[model_type]) if is_whole else TESTED[BUILDERS[model_type]].build()
    assert hf.config.model_type == model_type
    hf.save_pretrained(tmp_path)
    model = HookedAudioTransformer.from_pretrained(tmp_path)
    assert type(model) is FAMILIES[model_type] is family_of(hf.config)
    hf_class = FAMILIES[model_type].hf_class
    for name in [hf_class] if isinstance(hf_class, str) else hf_class:
        assert hasattr(transformers, name)


class OwnConfig(transformers.WhisperConfig):
    model_type = "whisper_of_my_own"


class OwnModel(transformers.WhisperForConditionalGeneration):
    config_class = OwnConfig


def own_family() -> type[HookedWhisper]:
    class HookedOwn(HookedWhisper):
        model_types = ("whisper_of_my_own",)

    return HookedOwn


@pytest.fixture
def own() -> Iterator[type[HookedWhisper]]:
    yield own_family()
    del FAMILIES["whisper_of_my_own"]


def own_hf() -> OwnModel:
    settings = TESTED["whisper"].build().config.to_diff_dict()
    return OwnModel(OwnConfig(**{k: v for k, v in settings.items() if k != "model_type"}))


def test_a_family_of_ones_own_is_one_class(own: type[HookedWhisper]) -> None:
    hf, batch = own_hf().eval(), TESTED["whisper"].batch()
    model = HookedAudioTransformer.from_hf(hf)
    assert type(model) is own
    with torch.no_grad():
        assert torch.allclose(model(batch), hf(**batch).logits, atol=1e-5)


def test_a_model_type_has_one_class(own: type[HookedWhisper]) -> None:
    with pytest.raises(TypeError, match="HookedWhisper implements the model type 'whisper' alre"):
        type("Another", (HookedWhisper,), {"model_types": ("whisper",)})
    again = own_family()  # a cell run twice
    assert FAMILIES["whisper_of_my_own"] is again is not own
    assert FAMILIES["whisper"] is HookedWhisper


def test_a_class_loads_its_own_kind_only(tmp_path: Path) -> None:
    class MyWhisper(HookedWhisper):
        pass

    whisper, other = TESTED["whisper"].build(), TESTED["wav2vec2"].build()
    assert type(HookedWhisper.from_hf(whisper)) is HookedWhisper
    assert type(MyWhisper.from_hf(whisper)) is MyWhisper
    with pytest.raises(LoadingError, match="a wav2vec2, which HookedWav2Vec2 implements, not Hook"):
        HookedWhisper.from_hf(other)
    other.save_pretrained(tmp_path)
    with pytest.raises(LoadingError, match="not HookedWhisper"):
        HookedWhisper.from_pretrained(tmp_path)


def test_parts_are_no_checkpoint() -> None:
    with pytest.raises(LoadingError, match="HookedComposed is put together from parts"):
        HookedComposed.config_from_hf(None)
