"""LoRA adapters of peft: live, switched off and merged, from directories and from memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from audio_lens import HookedAudioTransformer, LoadingError, metrics
from audio_lens.hooks import DeadHookError
from audio_lens.models.loading.lora import LoraError
from patching.loops import assert_exact, evenly
from tiny import hf_inputs, tiny_hf

peft = pytest.importorskip("peft")

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj"]},
    "several": {"target_modules": ["q_proj", "v_proj", "out_proj", "o_proj", "fc2", "down_proj"]},
    "all": {"target_modules": "all-linear"},
    "rslora": {"target_modules": ["k_proj"], "r": 4, "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 3},
        "alpha_pattern": {"layers.0.self_attn.v_proj": 11},
    },
    "saved": {"target_modules": ["v_proj"], "modules_to_save": ["layer_norm", "norm"]},
}


def adapted(family: str, dtype: torch.dtype = torch.float64, **config: Any) -> Any:
    """A tiny model with a random adapter, wrapped by peft."""
    options = {"target_modules": ["q_proj"], "r": 2, "lora_alpha": 5} | config
    torch.manual_seed(0)
    model = peft.get_peft_model(
        tiny_hf(family, dtype=dtype), peft.LoraConfig(init_lora_weights=False, **options)
    )
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data += 0.3 * noise.to(parameter)
    return model.to(dtype).eval()


def saved(family: str, path: Path, **options: Any) -> tuple[Any, Path, Path]:
    """The same with base and adapter on disk."""
    model = adapted(family, **options)
    tiny_hf(family, dtype=model.dtype).save_pretrained(path / "base")
    model.save_pretrained(path / "adapter")
    return model, path / "base", path / "adapter"


def batch_of(family: str, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    return hf_inputs(family, dtype=dtype)


def agrees(model: HookedAudioTransformer, hf: Any, batch: dict, tolerance: float = 1e-12) -> bool:
    with torch.no_grad(), model.attention("explicit"):
        theirs, ours = hf(**batch).logits, model(batch)
    attended = model.as_inputs(batch).attended
    largest = theirs[attended].abs().max()
    return bool((ours - theirs)[attended].abs().max() <= tolerance * largest)


def edit(path: Path, change: Callable[[dict], Any]) -> None:
    file = path / "adapter_config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


# -------------------------------------------------------------------------------- parity with peft


@pytest.mark.mostly_slow(3)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_live_disabled_and_merged_agree_with_peft(
    family: str, config: dict, tmp_path: Path
) -> None:
    hf, base, path = saved(family, tmp_path, **config)
    batch = batch_of(family)
    for model in (
        HookedAudioTransformer.from_pretrained(base, adapter=path),
        HookedAudioTransformer.from_hf(hf),
    ):
        assert agrees(model, hf, batch)
        assert model.lora.enabled
        with model.lora_disabled(), hf.disable_adapter():
            assert agrees(model, hf, batch)
        assert agrees(model, hf, batch)
    for merged in (
        HookedAudioTransformer.from_pretrained(base, adapter=path, merge=True),
        HookedAudioTransformer.from_hf(hf, merge=True),
    ):
        assert agrees(merged, hf, batch)
        with pytest.raises(LoraError, match="carries no live adapter"):
            _ = merged.lora
    assert agrees(HookedAudioTransformer.from_hf(hf), hf, batch)  # merging left it as it was


def test_half_precision_agrees_with_peft(family: str, tmp_path: Path) -> None:
    """The low-rank path runs in float32 beside half-precision weights, as in peft."""
    hf, base, path = saved(family, tmp_path, dtype=torch.bfloat16)
    loaded = peft.PeftModel.from_pretrained(
        type(hf.get_base_model()).from_pretrained(base, attn_implementation="sdpa"), path
    ).eval()
    model = HookedAudioTransformer.from_pretrained(base, adapter=path)
    assert next(iter(model.lora.linears.values())).lora_A.dtype == torch.float32
    assert model.dtype == torch.bfloat16
    assert agrees(model, loaded, batch_of(family, torch.bfloat16), 0.03)


def test_an_adapter_names_its_base(family: str, tmp_path: Path) -> None:
    hf, base, path = saved(family, tmp_path)
    with pytest.raises(LoadingError, match="does not say what the adapter is for"):
        HookedAudioTransformer.from_pretrained(path)
    edit(path, lambda config: config.update(base_model_name_or_path=str(base)))
    model = HookedAudioTransformer.from_pretrained(path)
    assert model.cfg.model_name == str(path)
    assert agrees(model, hf, batch_of(family))


def test_keys_of_older_transformers(tmp_path: Path) -> None:
    """Adapters trained before transformers 5 name the modules as the hub's checkpoints do."""
    hf, base, path = saved("qwen2_audio", tmp_path)
    file = path / "adapter_model.safetensors"
    older = {
        key.replace("model.model.language_model.", "model.language_model.model.").replace(
            "model.model.audio_tower.", "model.audio_tower."
        ): tensor
        for key, tensor in load_file(file).items()
    }
    save_file(older, file)
    model = HookedAudioTransformer.from_pretrained(base, adapter=path)
    assert agrees(model, hf, batch_of("qwen2_audio"))


