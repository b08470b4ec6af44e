"""Adapters in some blocks alone: the planted wrong block, equal counts, what stays as it was."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from analysis import answering
from analysis.answering import AnsweringToy
from audio_lens import HookedAudioTransformer, Item, Items, metrics
from audio_lens.analysis import adapters
from audio_lens.analysis.adapters import training, wearing
from audio_lens.analysis.adapters.groups import Arms, checked_groups, linears_of
from audio_lens.analysis.adapters.training import Bench, Start, answers_of, examined
from audio_lens.errors import ExtraError, InputError
from audio_lens.items import ItemError
from audio_lens.models import LoraError
from tiny import hf_inputs, tiny_hf
from toys import ANSWER, N_CLASSES, QUERY

pytest.importorskip("peft", reason="adapters need the extra 'lora'")
BROKEN, RANK = 2, 5
SWEEP: dict[str, Any] = {"modules": ["fc_out"], "rank": RANK, "size": 4, "progress": False}
LEARNS = {"steps": 15, "rate": 0.3}


def broken() -> AnsweringToy:
    """It hears rightly in block 1, and block 2 then makes each answer the next one."""
    toy = answering.copying(n_layers=5, layer=1)
    for c in range(N_CLASSES):
        answer, following = ANSWER.start + c, ANSWER.start + (c + 1) % N_CLASSES
        toy.neuron(BROKEN, c, {QUERY: 1.0}, {answer: 1.0}, {answer: -1.0, following: 1.0})
    return toy


def state_of(model: HookedAudioTransformer) -> dict[str, Tensor]:
    return {name: one.clone() for name, one in model.state_dict().items()}


# -------------------------------------------------------------------------------- groups


@pytest.mark.parametrize(
    "n_layers, groups",
    [
        (20, ((0, 1, 2, 3), (8, 9, 10, 11), (16, 17, 18, 19))),
        (32, (tuple(range(6)), tuple(range(13, 19)), tuple(range(26, 32)))),
        (6, ((0,), (2,), (5,))),
        (3, ((0,), (1,), (2,))),
    ],
)
def test_groups_are_fifths_of_one_size(n_layers: int, groups: tuple) -> None:
    assert tuple(adapters.layer_groups(n_layers).values()) == groups


@pytest.mark.parametrize("n_layers", range(3, 49))
def test_arms_train_equally_many_parameters(n_layers: int) -> None:
    arms = Arms(adapters.layer_groups(n_layers), n_layers, rank=8)
    wanted = 8 * arms.size
    for name in (*arms.groups, "all_equal"):
        assert sum(arms.of(name, 0).ranks.values()) == wanted
    assert len(arms.of("all_equal", 0).ranks) == n_layers
    assert sum(arms.of("all", 0).ranks.values()) == 8 * n_layers
    if n_layers == 3:
        assert not arms.has_random()
        return
    for seed in range(3):
        layers = [*arms.of("random", seed).ranks]
        assert len(layers) == arms.size and tuple(layers) not in arms.groups.values()
        assert arms.size == 1 or layers[-1] - layers[0] > arms.size - 1
    assert arms.of("random", 0) == arms.of("random", 0)


# -------------------------------------------------------------------------------- the sweep


@pytest.fixture(scope="module")
def swept() -> tuple[AnsweringToy, dict[str, Tensor], Any]:
    toy = broken()
    before = state_of(toy)
    result = adapters.sweep(toy, answering.items(), seeds=[0, 1], **SWEEP, **LEARNS)
    return toy, before, result


def test_only_the_group_that_holds_the_wrong_block_repairs_it(swept: tuple) -> None:
    _, _, result = swept
    assert result.dims == ("metric", "stimulus", "arm", "seed")
    assert result.coords["arm"] == [
        *("early", "middle", "late", "random", "all_equal", "all", "connector", "none")
    ]
    right = result.mean().select(metric="right")
    assert right.select(arm="middle").values.tolist() == [1.0] * 2
    assert right.select(arm="all").values.tolist() == [1.0] * 2
    for idle in ("early", "late", "random", "none"):
        assert right.select(arm=idle).values.tolist() == [0.0] * 2
    assert result.low is not None and (result.low <= result.high).all()
    assert result.report[0].startswith("Most right answers of the groups: middle, 1.00")
    assert "with every seed" in result.report[0]
    counted = dict(one.split() for one in result.meta["parameters"].split(", "))
    assert len({counted[name] for name in ("early", "middle", "late", "random", "all_equal")}) == 1
    assert int(counted["all"]) == 5 * int(counted["early"]) and counted["none"] == "0"
    assert result.n_kept + result.dropped["trained on"] == len(answering.items())


def test_silence_teaches_nothing_that_is_heard(swept: tuple) -> None:
    control = swept[2].controls["no_audio"].mean().select(metric="right")
    assert control.dims == ("seed",) and (control.values < 0.8).all()


def test_the_model_is_what_it_was(swept: tuple) -> None:
    toy, before, _ = swept
    fresh = broken()
    assert toy.state_dict().keys() == before.keys() == fresh.state_dict().keys()
    assert all(torch.equal(one, before[name]) for name, one in toy.state_dict().items())
    assert toy.hook_dict.keys() == fresh.hook_dict.keys()
    assert not any(one.requires_grad for one in toy.parameters())
    with pytest.raises(LoraError, match="no live adapter"):
        adapters.take_off(toy)


def test_a_weight_that_moves_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = broken()

    def careless(model: Any, *args: Any) -> list[float]:
        model.decoder.unembed.weight.data[0, 0] += 1e-9
        return [0.0]

    monkeypatch.setattr("audio_lens.analysis.adapters.sweeping.descend", careless)
    with pytest.raises(adapters.FrozenError, match="'middle' changed weights"):
        adapters.sweep(toy, answering.items(), arms=["middle"], seeds=[0], controls=False, **SWEEP)


def test_what_should_not_be_lost_and_what_diverges() -> None:
    toy = broken()
    options: dict[str, Any] = {"arms": ["middle", "none"], "seeds": [0], "controls": False, **SWEEP}
    result = adapters.sweep(toy, answering.items(), retained=answering.items(1), steps=2, **options)
    kept = result.controls["retained"]
    assert kept.dims == ("metric", "arm", "seed") and kept.low is not None
    wild = adapters.sweep(toy, answering.items(), steps=9, rate=1e200, **options)
    right = wild.mean().select(metric="right")
    assert right.select(arm="middle").values.isnan().all()
    assert right.select(arm="none").values.tolist() == [0.0]
    assert any(note.startswith("Training diverged in middle") for note in wild.report)


# -------------------------------------------------------------------------------- folders


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each training."""
    done: list[int] = []
    own = training.descend

    def descend(*args: Any) -> list[float]:
        done.append(1)
        return own(*args)

    monkeypatch.setattr("audio_lens.analysis.adapters.sweeping.descend", descend)
    return done


