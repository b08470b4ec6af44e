"""Neurons: selectors against loops, planted truth, and real speech of unseen speakers."""

from __future__ import annotations

import math

import pytest
import torch

from analysis.neuron_toy import (
    ALWAYS,
    CUE_AND_QUESTION,
    GATE,
    LAYER,
    NOISE,
    NeuronToy,
    heard,
    heard_items,
)
from audio_lens import Items, intervene
from audio_lens.analysis import neurons
from audio_lens.analysis.neurons import KINDS, Selection, logged, scores, select
from audio_lens.errors import InputError
from audio_lens.items import ANALYSES, ControlError, ItemError, MethodError, demo_items, rerun
from audio_lens.sites import SiteError
from items.speech import STARTS, spoken_items
from toys import N_CLASSES

ONE = 1 / 160  # of the toy's neurons
EACH = (0.0, 1.0, 0.3)  # of AAPE: most of the toy's neurons never fire, and few are few


@pytest.fixture(scope="module")
def toy() -> NeuronToy:
    return NeuronToy()


@pytest.fixture(scope="module")
def items() -> Items:
    return heard_items(2)


@pytest.fixture(scope="module")
def acts(toy):
    return logged(toy, heard_items(6), "decoder", where=CUE_AND_QUESTION, progress=False)


@pytest.fixture(scope="module")
def planted(acts):
    return select(scores(acts, "answer"), ONE)


# -------------------------------------------------------------------------------- selectors


def by_hand(x: torch.Tensor, labels: list[str], kind: str, c: str, n: int, floor: float) -> float:
    """One score, from the definition."""
    classes = sorted(set(labels))
    own = {k: [row[n].item() for row, l in zip(x, labels, strict=True) if l == k] for k in classes}
    often = {k: sum(v > 0 for v in own[k]) / len(own[k]) for k in classes}
    mean = {k: sum(own[k]) / len(own[k]) for k in classes}
    rest = [v for k in classes if k != c for v in own[k]]
    if kind == "LAP":
        return often[c]
    if kind == "MAD":
        return mean[c] - sum(rest) / len(rest)
    if kind == "CAS":
        return mean[c] - max(mean[k] for k in classes if k != c)
    shares = [often[k] / sum(often.values()) for k in classes]
    if often[c] < floor or often[c] < max(often.values()):
        return math.nan
    return sum(p * math.log(p) for p in shares if p > 0)


@pytest.mark.parametrize("kind", ["LAP", "LAPE", "MAD", "CAS"])
def test_scores_are_their_definitions(kind):
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(40, 6, generator=draw)
    labels = [("a", "b", "b", "c")[i % 4] for i in range(40)]  # unequally many
    limit = {"floor": 0.5} if kind == "LAPE" else {}
    result = scores(x, labels, kind, resamples=20, **limit)
    expected = [[by_hand(x, labels, kind, c, n, 0.5) for n in range(6)] for c in "abc"]
    torch.testing.assert_close(result.values, torch.tensor(expected).double(), equal_nan=True)
    there = ~result.values.isnan()
    assert (result.low <= result.high)[there].all() and result.axes == ("class", "neuron")
    assert result.controls["permuted_labels"].values.shape == result.values.shape
    assert result.report[0].startswith(f"{kind} of 6 neurons for 3 classes")


def test_intervals_draw_items_not_positions():
    """Positions of one clip that are all alike say no more than one of them."""
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(12, 1, generator=draw)
    labels = ["a", "b"] * 6
    once = scores(x, labels, "MAD", resamples=500)
    wide = (once.high - once.low)[0, 0]
    bootstrap = []
    for seed in range(300):
        rows = torch.randint(12, (12,), generator=torch.Generator().manual_seed(seed)).tolist()
        a, b = ([x[r, 0] for r in rows if labels[r] == c] for c in "ab")
        if a and b:
            bootstrap.append(torch.stack(a).mean() - torch.stack(b).mean())
    ends = torch.stack(bootstrap).quantile(torch.tensor([0.025, 0.975]))
    assert wide == pytest.approx(float(ends[1] - ends[0]), rel=0.2)


