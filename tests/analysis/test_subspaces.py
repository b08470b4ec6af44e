"""Subspaces: bases of planted truth, curves of toys, real speech of unseen speakers."""

from __future__ import annotations

import pytest
import torch

from analysis.said import CUE, said_items
from audio_lens import Edit, collect, edits, metrics, patching
from audio_lens.analysis import subspaces
from audio_lens.analysis.subspaces import Subspace, basis
from audio_lens.analysis.subspaces.drawn import random_within
from audio_lens.errors import InputError
from audio_lens.items import ANALYSES, ItemError, MethodError, demo_items, rerun
from audio_lens.sites import SiteError
from items.speech import spoken_items
from toys import TEXT_CLASS, DormantToy, SubspaceToy

SITE = "decoder.resid_pre"
DRAW = torch.Generator().manual_seed(0)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=DRAW, dtype=torch.float64)


def planted(rank: int = 3, d: int = 32) -> torch.Tensor:
    return torch.linalg.qr(randn(d, rank))[0]


@pytest.fixture(scope="module")
def toy() -> SubspaceToy:
    return SubspaceToy()


@pytest.fixture(scope="module")
def pairs():
    return said_items(range(1)).pairs()


# -------------------------------------------------------------------------------- subspaces


def test_a_subspace_holds_orthonormal_directions_in_order(tmp_path):
    vectors = randn(32, 4) * torch.tensor([1.0, 100, 1e-3, 1])
    one = Subspace.spanned(vectors, site=SITE, layer=2, kind="probe", meta={"seed": "1"})
    torch.testing.assert_close(one.basis.T @ one.basis, torch.eye(4).double())
    assert one.first(2).angles(vectors[:, :2]).max() < 1e-5
    assert one.angles(vectors).max() < 1e-5 and one.angles(vectors[:, [3]]).shape == (1,)
    again = Subspace.load(one.save(tmp_path / "one.safetensors"))
    assert torch.equal(again.basis, one.basis) and again.strengths is None
    assert (again.site, again.layer, again.kind, again.meta) == (SITE, 2, "probe", {"seed": "1"})


def test_angles_are_those_of_the_planes():
    turn = torch.tensor(10.0).deg2rad().double()
    tilted = torch.stack([turn.cos(), turn.sin(), torch.zeros_like(turn)])[:, None]
    assert Subspace(tilted).angles(torch.eye(3, 1).double()).tolist() == pytest.approx([10])
    assert Subspace(tilted).angles(torch.eye(3).double()[:, [2]]).tolist() == pytest.approx([90])


def test_bad_subspaces_say_why(tmp_path):
    with pytest.raises(InputError, match=r"Subspace\.spanned"):
        Subspace(torch.ones(4, 2))
    with pytest.raises(InputError, match="depend on each other"):
        Subspace.spanned(torch.ones(4, 2))
    with pytest.raises(InputError, match="k in 1 to d"):
        Subspace.spanned(torch.ones(2, 4))
    with pytest.raises(InputError, match="has 1 to 1 directions, not 2"):
        Subspace.spanned(torch.ones(4, 1)).first(2)
    with pytest.raises(InputError, match="4 dimensions, the other 3"):
        Subspace.spanned(torch.ones(4, 1)).angles(torch.ones(3, 1))
    (tmp_path / "none").write_text("nothing")
    for name in ("none", "nowhere"):
        with pytest.raises(InputError, match="holds no subspace"):
            Subspace.load(tmp_path / name)


# -------------------------------------------------------------------------------- bases


def test_differences_show_what_changes_and_not_what_is_large():
    truth, common = planted(), planted(8)
    same = 20 * randn(200, 8) @ common.T
    clean, corrupted = (same + randn(200, 3) @ truth.T for _ in range(2))
    for given in ((clean, corrupted), clean - corrupted):
        one = basis(given, rank=3)
        assert one.angles(truth).max() < 1e-3 and one.kind == "difference"
        assert (one.strengths.diff() <= 0).all()
    assert basis(clean - corrupted).rank == 3  # no more carries anything
    assert basis(clean, rank=3).angles(truth).max() > 45


def test_differences_are_not_centred():
    shift = planted(1)
    assert basis((3 * shift + 0.01 * randn(32, 50)).T, rank=1).angles(shift).max() < 1


def test_conditions_share_what_correlates():
    truth, other = planted(), planted(4)
    said = randn(400, 3)
    one, two = (said @ truth.T + 3 * randn(400, 4) @ other.T + 0.05 * randn(400, 32) for _ in "ab")
    found = basis((one, two), "cca")
    assert found.rank == 3 and found.strengths.min() > 0.9
    assert found.angles(truth - other @ torch.linalg.lstsq(other, truth).solution).max() < 5