def test_a_folder_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy, items, trained = broken(), answering.items(), counted(monkeypatch)
    options: dict[str, Any] = {"to": tmp_path / "runs", "steps": 8, "rate": 0.3, **SWEEP}
    some: dict[str, Any] = {"arms": ["middle", "none"], "controls": False}
    first = adapters.sweep(toy, items, seeds=[0], **some, **options)
    assert len(trained) == 1
    both = adapters.sweep(toy, items, seeds=[0, 1], **some, **options)
    assert len(trained) == 2
    assert torch.equal(both.select(seed=[0]).values, first.values)
    (tmp_path / "runs" / "middle-1.safetensors").unlink()
    again = adapters.sweep(toy, items, seeds=[0, 1], **some, **options)
    assert len(trained) == 3 and torch.equal(again.values, both.values)
    with pytest.raises(InputError, match="a sweep with other steps"):
        adapters.sweep(toy, items, **options | {"steps": 9})
    with pytest.raises(InputError, match="a sweep with other items"):
        adapters.sweep(toy, items[:8], **options)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").touch()
    with pytest.raises(InputError, match=r"holds letter\.txt already"):
        adapters.sweep(toy, items, **options | {"to": tmp_path / "other"})


def test_its_adapters_are_put_on_again(tmp_path: Path) -> None:
    toy, items = broken(), answering.items()
    options: dict[str, Any] = {"arms": ["middle"], "seeds": [0], "controls": False}
    result = adapters.sweep(toy, items, to=tmp_path, **options, **SWEEP, **LEARNS)
    lora = adapters.load(toy, tmp_path / "middle-0.safetensors")
    assert list(lora.linears) == [f"decoder.blocks.{BROKEN}.mlp.fc_out"]
    _, test = items.split("group", 0.5, 0)
    found = examined(toy, Bench.each(toy, test, answers_of(toy, test), 4), len(test))
    assert torch.equal(found.T, result.values[..., 0, 0])
    path = adapters.save(toy, tmp_path / "own.safetensors")
    adapters.take_off(toy)
    adapters.load(toy, path)
    assert torch.equal(examined(toy, Bench.each(toy, test, answers_of(toy, test), 4), 4), found)
    with pytest.raises(InputError, match="carries a live adapter already"):
        adapters.load(toy, path)


# -------------------------------------------------------------------------------- plain loops


@pytest.mark.parametrize("name", ["whisper", "qwen2_audio"])
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_training_from_a_start_is_training_the_whole(name: str, part: str) -> None:
    """The losses of an adapter in block 1 are those of whole forwards."""
    hf = tiny_hf(name, dtype=torch.float64)
    losses = []
    for start in (Start(part, 1), Start()):
        model = HookedAudioTransformer.from_hf(hf)
        inputs = model.as_inputs(
            hf_inputs(name, words=(4, 4), lengths=(201, 201), dtype=torch.float64)
        )
        answers = torch.tensor([[5], [7]])
        bench = Bench([0, 1], inputs, answers).at(model, start)
        names = linears_of(model, part, ["q_proj", "v_proj"])[1]
        with training.frozen(model):
            trained = wearing.put_on(model, dict.fromkeys(names, 2), 2.0, seed=0)
            losses.append(training.descend(model, [bench], trained, 4, 0.05, 0, False))
    assert torch.allclose(*map(torch.tensor, losses), rtol=1e-10)
    assert losses[0][-1] < losses[0][0]