def test_selectors_find_the_planted_neurons_and_frequency_the_one_that_always_fires(acts):
    at = acts.layers().index(LAYER)
    for kind in KINDS:
        found = scores(acts, "answer", kind, shares=EACH if kind == "AAPE" else None)
        chosen = select(found, ONE)  # one of all
        top = [row.nonzero().tolist() for row in chosen.chosen]
        if kind == "LAP":
            assert top == [[[at, ALWAYS]]] * N_CLASSES
            assert found.values[:, at, ALWAYS].tolist() == [1.0] * N_CLASSES
        else:
            assert top == [[[at, c]] for c in range(N_CLASSES)], kind
    assert scores(acts, "answer", "LAPE").values[0, at, NOISE].isnan()  # fires in one clip of six
    noise = scores(acts, "answer", "LAPE", floor=0.05).values[0, at, NOISE]
    assert noise.abs() < 1e-9  # without a floor as good as a planted one


def test_only_what_is_answered_rightly_is_logged(toy):
    wrong = [heard(0, 90 + n, answer=1) for n in range(5)]  # would make neuron 0 fire for answer 1
    mixed = Items([*heard_items(2), *wrong])
    acts = logged(toy, mixed, "decoder", where="last", progress=False)
    assert len(acts.items) == 8 and acts.sites == (GATE,)
    result = scores(acts, "answer", "LAP")
    assert result.values[1, LAYER, 0] == 0 and result.dropped == {"not answered rightly": 5}
    each = ["last"] * 8 + ["all"] * 5  # places of items that are left out go with them
    assert len(logged(toy, mixed, GATE, where=each, progress=False)) == 8
    with pytest.raises(ItemError, match="none of the 5 items is answered rightly"):
        neurons.right(toy, Items(wrong))


def test_frequencies_of_pooled_activations_are_told(toy, items):
    from audio_lens.items import collect

    pooled = collect(toy, items, GATE, "last", "mean", progress=False)
    assert any("counted over items" in line for line in scores(pooled, "answer", "LAP").report)
    assert not any("over items" in line for line in scores(pooled, "answer", "MAD").report)


# -------------------------------------------------------------------------------- selections


def test_a_share_of_the_model_or_of_every_layer_is_taken(acts, tmp_path):
    found = scores(acts, "answer")
    assert select(found, 1 / 40, "layer").counts == [4] * 4
    assert select(found, 1 / 40, "layer").histogram().values.tolist() == [[1.0] * 4] * 4
    planted = select(found, ONE)
    assert planted.histogram().values[:, LAYER].tolist() == [1.0] * 4
    again = Selection.load(planted.save(tmp_path / "neurons.safetensors"))
    assert torch.equal(again.chosen, planted.chosen) and again.classes == planted.classes
    assert (again.site, again.layers, again.meta["kind"]) == (GATE, [0, 1, 2, 3], "MAD")
    of_tensor = select(scores(torch.eye(4), list("abcd"), "LAP"), 0.25, site=GATE, layer=LAYER)
    assert of_tensor.layers == [LAYER] and of_tensor.chosen.shape == (4, 1, 4)


def test_random_neurons_are_others_and_as_many(planted):
    for per_layer in (False, True):
        others = planted.others(per_layer=per_layer, seed=3)
        assert others.counts == planted.counts and not (others.chosen & planted.chosen).any()
        if per_layer:
            assert torch.equal(others.histogram().values, planted.histogram().values)
    full = Selection(torch.ones(1, 4, 40, dtype=torch.bool), ["a"], GATE, [0, 1, 2, 3])
    with pytest.raises(ControlError, match="smaller share"):
        full.others()


