"""What latents are and do: evaluation, matching, ranking, moments, splicing, steering."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import planted
import pytest
import torch
import toy_items
from answering import copying
from answering import items as answering_items

import toys
from audio_lens import Edit, Item, Items, collect, edits, intervene
from audio_lens.analysis import autoencoders
from audio_lens.analysis.autoencoders import Autoencoder
from audio_lens.edits.at import At
from audio_lens.errors import InputError
from audio_lens.items import ItemError, demo_items, rerun
from audio_lens.items.controls import ControlError
from audio_lens.sites import Site
from audio_lens.timeline import Span
from toys import ANSWER, AUDIO_CLASS, N_CLASSES, WIDTH

SITE = "decoder.resid_pre"


def perfect(site: str | None = SITE, layer: int | None = 2) -> Autoencoder:
    """A dictionary that loses nothing of a toy's stream: each dimension, up and down."""
    both = torch.cat([torch.eye(WIDTH), -torch.eye(WIDTH)])
    return Autoencoder(
        *(both, torch.zeros(2 * WIDTH), both, torch.zeros(WIDTH)),
        kind="relu",
        site=site,
        layer=layer,
    )


def known() -> Autoencoder:
    """The planted directions, read by their duals so that amounts come back exactly."""
    directions = torch.eye(8)
    return Autoencoder(directions, torch.zeros(8), directions, torch.zeros(8), kind="relu")


def small(count: int = 60) -> torch.Tensor:
    """Rows of 8 entries of which few are not 0."""
    draw = torch.Generator().manual_seed(0)
    return torch.rand(count, 8, generator=draw) * (torch.rand(count, 8, generator=draw) < 0.3)


# -------------------------------------------------------------------------------- evaluation


def test_what_is_lost_is_the_plain_formula() -> None:
    x, found = small(250), planted_like()
    result = autoencoders.evaluate(found, x)
    latents = found.encode(x)
    lost = (x - found.decode(latents)).square().sum() / (x - x.mean(0)).square().sum()
    fvu, l0 = result.mean().values.tolist()
    assert fvu == pytest.approx(lost.item(), rel=1e-4)
    assert l0 == pytest.approx((latents > 0).sum(1).double().mean().item())
    assert float(result.meta["dead"]) == pytest.approx(
        (latents == 0).all(0).double().mean().item(), abs=1e-5
    )
    assert (result.low <= result.estimate).all() and (result.estimate <= result.high).all()


def planted_like() -> Autoencoder:
    draw = torch.Generator().manual_seed(1)
    reads = torch.randn(12, 8, generator=draw)
    return Autoencoder(reads, torch.zeros(12), reads / 3, torch.full((8,), 0.1), k=3)


def test_a_perfect_dictionary_loses_nothing() -> None:
    fvu = autoencoders.evaluate(known(), small()).mean().values[0].item()
    assert fvu == pytest.approx(0, abs=1e-12)


def test_activations_are_evaluated_by_item(embedded, tmp_path: Path) -> None:
    items = demo_items()[:4]
    acts = collect(embedded, items, "encoder.resid_post", layers=[2], to=tmp_path / "acts")
    found = autoencoders.train(acts, 64, 8, steps=60, progress=False)
    result = autoencoders.evaluate(found, acts, by="group")
    assert result.coords["stimulus"] == [item.id for item in items]
    lost = (acts.array() - found(acts.array())).square().sum()
    spread = (acts.array() - acts.array().mean(0)).square().sum()
    assert result.mean().values[0].item() == pytest.approx((lost / spread).item(), rel=1e-3)


def test_evaluation_refuses_what_does_not_vary_or_fit() -> None:
    with pytest.raises(InputError, match="do not vary"):
        autoencoders.evaluate(known(), torch.ones(10, 8))
    with pytest.raises(InputError, match="have 5 entries"):
        autoencoders.evaluate(known(), torch.ones(10, 5))
    with pytest.raises(InputError, match="no labels to draw by"):
        autoencoders.evaluate(known(), small(), by="group")


# -------------------------------------------------------------------------------- matching


def permuted(of: Autoencoder, order: list[int]) -> Autoencoder:
    return Autoencoder(
        *(of.reads[order], of.offsets[order], of.directions[order], of.centre), kind=of.kind
    )