def test_answers_of_several_tokens_are_forced(embedded: HookedAudioTransformer) -> None:
    from audio_lens.models.embedded import default_pair

    pair = default_pair()
    item = Item(pair.clean, pair.question, answer="seven two", group="a")
    items = Items([item, item.replaced(answer="seven", group="b")])
    answers = answers_of(embedded, items)
    assert len(answers[0]) > 1 and len(answers[1]) == 1
    told = examined(embedded, Bench.each(embedded, items, answers, 4), 2)
    plain = embedded.prepare([pair.clean], [pair.question])
    behind = training.with_tokens(plain, torch.cat([plain.tokens, torch.tensor([answers[0]])], 1))
    whole = metrics.sequence_log_prob(answers[0]).bind(embedded, behind)(embedded(behind))
    single = metrics.log_prob("seven").bind(embedded, plain)(embedded(plain))
    wanted = torch.cat([whole, single]).double()
    assert torch.allclose(told[:, 1], wanted, atol=1e-4)


def test_an_adapter_is_trained_and_stays_on() -> None:
    toy = broken()
    losses = adapters.train(toy, answering.items(), layers=[BROKEN], **SWEEP, **LEARNS)
    assert losses[-1] < losses[0] / 2 and len(toy.lora.linears) == 1
    assert not any(one.requires_grad for name, one in toy.named_parameters() if "lora" not in name)
    adapters.take_off(toy)
    fresh = broken().state_dict()
    assert all(torch.equal(one, fresh[name]) for name, one in toy.state_dict().items())


# -------------------------------------------------------------------------------- what is refused


def _adapted() -> AnsweringToy:
    toy = broken()
    adapters.train(toy, answering.items(1), steps=1, **SWEEP)
    return toy


BAD: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "no such module": (broken, {"modules": ["fc_outt"]}, "no linear map 'fc_outt'"),
    "no modules": (broken, {"modules": []}, "names one linear map or more"),
    "no such part": (broken, {"part": "ear"}, "part is one with blocks"),
    "a part without blocks": (broken, {"part": "encoder"}, "part is one with blocks"),
    "no such arm": (broken, {"arms": ["earlier"]}, "no arm 'earlier'"),
    "an arm twice": (broken, {"arms": ["all", "all"]}, "each once"),
    "groups of unequal size": (broken, {"groups": {"a": [0], "b": [1, 2]}}, "a 1, b 2"),
    "a group named as another arm": (broken, {"groups": {"all": [0]}}, "another arm already"),
    "no groups": (broken, {"groups": {}}, "groups are of one size"),
    "a group without blocks": (broken, {"groups": {"a": []}}, "each once, got"),
    "blocks that are not there": (broken, {"groups": {"a": [7]}}, "groups"),
    "too few blocks": (lambda: answering.copying(2, 1), {}, "2 blocks make no 3 groups"),
    "a rank too small to divide": (broken, {"rank": 2, "arms": ["all_equal"]}, "rank of 5 or more"),
    "rank 0": (broken, {"rank": 0}, "rank"),
    "a rate of 0": (broken, {"rate": 0.0}, "rate"),
    "a seed twice": (broken, {"seeds": [1, 1]}, "each once"),
    "a live adapter": (_adapted, {}, "carries a live adapter already"),
}


@pytest.mark.parametrize("make, options, message", BAD.values(), ids=BAD)
def test_what_cannot_be_swept(make: Callable, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        adapters.sweep(make(), answering.items(1), **SWEEP | options)


def test_items_without_answers_and_files_that_hold_no_adapter(tmp_path: Path) -> None:
    toy = broken()
    mute = Items(item.replaced(answer=None) for item in answering.items(1))
    with pytest.raises(ItemError, match="has no answer to train on"):
        adapters.sweep(toy, mute, **SWEEP)
    with pytest.raises(InputError, match="no saved adapter at"):
        adapters.load(toy, tmp_path / "none.safetensors")
    (tmp_path / "odd.safetensors").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="holds no adapter"):
        adapters.load(toy, tmp_path / "odd.safetensors")
    with pytest.raises(InputError, match="has no connector with weights"):
        whisper = HookedAudioTransformer.from_hf(tiny_hf("whisper"))
        wearing.check_connector(whisper)


def test_another_model_does_not_take_the_adapter(tmp_path: Path) -> None:
    toy = _adapted()
    path = adapters.save(toy, tmp_path / "adapter.safetensors")
    with pytest.raises(InputError, match="which the adapter is of"):
        adapters.load(answering.copying(2, 1), path)


def test_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    for call in (adapters.sweep, adapters.train):
        with pytest.raises(ExtraError, match=r"audio_lens\[lora\]"):
            call(broken(), answering.items(1))


def test_groups_that_are_given() -> None:
    assert checked_groups({"a": [3, 1], "b": (0, 2)}, 4) == {"a": (1, 3), "b": (0, 2)}
