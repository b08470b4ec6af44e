"""What an adapter does to each layer: planted ranks and idle blocks, plain loops, random halves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from analysis import answering
from audio_lens import HookedAudioTransformer, Item, Items
from audio_lens.analysis import adapters, similarity
from audio_lens.analysis.adapters import wearing
from audio_lens.analysis.adapters.counting import needed
from audio_lens.analysis.adapters.outputs import Spots, outputs, redrawn
from audio_lens.errors import InputError
from audio_lens.items import demo_items
from audio_lens.models import LoraError
from families.whisper import build_classifier

pytest.importorskip("peft", reason="adapters need the extra 'lora'")
MODULES, RANK, N_LAYERS, IDLE = ("q_proj", "v_proj"), 4, 3, 1


def classifier(seed: int = 0) -> HookedAudioTransformer:
    """A random Whisper encoder of three blocks with seven classes."""
    model = HookedAudioTransformer.from_hf(build_classifier(seed, torch.float64))
    model.feature_extractor = transformers.WhisperFeatureExtractor(feature_size=model.cfg.n_mels)
    return model


def adapted(layers: tuple[int, ...] = (0, 1, 2), seed: int = 0) -> HookedAudioTransformer:
    """The same with a random adapter."""
    model = classifier()
    names = [f"encoder.blocks.{layer}.attn.{module}" for layer in layers for module in MODULES]
    wearing.put_on(model, dict.fromkeys(names, RANK), 2.0, seed)
    draw = torch.Generator().manual_seed(seed)
    for linear in model.lora.linears.values():
        nn.init.normal_(linear.lora_B, std=0.3, generator=draw)
    return model


def noise_items(count: int = 8, seed: int = 0) -> Items:
    """Clips of noise, some of which are shorter than others."""
    draw = np.random.default_rng(seed)
    return Items(
        Item(
            draw.uniform(-0.5, 0.5, 16_000 + 1600 * (number % 2)).astype(np.float32),
            answer=f"LABEL_{number % 7}",
            group=f"group {number % 4}",
            sampling_rate=16_000,
        )
        for number in range(count)
    )


def idle(model: HookedAudioTransformer, layer: int = IDLE) -> HookedAudioTransformer:
    """The model with a block that adds nothing."""
    block = model.encoder.blocks[layer]
    with torch.no_grad():
        for linear in (block.attn.o_proj, block.mlp.fc_out):
            linear.weight.zero_()
            linear.bias.zero_()
    return model


def cache_of(model: HookedAudioTransformer, item: Item) -> tuple[Any, dict[str, Tensor], Tensor]:
    """A run of one item alone, and its valid positions."""
    inputs = Items([item]).prepare(model)
    with torch.no_grad():
        logits, cache = model.run_with_cache(inputs, return_cache_object=False)
    return (inputs, logits), cache, model.timeline(inputs)[0].valid("encoder")


# -------------------------------------------------------------------------------- contributions


def test_contributions_are_those_of_the_plain_loop() -> None:
    model, items = adapted(), noise_items(3)
    result = adapters.contributions(model, items, progress=False)
    for number, item in enumerate(items):
        _, cache, valid = cache_of(model, item)
        for layer in range(N_LAYERS):
            at = {
                w: cache[f"encoder.blocks.{layer}.hook_{w}"][0, valid]
                for w in ("resid_pre", "attn_out", "mlp_out")
            }
            x = at.pop("resid_pre")
            ratios = {w: (one.norm(dim=1) / x.norm(dim=1)).mean() for w, one in at.items()}
            own = result.select(layer=layer).values[:, number]
            wanted = [*ratios.values(), sum(ratios.values())]
            wanted += [torch.cosine_similarity(one, x, dim=1).mean() for one in at.values()]
            assert torch.allclose(own, torch.stack(wanted), rtol=1e-9)
    assert result.coords["metric"] == [
        *("attn_out_ratio", "mlp_out_ratio", "ratio", "attn_out_cosine", "mlp_out_cosine")
    ]
    with model.lora_disabled():
        without = adapters.contributions(model, items, progress=False)
    assert not without.controls
    assert torch.equal(result.controls["no_adapter"].values, without.values)


def test_an_idle_block_contributes_nothing() -> None:
    result = adapters.contributions(idle(classifier()), noise_items(2), progress=False)
    assert (result.select(layer=IDLE).values == 0).all()
    assert (result.select(layer=0, metric="ratio").values > 0).all()


# -------------------------------------------------------------------------------- classifier lens


@pytest.mark.parametrize("apply_final_ln", [True, False])
def test_the_classifier_lens_is_the_plain_loop(apply_final_ln: bool) -> None:
    model, items = adapted(), noise_items(4)
    result = adapters.classifier_lens(model, items, apply_final_ln=apply_final_ln, progress=False)
    assert result.coords["layer"] == [0, 1, 2, 3]
    kl = result.select(metric="kl").values
    assert (kl[:, -1].abs() < 1e-12).all() and (kl[:, :-1] > 1e-6).all()
    assert (result.select(metric="agrees", layer=3).values == 1).all()
    for number, item in enumerate(items):
        (_, logits), cache, _ = cache_of(model, item)
        truth = logits.log_softmax(-1)[0]
        for layer in range(N_LAYERS):
            stream = cache[f"encoder.blocks.{layer}.hook_resid_pre"]
            stream = model.encoder.ln_final(stream) if apply_final_ln else stream
            said = model.head(stream, None).log_softmax(-1)[0]
            assert torch.allclose(kl[number, layer], (truth.exp() * (truth - said)).sum())
    assert set(result.controls) == {"other_item", "no_adapter"}
    right = result.select(metric="right", layer=3).values
    said = [int(cache_of(model, item)[0][1].argmax()) for item in items]
    assert right.tolist() == [
        float(f"LABEL_{s}" == i.answer) for s, i in zip(said, items, strict=True)
    ]


def test_what_the_lens_cannot_read() -> None:
    with pytest.raises(InputError, match="writes tokens, not classes"):
        adapters.classifier_lens(HookedAudioTransformer.from_pretrained("embedded"), demo_items())


# -------------------------------------------------------------------------------- directions


def test_a_planted_rank_is_found() -> None:
    """One direction of B, and of A where its rows are multiples of one."""
    model, items = adapted(), noise_items(4)
    for linear in model.lora.linears.values():
        with torch.no_grad():
            linear.lora_B.copy_(linear.lora_B[:, :1] * torch.tensor([1.0, -2.0, 0.5, 1.0]))
    result = adapters.directions(model, items, progress=False)
    assert result.dims == ("metric", "stimulus", "layer", "module")
    assert result.coords["module"] == ["attn.q_proj", "attn.v_proj"]
    assert (result.mean().select(metric="B").values == 1).all()
    assert (result.mean().select(metric="A_gradient").values == 1).all()
    assert (result.mean().select(metric="A").values > 1).all()
    assert (result.select(metric="B").values == 1).all()
    assert (result.controls["random"].mean().select(metric="B").values > 1).all()
    assert result.low is not None and (result.low <= result.high).all()


def test_counts_are_those_of_the_plain_formula() -> None:
    model, items = adapted(), noise_items(3)
    result = adapters.directions(
        model, items, positions=10_000, share=0.8, controls=False, progress=False
    )
    rows = []
    for item in items:
        _, cache, valid = cache_of(model, item)
        rows.append(cache["encoder.blocks.1.attn.v_proj.hook_lora_B"][0, valid])
    pooled = torch.cat(rows)
    energy = torch.linalg.svdvals(pooled - pooled.mean(0)).square()
    wanted = 1 + int((energy.cumsum(0) / energy.sum() < 0.8).sum())
    assert result.mean().select(metric="B", layer=1, module="attn.v_proj").values == wanted


def test_needed_directions() -> None:
    assert needed(torch.tensor([1.0, 8, 1]), 0.8) == 1
    assert needed(torch.tensor([1.0, 8, 1]), 0.9) == 2
    assert needed(torch.zeros(3), 0.9) == 0


def test_an_adapter_in_some_blocks_leaves_the_others_out() -> None:
    result = adapters.directions(adapted((0, 2)), noise_items(2), progress=False)
    assert result.coords["layer"] == [0, 2]


# -------------------------------------------------------------------------------- alignment


def test_alignment_is_the_cka_of_means() -> None:
    model, items = adapted(), noise_items(6)
    result = adapters.alignment(model, items, controls=False, progress=False)
    means: dict[str, list[Tensor]] = {"A": [], "B": []}
    for item in items:
        _, cache, valid = cache_of(model, item)
        for half, kept in means.items():
            hook = f"encoder.blocks.2.attn.q_proj.hook_lora_{half}"
            kept.append(cache[hook][0, valid].mean(0))
    wanted = similarity.cka(torch.stack(means["A"]), torch.stack(means["B"]))
    found = result.mean().select(metric="forward", layer=2, module="attn.q_proj").values
    assert found.item() == pytest.approx(wanted, abs=1e-9)


def test_gradients_of_a_are_a_map_of_those_of_b() -> None:
    model, items = adapted(), noise_items(2)
    spots = Spots.of(model, "encoder")
    options: dict[str, Any] = {"size": 4, "what": "", "progress": False}
    for batch in outputs(model, items, spots, None, **options):
        for (layer, module), sides in batch.sides.items():
            linear = model.lora.linears[f"encoder.blocks.{layer}.{module}"]
            back = linear.scale * sides["B_gradient"] @ linear.lora_B.detach()
            assert torch.allclose(sides["A_gradient"], back, atol=1e-12)
            assert sides["B_gradient"].abs().sum() > 0


def test_a_random_b_is_as_aligned(embedded: HookedAudioTransformer) -> None:
    """A random B of rank 8 gives a forward CKA of 0.99 by itself, as the trained one does."""
    clips = demo_items()[::2]
    adapters.train(embedded, clips, part="encoder", modules=["v_proj"], steps=2, progress=False)
    try:
        result = adapters.alignment(embedded, clips, progress=False)
    finally:
        adapters.take_off(embedded)
    assert set(result.controls) == {"random_A", "random_B"}
    forward = result.controls["random_B"].mean().select(metric="forward").values
    assert forward.mean() >= 0.99 and forward.min() >= 0.98
    assert "arithmetic" in result.report[2]


@pytest.mark.parametrize(("filled", "width"), [(1, 192), (3, 192), (8, 192)])
def test_how_near_a_random_b_comes_is_arithmetic(filled: int, width: int) -> None:
    """By how many directions A's output fills evenly, and into what width B writes."""
    draw = torch.Generator().manual_seed(filled)
    low = torch.randn(400, 8, generator=draw, dtype=torch.float64)
    low[:, filled:] *= 1e-3
    found = [
        similarity.cka(low, low @ torch.randn(8, width, generator=draw, dtype=torch.float64))
        for _ in range(20)
    ]
    expected = 1 - (filled - 1) * (filled + 2) / (2 * filled * width)
    assert sum(found) / len(found) == pytest.approx(expected, abs=0.004)