def test_the_same_latents_in_another_order_match_whole() -> None:
    order = [3, 1, 0, 2, 7, 6, 5, 4]
    result = autoencoders.match(known(), permuted(known(), order), small())
    values = dict(zip(result.coords["measure"], result.mean().values.tolist(), strict=True))
    for name in ("cosine", "assigned", "co_activation"):
        assert values[name] == pytest.approx(1, abs=1e-5), name
        assert values[f"{name} > 0.7"] == 1
    chance = result.controls["random_direction"].mean().values.tolist()
    assert max(chance[:3]) < 0.8


def test_two_latents_with_one_partner_are_told_by_the_assignment() -> None:
    twice = permuted(known(), [0, 1, 2, 3, 4, 5, 6, 6])
    result = autoencoders.match(twice, known())
    values = dict(zip(result.coords["measure"], result.mean().values.tolist(), strict=True))
    assert values["cosine"] == pytest.approx(1)
    assert values["assigned"] == pytest.approx(7 / 8)


def test_latents_of_other_sizes_match_by_their_activity() -> None:
    wide = Autoencoder(
        *(torch.eye(8, 10), torch.zeros(8), torch.eye(8, 10), torch.zeros(10)), kind="relu"
    )
    x = small()
    padded = torch.nn.functional.pad(x, (0, 2))
    result = autoencoders.match(known(), wide, (x, padded))
    assert result.coords["measure"] == ["co_activation", "co_activation > 0.7"]
    assert result.mean().values.tolist() == pytest.approx([1, 1])
    with pytest.raises(InputError, match="have no cosines"):
        autoencoders.match(known(), wide)
    with pytest.raises(InputError, match="do not belong together"):
        autoencoders.match(known(), wide, (x, padded[:-3]))


@pytest.mark.slow
def test_seeds_find_the_same_planted_directions() -> None:
    x = planted.rows(20_000)
    one, two = (autoencoders.train(x, 64, 4, seed=s, progress=False) for s in (0, 1))
    result = autoencoders.match(one, two, planted.rows(2000, seed=4), seed=5)
    values = dict(zip(result.coords["measure"], result.mean().values.tolist(), strict=True))
    assert values["cosine"] > 0.9 and values["assigned > 0.7"] > 0.85
    assert result.controls["random_direction"].mean().values[0] < 0.7


# -------------------------------------------------------------------------------- ranking


@pytest.mark.parametrize("kind", ["means", "logistic"])
def test_the_latent_of_a_label_comes_first(kind: str) -> None:
    x = small(80)
    labels = ["loud" if row[5] > 0 else "soft" for row in x]
    ranking = autoencoders.rank(known(), x, labels, "loud", kind=kind)
    assert ranking.top(1) == [5]
    ours = x[torch.tensor([label == "loud" for label in labels])]
    assert torch.allclose(ranking.means, ours.mean(0), atol=1e-6)
    if kind == "means":
        rest = x[torch.tensor([label == "soft" for label in labels])]
        assert ranking.scores[0] == pytest.approx((ours.mean(0) - rest.mean(0))[5].item(), rel=1e-5)


def test_ranking_refuses_what_it_cannot_compare() -> None:
    with pytest.raises(ItemError, match="no item has the value 'x'"):
        autoencoders.rank(known(), small(4), ["a", "b", "a", "b"], "x")
    with pytest.raises(InputError, match="as many labels"):
        autoencoders.rank(known(), small(4), ["a"], "a")
    with pytest.raises(InputError, match="kind is one of means, logistic"):
        autoencoders.rank(known(), small(4), ["a", "b", "a", "b"], "a", kind="svm")


# -------------------------------------------------------------------------------- moments


@pytest.fixture(scope="module")
def heard(embedded):
    """Items, activations, an autoencoder of a few moments, and the strongest of these."""
    items = demo_items()[[0, 2, 4]]
    acts = collect(embedded, items, "encoder.resid_post", layers=[2])
    one = acts.filter(id=items[1].id)
    row = one.array()[11]
    mean = acts.array().mean(0)
    toward = (row - mean) / (row - mean).norm()
    reads = torch.stack([toward, -toward])
    offsets = torch.tensor([-0.9 * (row - mean).norm().item(), -1e6])
    found = Autoencoder(
        *(reads, offsets, reads, mean), kind="relu", site="encoder.resid_post", layer=2
    )
    table, values = acts.table(), found.encode(acts.array())[:, 0]
    assert 0 < (values > 0).sum() < len(values) / 2
    at = int(values.argmax())
    return items, acts, found, (items[int(table["item"][at])].id, table["second"][at])