def test_classes_are_told_apart_by_lda():
    pytest.importorskip("sklearn")
    truth, noise = planted(), planted(6)
    noise = noise - truth @ (truth.T @ noise)
    means = torch.eye(4).double()
    means = (means - means.mean(0)) @ randn(4, 3)
    labels = [i % 4 for i in range(400)]
    rows = 5 * means[labels] @ truth.T + 10 * randn(400, 6) @ noise.T + 0.1 * randn(400, 32)
    found = basis(rows, "lda", labels=labels)
    assert found.rank == 3 and found.angles(truth).max() < 5
    with pytest.raises(InputError, match="label for each of the 400 rows"):
        basis(rows, "lda", labels=labels[:3])
    with pytest.raises(InputError, match="two classes"):
        basis(rows, "lda", labels=[0] * 400)


def test_columns_of_a_dictionary_stay_in_order():
    dictionary = randn(32, 100)
    found = basis(dictionary[:, [7, 3]], "columns")
    assert found.kind == "columns" and found.first(1).angles(dictionary[:, [7]]).max() < 1e-5


def test_collected_activations_say_what_they_are_of(toy):
    acts = collect(toy, said_items(), SITE, CUE, layers=[1])
    found = basis(acts, rank=3)
    assert (found.site, found.layer) == (SITE, 1) and found.meta["model"] == "toy"
    assert found.angles(toy.planted).max() < 1e-3
    pytest.importorskip("sklearn")
    assert basis(acts, "lda", labels="class").rank == 3


@pytest.mark.parametrize(
    ("given", "options", "said"),
    [
        (torch.ones(4, 3), {"kind": "best"}, "kind is one of"),
        (torch.ones(4, 3), {"kind": "das"}, r"interchange\.das\(model, pairs"),
        (torch.ones(4), {}, "tensor n d"),
        (torch.zeros(4, 3), {}, "no direction"),
        (torch.ones(4, 3) * torch.nan, {}, "finite"),
        (torch.ones(4, 3), {"kind": "cca"}, "two sides"),
        (torch.ones(4, 3), {"rank": 2}, "finds 1 directions here, and 2"),
        (torch.ones(4, 3), {"labels": [1] * 4}, "labels are for kind 'lda'"),
        ((torch.ones(4, 3), torch.ones(3, 3)), {}, "belong together"),
        ((torch.ones(4, 3), torch.ones(4, 3)), {"kind": "lda"}, "one set"),
        ((torch.ones(4, 3), torch.ones(4, 3)), {"kind": "cca"}, "8 rows"),
    ],
)
def test_bad_activations_say_why(given, options, said):
    with pytest.raises(InputError, match=said):
        basis(given, **options)


# -------------------------------------------------------------------------------- the curve


@pytest.fixture(scope="module")
def told(toy, pairs):
    rows = subspaces.differences(toy, pairs, SITE, CUE, layer=1)
    found = basis(rows, site=SITE, layer=1)
    return subspaces.curve(toy, pairs, SITE, CUE, found, [1, 2, 3, 4])


def test_the_elbow_is_at_the_planted_rank(told, toy):
    assert subspaces.elbow(told, "logit_diff") == 3
    diff = told.select(metric="logit_diff")
    assert diff.estimate.tolist() == pytest.approx([1 / 3, 2 / 3, 1, 1])
    complement = diff.controls["complement"].estimate.tolist()
    assert complement == pytest.approx([2 / 3, 1 / 3, 0, 0], abs=1e-6)
    assert diff.controls["random_direction"].estimate[:3].max() < 0.3
    assert diff.controls["whole_site"].estimate.item() == pytest.approx(1)
    assert told.controls["identity"].values.abs().max() < 1e-6
    assert told.controls["destroyed"].estimate.tolist() == [0.0, 0.5]
    assert told.meta["elbow"].endswith("logit_diff 3")
    assert told.report[1].startswith("logit_diff: 3 directions bring 1")


def test_random_parts_are_as_long_as_the_fitted(toy, pairs):
    """Against the obvious: a basis as wide as the site moves all, whatever its energy."""
    result = subspaces.curve(toy, pairs, SITE, CUE, torch.eye(32).double(), [32], layer=1)
    for name in ("random_direction", "energy_matched"):
        torch.testing.assert_close(result.controls[name].values, result.values)
    assert result.controls["complement"].values.abs().max() < 1e-12