def test_training_drops_as_peft_does() -> None:
    hf = adapted("whisper", lora_dropout=0.5).train()
    model = HookedAudioTransformer.from_hf(hf)
    assert model.training
    outputs = []
    for run in (model, hf):
        torch.manual_seed(0)
        layer = run.get_submodule(
            "decoder.blocks.0.attn.q_proj"
            if run is model
            else "base_model.model.model.decoder.layers.0.self_attn.q_proj"
        )
        outputs.append(layer(torch.ones(2, 3, 32, dtype=torch.float64)))
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], layer.eval()(torch.ones(2, 3, 32, dtype=torch.float64)))


# -------------------------------------------------------------------------------- hooks and switch


@pytest.fixture
def live(family: str) -> HookedAudioTransformer:
    """A model with a live adapter on everything a sweep reads weights of."""
    return HookedAudioTransformer.from_hf(adapted(family, **CONFIGS["all"]))


def test_low_rank_path_is_hooked(family: str, live: HookedAudioTransformer) -> None:
    batch, name = batch_of(family), "decoder.blocks.1.attn.q_proj"
    linear = live.lora.linears[name]
    logits, cache = live.run_with_cache(batch)
    low, added = cache[f"{name}.hook_lora_A"], cache[f"{name}.hook_lora_B"]
    assert low.shape[-1] == 2 and added.shape[-1] == linear.out_features
    assert torch.allclose(added, linear.scale * low @ linear.lora_B.T)
    q = cache["decoder.blocks.1.attn.hook_q"].flatten(2)
    assert torch.allclose(q, linear.base(cache_input(live, batch)) + added)
    zeroed = live.run_with_hooks(batch, fwd_hooks=[(f"{name}.hook_lora_A", lambda x, hook: x * 0)])
    linear.enabled = False
    assert torch.allclose(zeroed, live(batch), atol=1e-12)
    assert not torch.allclose(zeroed, logits)


def test_positions_of_the_low_rank_path() -> None:
    """Of cross-attention's keys and values it lies on the encoder's positions."""
    model = HookedAudioTransformer.from_hf(adapted("whisper", **CONFIGS["all"]))
    _, cache = model.run_with_cache(batch_of("whisper"), pos_slice=slice(0, 2))
    assert cache["decoder.blocks.0.cross_attn.q_proj.hook_lora_A"].shape[1] == 2
    assert "decoder.blocks.0.cross_attn.k_proj.hook_lora_A" not in cache


def cache_input(model: HookedAudioTransformer, batch: dict) -> torch.Tensor:
    """What the queries of the decoder's block 1 are made of."""
    block, (_, cache) = model.decoder.blocks[1], model.run_with_cache(batch)
    return block.ln1(cache["decoder.blocks.1.hook_resid_pre"])


