"""Models split over devices: activations move at borders, and nothing else changes.

Where no second device exists, one is made up: tensors that say they lie on a device of a kind no
machine has, hold their numbers on the CPU, and refuse to meet tensors of any other device.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from audio_lens import HookedAudioTransformer, metrics, patching
from audio_lens.models.loading import placement
from audio_lens.models.loading.lora import LoraLinear
from audio_lens.models.loading.placement import PlacementError, layout, unit_of
from patching.loops import assert_equals_loop
from tiny import hf_inputs, tiny_hf

ONE, TWO, CPU = torch.device("maia:1"), torch.device("maia:2"), torch.device("cpu")
SPLITS: dict[str, Any] = {
    "encoder apart": {"encoder": ONE, "decoder": CPU},
    "decoder in two": {"encoder": CPU, "decoder": [CPU, ONE]},
    "everything": {"encoder": [TWO, ONE], "decoder": [CPU, ONE, TWO]},
    "balanced": [TWO, CPU, ONE],
}


# -------------------------------------------------------------------------------- devices made up


class Elsewhere(Tensor):
    """A tensor on a made-up device; `numbers` holds its values."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, real: Tensor, device: torch.device) -> Elsewhere:
        made = Tensor._make_wrapper_subclass(
            cls, real.shape, strides=real.stride(), dtype=real.dtype, device=device
        )
        made.numbers = real
        return made

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(op, args, kwargs or {})

    def __getitem__(self, index: Any) -> Tensor:
        return _run(_at, (self, index), {})

    def __invert__(self) -> Tensor:
        return torch.bitwise_not(self)

    def tolist(self) -> Any:
        return self.numbers.tolist()

    def data_ptr(self) -> int:
        return self.numbers.data_ptr()


def _at(x: Tensor, index: Any) -> Tensor:
    return x[index]


class Machine(TorchDispatchMode):
    """Makes tensors on made-up devices, and counts what moves between devices."""

    def __init__(self) -> None:
        super().__init__()
        self.moves: list[tuple[torch.device, torch.device, int]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        to = _target(op, args, kwargs)
        if op.name() in _MOVES and to not in (None, args[0].device):
            self.moves.append((args[0].device, to, args[0].numel()))
        return _run(op, args, kwargs)


_MOVES = ("aten::_to_copy", "aten::to.device", "aten::to.dtype_layout", "aten::to.other")


def _target(op: Any, args: Any, kwargs: dict[str, Any]) -> torch.device | None:
    """The device that an operation is told to write to."""
    if op is torch.ops.aten.to.other:
        return args[1].device
    named = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.device)]
    return named[0] if named else None


def _plain(x: Any) -> Any:
    if isinstance(x, torch.device):
        return x if x.type == "meta" else CPU
    return x.numbers if isinstance(x, Elsewhere) else x


def _run(op: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation on the numbers of its arguments, if those lie on one device."""
    given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    devices = {x.device for x in given if x.ndim or x.device != CPU}
    to = _target(op, args, kwargs)
    is_transfer = to is not None or op is torch.ops.aten.copy_.default
    if len(devices) > 1 and not is_transfer:
        raise RuntimeError(f"{op} on tensors of several devices: {devices}")
    device = to or (given[0].device if is_transfer and given else (devices or {CPU}).pop())
    held = {id(x.numbers): x for x in given if isinstance(x, Elsewhere)}
    args, kwargs = tree_map(_plain, (args, kwargs))
    with torch._C._DisableTorchDispatch():
        out = op(*args, **kwargs)

    def wrapped(x: Any) -> Any:
        if not isinstance(x, Tensor) or device.type in ("cpu", "meta"):
            return x
        return held[id(x)] if id(x) in held else Elsewhere(x, device)

    return tree_map(wrapped, out)


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


def on_cpu(x: Any) -> Any:
    return x.numbers if isinstance(x, Elsewhere) else x


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


def test_attribution_says_that_it_needs_one_device(
    family: str, whole: HookedAudioTransformer
) -> None:
    with Machine(), torch.no_grad():
        model = split_like(whole, {"encoder": ONE, "decoder": [CPU, TWO]})
        batch = model.as_inputs(hf_inputs(family))
        with pytest.raises(PlacementError, match=r"attribution needs the model on one device"):
            patching.attribute(
                model,
                clean=batch,
                corrupted=batch,
                axes="layer",
                metric=metrics.logit_diff(7, 9),
            )


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
    batch = whole.as_inputs(hf_inputs(family))
    with pytest.raises(PlacementError, match=r"attribution needs the model on one device"):
        patching.attribute(
            model, clean=batch, corrupted=batch, site="decoder.resid_pre", metric=lambda x: x
        )
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
