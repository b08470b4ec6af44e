"""Temporal Attribution Patching: the rule of claims, stages that go on, toys, real speech."""

from __future__ import annotations

import itertools
import json
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch

from analysis.said import said_items
from audio_lens import Item, Items, patching
from audio_lens.analysis import tap
from audio_lens.analysis.tap import claims, confirm, grids, nodes, pairing, stages, work
from audio_lens.analysis.tap.choose import chosen_k
from audio_lens.analysis.tap.exact import Exact, Patch, exact
from audio_lens.analysis.tap.nodes import Node
from audio_lens.errors import InputError
from audio_lens.items import ItemError, Pairs, found
from audio_lens.patching.engine.checkpoint import CheckpointError
from audio_lens.report import tap_page
from audio_lens.results import Result
from audio_lens.timeline import Span
from items.speech import spoken_items
from toys import SubspaceToy

KINDS = ("window", "head")  # a toy's encoder is taken out, and with it the connector's places
CUE = Span(0.2, 0.3)  # the window of the toy's cue
DRAW = torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def toy() -> SubspaceToy:
    return SubspaceToy()


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    return said_items(range(2)).pairs()


def located(toy, pairs, **options):
    asked = {"kinds": KINDS, "windows": 0.1, "stages": tap.LOCATING, "progress": False}
    return tap.tap(toy, pairs, **(asked | options))


# -------------------------------------------------------------------------------- the rule


def items_of(count: int) -> Pairs:
    items = Items(Item(np.zeros(8), "?", answer="0", against="1") for _ in range(count))
    return Pairs(items, items)


def judged(effects: dict, gap: torch.Tensor | None = None, n_nodes: int = 3) -> list:
    """The claims of nodes with these mean effects by direction and control; the rest is noise."""
    n, axes = 30, (2, 2, n_nodes)
    gap = 10 + torch.randn(n, 2, generator=DRAW).double() if gap is None else gap

    def drawn(mean) -> torch.Tensor:
        noise = 0.3 * torch.randn(n, *axes, generator=DRAW).double()
        return noise + torch.as_tensor(mean).double() * gap[..., None, None]

    controls = ("other_item", "norm_matched_noise", "random_sites")
    moved = {"": drawn(effects.get("", 0.0))}
    moved |= {name: drawn(effects.get(name, 0.0)) for name in controls}
    moved["identity"] = torch.full((n, *axes), effects.get("identity", 0.0)).double() * 10
    for name in controls[:2]:
        moved[name][:, :, 1] = torch.nan  # of what is put into the clean run nothing is asked
    told = Exact(["log_prob", "logit_diff"], moved[""][:, :, 0], gap, torch.zeros_like(gap))
    asked = [Node("head", "decoder.attn.z", 0, head=i) for i in range(n_nodes)]
    result = confirm.of_effects(told, items_of(n), [str(node) for node in asked], moved)
    by_corruption = {"counterpart": result, "silence": result}
    return claims.claims_of(asked, dict.fromkeys(asked, 0.5), by_corruption, seed=0)


def test_what_leads_its_controls_in_every_trial_is_confirmed():
    (one, *_) = judged({"": 0.6, "other_item": 0.3})
    assert one.is_confirmed and one.why == "" and len(one.trials) == 8
    assert one.effect == pytest.approx(0.6, abs=0.05) and one.interval[0] < one.effect
    assert one.controls["other_item"] == pytest.approx(0.3, abs=0.05)
    assert one.controls["destroyed"] == 0.0  # of log_prob, the first metric
    assert sum(trial.is_demanded for trial in one.trials) == 6
    assert {trial.name for trial in one.trials} == {
        f"{corruption}, {metric}, {direction}"
        for corruption in ("counterpart", "silence")
        for metric in ("log_prob", "logit_diff")
        for direction in ("denoise", "noise")
    }