def test_switch(family: str, live: HookedAudioTransformer) -> None:
    batch, base = (
        batch_of(family),
        HookedAudioTransformer.from_hf(tiny_hf(family, dtype=torch.float64)),
    )
    assert "enabled" in repr(live.lora) and not torch.allclose(live(batch), base(batch))
    live.lora.enabled = False
    assert not live.lora.enabled and torch.equal(live(batch), base(batch))
    assert torch.equal(live.part("decoder").W_Q, base.part("decoder").W_Q)
    with live.lora_disabled():
        pass
    assert not live.lora.enabled  # a with block leaves it as it found it
    with pytest.raises(DeadHookError):
        live.run_with_hooks(
            batch,
            fwd_hooks=[("decoder.blocks.0.attn.q_proj.hook_lora_A", lambda x, hook: x)],
        )
    with pytest.raises(LoraError, match="carries no live adapter"), base.lora_disabled():
        pass


def test_generation_and_moving(family: str, live: HookedAudioTransformer) -> None:
    prompts = hf_inputs(family, words=(4, 4), lengths=(201, 201), dtype=torch.float64)
    merged = HookedAudioTransformer.from_hf(adapted(family, **CONFIGS["all"]), merge=True)
    for model in (live, merged):
        model.generation_config = transformers.GenerationConfig(eos_token_id=2, pad_token_id=0)
    written = [model.generate(prompts, 5, return_type="tokens") for model in (live, merged)]
    assert torch.equal(*written)
    assert live.to(torch.float32).decoder.blocks[0].attn.q_proj.weight.dtype == torch.float32


def test_gradients_reach_the_adapter(family: str, live: HookedAudioTransformer) -> None:
    live(batch_of(family), return_type="loss").backward()
    assert all(one.lora_A.grad.abs().sum() > 0 for one in live.lora.linears.values())


@pytest.mark.mostly_slow(3)
@pytest.mark.parametrize(
    "site", ["decoder.resid_pre", "decoder.mlp.post", "decoder.attn.z", "decoder.attn.v"]
)
def test_sweep_is_the_loop(family: str, live: HookedAudioTransformer, site: str) -> None:
    """The engine reads weights where it adds differences: these are the effective ones."""
    clean, corrupted = (
        live.as_inputs(hf_inputs(family, seed=seed, dtype=torch.float64)) for seed in (0, 1)
    )
    assert_exact(
        live,
        evenly(16),
        clean=clean,
        corrupted=corrupted,
        site=site,
        axes=("layer", "position"),
        metric=metrics.logit_diff(7, 9),
    )


# -------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "change, message",
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"something_new": {"k": 1}}, "something_new"),
        ({"peft_type": "IA3"}, "of kind 'IA3'; only LoRA"),
        ({"init_lora_weights": "pissa"}, "also changes the base model"),
        ({"target_modules": ["q_proj", "fc1"]}, "lists fc1 and holds no weights for it"),
    ],
)
def test_variants_are_refused_by_name(tmp_path: Path, change: dict, message: str) -> None:
    _, base, path = saved("whisper", tmp_path)
    edit(path, lambda config: config.update(change))
    with pytest.raises(LoadingError, match=message):
        HookedAudioTransformer.from_pretrained(base, adapter=path)


def change_weights(path: Path, change: Callable[[dict], Any]) -> None:
    file = path / "adapter_model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.pop(next(k for k in w if "lora_B" in k)), "only one of lora_A and lora_B"),
        (lambda w: w.clear(), "no lora_A and lora_B at all"),
        (
            lambda w: (
                w.update({"base_model.model.new.q_proj.lora_A.weight": torch.ones(2, 32)})
                or w.update({"base_model.model.new.q_proj.lora_B.weight": torch.ones(32, 2)})
            ),
            r"does not have: new\.q_proj\.weight",
        ),
        (lambda w: w.update({"base_model.model.odd.weight": torch.ones(2)}), r"odd\.weight"),
        (
            lambda w: w.update({"base_model.model.a.lora_magnitude_vector": torch.ones(2)}),
            "lora_magnitude_vector",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path: Path, change: Any, message: str) -> None:
    _, base, path = saved("whisper", tmp_path)
    change_weights(path, change)
    with pytest.raises(LoadingError, match=message):
        HookedAudioTransformer.from_pretrained(base, adapter=path)