def test_edits_turn_the_neurons_of_a_class(toy, items, planted):
    """Against hooks that multiply by hand; off, doubled, and several classes together."""
    inputs = toy.prepare([item.clip for item in items])
    plain = toy(inputs)

    def turned(factors: dict[int, float]) -> torch.Tensor:
        def hook(x, hook):
            x = x.clone()
            for neuron, factor in factors.items():
                x[..., neuron] *= factor
            return x

        name = f"decoder.blocks.{LAYER}.mlp.hook_gate"
        return toy.run_with_hooks(inputs, fwd_hooks=[(name, hook)])

    for classes, alpha, factors in (
        ("2", -1, {2: 0.0}),
        ("2", 1.0, {2: 2.0}),
        (["0", "3"], 0.5, {0: 1.5, 3: 1.5}),
    ):
        with intervene(toy, planted.edits(classes, alpha)):
            found = toy(inputs)
        torch.testing.assert_close(found, turned(factors))
    with intervene(toy, planted.edits("1", 0)):
        assert torch.equal(toy(inputs), plain)


# -------------------------------------------------------------------------------- taken out


@pytest.fixture(scope="module")
def matrix(toy, items, planted):
    return neurons.deactivation(toy, items, planted, progress=False)


def test_planted_neurons_give_a_diagonal_matrix(matrix):
    recall = matrix.select(metric="recall")
    assert torch.equal(recall.estimate.diag(), torch.ones(4).double())
    lost = matrix.select(metric="log_prob").estimate
    off = ~torch.eye(4, dtype=torch.bool)
    assert lost.diag().min() > 0.3 and lost[off].abs().max() == 0
    assert matrix.controls["identity"].values.abs().max() == 0
    for name in ("random", "random_per_layer"):
        assert matrix.controls[name].estimate.diagonal(dim1=1, dim2=2).abs().max() < 0.1
    assert matrix.report[0].startswith(f"1 neurons of {GATE} for each of 4 classes taken out")


def test_the_matrix_is_runs_with_neurons_at_zero(toy, items, matrix):
    inputs = toy.prepare([item.clip for item in items])
    right = torch.tensor([int(item.answer) for item in items])
    rows = torch.arange(len(items))
    plain = toy(inputs)[:, -1].log_softmax(-1)[rows, right]
    for neuron in range(N_CLASSES):

        def off(x, hook, neuron=neuron):
            return x.index_fill(-1, torch.tensor([neuron]), 0)

        hooks = [(f"decoder.blocks.{LAYER}.mlp.hook_gate", off)]
        lost = (
            plain - toy.run_with_hooks(inputs, fwd_hooks=hooks)[:, -1].log_softmax(-1)[rows, right]
        )
        found = matrix.values[0, rows, neuron, right]
        torch.testing.assert_close(found, lost)
        expected = [lost[right == c].mean() for c in range(N_CLASSES)]
        torch.testing.assert_close(matrix.estimate[0, neuron], torch.stack(expected))


def test_specificity_weighs_classes_alike(toy, planted):
    """One class has many more items than the others."""
    many = Items([*heard_items(1), *(heard(1, 50 + n) for n in range(6))])
    matrix = neurons.deactivation(toy, many, planted, controls=["random"], progress=False)
    told = neurons.specificity(matrix)
    off = ~torch.eye(4, dtype=torch.bool)
    for at in (0, 1):
        own, cross = matrix.estimate[at].diag().mean(), matrix.estimate[at][off].mean()
        expected = [own.item(), cross.item(), (own - cross).item()]
        assert told.estimate[at].tolist() == pytest.approx(expected)
    assert set(told.controls) == {"random"} and told.coords["effect"][2] == "specificity"
    with pytest.raises(InputError, match="a matrix of deactivation"):
        neurons.specificity(told)