def test_halves_are_drawn_and_given_back() -> None:
    model = adapted()
    own = {n: (one.lora_A, one.lora_B) for n, one in model.lora.linears.items()}
    with pytest.raises(ZeroDivisionError), redrawn(model, ["B"], seed=1):
        linear = model.lora.linears["encoder.blocks.0.attn.q_proj"]
        old = own["encoder.blocks.0.attn.q_proj"][1]
        assert not torch.equal(linear.lora_B, old)
        assert linear.lora_B.std().item() == pytest.approx(old.std().item(), rel=0.3)
        raise ZeroDivisionError
    for name, linear in model.lora.linears.items():
        assert (linear.lora_A, linear.lora_B)[0] is own[name][0]
        assert linear.lora_B is own[name][1]


# -------------------------------------------------------------------------------- erasure


def test_erasing_is_the_plain_loop_of_hooks() -> None:
    model, items = adapted(), noise_items(3)
    result = adapters.erasure(model, items, progress=False)
    assert result.coords["erased"] == ["one", "from_top", "from_bottom"]
    skipped = {"one": [1], "from_top": [1, 2], "from_bottom": [0, 1]}  # at layer 1
    for number, item in enumerate(items):
        (inputs, logits), _, _ = cache_of(model, item)
        answer = model.to_single_token(item.answer)
        for erased, layers in skipped.items():
            entered: dict[int, Tensor] = {}

            def keep(layer: int, entered: dict = entered) -> Callable:
                return lambda x, hook: entered.update({layer: x})

            def give(layer: int, entered: dict = entered) -> Callable:
                return lambda x, hook: entered[layer]

            hooks = [
                (f"encoder.blocks.{layer}.hook_{stage}", make(layer))
                for layer in layers
                for stage, make in (("resid_pre", keep), ("resid_post", give))
            ]
            with torch.no_grad():
                without = model.run_with_hooks(inputs, fwd_hooks=hooks)
            told = []
            for one in (logits, without):
                probs = one[0].softmax(-1)
                told.append([float(one[0].argmax() == answer), probs.max(), -probs[answer].log()])
            right, confidence, loss = (torch.tensor(told[0]) - torch.tensor(told[1])).double()
            own = result.select(erased=erased, layer=1).values[:, number]
            wanted = torch.stack([right + 0.5 * confidence - 0.1 * loss, right, confidence, loss])
            assert torch.allclose(own, wanted, atol=1e-6)
    assert (result.controls["identity"].values == 0).all()
    assert result.controls["no_adapter"].dims == result.dims