@pytest.mark.parametrize(
    ("effects", "why"),
    [
        ({}, "reaches down"),
        ({"": 0.6, "other_item": 0.6}, "no lead over other_item"),
        ({"": 0.6, "norm_matched_noise": 0.7}, "no lead over norm_matched_noise"),
        ({"": 0.6, "random_sites": 0.6}, "no lead over random_sites"),
        ({"": [[[0.6], [0.0]]]}, "noise: the effect"),  # enough, and not needed
        ({"": 0.04}, "below 0.05"),
        ({"": 0.6, "identity": 0.01}, "own activations"),
    ],
)
def test_a_claim_that_one_trial_does_not_bear_is_refused_with_its_reason(effects, why):
    for one in judged(effects):
        assert one.verdict == "refused" and why in one.why


def test_without_a_gap_there_is_nothing_to_share():
    gap = torch.randn(30, 2, generator=DRAW).double()
    moved = {"": 1.0}  # whole recoveries, of nothing
    assert all("do not differ" in one.why for one in judged(moved, gap))


def test_of_many_nodes_without_effect_none_is_confirmed():
    found_any = [one for _ in range(4) for one in judged({}, n_nodes=16) if one.is_confirmed]
    assert found_any == []


def test_a_claim_is_written_and_read_again():
    one = judged({"": 0.6})[0]
    assert claims.Claim.of(json.loads(json.dumps(one.to_dict()))) == one


def test_the_number_of_nodes_is_where_the_curve_beyond_random_ones_is_flat():
    items, gap = list(items_of(4).clean), torch.ones(4)
    curve = found(torch.tensor([[0.2, 0.5, 0.95, 1.0]] * 4), {"k": [1, 2, 4, 8]}, items)
    curve.controls["random_sites"] = found(torch.zeros(4, 4), {"k": [1, 2, 4, 8]}, items)
    assert chosen_k(curve) == 4 and len(gap) == 4
    curve.controls["random_sites"] = found(torch.ones(4, 4), {"k": [1, 2, 4, 8]}, items)
    assert chosen_k(curve) == 1  # nothing beyond random ones


# -------------------------------------------------------------------------------- pairs


def test_roles_hold_where_the_clean_side_is_right_and_not_by_chance(toy, pairs):
    roles = pairing.roles_of(toy, pairs, 64)
    assert roles.hold and roles.n_right == len(roles.kept) == len(pairs) and roles.n_reversed == 0
    half = [row % 2 == 0 for row in range(len(pairs))]
    sides = list(zip(pairs.clean, pairs.corrupted, half, strict=True))
    turned = Pairs(
        Items((a if keep else b).replaced(id=a.id) for a, b, keep in sides),
        Items((b if keep else a).replaced(id=a.id) for a, b, keep in sides),
    )
    mixed = pairing.roles_of(toy, turned, 64)
    assert not mixed.hold and mixed.n_right == mixed.n_reversed == len(pairs) / 2
    assert "nothing is claimed" in str(mixed)


def test_where_clips_differ_is_silenced_unless_told_otherwise():
    clip = np.ones(1000, dtype=np.float32)
    other = clip.copy()
    other[300:500] = 0.5
    items = Items([Item(clip, "?", answer="0", other_audio=other, sampling_rate=1000)])
    pairs = items.pairs()
    assert pairing.differing(pairs) == [Span(0.3, 0.5)]
    made = pairing.families(pairs, None)
    assert list(made) == ["counterpart", "silence"]
    heard = made["silence"].corrupted[0].clip["array"]
    assert not heard[310:490].any() and heard[:300].all() and heard[500:].all()
    same = items[0].replaced(id="same")
    two = Items([items[0], same])
    assert pairing.differing(two.pairs([items[0].replaced(audio=other), same])) == [
        Span(0.3, 0.5),
        None,
    ]
    with pytest.raises(ItemError, match="sound alike"):
        pairing.differing(items.pairs([items[0]]))
    for odd, why in (
        ([], "two corruptions"),
        ([3], "corruption '1'"),
        ({"counterpart": 1}, "another name"),
    ):
        with pytest.raises(InputError, match=why):
            pairing.families(pairs, odd)


# -------------------------------------------------------------------------------- exact effects