def test_doses_rise_for_the_own_class_and_nothing_is_nothing(toy, items, planted):
    result = neurons.dose(toy, items, planted, [-1, 0, 1, 3], progress=False)
    own = result.select(metric="log_prob", whose="own").estimate
    assert (own.diff() > 0).all() and own[1] == 0
    assert result.select(alpha=0.0).values.abs().max() == 0
    other = result.select(metric="log_prob", whose="other", alpha=3.0)
    assert other.estimate == 0
    assert result.controls["random_per_layer"].select(whose="own").estimate.abs().max() < 0.2
    off = result.select(metric="recall", whose="own", alpha=-1.0).estimate
    assert off == -1
    assert result.report[0].startswith("The answer's log-probability moves by -")


def test_neurons_are_injected_without_knowing_the_class(toy, items, planted):
    result = neurons.inject(toy, items, planted, 2.0, progress=False)
    gains = result.select(metric="log_prob").estimate.tolist()
    known = result.controls["known_class"].select(metric="log_prob").estimate.item()
    two_pass, mix, union = gains
    assert two_pass == pytest.approx(known) and 0 < mix < two_pass
    assert union == pytest.approx(two_pass)  # other classes' neurons do not fire
    assert result.controls["identity"].values.abs().max() == 0
    assert result.report[0].endswith("The first run names the right class in 1.00 of the items.")
    by_name = select(scores(logged(toy, items, "decoder", where="last"), "class"), ONE)
    says = {f"class {c}": str(c) for c in range(N_CLASSES)}
    given = {"says": says, "label": "class", "modes": ["mix"], "controls": []}
    same = neurons.inject(toy, items, by_name, 2.0, progress=False, **given)
    torch.testing.assert_close(same.values, result.select(mode=["mix"]).values)
    with pytest.raises(InputError, match="no word for the class 'class 0'"):
        neurons.inject(toy, items, by_name, says={}, label="class")


def test_selectors_stand_beside_each_other(toy, items, acts):
    result = neurons.compare(toy, items, acts, ONE, kinds=["MAD", "LAP"], progress=False)
    assert result.coords["kind"] == ["MAD", "LAP"]
    recall = result.select(metric="recall", effect="specificity").estimate
    assert recall.tolist() == pytest.approx([1, 0])
    assert set(result.controls) == {"random", "random_per_layer"}
    with pytest.raises(MethodError, match="no file holds its activations"):
        rerun(result, toy, items)


def test_a_matrix_is_made_again_from_its_file(toy, items, matrix, tmp_path):
    again = rerun(matrix.save(tmp_path / "matrix.nc"), toy, items)
    torch.testing.assert_close(again.values, matrix.values, equal_nan=True)


# -------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("given", "options", "said"),
    [
        (torch.ones(4, 3), {"kind": "SUM"}, "kind is one of LAP, LAPE"),
        (torch.ones(4, 3), {"floor": 0.1}, "floor= is a limit of LAPE; MAD has none"),
        (torch.ones(4, 3), {"shares": (0, 0, 0)}, "filters of AAPE"),
        (torch.ones(4, 3), {"kind": "AAPE", "shares": (0, 0)}, "three"),
        (torch.ones(4, 3), {"kind": "LAPE", "floor": 2.0}, "floor must be a number of 0 to 1"),
        (torch.ones(4), {}, "n by d"),
        (torch.ones(3, 2), {}, "3 rows need as many values of label, got 4"),
        (torch.ones(4, 3) * torch.nan, {}, "NaN"),
    ],
)
def test_bad_activations_say_why(given, options, said):
    with pytest.raises(InputError, match=said):
        scores(given, ["a", "b"] * 2, **options)


