"""Every class of transformers with a config that we know: taken over, or refused by its name."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from audio_lens import HookedAudioTransformer, LoadingError
from audio_lens.models.families.whisper import HookedWhisper
from audio_lens.models.registry import FAMILIES as REGISTERED
from families import FAMILIES
from families.base import randomise
from families.whisper import batch, build, build_classifier, spectrograms

TAKEN = "ForCTC", "ForSequenceClassification", "ForPreTraining", "Model"  # of speech encoders
OTHER_HEADS = {
    "wav2vec2": ("Wav2Vec2ForXVector", "Wav2Vec2ForAudioFrameClassification"),
    "wavlm": ("WavLMForXVector", "WavLMForAudioFrameClassification"),
    "data2vec_audio": ("Data2VecAudioForXVector", "Data2VecAudioForAudioFrameClassification"),
    "unispeech_sat": ("UniSpeechSatForXVector", "UniSpeechSatForAudioFrameClassification"),
    "whisper": ("WhisperForCausalLM",),
    "qwen2_audio": ("Qwen2AudioModel",),
    "audioflamingo3": ("AudioFlamingo3Model",),
    "voxtral": ("VoxtralModel",),
    "granite_speech": ("GraniteSpeechModel",),
    "glmasr": ("GlmAsrModel",),
    "qwen3_asr": ("Qwen3ASRModel", "Qwen3ASRForTokenClassification"),
    "kyutai_stt": ("KyutaiSpeechToTextModel",),
}


def made(name: str, family: str) -> transformers.PreTrainedModel:
    """A random model of a class, with the config of the tiny family."""
    kind = getattr(transformers, name)
    config = FAMILIES[family].build().config
    return randomise(kind(config))


@pytest.mark.parametrize(
    "family, name", [(family, name) for family, names in OTHER_HEADS.items() for name in names]
)
def test_other_heads_are_refused_by_name(family: str, name: str, tmp_path: Path) -> None:
    hf = made(name, family)
    with pytest.raises(LoadingError, match=rf"{name} is not implemented|head of {name}"):
        HookedAudioTransformer.from_hf(hf)
    if "For" in name:
        hf.save_pretrained(tmp_path)
        with pytest.raises(LoadingError, match=rf"checkpoint is a {name}; implemented: "):
            HookedAudioTransformer.from_pretrained(tmp_path)


def classes_with_our_configs() -> list[tuple[str, str]]:
    """Model types that are registered, and every class of transformers for each."""
    found = []
    for name in dir(transformers):
        kind = getattr(transformers, name) if "For" in name or name.endswith("Model") else None
        if inspect.isclass(kind) and issubclass(kind, transformers.PreTrainedModel):
            model_type = getattr(getattr(kind, "config_class", None), "model_type", None)
            if model_type in REGISTERED and "PreTrainedModel" not in name:
                found.append((model_type, name))
    return found


@pytest.mark.slow
def test_no_class_of_transformers_is_forgotten() -> None:
    """A release with a further head appears here: decide about it."""
    refused = {name for names in OTHER_HEADS.values() for name in names}
    whole = {"MoshiForCausalLM", "MoshiModel"}  # parts, with configs of their own
    known = {
        name
        for family in REGISTERED.values()
        for name in ([family.hf_class] if isinstance(family.hf_class, str) else family.hf_class)
    }
    known |= {"WhisperModel", "WhisperForAudioClassification", *refused, *whole}
    known |= {"Qwen2_5OmniForConditionalGeneration", "Qwen3OmniMoeForConditionalGeneration"}
    left = [name for _, name in classes_with_our_configs() if name not in known]
    bare = [name for name in left if name.endswith("Model")]  # as those of their siblings above
    assert sorted(set(left) - set(bare)) == []


# -------------------------------------------------------------------------------- Whisper


def difference(model: HookedAudioTransformer, hf: Any, inputs: dict[str, Any]) -> float:
    with torch.no_grad(), model.attention("explicit"):
        return (model(inputs) - hf(**inputs).logits).abs().max().item()


def test_a_whisper_without_its_head_writes_with_its_embedding(tmp_path: Path) -> None:
    whole = build()
    whole.model.save_pretrained(tmp_path)
    for model in (
        HookedAudioTransformer.from_hf(whole.model),
        HookedWhisper.from_hf(whole.model),
        HookedAudioTransformer.from_pretrained(tmp_path),
    ):
        assert type(model) is HookedWhisper and model.cfg.output_kind == "tokens"
        assert difference(model, whole, batch()) == 0
        written = model.generate(batch(words=(2, 2)), 4, return_type="tokens")
        assert written.shape == (2, 7)  # the prompts and what follows
    untied = build(tie_word_embeddings=False)
    with pytest.raises(LoadingError, match="tie_word_embeddings=False holds no head"):
        HookedAudioTransformer.from_hf(untied.model)


def test_a_subclass_of_ones_own_is_what_it_derives_from() -> None:
    class Mine(transformers.WhisperForConditionalGeneration):
        pass

    hf = randomise(Mine(build().config))
    assert difference(HookedAudioTransformer.from_hf(hf), hf, batch()) == 0


def test_whisper_for_classes(tmp_path: Path) -> None:
    labels = {"id2label": {i: f"language {i}" for i in range(7)}}
    hf = build_classifier(**labels)
    hf.save_pretrained(tmp_path)
    for model in (
        HookedAudioTransformer.from_hf(hf),
        HookedAudioTransformer.from_pretrained(tmp_path),
    ):
        assert (
            model.cfg.output_kind == model.cfg.head == "classes"
            and model.cfg.labels[3] == "language 3"
        )
        assert difference(model, hf, spectrograms()) == 0
        best = hf(**spectrograms()).logits.argmax(-1).tolist()
        assert model.generate(spectrograms()) == [f"language {i}" for i in best]
        batch = {**spectrograms(), "labels": torch.tensor([2, 5])}
        assert torch.allclose(model(batch, return_type="loss"), hf(**batch).loss)


def test_heads_of_whisper_that_are_not_asked_for(tmp_path: Path) -> None:
    hf = build_classifier()
    hf.save_pretrained(tmp_path)
    with pytest.raises(LoadingError, match="which HookedWhisperClassifier implements, not Hooked"):
        HookedWhisper.from_pretrained(tmp_path)
    summed = build_classifier(use_weighted_layer_sum=True)
    with pytest.raises(LoadingError, match="use_weighted_layer_sum=True is not implemented"):
        HookedAudioTransformer.from_hf(summed)