def test_a_moment_is_where_the_latent_is_strongest(heard) -> None:
    items, acts, found, (item, second) = heard
    moments = autoencoders.firings(found, acts, [0, 1], most=3)
    assert moments[0][0].item == item
    assert moments[0][0].second == pytest.approx(second)
    assert moments[1] == []  # never active
    values = [one.value for one in moments[0]]
    assert values == sorted(values, reverse=True)
    assert autoencoders.clips(found, acts, 0)[0][0][0] == item
    assert autoencoders.clips(found, acts, 0, by="mean")[0][0][0] in {item.id for item in items}


def test_moments_that_lie_together_count_once(heard) -> None:
    _, acts, found, _ = heard
    wide = Autoencoder(
        *(found.reads, found.offsets * 0, found.directions, found.centre), kind="relu"
    )
    moments = autoencoders.firings(wide, acts, 0, most=50, apart_s=0.2)[0]
    for i, one in enumerate(moments):
        for other in moments[:i]:
            assert one.item != other.item or abs(one.second - other.second) >= 0.2


def test_a_course_is_the_latent_over_the_seconds_of_a_clip(heard) -> None:
    _, acts, found, (item, second) = heard
    course = autoencoders.profile(found, acts, item, 0)
    assert course.axes == ("latent", "time")
    expected = found.encode(acts.filter(id=item).array())[:, 0]
    assert torch.allclose(course.values[0], expected)
    strongest = course.coords["time"][course.values[0].argmax()]
    assert strongest.start_s <= second <= strongest.end_s
    with pytest.raises(ItemError, match="no item is called"):
        autoencoders.profile(found, acts, "nobody", 0)


def test_purity_is_the_share_on_one_label() -> None:
    moments = [autoencoders.Firing("a", 0, i, i / 10, 1.0) for i in range(4)]
    said = {"a": [Span(0, 0.15, "AA"), Span(0.15, 0.25, "B")]}
    assert autoencoders.purity(moments, said) == ("AA", 0.5)
    with pytest.raises(InputError, match="nothing is known"):
        autoencoders.purity(moments, {})
    with pytest.raises(InputError, match="without moments"):
        autoencoders.purity([], said)


def test_pooled_activations_have_no_moments(embedded) -> None:
    acts = collect(embedded, demo_items()[:2], "encoder.resid_post", layers=[2], pool="mean")
    found = autoencoders.train(acts, 8, 2, steps=2, progress=False)
    with pytest.raises(InputError, match="without pool="):
        autoencoders.firings(found, acts, 0)
    with pytest.raises(InputError, match="without pool="):
        autoencoders.profile(found, acts, demo_items()[0].id, 0)


# -------------------------------------------------------------------------------- splicing


def test_a_perfect_dictionary_leaves_the_logits_as_they_are() -> None:
    toy = toys.copy_toy()
    prompt = toys.prompt(toys.Cue(heard=2))
    plain = toy(prompt)
    with intervene(toy, Edit(SITE, edits.Reconstruct(perfect()), layer=2)):
        assert torch.allclose(toy(prompt), plain, atol=1e-12)
    with intervene(toy, Edit(SITE, edits.Reconstruct(planted_small()), layer=2)):
        assert not torch.allclose(toy(prompt), plain, atol=1e-3)


def planted_small() -> Autoencoder:
    draw = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0))
    return Autoencoder(draw, torch.zeros(4), draw, torch.zeros(WIDTH), k=1)


