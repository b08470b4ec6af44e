"""Causal scrubbing: planted toys, hypotheses in trees, who lends to whom, and real speech."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from analysis.toy_items import hearing, item_of
from audio_lens import HookedAudioTransformer, InputError, Item, ItemError, Items, metrics, places
from audio_lens.analysis import scrubbing
from audio_lens.analysis.scrubbing import Hypothesis, LendingError, Node
from audio_lens.analysis.scrubbing.running import Runner
from audio_lens.analysis.scrubbing.scrub import CLAIM, _Scrubbing
from audio_lens.analysis.scrubbing.tree import Tree
from audio_lens.items import ANALYSES, demo_items, rerun
from audio_lens.places import Words
from audio_lens.results import Result
from audio_lens.sites import Site, SiteError
from items.speech import spoken_items
from toys import ANSWER, AUDIO_CLASS, MARKER, N_CLASSES, Cue, copy_toy, prompt, two_stream_toy

STREAM = "decoder.resid_pre"
CUES = [
    Cue(heard, read) for heard in range(N_CLASSES) for read in range(N_CLASSES) if heard != read
]


@pytest.fixture(scope="module")
def toy():
    """Block 2 copies the heard class from the audio to the last position."""
    return hearing(copy_toy())


@pytest.fixture(scope="module")
def items() -> Items:
    return Items(item_of(cue, labels={"odd": cue.heard % 2}) for cue in CUES)


def recovered(toy, items, *nodes: Node, **options) -> list[float]:
    result = scrubbing.scrub(toy, items, Hypothesis(nodes), progress=False, **options)
    return result.of_metric("logit_diff").mean().values.tolist()


AUDIO = Node(STREAM, 2, "audio", feature="answer", name="audio")
LAST = Node(STREAM, 4, "last", feature="answer", name="last")


# -------------------------------------------------------------------------------- planted truth


def test_the_planted_hypothesis_recovers_all_up_to_the_copying_block(toy, items):
    result = scrubbing.scrub(
        toy, items, Hypothesis([AUDIO]), layers=range(5), draws=2, progress=False
    )
    for metric in ("log_prob", "logit_diff"):
        curve = result.of_metric(metric).mean().values
        assert curve[:3].tolist() == pytest.approx([1, 1, 1], abs=1e-9)
        assert curve[3:].abs().max() < 0.5
    controls = {name: one.of_metric("logit_diff").mean() for name, one in result.controls.items()}
    assert set(controls) == {"empty", "full", "spread"}
    assert controls["full"].values.tolist() == pytest.approx([1] * 5, abs=1e-9)
    assert controls["empty"].values.abs().max() < 0.5
    assert controls["spread"].values[:3].max() < 1e-9 < 0.5 < controls["spread"].values[3]
    assert result.meta["cancelling"] == ""


@pytest.mark.parametrize(
    "node",
    [
        Node(STREAM, 2, "audio", feature="against"),  # another feature
        Node(STREAM, 2, "last", feature="answer"),  # another place
        Node(STREAM, 2, [5, 7], feature="id"),  # all of the item, beside the cue
        Node("decoder.attn.z", 2, "last", head=0, feature="answer"),  # another head
    ],
    ids=str,
)
def test_what_is_wrong_recovers_little(toy, items, node):
    assert abs(recovered(toy, items, node, draws=8)) < 0.3


@pytest.mark.parametrize(
    "node",
    [
        Node(STREAM, 2, (0.22, 0.3), feature="answer"),
        Node(STREAM, 4, "last", feature=lambda item: int(item.answer)),
        Node("decoder.attn.z", 2, "last", head=1, feature="answer"),
        Node(STREAM, 0, ~places.LAST, feature=["answer", "against"], name="both"),
        Node(STREAM, 0, lambda item: "audio", feature="id"),
    ],
    ids=str,
)
def test_what_is_right_recovers_all(toy, items, node):
    if node.name == "both":  # what nobody but a twin agrees in
        items = Items([*items[:4], *(x.replaced(id=f"twin {x.id}") for x in items[:4])])
    assert recovered(toy, items, node, draws=1) == pytest.approx(1, abs=1e-9)


def test_a_subspace_is_all_that_matters_or_nothing(toy, items):
    own = torch.eye(toy.cfg.decoder.d_model, dtype=torch.float64)
    basis = torch.cat([own[:, [MARKER]], own[:, AUDIO_CLASS]], dim=1)
    assert recovered(toy, items, Node(STREAM, 2, "audio", basis, "answer")) == pytest.approx(1)
    other = Node(STREAM, 2, "audio", own[:, ANSWER], "answer")
    assert abs(recovered(toy, items, other)) < 0.3


def test_a_feature_that_says_too_little_recovers_a_part(toy, items):
    """Of two classes of one parity half are right by chance."""
    assert 0.2 < recovered(toy, items, Node(STREAM, 2, "audio", feature="odd"), draws=16) < 0.7


def test_errors_that_cancel_are_told_from_the_spread():
    """The text is read as well, as often for the answer as against it."""
    toy = hearing(two_stream_toy(2.0, 1.0))
    items = Items(
        item_of(Cue(heard, read), against=str(1 - heard))
        for heard, read in [(0, 0), (0, 1), (1, 0), (1, 1)] * 6
    )
    hypothesis = Hypothesis([Node(STREAM, 1, "audio", feature="answer")])
    result = scrubbing.scrub(toy, items, hypothesis, progress=False)
    one = result.of_metric("logit_diff")
    assert one.estimate.item() == pytest.approx(1, abs=0.15)
    assert one.controls["spread"].estimate > 0.35
    assert "logit_diff" in result.meta["cancelling"]
    assert any("cancel in" in line and "logit_diff" in line for line in result.report)
    whole = Hypothesis([*hypothesis.nodes, Node(STREAM, 1, ~places.AUDIO, feature="text")])
    right = scrubbing.scrub(toy, items, whole, progress=False)
    assert right.meta["cancelling"] == "" and right.controls["spread"].estimate.max() < 1e-9


# -------------------------------------------------------------------------------- trees


@pytest.mark.slow
def test_nodes_behind_each_other_are_computed_from_each_other(toy, items):
    """What is wrong in front is wrong behind, unless what is behind reads nothing."""
    assert recovered(toy, items, AUDIO, LAST) == pytest.approx(1, abs=1e-9)
    wrong = Node(STREAM, 2, "audio", feature="against", name="audio")
    assert recovered(toy, items, wrong, LAST, draws=8) < 0.3  # below 0: never the answer
    alone = Node(STREAM, 4, "last", feature="answer", reads=())
    assert recovered(toy, items, wrong, alone) == pytest.approx(1, abs=1e-9)


def test_who_reads_what(toy):
    late = Node(STREAM, 4, "text", feature="id", name="late", reads=["audio"])
    tree = Tree.of(toy, Hypothesis([LAST, AUDIO, Node("attn.z", 2, "last", name="z")]))
    assert list(tree.nodes) == ["audio", "z", "last"] and tree.roots == ("last",)
    assert tree.reads == {"audio": (), "z": ("audio",), "last": ("z",)}
    assert Tree.of(toy, Hypothesis([late, AUDIO])).reads["late"] == ("audio",)


@pytest.mark.mostly_slow(4)
@pytest.mark.parametrize("seed", [0, 3])
def test_trees_are_what_single_forwards_with_hooks_give(toy, items, seed):
    early = Node(STREAM, 1, [6], feature="odd", name="early")
    tree = Tree.of(toy, Hypothesis([early, AUDIO, LAST, Node(STREAM, 4, [3], name="own")]))
    setup = _Scrubbing(toy, items, {(CLAIM, 0): tree}, None, 5)
    plan = [*setup.plan(2, seed).values()]
    scores = Runner(setup.layout, items.metrics(toy), 5, False).scores(plan, [])
    inputs = [prompt(cue) for cue in CUES]

    def run(base: int, puts, name: str):
        """One activation of a run with others put into it; they are (node, value)."""
        hooks = []
        for node, value in puts:
            at = {"audio": slice(0, 10), "last": [11]}.get(str(node.where), node.where)

            def put(x, hook, at=at, value=value):
                x = x.clone()
                x[:, at] = value[:, at]
                return x

            hooks.append((Site.parse(node.site, toy).hook_name(node.layer), put))
        with toy.hooks(hooks):
            return toy.run_with_cache(inputs[base], names_filter=[name])[1][name]

    def value(draw, slot: int):
        name = draw.placed.hook_name
        if not draw.reads:
            return run(draw.lenders[slot], [], name)
        puts = [(one.placed.node, value(one, slot)) for one in draw.reads.values()]
        return run(draw.bases[slot], puts, name)

    for number, scrub in enumerate(plan):
        for slot, item in enumerate(items):
            puts = [(one.placed.node, value(one, slot)) for one in scrub.roots]
            logits = run(scrub.bases[slot], puts, "hook_logits")[0, -1]
            expected = logits[int(item.answer)] - logits[int(item.against)]
            at = scores.metrics.index("logit_diff")
            assert scores.scrubbed[slot, at, number].item() == pytest.approx(expected.item())


# -------------------------------------------------------------------------------- who lends


def test_lenders_agree_in_the_feature_and_are_others(toy, items):
    trees = {(CLAIM, 0): Tree.of(toy, Hypothesis([AUDIO]))}
    setup = _Scrubbing(toy, items, trees, "against", 5)
    answers, against = items.values("answer"), items.values("against")
    twins = Items([*items, *(x.replaced(id=f"twin {x.id}") for x in items)])
    setup = _Scrubbing(toy, twins, trees, "against", 5)
    rows, dropped = setup.kept(skip_bad=False)
    assert rows == list(range(24)) and dropped == {}
    for scrub in setup.plan(3, 0).values():
        lenders = scrub.roots[0].lenders
        assert sorted(scrub.bases.tolist()) == rows
        for row, (lender, base) in enumerate(zip(lenders, scrub.bases, strict=True)):
            assert lender != row != base
            assert answers[lender % 12] == answers[row % 12]
            assert against[lender % 12] == against[row % 12] == against[base % 12]


@pytest.mark.slow
def test_draws_follow_the_seed(toy, items):
    node = Node(STREAM, 3, "audio", feature="answer")
    same, again, other = (recovered(toy, items, node, seed=seed) for seed in (1, 1, 2))
    assert same == again != other


def test_items_that_nobody_can_lend_to(toy, items):
    lonely = item_of(Cue(3, 1), id="lonely", labels={"odd": 7})
    some, node = Items([*items, lonely]), Node(STREAM, 2, "audio", feature="odd")
    with pytest.raises(LendingError, match=r"lonely.*agrees in odd"):
        recovered(toy, some, node)
    result = scrubbing.scrub(toy, some, Hypothesis([node]), skip_bad=True, progress=False)
    assert result.n_kept == 12
    assert result.dropped == {"no other item of equal layout agrees in odd": 1}
    with pytest.raises(LendingError, match="12 of 12"):
        recovered(toy, items, Node(STREAM, 2, "audio", feature=["answer", "text"]), skip_bad=True)
    with pytest.raises(LendingError, match="no other item of equal layout"):
        recovered(toy, items[:1], AUDIO)


def test_metrics_of_words_stay_with_their_items(toy, items):
    lonely = item_of(Cue(3, 1), id="lonely", labels={"odd": 7})
    some = Items([lonely, *items])
    asked = metrics.logit_diff([x.answer for x in some], [x.against for x in some])
    node = Node(STREAM, 2, "audio", feature=["odd", "answer"])
    hypothesis = Hypothesis([node])
    options = {"skip_bad": True, "progress": False}
    one = scrubbing.scrub(toy, some, hypothesis, metric={"logit_diff": asked}, **options)
    other = scrubbing.scrub(toy, some, hypothesis, **options).select(metric=["logit_diff"])
    assert torch.equal(one.values, other.values)


# -------------------------------------------------------------------------------- files


def test_hypotheses_are_written_and_read(tmp_path, toy, items):
    basis = torch.eye(toy.cfg.decoder.d_model, dtype=torch.float64)[:, :9]
    nodes = [
        Node(STREAM, 2, Words("x") | places.AUDIO, basis, ("answer", "odd"), name="a"),
        Node("attn.z", 4, (0.1, 0.2), feature="id", head=1, reads=["a"]),
    ]
    Hypothesis(nodes).save(tmp_path / "one.json")
    again = Hypothesis.load(tmp_path / "one.json")
    assert str(again) == str(Hypothesis(nodes))
    assert torch.equal(again.nodes[0].basis, basis) and again.nodes[1].reads == ["a"]
    json.loads((tmp_path / "one.json").read_text())
    with pytest.raises(InputError, match="holds a function"):
        Hypothesis([Node(STREAM, 2, feature=lambda item: 1)]).save(tmp_path / "two.json")
    (tmp_path / "bad.json").write_text('{"hypothesis": [1]}')
    for name in ("bad", "gone"):
        with pytest.raises(InputError, match="holds no hypothesis"):
            Hypothesis.load(tmp_path / f"{name}.json")


@pytest.mark.slow
def test_results_are_run_again_from_their_files(tmp_path, toy, items):
    own = torch.eye(toy.cfg.decoder.d_model, dtype=torch.float64)
    nodes = [Node(STREAM, 2, "audio", own[:, :9], "answer"), Node(STREAM, 2, "last")]
    result = scrubbing.scrub(toy, items, Hypothesis(nodes), layers=[1, 2], progress=False)
    assert set(result.controls) == {"empty", "own", "full", "spread"}
    path = result.save(tmp_path / "result.nc")
    assert torch.equal(rerun(path, toy, items).values, result.values)
    assert Result.load(path).report == result.report
    assert result.of_metric("log_prob").plot().data
    json.dumps(result.to_dict())


# -------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("nodes", "options", "error", "says"),
    [
        ([Node("decoder.resid_pree", 0)], {}, SiteError, "resid_pre"),
        ([Node(STREAM)], {}, SiteError, "say in which"),
        ([Node(STREAM, 5)], {}, SiteError, "0 to 4"),
        ([Node("attn.pattern", 0)], {}, SiteError, "no item can lend"),
        ([Node("attn.z", 0, head=2)], {}, SiteError, "0 to 1"),
        ([Node(STREAM, 0, head=0)], {}, SiteError, "no heads"),
        ([Node(STREAM, 0, basis=torch.ones(4, 2))], {}, InputError, "depend on each other"),
        ([Node(STREAM, 0, basis=torch.eye(4))], {}, InputError, "15 entries, its basis 4"),
        ([Node(STREAM, 0, feature="colour")], {}, ItemError, "colour"),
        ([Node(STREAM, 0, feature=3)], {}, InputError, "label or a function"),
        ([Node(STREAM, 0, feature=lambda item: [1])], {}, InputError, "compared"),
        ([Node(STREAM, 0, (7.0, 8.0))], {}, InputError, "selects no position"),
        ([Node(STREAM, 0), Node(STREAM, 0, "last")], {}, InputError, "same positions"),
        ([Node(STREAM, 1), Node("resid_post", 0, [3])], {}, InputError, "same positions"),
        ([Node(STREAM, 0)], {"layers": []}, InputError, "layers"),
        ([Node(STREAM, 0)], {"layers": [7]}, SiteError, "0 to 4"),
        ([Node("connector.out")], {"layers": [0]}, InputError, "no layer to move"),
        ([Node(STREAM, 0)], {"draws": 0}, InputError, "draws"),
        ([Node(STREAM, 0)], {"metric": metrics.kl()}, InputError, "clean run"),
    ],
)
def test_what_cannot_work_raises_before_the_model_runs(toy, items, nodes, options, error, says):
    ran = []
    toy.add_hook("hook_logits", lambda x, hook: ran.append(1))
    try:
        with pytest.raises(error, match=says):
            scrubbing.scrub(toy, items, Hypothesis(nodes), progress=False, **options)
    finally:
        toy.reset_hooks()
    assert not ran


@pytest.mark.parametrize(
    ("nodes", "says"),
    [
        ([3], "Node"),
        ([Node(STREAM, name="a"), Node(STREAM, name="a")], "called 'a'"),
        ([Node(STREAM, reads=["b"])], "reads 'b'"),
    ],
)
def test_hypotheses_that_are_none(nodes, says):
    with pytest.raises((InputError, TypeCheckError), match=says):
        Hypothesis(nodes)


def test_nodes_read_what_lies_before_them(toy):
    late = Node(STREAM, 3, name="late")
    with pytest.raises(InputError, match="does not lie before"):
        Tree.of(toy, Hypothesis([late, Node(STREAM, 2, reads=["late"])]))


# -------------------------------------------------------------------------------- from a shell


@pytest.mark.slow
def test_the_analysis_finds_where_the_answer_is(toy):
    """With lenders it tests the answer; without, each keeps its own, and the report says so."""
    single = Items(item_of(cue) for cue in CUES)
    twins = Items([*single, *(x.replaced(id=f"twin {x.id}") for x in single)])
    for some, feature in ((single, "id"), (twins, "answer")):
        found = ANALYSES["scrubbing"].function(toy, some, seed=1, progress=False)
        curves = {n: x.of_metric("log_prob").mean().values.tolist() for n, x in found.items()}
        assert curves["audio"][:3] == [*curves["last"][3:], curves["audio"][0]]
        assert curves["audio"][0] == pytest.approx(1) and abs(curves["last"][0]) < 0.4
        for result in found.values():
            assert result.meta["title"].endswith(feature)
            assert any("Too few" in line for line in result.report) == (feature == "id")


@pytest.mark.slow
def test_the_analysis_runs_on_the_shipped_items():
    model = HookedAudioTransformer.from_pretrained("embedded")
    found = ANALYSES["scrubbing"].function(model, demo_items(), progress=False)
    audio, last = (found[name].of_metric("log_prob").mean().values for name in ("audio", "last"))
    assert audio[0] > 0.8 and last[0] < 0.3 and last[-1] > audio[-1]


# -------------------------------------------------------------------------------- real speech

SECOND, THIRD = (0.86, 1.52), (1.54, 2.2)  # where the words of `spoken_items` lie, in seconds


def third_digit(item: Item) -> str:
    return str(item.words[2].label)


@pytest.fixture(scope="module")
def embedded() -> HookedAudioTransformer:
    return HookedAudioTransformer.from_pretrained("embedded")


@pytest.mark.slow
def test_floors_on_unseen_speakers(embedded):
    items, layers = spoken_items(50), [0, 2]

    def claimed(where, feature) -> tuple[np.ndarray, Result]:
        hypothesis = Hypothesis([Node(STREAM, 0, where, feature=feature)])
        options = {"layers": layers, "skip_bad": True, "draws": 3, "progress": False}
        result = scrubbing.scrub(embedded, items, hypothesis, **options)
        return result.of_metric("log_prob").mean().values.numpy(), result

    true, result = claimed(SECOND, "digit")
    assert (true >= 0.95).all() and result.n_kept >= 45
    assert (result.controls["empty"].of_metric("log_prob").mean().values <= 0.3).all()
    assert result.controls["full"].of_metric("log_prob").mean().values.min() > 0.999
    assert (claimed(THIRD, third_digit)[0] <= 0.15).all()
    assert (claimed(THIRD, "digit")[0] <= 0.15).all()


@pytest.mark.slow
def test_the_audio_of_late_layers_and_the_last_of_early_ones_recover_nothing(embedded):
    """What positions outside the hypothesis hold is another item's, the last one's too."""
    items, n_layers = spoken_items(30), embedded.cfg.decoder.n_layers

    def curve(where) -> np.ndarray:
        hypothesis = Hypothesis([Node(STREAM, 0, where, feature="id")])
        options = {"layers": range(n_layers), "draws": 2, "progress": False}
        result = scrubbing.scrub(embedded, items, hypothesis, **options)
        empty = result.controls["empty"].of_metric("log_prob").mean().values
        assert (empty <= 0.3).all()
        return result.of_metric("log_prob").mean().values.numpy()

    audio, last = curve("audio"), curve("last")
    assert audio[0] > 0.9 and audio[-1] < 0.4
    assert last[0] < 0.3 and last[-1] > 0.7
