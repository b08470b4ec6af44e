"""Adapters of peft that trained biases, models that carry several, and what lies beside a model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from audio_lens import HookedAudioTransformer, LoadingError
from families import FAMILIES

peft = pytest.importorskip("peft")

FAMILY = {"whisper": "proj_out", "wav2vec2_ctc": "lm_head"}  # and the name of its head


@pytest.fixture(params=FAMILY)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def plain(family: str) -> transformers.PreTrainedModel:
    return FAMILIES[family].build(dtype=torch.float64)


def lora(*targets: str, **options: Any) -> Any:
    return peft.LoraConfig(r=2, target_modules=list(targets or ("q_proj", "v_proj")), **options)


def trained(model: Any) -> Any:
    """The model with all that peft trains made random."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or "lora_" in name or "modules_to_save" in name:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data += 0.3 * noise
    return model.to(torch.float64).eval()


def adapted(family: str, config: Any | None = None) -> Any:
    return trained(peft.get_peft_model(plain(family), config or lora()))


def saved(hf: Any, family: str, path: Path) -> tuple[Path, Path]:
    """Directories of the plain model and of the adapter."""
    plain(family).save_pretrained(path / "base")
    hf.save_pretrained(path / "adapter")
    return path / "base", path / "adapter"


def two(family: str, second: Any) -> Any:
    """A model with the adapters french, which saves the head, and german."""
    first = lora(modules_to_save=[FAMILY[family]])
    model = peft.get_peft_model(plain(family), first, adapter_name="french")
    model.add_adapter("german", second)
    return trained(model)


def difference(model: HookedAudioTransformer, hf: Any, family: str) -> float:
    batch = FAMILIES[family].batch(dtype=torch.float64)
    with torch.no_grad(), model.attention("explicit"):
        theirs, ours = hf(**batch).logits, model(batch)
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def agrees(model: HookedAudioTransformer, hf: Any, family: str) -> bool:
    return difference(model, hf, family) < 1e-12


# -------------------------------------------------------------------------------- biases


@pytest.mark.mostly_slow(4)
@pytest.mark.parametrize("bias", ["lora_only", "all"])
@pytest.mark.parametrize("whole", [None, ["lm_head", "layer_norm"]], ids=["", "and whole modules"])
def test_trained_biases_load_from_directories(
    family: str, bias: str, whole: list[str] | None, tmp_path: Path
) -> None:
    hf = adapted(family, lora(bias=bias, modules_to_save=whole))
    base, path = saved(hf, family, tmp_path)
    live = HookedAudioTransformer.from_pretrained(base, adapter=path)
    assert agrees(live, hf, family)
    assert agrees(
        HookedAudioTransformer.from_pretrained(base, adapter=path, merge=True), hf, family
    )
    with live.lora_disabled():  # which peft itself cannot give back
        assert agrees(live, plain(family), family)
    assert agrees(live, hf, family)


def test_biases_lost_in_memory_are_told(family: str, caplog: pytest.LogCaptureFixture) -> None:
    hf = adapted(family, lora(bias="lora_only"))
    with caplog.at_level(logging.WARNING):
        model = HookedAudioTransformer.from_hf(hf)
    assert "switching the adapter off leaves them trained" in caplog.text
    assert agrees(model, hf, family)
    with model.lora_disabled(), hf.disable_adapter():
        assert agrees(model, hf, family)


# -------------------------------------------------------------------------------- several adapters


SECOND = {
    "saves the head too": lambda family: lora(modules_to_save=[FAMILY[family]]),
    "saves nothing": lambda family: lora(),
    "other modules": lambda family: lora("k_proj", modules_to_save=["layer_norm"]),
    "dora": lambda family: lora(use_dora=True),
    "biases of its own": lambda family: lora(lora_bias=True),
}


@pytest.mark.mostly_slow(3)
@pytest.mark.parametrize("second", SECOND)
def test_switching_between_adapters(family: str, second: str) -> None:
    hf = two(family, SECOND[second](family))
    hf.set_adapter("french")
    french = HookedAudioTransformer.from_hf(hf)
    assert agrees(french, hf, family)
    hf.set_adapter("german")
    if second in ("dora", "biases of its own"):
        with pytest.raises(LoadingError, match="'german' asks for what is not implemented"):
            HookedAudioTransformer.from_hf(hf)
        return
    for merge in (False, True):
        german = HookedAudioTransformer.from_hf(hf, merge=merge)
        assert agrees(german, hf, family)
    assert difference(french, hf, family) > 1e-3  # the one taken over before stays as it was
    hf.set_adapter("french")
    assert agrees(french, hf, family) and agrees(HookedAudioTransformer.from_hf(hf), hf, family)


def test_inactive_adapters_of_embeddings_and_tokens_are_left_out() -> None:
    for other in (lora("embed_tokens"), lora(trainable_token_indices=[3, 5])):
        hf = two("whisper", other)
        hf.set_adapter("french")
        assert agrees(HookedAudioTransformer.from_hf(hf), hf, "whisper")


def test_adapters_of_transformers_own(family: str) -> None:
    hf = plain(family)
    hf.add_adapter(lora(modules_to_save=[FAMILY[family]]), "french")
    hf.add_adapter(lora("k_proj", modules_to_save=[FAMILY[family]]), "german")
    trained(hf)
    for name in ("french", "german"):
        hf.set_adapter(name)
        assert agrees(HookedAudioTransformer.from_hf(hf), hf, family)
    hf.disable_adapters()
    model = HookedAudioTransformer.from_hf(hf)
    assert not model.lora.enabled and agrees(model, hf, family)