def test_splicing_measures_what_reconstructions_keep() -> None:
    toy, items = copying(), answering_items()
    whole = autoencoders.splice(toy, items, perfect())
    assert whole.coords["metric"] == ["right", "log_prob"]
    assert torch.allclose(whole.values, whole.controls["unedited"].values, atol=1e-9)
    assert whole.values[0].mean() == 1
    assert whole.controls["mean"].values[0].mean() < 1
    part = autoencoders.splice(toy, items, planted_small(), site=SITE, layer=2)
    assert part.values[0].mean() < 1
    again = rerun(whole, toy, items)
    assert torch.equal(again.values, whole.values)


def test_splicing_refuses_what_it_cannot_place() -> None:
    toy, items = copying(), answering_items(1)
    with pytest.raises(InputError, match="name site="):
        autoencoders.splice(toy, items, perfect(None, None))
    with pytest.raises(InputError, match="controls are some of"):
        autoencoders.splice(toy, items, perfect(), controls=["none"])
    with pytest.raises(InputError, match="metric is metrics, or 'wer'"):
        autoencoders.splice(toy, items, perfect(), metric="cer")
    with pytest.raises(InputError, match="the autoencoder's 8"):
        autoencoders.splice(toy, items, known(), site=SITE, layer=2)


def test_transcripts_are_compared_where_wer_is_asked_for(embedded) -> None:
    items = demo_items()[:2]
    d = embedded.cfg.need_encoder.d_model
    both = torch.cat([torch.eye(d), -torch.eye(d)])
    whole = Autoencoder(
        *(both, torch.zeros(2 * d), both, torch.zeros(d)),
        kind="relu",
        site="encoder.resid_post",
        layer=1,
    )
    result = autoencoders.splice(embedded, items, whole, metric="wer", controls=["unedited"])
    assert result.coords["metric"] == ["wer"]
    assert torch.equal(result.values, result.controls["unedited"].values)


# -------------------------------------------------------------------------------- steering


def toward(number: int) -> list[int]:
    """The latent that is the answer to a class in the stream of a toy."""
    return [ANSWER.start + number]


def test_a_latent_that_is_the_answer_gives_it_and_others_do_not() -> None:
    toy, items = copying(), answering_items()
    after = perfect(layer=4)
    result = autoencoders.steer(
        toy, items, after, toward(1), "c1", value=9.0, where="last", among=range(4)
    )
    assert result.coords["metric"] == ["says", "log_prob"]
    assert result.values[0].mean() == 1
    assert result.controls["unedited"].values[0].mean() == pytest.approx(1 / N_CLASSES)
    assert result.controls["random_latents"].values[0].mean() <= 1 / N_CLASSES
    assert torch.equal(rerun(result, toy, items).values, result.values)


@pytest.mark.parametrize(
    "mode, value, becomes",
    [("zero", None, 0.0), ("negate", None, -1.0), ("negate", 3.0, -3.0), ("scale", 2.5, 2.5)],
)
def test_modes_change_the_latent_and_nothing_else(mode, value, becomes) -> None:
    """The audio's class in the stream becomes so many times what it was; the rest stays."""
    toy, prompt = toys.copy_toy(), toys.prompt(toys.Cue(heard=2))
    name = "decoder.blocks.2.hook_resid_pre"
    plain = toy.run_with_cache(prompt)[1][name]
    edit = autoencoders.steering(perfect(), AUDIO_CLASS.start + 2, mode, value, where="all")
    with intervene(toy, edit):
        changed = toy.run_with_cache(prompt)[1][name]
    expected = plain.clone()
    expected[..., AUDIO_CLASS.start + 2] *= becomes
    assert torch.allclose(changed, expected, atol=1e-12)


def test_clamping_sets_each_latent_to_its_own_value_and_keeps_what_is_lost() -> None:
    toy, prompt = toys.copy_toy(), toys.prompt(toys.Cue(heard=2))
    name = "decoder.blocks.2.hook_resid_pre"
    plain = toy.run_with_cache(prompt)[1][name]
    few = Autoencoder(
        *(torch.eye(3, WIDTH), torch.zeros(3), torch.eye(3, WIDTH), torch.zeros(WIDTH)),
        kind="relu",
    )
    edit = autoencoders.steering(
        few, [0, 2], value=torch.tensor([4.0, 5.0]), site=SITE, layer=2, where="last"
    )
    with intervene(toy, edit):
        changed = toy.run_with_cache(prompt)[1][name]
    expected = plain.clone()
    expected[:, -1, 0] = 4
    expected[:, -1, 2] = 5
    assert torch.allclose(changed, expected, atol=1e-12)


