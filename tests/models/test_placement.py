"""Models split over devices: activations move at borders, and nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from audio_lens import HookedAudioTransformer, metrics, patching
from audio_lens.models.loading import placement
from audio_lens.models.loading.lora import LoraLinear
from audio_lens.models.loading.placement import PlacementError, layout, unit_of
from devices import CPU, HAVE_GRADIENTS, ONE, TWO, Machine, on_cpu
from patching.loops import assert_equals_loop
from tiny import hf_inputs, tiny_hf

SPLITS: dict[str, Any] = {
    "encoder apart": {"encoder": ONE, "decoder": CPU},
    "decoder in two": {"encoder": CPU, "decoder": [CPU, ONE]},
    "everything": {"encoder": [TWO, ONE], "decoder": [CPU, ONE, TWO]},
    "balanced": [TWO, CPU, ONE],
}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """A machine with as many devices as one asks for."""
    tensor = torch.tensor

    def made(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        made = tensor(data, **options)
        return made if device is None else made.to(device)

    monkeypatch.setattr(torch, "tensor", made)  # makes its tensors where no mode sees it
    with Machine() as machine, torch.no_grad():
        yield machine


@pytest.fixture
def whole(family: str) -> HookedAudioTransformer:
    return HookedAudioTransformer.from_hf(tiny_hf(family))


def split_like(model: HookedAudioTransformer, devices: Any) -> HookedAudioTransformer:
    return copy.deepcopy(model).place(devices)


# -------------------------------------------------------------------------------- what moves


def test_made_up_devices_refuse_to_mix(machine: Machine) -> None:
    x = torch.ones(2, device=ONE)
    assert x.device == ONE and (x + x).device == ONE and (x * 2.0).sum().item() == 4
    with pytest.raises(RuntimeError, match="several devices"):
        _ = x + torch.ones(2)


@pytest.mark.mostly_slow(2)
@pytest.mark.parametrize("devices", SPLITS.values(), ids=SPLITS)
def test_logits_and_caches_are_the_same(
    family: str, whole: HookedAudioTransformer, machine: Machine, devices: Any
) -> None:
    batch = hf_inputs(family)
    expected, cached = whole.run_with_cache(batch)
    model = split_like(whole, devices)
    assert model.is_split and not whole.is_split
    logits, cache = model.run_with_cache(model.as_inputs(batch))
    assert logits.device == model.device
    assert torch.allclose(on_cpu(logits), expected, atol=1e-5)
    for name in cached:
        assert torch.allclose(on_cpu(cache[name]), cached[name], atol=1e-4), name
        if ".blocks." in name:
            block = model.get_submodule(".".join(name.split(".")[:3]))
            assert cache[name].device == next(block.parameters()).device
    for part in model.cfg.parts:
        assert model.part(part).cfg.device == model.device_of(part)


def test_only_borders_are_crossed(family: str, whole: HookedAudioTransformer) -> None:
    """One move of the stream per border, one of masks and positions per device: no more."""
    batch = whole.as_inputs(hf_inputs(family, lengths=(201,), words=(6,)))
    with Machine() as machine, torch.no_grad():
        model = split_like(whole, {"encoder": CPU, "decoder": [CPU, ONE]})
        machine.moves.clear()
        model(batch)
    width = model.cfg.decoder.d_model * batch.tokens.numel()
    streams = [(a, b) for a, b, size in machine.moves if size == width]
    assert streams == [(CPU, ONE), (ONE, CPU)]
    assert len(machine.moves) <= 5, machine.moves


def test_hooks_generation_and_layers(
    family: str, whole: HookedAudioTransformer, machine: Machine
) -> None:
    prompts = hf_inputs(family, words=(4, 4), lengths=(201, 201))
    model = split_like(whole, {"encoder": [ONE, TWO], "decoder": [CPU, ONE]})
    hooks = [
        (name, lambda x, hook: x * 1.5)
        for name in ("encoder.blocks.2.hook_resid_pre", "decoder.blocks.2.attn.hook_pattern")
    ]
    outputs = []
    for one in (whole, model):
        one.generation_config = transformers.GenerationConfig(eos_token_id=2, pad_token_id=0)
        batch = one.as_inputs(prompts)
        logits = one.run_with_hooks(batch, fwd_hooks=hooks)
        written = one.generate(batch, 4, return_type="tokens")
        resid = one(batch, stop_at_layer=2)
        onwards = one(resid, start_at_layer=2, inputs=batch)
        outputs.append([logits, written, resid, onwards])
    for one, other in zip(*outputs, strict=True):
        assert torch.allclose(on_cpu(one).float(), on_cpu(other).float(), atol=1e-4)


def test_weights_of_all_blocks_come_together(
    family: str, whole: HookedAudioTransformer, machine: Machine
) -> None:
    model = split_like(whole, [CPU, ONE])
    part = model.part("decoder")
    assert part.W_O.device == part.cfg.device
    assert torch.equal(on_cpu(part.W_O), whole.part("decoder").W_O)


ATTRIBUTED = {
    "atp": ["encoder.resid_pre", "decoder.attn.z"],
    "ig": ["encoder.attn.z", "decoder.mlp_out"],
    "qk_fix": ["decoder.attn.k", "encoder.attn.q"],
    "grad_drop": ["decoder.resid_pre"],
    "atp*": ["encoder.attn.k"],
}


@pytest.mark.skipif(not HAVE_GRADIENTS, reason="this torch has no made-up devices with gradients")
@pytest.mark.parametrize("encoder", [ONE, CPU], ids=str)
@pytest.mark.parametrize(
    "method", ["atp", *(pytest.param(m, marks=pytest.mark.slow) for m in ATTRIBUTED if m != "atp")]
)
def test_attribution_is_that_of_one_device(
    family: str,
    whole: HookedAudioTransformer,
    machine: Machine,
    method: Any,
    encoder: torch.device,
) -> None:
    model = split_like(whole, {"encoder": encoder, "decoder": [CPU, ONE]})
    assert model.is_split
    found: list[Any] = [
        patching.attribute(
            one,
            clean=one.as_inputs(hf_inputs(family, seed=0)),
            corrupted=one.as_inputs(hf_inputs(family, seed=1)),
            site=ATTRIBUTED[method],
            axes="layer",
            metric=metrics.logit_diff(7, 9),
            method=method,
            progress=False,
        )
        for one in (whole, model)
    ]
    for site, expected in found[0].items():
        torch.testing.assert_close(found[1][site].values, expected.values, rtol=1e-4, atol=1e-4)
        assert (expected.values - expected.corrupted[:, None]).abs().max() > 1e-3


def test_sweep_is_the_loop(family: str, whole: HookedAudioTransformer, machine: Machine) -> None:
    model = split_like(whole, {"encoder": ONE, "decoder": [CPU, TWO]})
    clean, corrupted = (model.as_inputs(hf_inputs(family, seed=seed)) for seed in (0, 1))
    for site, layers in (("decoder.resid_pre", [0, 2]), ("encoder.attn.z", [1])):
        options = {
            "clean": clean,
            "corrupted": corrupted,
            "site": site,
            "axes": ("layer",),
            "layers": layers,
            "metric": metrics.logit_diff(7, 9),
        }
        result = patching.sweep(model, progress=False, **options)
        assert_equals_loop(whole, result, **options)
        assert any("several devices" in note for note in result.report)


def test_collecting_on_one_device(
    family: str, whole: HookedAudioTransformer, machine: Machine
) -> None:
    model = split_like(whole, [ONE, CPU, TWO])
    assert model.place(ONE).device == ONE
    assert not model.is_split and not model._borders


def test_live_adapters_are_split_too(whole_lora: HookedAudioTransformer, machine: Machine) -> None:
    batch = hf_inputs("whisper")
    model = split_like(whole_lora, {"encoder": ONE, "decoder": [CPU, TWO]})
    last = model.decoder.blocks[-1].attn.q_proj
    assert isinstance(last, LoraLinear) and last.lora_A.device == TWO
    assert torch.allclose(on_cpu(model(batch)), whole_lora(batch), atol=1e-5)


@pytest.fixture
def whole_lora() -> HookedAudioTransformer:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    return HookedAudioTransformer.from_hf(peft.get_peft_model(tiny_hf("whisper"), config).eval())


def test_reading_straight_onto_devices(family: str, tmp_path: Path, machine: Machine) -> None:
    hf = tiny_hf(family)
    hf.save_pretrained(tmp_path)
    batch, expected = hf_inputs(family), HookedAudioTransformer.from_hf(hf)
    machine.moves.clear()
    model = HookedAudioTransformer.from_pretrained(
        tmp_path, devices={"encoder": ONE, "decoder": [CPU, TWO]}
    )
    away = sum(p.numel() for p in model.parameters() if p.device != CPU)
    assert sum(size for _, to, size in machine.moves if to in (ONE, TWO)) == away  # once each
    assert {p.device for p in model.parameters()} == {CPU, ONE, TWO}
    assert torch.allclose(on_cpu(model(batch)), expected(batch), atol=1e-5)


# -------------------------------------------------------------------------------- what goes where


def test_units() -> None:
    assert unit_of("decoder.blocks.12.attn.q_proj.weight") == "decoder.blocks.12"
    assert unit_of("decoder.blocks.1") == "decoder.blocks.1"
    for name in ("decoder.blocks.0.ln1.weight", "decoder.unembed.weight", "decoder"):
        assert unit_of(name) == "decoder"
    for name in ("encoder.conv1.weight", "connector.blocks.3.ln1.weight", "frontend.ln.bias"):
        assert unit_of(name) == "encoder"


def test_bytes_are_balanced_in_order() -> None:
    sizes = {"encoder.conv1.weight": 10}
    sizes |= {f"encoder.blocks.{i}.w": 10 for i in range(1, 4)}
    sizes |= {"connector.w": 10, "decoder.token_embed.weight": 40}
    sizes |= {f"decoder.blocks.{i}.w": 10 for i in range(1, 12)}
    placed = layout(
        {name: torch.zeros(n, dtype=torch.uint8) for name, n in sizes.items()}, [CPU, ONE, TWO]
    )
    held = {device: 0 for device in (CPU, ONE, TWO)}
    for name, size in sizes.items():
        held[placed[unit_of(name)]] += size
    assert list(held.values()) == [50, 80, 70] or max(held.values()) <= 90, held
    order = [(CPU, ONE, TWO).index(device) for device in placed.values()]
    assert order == sorted(order)


def test_tied_weights_count_once_and_stay_tied(machine: Machine) -> None:
    whole = HookedAudioTransformer.from_hf(tiny_hf("whisper"))
    state = whole.state_dict(keep_vars=True)
    assert sum(placement._sizes(state).values()) == sum(p.nbytes for p in whole.parameters())
    model = split_like(whole, [ONE, CPU])
    assert model.decoder.unembed.weight.device == model.decoder.token_embed.weight.device


@pytest.mark.parametrize(
    "devices, message",
    [
        ({"encoder": "cpu"}, "devices are for encoder; the parts are encoder and decoder"),
        ({"encoder": "cpu", "decoder": "cpu", "ear": "cpu"}, "for encoder, decoder, ear; the"),
        ({"encoder": [], "decoder": "cpu"}, "devices is empty"),
        ("gpu", r"no such device: gpu \(cpu, cuda"),
        ("cuda:97", r"no such device: cuda:97 \(\d+ CUDA devices are visible\)"),
    ],
)
def test_devices_that_are_refused(devices: Any, message: str) -> None:
    model = HookedAudioTransformer.from_hf(tiny_hf("whisper"))
    with pytest.raises(PlacementError, match=message):
        model.place(devices)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are devices")
def test_auto_needs_devices(tmp_path: Path) -> None:
    tiny_hf("whisper").save_pretrained(tmp_path)
    with pytest.raises(PlacementError, match="and none is visible"):
        HookedAudioTransformer.from_pretrained(tmp_path, devices="auto")
    with pytest.raises(ValueError, match="not both"):
        HookedAudioTransformer.from_pretrained(tmp_path, device="cpu", devices="auto")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_on_real_devices(family: str, whole: HookedAudioTransformer) -> None:
    model = split_like(whole, "auto")
    assert {p.device.index for p in model.parameters()} == set(range(torch.cuda.device_count()))
    logits = model(model.as_inputs(hf_inputs(family)))
    assert torch.allclose(logits.cpu(), whole(hf_inputs(family)), atol=1e-4)