def test_random_directions_of_where_most_varies_bring_more(toy):
    """The toy varies in six directions only, three of which say the class and three who speaks."""
    pairs = said_items().pairs()
    speakers = toy.turned[:, TEXT_CLASS][:, :3]
    result = subspaces.curve(
        toy, pairs, SITE, CUE, toy.planted, [1, 3], layer=1, other=speakers, seed=1
    )
    diff = result.select(metric="logit_diff")
    anywhere, inside = (
        diff.controls[name].estimate for name in ("random_direction", "random_principal")
    )
    assert anywhere[1] < 0.25 < inside[1] < 0.9
    assert diff.controls["other_contrast"].values.abs().max() < 1e-9
    assert "3 of the other contrast" in result.report[1]
    assert "3 of where most varies" in result.report[1]
    with pytest.raises(InputError, match="ks go up to 3, and it has 2"):
        subspaces.curve(toy, pairs, SITE, CUE, toy.planted, [3], layer=1, other=speakers[:, :2])
    with pytest.raises(InputError, match="32 entries, those of the subspace 5"):
        subspaces.curve(
            toy, pairs, SITE, CUE, toy.planted, [1], layer=1, other=torch.eye(5, 3).double()
        )


def test_a_random_part_of_few_directions_has_them_all():
    some = planted(4)
    part, all_and_more = random_within(some, 2, 0), random_within(some, 6, 0)
    assert part.rank == 2 and part.angles(some).max() < 1e-3
    assert all_and_more.rank == 6 and all_and_more.angles(some).max() < 1e-3
    assert part.angles(random_within(some, 2, 1)).max() > 1


def test_behind_the_hand_over_nothing_is_brought(toy, pairs):
    result = subspaces.curve(toy, pairs, SITE, CUE, toy.planted, [3], layer=2)
    assert result.values.abs().max() < 1e-12 and subspaces.elbow(result) is None
    assert "no number of directions" in result.report[0]


def test_cells_are_single_edits(toy, pairs):
    result = subspaces.curve(toy, pairs, SITE, CUE, toy.planted, [2], layer=0)
    kept = pairs.kept(toy)[0]
    (batch,) = kept[:3].batches(toy)
    metric = metrics.logit_diff(kept[:3].clean.values("answer"), kept[:3].clean.values("against"))
    two, clean = toy.planted[:, :2], batch.pair.clean
    swap = Edit(SITE, edits.Swap(two, clean), layer=0, where=CUE)
    rest = torch.linalg.qr(two, mode="complete")[0][:, 2:]
    others = Edit(SITE, edits.Swap(rest, clean), layer=0, where=CUE)
    sides = [patching.run(toy, inputs, [], metric) for inputs in batch.pair.values()]
    for edit, cell in ((swap, result), (others, result.controls["complement"])):
        run = patching.run(toy, batch.pair.corrupted, edit, metric)
        expected = (run - sides[1]) / (sides[0] - sides[1])
        found = cell.select(metric="logit_diff", rank=2).values[:3]
        torch.testing.assert_close(found, expected)


def test_what_the_whole_site_does_not_do_is_warned_of(toy, pairs, told):
    """Directions through a pathway that the model leaves asleep, and those that it uses."""
    dormant = DormantToy()
    result = subspaces.curve(dormant, pairs, SITE, CUE, dormant.illusion, [1, 3], layer=1)
    diff = result.select(metric="logit_diff")
    assert diff.controls["whole_site"].estimate.item() == 0 and diff.estimate[1] > 1
    (warning,) = [text for text in result.report if text.startswith("logit_diff: the subspace")]
    assert f"more ({diff.estimate[1]:.3g}) than the whole site does (0)" in warning
    both_ways = subspaces.effects(dormant, pairs, SITE, CUE, dormant.illusion, layer=1)
    asleep = [text.split(":")[0] for text in both_ways.report if "the model itself" in text]
    assert {"logit_diff, sufficiency", "logit_diff, necessity"} <= set(asleep)
    honest = subspaces.effects(toy, pairs, SITE, CUE, toy.planted, layer=1)
    assert not any("pathway" in text for text in (*told.report, *honest.report))