def test_erasing_an_idle_block_changes_nothing() -> None:
    result = adapters.erasure(idle(classifier()), noise_items(2), progress=False)
    assert (result.select(erased="one", layer=IDLE).values == 0).all()
    assert (result.select(erased="one", layer=0, metric="loss").values != 0).all()


def test_decoders_are_read_too() -> None:
    toy, items = answering.copying(), answering.items(2)
    lost = adapters.erasure(toy, items, progress=False).mean()
    right = lost.select(metric="right", erased="one").values
    assert right[2] > 0.5 and (right[[0, 1, 3, 4]] == 0).all()
    ratio = adapters.contributions(toy, items, progress=False).mean().select(metric="ratio").values
    assert ratio[2] > 0 and (ratio[[0, 1, 3, 4]] == 0).all()


# -------------------------------------------------------------------------------- the study, files


@pytest.mark.slow
def test_the_study_of_an_adapter_and_of_none() -> None:
    found = adapters.study(adapted(), noise_items(6), progress=False)
    assert set(found) == {
        *("alignment", "directions", "contributions", "erasure", "classifier_lens")
    }
    for result in found.values():
        assert result.report and result.controls and result.meta["method"]
        assert result.plot(metric=result.coords["metric"][0]).data


def test_results_are_saved(tmp_path: Any) -> None:
    result = adapters.directions(adapted(), noise_items(3), progress=False)
    again = type(result).load(result.save(tmp_path / "directions.nc"))
    assert torch.equal(again.values, result.values) and again.controls.keys() == {"random"}


# -------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("method", [adapters.alignment, adapters.directions])
def test_models_without_an_adapter(method: Callable) -> None:
    with pytest.raises(LoraError, match="carries no live adapter"):
        method(classifier(), noise_items(6))
    off = adapted()
    off.lora.enabled = False
    with pytest.raises(InputError, match="switched off"):
        method(off, noise_items(6))
    with pytest.raises(InputError, match="sits in blocks of encoder, not of decoder"):
        method(adapted(), noise_items(6), part="decoder")
    with pytest.raises(InputError, match="items or more"):
        method(adapted(), noise_items(1))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: adapters.directions(adapted(), noise_items(3), share=1.5), "share"),
        (lambda: adapters.directions(adapted(), noise_items(3), positions=0), "positions"),
        (lambda: adapters.erasure(classifier(), noise_items(3), part="ear"), "part is one"),
        (lambda: adapters.contributions(classifier(), noise_items(3), part="decoder"), "part is"),
    ],
)
def test_other_arguments(call: Callable, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