def test_sweeps_and_single_patches_agree_with_patches_by_hand(toy, pairs):
    some = pairs[:6]
    window, head = nodes.kinds_of(toy, some.clean, 0.2, None, KINDS)
    metric = some.clean.metrics(toy)
    for kind in (window, head):
        swept = grids.grid(patching.sweep, toy, some, kind, metric, 64)
        asked = [Patch((n,), d) for d in ("denoise", "noise") for n in kind.nodes]
        one_by_one = exact(toy, some, asked, metric, size=64)
        torch.testing.assert_close(swept.effects.flatten(2), one_by_one.effects)
        torch.testing.assert_close(swept.gap, one_by_one.gap)
    (batch,) = some.batches(toy, 64)
    node = window.nodes[0]
    diff = metric["logit_diff"].of_rows(batch.rows, len(some))
    point = f"decoder.blocks.{node.layer}.hook_resid_pre"
    _, cache = toy.run_with_cache(batch.pair.clean, names_filter=point)
    patch = patching.Patch(node.site, layer=node.layer, time=node.span, source=cache)
    by_hand = patching.patch(toy, batch.pair.corrupted, [patch], metric=diff)
    base = patching.run(toy, batch.pair.corrupted, [], diff)
    one = exact(toy, some, [Patch((node,))], metric, size=64)
    torch.testing.assert_close(one.effects[batch.rows, 1, 0], by_hand - base)


def test_an_identity_changes_nothing_and_another_item_brings_another_answer(toy, pairs):
    cue = Node("window", "decoder.resid_pre", 0, span=CUE)
    asked = [Patch((cue,), d, s) for d in ("denoise", "noise") for s in ("identity", "")]
    told = exact(toy, pairs, [*asked, Patch((cue,), "denoise", "other_item")], None, size=64)
    share = told.effects.mean(0) / told.gap.mean(0)[:, None]
    assert share[:, [0, 2]].abs().max() < 1e-9
    assert share[:, [1, 3]].sub(1).abs().max() < 1e-9
    assert (share[:, 4] < 0.7).all()


# -------------------------------------------------------------------------------- toys, end to end


def test_the_planted_head_is_confirmed_and_no_other(toy):
    report = located(toy, said_items(range(1)).pairs(), kinds=("head",), k=2)
    assert [(one.layer, one.head) for one in report.confirmed] == [(1, 1)]
    assert len(report.claims) == 2 and report.place is None


@pytest.mark.slow
def test_the_planted_place_and_head_are_confirmed_and_nothing_else(toy, pairs, tmp_path):
    path = tmp_path / "tap.part"
    report = located(toy, pairs, k=3, checkpoint=path)
    held = {(c.kind, c.layer, c.head, c.start_s) for c in report.confirmed}
    assert {("window", 0, None, 0.2), ("window", 1, None, 0.2), ("head", 1, 1, None)} == held
    assert report.place == "decoder.resid_pre of block 0 at 0.20-0.30 s"
    assert report.n_kept == len(pairs) and set(report.k) == set(KINDS)
    for claim in report.confirmed:
        assert claim.controls["random_sites"] == pytest.approx(0, abs=1e-6)
        assert claim.controls["identity"] == 0
    assert report["map"].mean().select(metric="log_prob", direction="noise").values.shape == (3, 4)
    again = tap.Report.load(report.save(tmp_path / "report.zip"))
    assert str(again) == str(report) and again.to_dict() == report.to_dict()
    assert set(report.found()) >= {"claims", "k", "agreement", "place", "hand_over", "n_kept"}
    page = tap_page(report, tmp_path / "tap.html").read_text()
    assert "decoder.attn.z, layer 1, head 1" in page and "confirmed" in page
    report.plot()

    def never(*_):
        raise AssertionError("a stage that was done ran again")

    with pytest.MonkeyPatch.context() as patch:  # killed and started again
        for name in tap.LOCATING:
            patch.setattr(work.Study, f"_{name}", never)
        assert str(located(toy, pairs, k=3, checkpoint=path)) == str(report)
    with pytest.raises(CheckpointError, match="seed differ"):
        located(toy, pairs, k=3, checkpoint=path, seed=1)
    with pytest.raises(InputError, match="may not be done"):
        tap.Report.load(path)


