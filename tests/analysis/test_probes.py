"""Probes by group, their control task, LEACE and directions: planted spaces, and the floors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from analysis import answering
from audio_lens import Edit, HookedAudioTransformer, Item, Items, Span, edits
from audio_lens.analysis import probes
from audio_lens.analysis.learning import folds
from audio_lens.analysis.probes.baselines import mean_log_mels, untrained
from audio_lens.errors import ExtraError, InputError
from audio_lens.items import ANALYSES, ActivationsError, ControlError, ItemError, collect, rerun
from items import speech

pytest.importorskip("sklearn", reason="probes need the extra 'probe'")
N_DIMS, N_SPEAKERS = 24, 6


def subspaces(count: int = 240, seed: int = 0) -> tuple[Tensor, list[str], list[str]]:
    """METHODS toy G: classes in a rotated plane, speakers in another, orthogonal to it; noise."""
    draw = torch.Generator().manual_seed(seed)
    axes, _ = torch.linalg.qr(torch.randn(N_DIMS, N_DIMS, generator=draw, dtype=torch.float64))
    classes = torch.tensor([[0.0, 2], [1.8, -1], [-1.8, -1]]).double() @ axes[:2]
    voices = 6 * torch.randn(N_SPEAKERS, 2, generator=draw).double() @ axes[2:4]
    said = torch.randint(3, (count,), generator=draw)
    who = torch.arange(count) % N_SPEAKERS
    noise = 0.3 * torch.randn(count, N_DIMS, generator=draw).double()
    labels = [f"class {i}" for i in said.tolist()]
    return classes[said] + voices[who] + noise, labels, [f"speaker {i}" for i in who.tolist()]


# -------------------------------------------------------------------------------- probes


@pytest.mark.parametrize("kind", ["logistic", "mass_mean"])
def test_a_planted_class_is_told_of_speakers_unheard(kind: str) -> None:
    x, said, who = subspaces()
    result = probes.probe(x, said, group=who, kind=kind, by="group")
    assert result.dims == ("stimulus",) and result.estimate is not None
    assert result.estimate > 0.97 and result.low > 0.9
    assert result.controls["permuted_labels"].estimate < 0.45
    assert result.meta["interval"].endswith("6 of group") and result.meta["folds"] == "5"
    assert "chance is 0.333" in result.report[0] and "Selectivity" in result.report[-2]
    assert result.plot().data


def test_what_speakers_alone_give_away_is_not_told() -> None:
    """Each speaker says one of two classes more often; only the speaker can be read."""
    draw = np.random.default_rng(0)
    who = np.arange(300) % 50
    x = torch.as_tensor(draw.normal(size=(50, 60))[who] + 0.01 * draw.normal(size=(300, 60)))
    said = [int(one) for one in (draw.random(300) < np.where(who % 2, 0.95, 0.05))]
    by_item = probes.probe(x, said, control=False)
    by_speaker = probes.probe(x, said, group=who.tolist(), control=False)
    assert by_item.estimate > 0.85 and by_speaker.estimate < 0.7
    assert "item by item" in by_item.report[0] and "50 groups" in by_speaker.report[0]


def test_a_probe_that_knows_types_by_heart_is_not_selective() -> None:
    words = np.arange(120) % 12
    x, kinds = torch.eye(12)[words], (words % 3).tolist()
    result = probes.probe(x, kinds, types=words.tolist())
    assert result.estimate == 1 and result.controls["permuted_labels"].estimate == 1
    assert probes.probe(x, kinds).controls["permuted_labels"].estimate < 0.6


def test_numbers_are_regressed() -> None:
    x, _, who = subspaces()
    y = (x @ torch.linspace(-1, 1, N_DIMS).double() + 3).tolist()
    result = probes.probe(x, y, group=who)
    assert result.estimate > 0.95 and result.meta["value"] == "R2"
    assert result.controls["permuted_labels"].estimate < 0.05
    mean = probes.probe(torch.randn(240, 1), y, group=who, control=False, strength=1e12)
    assert mean.estimate == pytest.approx(0, abs=1e-6)
    assert probes.probe(x, [round(one) for one in y], kind="ridge", group=who).estimate > 0.9


def test_the_estimate_is_balanced_accuracy() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, said, who = subspaces(90, seed=3)
    x = x + 1.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    said = ["class 0" if one == "class 1" else one for one in said]
    y, told = np.unique(said, return_inverse=True)[1], np.full(90, -1)
    tests = folds(said, who, 3, 0, stratified=True)
    for test in tests:
        train = [i for i in range(90) if i not in test]
        assert not {who[i] for i in train} & {who[i] for i in test}
        made = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
        told[test] = made.fit(x[train], y[train]).predict(x[test])
    result = probes.probe(x, said, group=who, n_folds=3, control=False)
    assert result.estimate == pytest.approx(balanced_accuracy_score(y, told))
    assert result.values.tolist() == (told == y).astype(float).tolist()
    assert 0.5 < result.estimate < 0.95


def test_the_best_strength_is_chosen_on_groups_left_out() -> None:
    x, said, who = subspaces(60)
    wide = torch.cat([x, 3 * torch.randn(60, 200, generator=torch.Generator().manual_seed(0))], 1)
    chosen = probes.probe(wide, said, group=who, strength=[1e5, 1.0], control=False)
    weak = probes.probe(wide, said, group=who, strength=1.0, control=False)
    assert chosen.estimate >= weak.estimate - 0.1


def test_classes_of_one_group_are_left_out_and_counted() -> None:
    x, said, who = subspaces(60)
    said = ["rare" if i < 1 else one for i, one in enumerate(said)]
    result = probes.probe(x, said, group=who, control=False)
    assert result.n_kept == 59 and result.dropped == {"its label is of one group alone": 1}


# -------------------------------------------------------------------------------- models


def test_the_layer_that_brings_the_answer_is_where_it_can_be_read(tmp_path) -> None:
    toy, items = answering.copying(3, 1), answering.items(6)
    options = {"site": "decoder.resid_post", "where": "last"}
    result = probes.layers(toy, items, n_folds=3, **options)
    assert result.coords["layer"] == [0, 1, 2]
    assert result.estimate.tolist() == [0.25, 1, 1]
    assert result.controls["log_mel"].dims == ("stimulus",)
    assert "Best at layer 1" in result.report[1]
    again = rerun(result.save(tmp_path / "probes.nc"), toy, items)
    assert torch.equal(again.values, result.values)


def test_rows_of_activations_are_those_of_their_items() -> None:
    toy, items = answering.copying(3, 1), answering.items(6)
    acts = collect(toy, items, "decoder.resid_pre", "audio")
    result = probes.probe(acts, "answer", layers=[0], control=False, n_folds=3)
    assert result.values.shape == (len(items), 1) and result.coords["stimulus"] == items.values(
        "id"
    )
    assert 0 < result.estimate.item() < 0.5  # one frame of ten tells the class
    assert result.values[0].item() in [i / 10 for i in range(11)]
    of_items = probes.probe(acts, "answer", layers=[0], beside={"one": torch.zeros(len(items), 2)})
    assert of_items.controls["one"].estimate == pytest.approx(0.25)
    heads = collect(toy, items, "decoder.attn.z", "last")
    by_head = probes.probe(heads, "answer", control=False, n_folds=3)
    assert by_head.dims == ("stimulus", "layer", "head")
    assert by_head.select(layer=1, head=1).estimate == 1 and by_head.top(1)[0].at["layer"] == 1


def test_weights_in_disorder_know_nothing() -> None:
    toy = answering.copying(3, 1)
    other = untrained(toy)
    weights = [sorted(p.flatten().tolist()) for p in toy.parameters()]
    assert weights == [sorted(p.flatten().tolist()) for p in other.parameters()]
    assert any(
        not torch.equal(a, b) for a, b in zip(toy.parameters(), other.parameters(), strict=True)
    )


def test_spectra_are_of_the_seconds_that_are_named() -> None:
    time = np.arange(16_000) / 16_000
    wave = np.concatenate([np.sin(2 * np.pi * 300 * time), np.sin(2 * np.pi * 3000 * time)])
    items = Items([Item(wave.astype(np.float32), sampling_rate=16_000)])
    low, high = (mean_log_mels(items, place)[0] for place in ((0.1, 0.9), Span(1.1, 1.9)))
    assert low.argmax() < 15 < 40 < high.argmax()
    assert mean_log_mels(items, [(0.1, 0.9)]).equal(low[None])
    assert mean_log_mels(items).shape == (1, 80)


def test_the_command_probes_the_answer_or_words() -> None:
    both = ANALYSES["probes"].function(answering.copying(3, 1), answering.items(6))
    assert both["decoder"].estimate.tolist() == [0.25, 1, 1]
    assert both["decoder"].report[0] == "Probed is answer."
    assert ANALYSES["probes"].summary.endswith("?")
    alone = Items(answering.item(0, i).replaced(id=str(i)) for i in range(4))
    with pytest.raises(ItemError, match="nothing to probe"):
        ANALYSES["probes"].function(answering.copying(3, 1), alone)


# -------------------------------------------------------------------------------- erasing


def leace() -> None:
    pytest.importorskip("concept_erasure", reason="LEACE needs the extra 'probe'")


def test_what_is_erased_no_linear_probe_tells_and_the_rest_stays() -> None:
    leace()
    x, said, who = subspaces()
    eraser = probes.erase(x, said)
    assert eraser.read.shape == (N_DIMS, 2)
    erased = eraser.of(x)
    classes = torch.stack([erased[[one == c for one in said]].mean(0) for c in sorted(set(said))])
    assert (classes - classes[0]).abs().max() < 1e-10
    assert probes.probe(erased, said, group=who, control=False).estimate < 0.45
    assert probes.probe(erased, who, control=False).estimate > 0.95
    assert (erased - x).norm() < 0.4 * (x - x.mean(0)).norm()
    twice = eraser.of(erased)
    assert torch.allclose(twice, erased, atol=1e-9)


def test_numbers_are_erased() -> None:
    leace()
    x, _, who = subspaces()
    y = (x[:, 0] - 2 * x[:, 1]).tolist()
    erased = probes.erase(x, y).of(x)
    assert probes.probe(erased, y, group=who, control=False).estimate < 0.05


def test_erasing_a_label_takes_the_answer_that_reads_it(tmp_path) -> None:
    leace()
    toy, items = answering.copying(3, 1), answering.items(6)
    result = probes.erased(toy, items, site="decoder.resid_pre", layer=0)
    lost = result.select(metric="log_prob")
    assert lost.values.std() < 1e-9  # no clip is answered differently from another
    assert lost.estimate < lost.controls["identity"].estimate - 0.5
    right = result.select(metric="right")
    assert right.controls["identity"].estimate == right.controls["random_direction"].estimate == 1
    behind = probes.erased(toy, items, site="decoder.resid_pre", layer=2, controls=False)
    assert behind.select(metric="right").estimate == 1
    assert result.meta["rank"] == "3"
    again = rerun(result.save(tmp_path / "erased.nc"), toy, items)
    assert torch.equal(again.values, result.values)
    acts = collect(toy, items, "decoder.resid_pre", layers=[0])
    edits.save(
        Edit("decoder.resid_pre", probes.erase(acts, "answer"), layer=0), tmp_path / "e.json"
    )
    (back,) = edits.load(tmp_path / "e.json")
    assert torch.equal(back.do.read, probes.erase(acts, "answer").read)


# -------------------------------------------------------------------------------- directions


def test_directions_tell_and_move() -> None:
    x, said, _ = subspaces(900)
    ours, others = (x[[one == f"class {i}" for one in said]] for i in (0, 1))
    means = probes.direction(x, said, "class 0", "class 1")
    assert torch.allclose(others.mean(0) + means, ours.mean(0))
    rest = x[[one != "class 0" for one in said]]
    assert torch.allclose(probes.direction(x, said, "class 0"), ours.mean(0) - rest.mean(0))
    for kind in ("mass_mean", "logistic"):
        read = probes.direction(x, said, "class 0", "class 1", kind=kind)
        middle = (ours.mean(0) + others.mean(0)) / 2
        assert ((ours - middle) @ read > 0).double().mean() > 0.99
        assert ((others - middle) @ read < 0).double().mean() > 0.99
    by_hand = torch.linalg.solve(
        torch.cov(torch.cat([ours - ours.mean(0), others - others.mean(0)]).T), means
    )
    mass = probes.direction(x, said, "class 0", "class 1", kind="mass_mean")
    assert torch.cosine_similarity(mass, by_hand, dim=0) > 0.95


def test_reflections_exchange_the_sides() -> None:
    x, said, _ = subspaces()
    w, centre = probes.direction(x, said, "class 0", "class 1"), x.mean(0)
    side = (x - centre) @ w
    assert torch.allclose((probes.reflection(w, centre).of(x) - centre) @ w, -side)
    assert ((probes.reflection(w, centre, 1.0).of(x) - centre) @ w).abs().max() < 1e-9


# -------------------------------------------------------------------------------- real speech


@pytest.mark.real
@pytest.mark.slow
def test_digits_of_unseen_speakers_are_read_at_the_last_layer(
    embedded: HookedAudioTransformer,
) -> None:
    items = speech.spoken_items(120, seed=61, takes=range(12))
    result = probes.layers(embedded, items, "digit", where=second, size=24)
    assert result.select(layer=3).estimate >= 0.9
    assert result.select(layer=0).estimate < result.select(layer=3).estimate - 0.1
    assert result.controls["permuted_labels"].estimate.max() < 0.3
    assert result.controls["log_mel"].estimate < result.select(layer=3).estimate - 0.2


@pytest.mark.real
@pytest.mark.slow
def test_the_answer_needs_the_digit_and_not_the_speaker(embedded: HookedAudioTransformer) -> None:
    leace()
    items = speech.spoken_items(120, seed=61, takes=range(12))
    digit = probes.erased(embedded, items, "digit", where=second, size=24)
    right = digit.select(metric="right")
    assert right.estimate <= 0.3 and right.controls["random_direction"].estimate >= 0.9
    speaker = probes.erased(embedded, items, "speaker", where=second, size=24, controls=False)
    assert speaker.select(metric="right").estimate >= 0.9


def second(item: Item) -> Any:
    """The seconds of the word that is asked for."""
    return item.words[1]


# -------------------------------------------------------------------------------- bad input

X = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
Y, WHO = ["a", "b"] * 6, [0, 0, 1, 1, 2, 2] * 2
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "labels": (lambda: probes.probe(X, Y[:5]), InputError, "12 rows need as many values of label"),
    "a name": (lambda: probes.probe(X, "answer"), InputError, "names nothing of a plain tensor"),
    "groups": (lambda: probes.probe(X, Y, group=WHO[:3]), InputError, "of group, got 3"),
    "one group": (lambda: probes.probe(X, Y, group=[1] * 12), ItemError, "fewer than two classes"),
    "one value": (lambda: probes.probe(X, ["a"] * 12), ItemError, "all have one value"),
    "one number": (lambda: probes.probe(X, [0.5] * 12), ItemError, "all have one value"),
    "mixed": (lambda: probes.probe(X, ["a", 0.5] * 6), ItemError, "texts and others numbers"),
    "NaN label": (lambda: probes.probe(X, [0.1, float("nan")] * 6), ItemError, "NaN or infinite"),
    "kinds": (lambda: probes.probe(X, Y, kind="mlp"), InputError, "kind is one of logistic"),
    "by": (lambda: probes.probe(X, Y, by="speaker"), InputError, "by is 'group' or None"),
    "strength": (lambda: probes.probe(X, Y, strength=0), InputError, "strength must be"),
    "folds": (lambda: probes.probe(X, Y, n_folds=1), InputError, "n_folds must be"),
    "site": (lambda: probes.probe(X, Y, site="x.y"), InputError, "no sites and layers"),
    "shape": (lambda: probes.probe(X[0], Y), InputError, "n by d, got 3"),
    "NaN": (lambda: probes.probe(X / 0, Y), InputError, "NaN or infinite"),
    "beside": (lambda: probes.probe(X, Y, beside={"z": X[:5]}), InputError, "'z' has 5 rows"),
    "value": (lambda: probes.direction(X, Y, "c"), ItemError, "no row has the value 'c'"),
    "direction": (lambda: probes.direction(X, Y, "a", kind="pca"), InputError, "kind is one of"),
    "reflection": (lambda: probes.reflection(X[0] * 0, X[0]), InputError, "no length"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_probed_is_named(case: str) -> None:
    call, kind, message = REFUSED[case]
    with pytest.raises(kind, match=message):
        call()


def test_what_cannot_be_collected_is_named() -> None:
    toy, items = answering.copying(3, 1), answering.items(2)
    with pytest.raises(
        InputError, match="controls are some of permuted_labels, log_mel, untrained"
    ):
        probes.layers(toy, items, controls=["noise"])
    with pytest.raises(ItemError, match="no label 'mood'"):
        probes.layers(toy, items, "mood")
    acts = collect(toy, items, "decoder.resid_pre", "last")
    with pytest.raises(ActivationsError, match="not collected"):
        probes.probe(acts, "answer", site="encoder.resid_pre")


def test_what_cannot_be_erased_is_named() -> None:
    leace()
    acts = collect(answering.copying(3, 1), answering.items(2), "decoder.resid_pre", "last")
    with pytest.raises(InputError, match="several layers were collected"):
        probes.erase(acts, "answer")
    with pytest.raises(ItemError, match="one value"):
        probes.erase(X, [1] * 12)
    with pytest.raises(ItemError, match="nothing to erase"):
        probes.erase(torch.ones(12, 3), Y)


def test_extras_that_lack_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.linear_model", None)
    monkeypatch.setitem(__import__("sys").modules, "concept_erasure", None)
    with pytest.raises(ExtraError, match=r"scikit-learn: pip install 'audio_lens\[probe\]'"):
        probes.probe(X, Y)
    with pytest.raises(ExtraError, match=r"concept-erasure: pip install 'audio_lens\[probe\]'"):
        probes.erase(X, Y)
    assert issubclass(ExtraError, ImportError) and issubclass(ControlError, ValueError)