def test_a_curve_is_drawn_and_saved(toy, pairs, told, tmp_path):
    assert "directions bring" in str(told.plot(metric="logit_diff").layout)
    with pytest.raises(MethodError, match="no file holds its basis"):
        rerun(told.save(tmp_path / "curve.nc"), toy, pairs)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"ks": [1, 9]}, InputError, "ks"),
        ({"ks": [1, 1]}, InputError, "each once"),
        ({"layer": None}, SiteError, "say which by layer="),
        ({"layer": 7}, SiteError, "lie in 0 to 2"),
        ({"site": "decoder.attn.pattern"}, SiteError, "no subspaces"),
        ({"basis": torch.eye(5, 3).double()}, InputError, "32 entries, those of the subspace 5"),
        ({"controls": ["luck"]}, InputError, "no control 'luck' here"),
        ({"where": [CUE, CUE]}, InputError, "12 items need one place, or as many, got 2"),
    ],
)
def test_bad_curves_say_why(toy, pairs, change, error, said):
    asked = {"site": SITE, "where": CUE, "basis": toy.planted, "ks": [1], "layer": 1} | change
    with pytest.raises(error, match=said):
        subspaces.curve(toy, pairs, **asked)


def test_pairs_that_are_all_wrong_are_refused(toy):
    wrong = said_items()[:3]
    wrong = type(wrong)(item.replaced(answer="3", against="2") for item in wrong)
    with pytest.raises(ItemError, match="no pair of 3 is left"):
        subspaces.curve(toy, wrong.pairs(), SITE, CUE, toy.planted, [1], layer=1)


# -------------------------------------------------------------------------------- effects


def test_the_planted_subspace_is_enough_and_needed(toy, pairs):
    result = subspaces.effects(toy, pairs, SITE, CUE, toy.planted, layer=1)
    diff = result.select(metric="logit_diff")
    assert diff.estimate.tolist() == pytest.approx([1, 0, 1, 0], abs=1e-9)
    assert diff.controls["whole_site"].estimate.tolist() == pytest.approx([1, 0, 1, 0], abs=1e-9)
    random = diff.controls["random_direction"].estimate
    assert random[0] < 0.4 and random[:2].sum() == pytest.approx(1, abs=1e-6)
    assert "without them 1.00 is lost" in result.report[1]


def test_what_one_speaker_says_another_says_likewise(toy):
    pairs = said_items(range(2)).pairs()
    result = subspaces.transfer(toy, pairs, SITE, CUE, layer=1, rank=3)
    diff = result.select(metric="logit_diff")
    assert diff.estimate.flatten().tolist() == pytest.approx([1] * 4, abs=1e-6)
    assert diff.controls["random_direction"].estimate.max() < 0.5
    assert "bring 1.00 at least" in result.report[1]
    with pytest.raises(InputError, match="between two values of 'class'"):
        one = pairs[[row for row, item in enumerate(pairs.clean) if item.answer == "0"]]
        subspaces.transfer(toy, one, SITE, CUE, layer=1, between="class")


# -------------------------------------------------------------------------------- real speech


BESIDE = ("complement", "random_direction", "whole_site")


def second(item):
    """The second word, which is asked, with what of it is heard a little later."""
    return (item.words[1].start_s - 0.02, item.words[1].start_s + 0.64)


@pytest.fixture(scope="module")
def speakers(embedded):
    items = spoken_items(70, seed=17, takes=range(20))
    sides = (items.filter(group=name) for name in ("nicolas", "theo"))
    return [side[:28].pairs().kept(embedded)[0] for side in sides]


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("site", [("connector.out", None), (SITE, 3)], ids=["connector", "layer 3"])
def test_a_subspace_of_one_speaker_holds_for_the_other(embedded, speakers, site):
    name, layer = site
    one, other = speakers
    rows = subspaces.differences(embedded, one, name, second, layer=layer)
    found = basis(rows, site=name, layer=layer)
    result = subspaces.curve(embedded, other, name, second, found, [8, 16, 32], controls=BESIDE)
    log_prob, diff = (result.select(metric=m) for m in ("log_prob", "logit_diff"))
    assert diff.estimate[0] >= 0.7 and log_prob.estimate[1] >= 0.9
    if layer is None:
        assert diff.estimate[1] >= 0.9
    assert diff.controls["random_direction"].estimate[1] <= 0.15
    assert result.controls["complement"].select(rank=32).estimate.abs().max() <= 0.1
    assert 4 <= subspaces.elbow(result, "logit_diff") <= 16


@pytest.mark.real
@pytest.mark.slow
def test_the_study_runs_on_the_shipped_clips(embedded):
    told = ANALYSES["subspaces"].function(embedded, demo_items(), progress=False)
    assert set(told) == {"curve", "effects"}
    assert told["curve"].select(metric="logit_diff").controls["whole_site"].estimate > 0.9