def test_an_adapter_of_another_size_is_refused(tmp_path: Path) -> None:
    _, _, path = saved("whisper", tmp_path)
    tiny_hf("whisper", d_model=16).save_pretrained(tmp_path / "small")
    with pytest.raises(LoadingError, match=r"q_proj\.weight is \(16, 16\) .* \(32, 32\)"):
        HookedAudioTransformer.from_pretrained(tmp_path / "small", adapter=path)


def test_directories_and_options_that_make_no_sense(tmp_path: Path) -> None:
    _, base, path = saved("whisper", tmp_path)
    with pytest.raises(LoadingError, match=r"holds no adapter_config\.json"):
        HookedAudioTransformer.from_pretrained(base, adapter=tmp_path)
    with pytest.raises(LoadingError, match="merge=True merges an adapter"):
        HookedAudioTransformer.from_pretrained(base, merge=True)
    with pytest.raises(LoadingError, match="the model carries none"):
        HookedAudioTransformer.from_hf(tiny_hf("whisper"), merge=True)
    (path / "adapter_model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(LoadingError, match=r"adapter_model\.safetensors is corrupt"):
        HookedAudioTransformer.from_pretrained(base, adapter=path)
    (path / "adapter_model.safetensors").unlink()
    with pytest.raises(LoadingError, match=r"holds no adapter_model\.safetensors"):
        HookedAudioTransformer.from_pretrained(base, adapter=path)


def test_adapters_in_memory_that_are_not_implemented() -> None:
    with pytest.raises(LoadingError, match="use_dora=True"):
        HookedAudioTransformer.from_hf(adapted("whisper", use_dora=True))
    merged = adapted("whisper")
    merged.merge_adapter()
    with pytest.raises(LoadingError, match="merged in place"):
        HookedAudioTransformer.from_hf(merged)
    with pytest.raises(LoadingError, match="adapters of convolutions are not implemented"):
        HookedAudioTransformer.from_hf(adapted("whisper", target_modules=["conv1"]))
    with pytest.raises(LoadingError, match="adapters of embeddings are not implemented"):
        HookedAudioTransformer.from_hf(adapted("whisper", target_modules=["embed_tokens"]))


REFUSAL = "The version of PEFT you are using is not compatible, please use a version >= 0.22.0"


def refuse(*_: Any, **__: Any) -> None:
    raise ValueError(REFUSAL)


def test_a_peft_that_transformers_refuses_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers 5.24 reads an adapter beside a model and then refuses to say which is active."""
    told = rf"pip install --upgrade 'audio_lens\[lora\]'.*transformers says: {REFUSAL}"
    hf, beside, _ = saved("whisper", tmp_path)
    hf.save_pretrained(beside)
    carrier = transformers.WhisperForConditionalGeneration.from_pretrained(beside)
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", refuse)
    for load in (
        lambda: HookedAudioTransformer.from_pretrained(beside),
        lambda: HookedAudioTransformer.from_hf(carrier),
    ):
        with pytest.raises(LoadingError, match=told) as raised:
            load()
        assert str(raised.value.__cause__) == REFUSAL


@pytest.mark.parametrize(
    "error", [ValueError(REFUSAL), ImportError("No module named 'peft.utils'")]
)
def test_a_refusal_while_reading_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    _, base, _ = saved("whisper", tmp_path)

    def from_pretrained(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(
        transformers.WhisperForConditionalGeneration, "from_pretrained", from_pretrained
    )
    with pytest.raises(LoadingError, match="transformers says") as raised:
        HookedAudioTransformer.from_pretrained(base)
    assert raised.value.__cause__ is error


def test_other_errors_of_transformers_do_not_blame_peft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, base, _ = saved("whisper", tmp_path / "my peft")

    def from_pretrained(*_: Any, **__: Any) -> None:
        raise ValueError(f"{base} is wrong")

    monkeypatch.setattr(
        transformers.WhisperForConditionalGeneration, "from_pretrained", from_pretrained
    )
    with pytest.raises(LoadingError, match=r"my peft.* cannot be loaded: .* is wrong") as raised:
        HookedAudioTransformer.from_pretrained(base)
    assert "pip install" not in str(raised.value)