def test_edits_of_latents_are_written_and_read(tmp_path: Path) -> None:
    toy, prompt = toys.copy_toy(), toys.prompt(toys.Cue(heard=2))
    given = autoencoders.steering(perfect(), toward(1), value=9.0, where="last")
    edits.save(given, tmp_path / "edit.json")
    (again,) = edits.load(tmp_path / "edit.json")
    logits = []
    for edit in (given, again):
        with intervene(toy, edit):
            logits.append(toy(prompt))
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    "given, says",
    [
        ({"latents": []}, "each once"),
        ({"latents": [1, 1]}, "each once"),
        ({"latents": [99]}, "a latent must be"),
        ({"mode": "up"}, "mode is one of"),
        ({"mode": "zero", "value": 1.0}, "takes no value"),
        ({"mode": "scale", "value": 1.0}, "changes nothing"),
        ({"mode": "clamp"}, "needs a value"),
        ({"value": torch.zeros(3)}, "2 latents take one finite number"),
        ({"autoencoder": perfect(None, None)}, "name site="),
    ],
)
def test_steering_refuses_what_would_do_nothing_or_cannot_be(given: dict, says: str) -> None:
    asked = {"autoencoder": perfect(), "latents": [1, 2]} | given
    if given.keys() & {"latents", "autoencoder"}:
        asked["value"] = 2.0
    with pytest.raises(InputError, match=says):
        autoencoders.steering(**asked)


def test_random_latents_need_others() -> None:
    toy, items = copying(), answering_items(1)
    with pytest.raises(ControlError, match="1 wanted, and 0 others"):
        autoencoders.steer(toy, items, perfect(), [1], "c1", value=1.0, among=[1])


def test_activations_keep_their_dtype_under_edits() -> None:
    x = torch.randn(2, 3, 8, dtype=torch.bfloat16)
    assert known()(x).dtype == torch.bfloat16
    toy = toys.copy_toy()
    at = At(toy, Site.parse(SITE, toy), "x", None)
    assert edits.Latents(known(), lambda f: 2 * f)(x, at).dtype == torch.bfloat16
    assert edits.Reconstruct(known())(x, at).dtype == torch.bfloat16


# -------------------------------------------------------------------------------- streams


def test_latents_are_fed_by_the_stream_that_moves_them() -> None:
    toy = toy_items.hearing(toys.two_stream_toy(1.0, 1.0))
    cues = [(0, 1), (1, 2), (2, 3), (3, 0)]
    items = Items(
        toy_items.item_of(toys.Cue(heard=heard, read=read), id=f"{heard}{read}").replaced(
            other_audio=toy_items.item_of(toys.Cue(heard=(heard + 2) % 4, read=read)).audio,
            other_text=str((read + 1) % 4),
        )
        for heard, read in cues
    )
    result = autoencoders.modality_of(toy, items, perfect(layer=0), where="all")
    told = autoencoders.modalities(result)
    for number in range(N_CLASSES):
        assert told[AUDIO_CLASS.start + number] == "audio"
        assert told[toys.TEXT_CLASS.start + number] == "text"
    assert told[WIDTH] == "silent"
    after = autoencoders.modality_of(toy, items, perfect(layer=2), toward(1), where="last")
    assert autoencoders.modalities(after) == {toward(1)[0]: "both"}
    with pytest.raises(ItemError, match="has no other_text"):
        lacking = Items([items[0].replaced(other_text=None)])
        autoencoders.modality_of(toy, lacking, perfect())


def test_items_without_answers_show_no_effects(embedded) -> None:
    clip = np.sin(np.arange(16_000) / 20).astype(np.float32)
    items = Items([Item(clip * g, "Which?", sampling_rate=16_000) for g in (0.1, 0.3)])
    acts = collect(embedded, items, "encoder.resid_post", layers=[1])
    found = autoencoders.train(acts, 32, 4, steps=20, progress=False)
    shown = autoencoders.features(embedded, items, acts, found, [0, 1], most=2)
    assert all(not one.effects for one in shown.features)
    assert any("is not shown" in note for note in shown.notes)