def test_models_without_their_adapters_again(family: str) -> None:
    hf = adapted(family)
    assert agrees(HookedAudioTransformer.from_hf(hf.merge_and_unload()), hf, family)
    assert agrees(HookedAudioTransformer.from_hf(hf), hf, family)  # what wrapped it holds none


def layer_of(hf: Any) -> tuple[str, Any]:
    return next((path, m) for path, m in hf.named_modules() if hasattr(m, "lora_A"))


def test_mixed_states_are_refused_by_name(family: str) -> None:
    hf = two(family, lora())
    hf.base_model.set_adapter(["french", "german"])
    with pytest.raises(LoadingError, match=r"2 adapters are active \(french, german\)"):
        HookedAudioTransformer.from_hf(hf)
    hf.set_adapter("french")
    layer_of(hf)[1].set_adapter("german")
    with pytest.raises(LoadingError, match="uses the adapter german, and the model is set to 'fre"):
        HookedAudioTransformer.from_hf(hf)
    hf.set_adapter("french")
    layer_of(hf)[1].enable_adapters(False)
    with pytest.raises(LoadingError, match="switched off in places"):
        HookedAudioTransformer.from_hf(hf)


def test_directories_of_several_are_told(tmp_path: Path) -> None:
    base, path = saved(two("whisper", lora()), "whisper", tmp_path)
    with pytest.raises(LoadingError, match="those in it do: french, german"):
        HookedAudioTransformer.from_pretrained(base, adapter=path)


# -------------------------------------------------------------------------------- other kinds


KINDS = {
    "IA3": lambda: peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    "ADALORA": lambda: peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10),
    "VERA": lambda: peft.VeraConfig(target_modules=["q_proj"]),
    "LN_TUNING": lambda: peft.LNTuningConfig(target_modules=["layer_norm"]),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}
SWITCHES = {
    "use_dora=True": {"use_dora": True},
    "lora_bias=True": {"lora_bias": True},
    "use_qalora=True": {"use_qalora": True},
    "trainable_token_indices": {"trainable_token_indices": [3]},
    "adapters of embeddings": {"target_modules": ["embed_tokens"]},
    "adapters of convolutions": {"target_modules": ["conv1"]},
}


@pytest.mark.parametrize("kind", [*KINDS, *SWITCHES])
def test_kinds_are_refused_by_name_wherever_they_lie(kind: str, tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj"], **SWITCHES.get(kind, {})}
    made = KINDS[kind]() if kind in KINDS else peft.LoraConfig(r=4, **options)
    hf = peft.get_peft_model(plain("whisper"), made)
    base, path = saved(hf, "whisper", tmp_path)
    with pytest.raises(LoadingError, match=kind):
        HookedAudioTransformer.from_hf(hf)
    with pytest.raises(LoadingError, match=kind):
        HookedAudioTransformer.from_pretrained(base, adapter=path)
    hf.save_pretrained(base)  # beside the model
    with pytest.raises(LoadingError, match=kind):
        HookedAudioTransformer.from_pretrained(base)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_that_change_the_base(start: str, tmp_path: Path) -> None:
    """In memory the base is what it was changed to; in a directory it is not."""
    hf = peft.get_peft_model(plain("whisper").float(), lora(init_lora_weights=start))
    base, path = saved(hf, "whisper", tmp_path)
    assert agrees(HookedAudioTransformer.from_hf(trained(hf)), hf, "whisper")
    for load in (
        lambda: HookedAudioTransformer.from_pretrained(base, adapter=path),
        lambda: hf.save_pretrained(base) or HookedAudioTransformer.from_pretrained(base),
    ):
        with pytest.raises(LoadingError, match=f"init_lora_weights='{start}', which also changes"):
            load()


# -------------------------------------------------------------------------------- beside a model


def test_without_peft_an_adapter_beside_a_model_is_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = adapted("whisper")
    base, path = saved(hf, "whisper", tmp_path)
    hf.save_pretrained(base)
    assert agrees(HookedAudioTransformer.from_pretrained(base), hf, "whisper")
    for place in ("transformers.integrations.peft", "audio_lens.models.loading.adapted"):
        monkeypatch.setattr(f"{place}.is_peft_available", lambda: False)
    with pytest.raises(LoadingError, match=r"takes peft: pip install 'audio_lens\[lora\]'"):
        HookedAudioTransformer.from_pretrained(base)
    (base / "adapter_config.json").unlink()
    model = HookedAudioTransformer.from_pretrained(base, adapter=path)
    assert agrees(model, hf, "whisper")


def test_what_transformers_cannot_read_beside_a_model_is_told(tmp_path: Path) -> None:
    """wav2vec 2.0 has a method of its own by the name of the one that would read it."""
    hf = adapted("wav2vec2_ctc")
    base, _ = saved(hf, "wav2vec2_ctc", tmp_path)
    hf.save_pretrained(base)
    with pytest.raises(LoadingError, match="cannot read the adapter that lies beside the model"):
        HookedAudioTransformer.from_pretrained(base)