def test_pairs_whose_change_does_not_touch_what_is_asked_claim_nothing(toy):
    items = said_items(range(2))
    same = [
        x.replaced(audio=y.audio) for x, y in zip(items, [*items[12:], *items[:12]], strict=True)
    ]
    report = located(toy, items.pairs(same))  # the same said by another speaker
    assert report.claims == [] and report.n_kept == 0 and len(report) == 0
    assert "nothing is claimed" in str(report)


@pytest.mark.slow
def test_what_is_confirmed_is_followed(toy, pairs):
    report = located(toy, pairs, kinds=("window",), k=2, rank=3, stages=tap.STAGES)
    assert report.hand_over == 2  # behind the block that copies
    for name in ("saturation", "transfer_back", "subspace"):
        assert name in report
    assert report["saturation"].select(metric="log_prob", rank=3).mean().values > 0.9
    assert report["directions"].values.shape == (32, 3)
    for name in ("scrubbing", "scrubbing_subspace"):
        one = report[name].select(metric="log_prob").mean()
        assert one.values > 0.9 > 0.5 > one.controls["empty"].values
    assert "probes" in report or any("probes is left out" in note for note in report.notes)


@pytest.mark.parametrize("what", ["roles", "labels"])
def test_shuffled_pairs_claim_nothing(toy, pairs, what):
    assert located(toy, shuffled(pairs, what, 0)).confirmed == []


def shuffled(pairs: Pairs, what: str, seed: int) -> Pairs:
    """Pairs without a true effect: sides, or answers, in random order."""
    draw = np.random.default_rng(seed)
    both = list(zip(pairs.clean, pairs.corrupted, strict=True))
    if what == "roles":
        turned = draw.permutation(len(both)) < len(both) // 2
        both = [(b, a) if turn else (a, b) for (a, b), turn in zip(both, turned, strict=True)]
        labels = [(one.answer, one.against) for one in pairs.clean]
    else:
        labels = [
            (pairs.clean[i].answer, pairs.clean[i].against) for i in draw.permutation(len(both))
        ]
    sides = [
        Items(
            pair[side].replaced(answer=answer, against=against, other_audio=None, id=str(number))
            for number, (pair, (answer, against)) in enumerate(zip(both, labels, strict=True))
        )
        for side in (0, 1)
    ]
    return Pairs(*sides)


def test_bad_arguments_say_what_to_do(toy, pairs):
    def refused(why: str, **options):
        with pytest.raises(InputError, match=why):
            located(toy, pairs, **options)

    refused("two corruptions or more", corruptions=[])
    refused("two metrics or more", metrics={"log_prob": pairs.clean.metrics(toy)["log_prob"]})
    refused("kinds are some of", kinds=("layer",))
    refused("width of windows", windows=0.0)
    refused("width in seconds, or", windows=(0.1, 0.1, 0.1))
    refused("part is encoder or decoder", part="connector")
    refused("k", k=0)
    refused("stages are the first ones", stages=("claims",))


# -------------------------------------------------------------------------------- stages