def test_bad_selections_say_why(toy, items, planted, acts, tmp_path):
    found = scores(torch.rand(8, 6), ["a", "b"] * 4)
    with pytest.raises(InputError, match="do not say whose neurons they are"):
        select(found)
    with pytest.raises(InputError, match="share must be"):
        select(found, 0.0, site=GATE)
    with pytest.raises(InputError, match="per is one of model, layer"):
        select(found, per="head", site=GATE)
    with pytest.raises(InputError, match="leave out site="):
        select(scores(acts, "answer"), site=GATE)
    with pytest.raises(InputError, match="no neuron is chosen for b"):
        select(scores(torch.ones(4, 3), ["a", "b"] * 2, "LAPE", floor=1), site=GATE)
    with pytest.raises(InputError, match="scores have the axes class, layer, neuron"):
        select(planted.histogram())
    with pytest.raises(InputError, match=r"no neurons were chosen for '7'; there are '0', '1'"):
        planted.edits("7")
    with pytest.raises(ItemError, match="all labels have one value"):
        scores(torch.ones(2, 3), ["a", "a"])
    (tmp_path / "none").write_text("nothing")
    with pytest.raises(InputError, match="holds no neurons"):
        Selection.load(tmp_path / "none")
    few = Selection(torch.ones(4, 4, 3, dtype=torch.bool), planted.classes, GATE, [0, 1, 2, 3])
    with pytest.raises(InputError, match="has 40 neurons in each block, the selection is of 3"):
        neurons.deactivation(toy, items, few)
    deep = Selection(planted.chosen, planted.classes, GATE, [0, 1, 2, 9])
    with pytest.raises(InputError, match="has 4 blocks, the selection is of block 9"):
        neurons.deactivation(toy, items, deep)


def test_bad_studies_say_why(toy, items, planted):
    with pytest.raises(InputError, match="controls are some of random, "):
        neurons.deactivation(toy, items, planted, controls=["chance"])
    with pytest.raises(ItemError, match="no neurons were chosen for the class of 8 of 8 items"):
        neurons.deactivation(toy, items, planted, label="class")
    with pytest.raises(InputError, match="alphas are one number or more, each once"):
        neurons.dose(toy, items, planted, [1, 1])
    with pytest.raises(InputError, match="modes are some of two_pass, mix, union"):
        neurons.inject(toy, items, planted, modes=["three_pass"])
    with pytest.raises(InputError, match="has no neurons; nearest names: decoder"):
        logged(toy, items, "decodr")
    with pytest.raises(InputError, match="has no neurons: name a site such as"):
        logged(toy, items, "decoder.resid_pre")
    with pytest.raises(SiteError):
        logged(toy, items, "decoder.mlp.nothing")


# -------------------------------------------------------------------------------- the real model


def test_gates_are_taken_where_there_are_any(embedded):
    assert neurons.site_of(embedded, "encoder") == "encoder.mlp.post"
    assert neurons.site_of(embedded, "decoder") == "decoder.mlp.gate"


@pytest.mark.slow
def test_the_study_of_the_demonstration_items(embedded):
    told = ANALYSES["neurons"].function(embedded, demo_items(), progress=False)
    assert set(told) == {"selectors", "dose"}
    own = told["selectors"].select(metric="log_prob", kind="MAD", effect="self")
    assert own.estimate > own.controls["random"].estimate


@pytest.mark.slow
@pytest.mark.real
def test_neurons_of_the_encoder_are_specific_to_a_spoken_digit(embedded):
    """ANALYSIS section 4: MAD self >= 0.4, cross <= 0.05, random <= 0.02 in log-probability."""
    said = neurons.right(embedded, spoken_items(160, seed=41, takes=range(15)))
    window = (STARTS[1] - 0.02, STARTS[1] + 0.64)
    acts = logged(embedded, said[:100], "encoder", where=window, progress=False)
    chosen = select(scores(acts, "answer", "MAD", control=False, resamples=0), 0.08)
    matrix = neurons.deactivation(
        embedded, said[100:140], chosen, controls=["random"], progress=False
    )
    effect = neurons.specificity(matrix).select(metric="log_prob")
    own, cross, _ = effect.estimate.tolist()
    assert own >= 0.4 and cross <= 0.05
    assert effect.controls["random"].estimate[:2].max() <= 0.02