def test_parts_are_kept_as_soon_as_they_are_done(tmp_path):
    path = tmp_path / "study"
    result = Result(torch.arange(3.0), ("layer",), {"layer": [0, 1, 2]})
    one = stages.Stages({"seed": "0"}, path)
    one.done("first", lambda: stages.Part({"x": result}, {"k": 3}))
    other = stages.Stages({"seed": "0"}, path)
    assert other.parts["first"].facts == {"k": 3}
    assert torch.equal(other.parts["first"].results["x"].values, result.values)
    with pytest.raises(CheckpointError, match="belongs to another study"):
        stages.Stages({"seed": "1"}, path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(CheckpointError, match="no checkpoint of tap"):
        stages.Stages({"seed": "0"}, path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("study.json", "{}")
    with pytest.raises(InputError, match="compressed"):
        stages.unpacked(path)
    with pytest.raises(InputError, match="no saved study"):
        tap.Report.load(tmp_path / "nowhere")


# -------------------------------------------------------------------------------- real speech


@pytest.mark.real
@pytest.mark.slow
def test_unseen_speakers_end_to_end(embedded, tmp_path):
    report = tap.tap(embedded, spoken_items(60).pairs(), progress=False)
    windows = [one for one in report.confirmed if one.kind == "window"]
    assert {one.start_s for one in windows} >= {0.8, 1.0}
    assert all(one.start_s >= 0.8 and one.end_s <= 1.6 and one.layer <= 3 for one in windows)
    assert report.hand_over == 4
    for name in ("saturation", "transfer_back"):  # from either speaker to the other
        one = report[name].select(metric="log_prob", rank=16).mean()
        assert one.values >= 0.9 and one.controls["random_direction"].values <= 0.15
    for one in report.confirmed:
        assert abs(one.controls["random_sites"]) < 0.05 and abs(one.controls["identity"]) < 1e-3
        assert one.controls["other_item"] < one.interval[0]
    assert {"scrubbing", "probes", "similarity"} <= set(report)
    tap.Report.load(report.save(tmp_path / "tap.zip"))

    nodes_of = [node for name in report.k for node in asked(report, embedded, name)]
    for seed in range(20):  # sides in random order, and the gate of roles left open
        turned = {
            name.removeprefix("confirmed_"): with_sides_turned(report[name], seed)
            for name in report
            if name.startswith("confirmed_")
        }
        some = claims.claims_of(nodes_of, dict.fromkeys(nodes_of, 0.0), turned, seed)
        assert not any(one.is_confirmed for one in some)


def asked(report: tap.Report, model, kind: str) -> list[Node]:
    """The nodes of a kind that a report tested."""
    (grid,) = nodes.kinds_of(model, spoken_items(3), 0.2, None, (kind,))
    named = {str(node): node for node in grid.nodes}
    return [named[x] for x in report["confirmed_counterpart"].coords["node"] if x in named]


def with_sides_turned(result: Result, seed: int) -> Result:
    """The effects that half of the pairs would show with their sides exchanged.

    What was put into the clean run is then put into the corrupted one, towards the same metric of
    the other sign. What was not measured that way is left out.
    """
    turned = torch.zeros(len(result.coords["stimulus"]), dtype=torch.bool)
    half = np.random.default_rng(seed).permutation(len(turned))[: len(turned) // 2]
    turned[half] = True

    def exchanged(values: torch.Tensor) -> torch.Tensor:  # metric stimulus direction node
        return torch.where(turned[:, None, None], values.flip(2), values)

    controls = {}
    for name, one in result.controls.items():
        if name == "gap":
            one = replace(one, values=torch.where(turned, -one.values, one.values))
        elif name != "destroyed":
            one = replace(one, values=exchanged(one.values))
        controls[name] = one
    return replace(result, values=exchanged(result.values), controls=controls)


@pytest.mark.real
@pytest.mark.slow
def test_another_word_claims_nothing(embedded):
    items = spoken_items(60)
    third = [
        x.replaced(audio=spliced(x, y)) for x, y in zip(items, [*items[1:], items[0]], strict=True)
    ]
    report = tap.tap(embedded, items.pairs(third), stages=tap.LOCATING, progress=False)
    assert report.confirmed == []


def spliced(item: Item, other: Item) -> np.ndarray:
    """The clip with the third word of another one."""
    start = int(16_000 * 1.5)
    return np.concatenate([item.audio[:start], other.audio[start:]])


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("what", ["roles", "labels"])
def test_of_twenty_shuffled_studies_at_most_one_claims_anything(embedded, what):
    pairs = spoken_items(60).pairs()
    found_any = itertools.chain.from_iterable(
        tap.tap(
            embedded, shuffled(pairs, what, seed), stages=tap.LOCATING, progress=False
        ).confirmed
        for seed in range(10)
    )
    assert len(list(found_any)) <= 1
