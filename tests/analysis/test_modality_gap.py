"""The modality gap: paths of copies, projections, conditions of toys, the shipped model."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from analysis import answering
from analysis.answering import NAMES
from audio_lens import Edit, Item, Items, edits, metrics, patching
from audio_lens.analysis import modality_gap
from audio_lens.analysis.modality_gap.aligning import cosines, paths
from audio_lens.analysis.modality_gap.forms import Forms
from audio_lens.analysis.modality_gap.projecting import as_angle, as_length
from audio_lens.errors import InputError
from audio_lens.items import ControlError, ItemError, demo_items, rerun
from audio_lens.models.embedded import clip_pairs
from audio_lens.results import Result
from audio_lens.sites import SiteError
from items.speech import spoken_items

SAYS = "The transcript says: {words}. {text}"  # as the shipped model was trained
DRAW = torch.Generator().manual_seed(0)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=DRAW, dtype=torch.float64)


def asked(count: int = 4) -> Items:
    """The shipped clips, asked without a transcript; what is said in them is known."""
    return Items(
        Item(pair.clean, pair.question, answer=pair.answer, against=pair.against, words=pair.words)
        for pair in clip_pairs()[:count]
    )


# -------------------------------------------------------------------------------- paths


def test_identical_sequences_score_1_along_the_diagonal():
    text = randn(6, 16)
    path, similar = modality_gap.align(text, text)
    assert path.mean(similar) == pytest.approx(1) and path.slope == pytest.approx(1)
    assert path.token.tolist() == path.frame.tolist() == list(range(6))
    assert modality_gap.path_score(text, 3 * text) == pytest.approx(1)


@pytest.mark.parametrize("times", [2, 5])
def test_stretched_copies_score_1_with_the_slope_of_the_stretch(times):
    text = randn(8, 16)
    path, similar = modality_gap.align(text, text.repeat_interleave(times, 0))
    assert path.mean(similar) == pytest.approx(1)
    assert path.slope == pytest.approx(1 / times, rel=0.03)
    assert path.of_frames(similar).tolist() == [n // times for n in range(8 * times)]
    torch.testing.assert_close(path.by_token(similar), torch.ones(8).double())
    assert modality_gap.path_score(randn(8, 16), text) < 0.5


@pytest.mark.parametrize(("n_tokens", "n_frames"), [(1, 4), (3, 1), (3, 4), (4, 3)])
def test_no_other_path_costs_less(n_tokens, n_frames):
    similar = cosines(randn(2, n_tokens, 5), randn(2, n_frames, 5))
    for path, own in zip(paths(similar), similar, strict=True):

        @functools.cache
        def least(i: int, j: int) -> float:
            before = [least(*at) for at in ((i - 1, j), (i, j - 1), (i - 1, j - 1)) if min(at) >= 0]
            return 1 - float(own[i, j]) + min(before, default=0.0)  # noqa: B023

        cost = float((1 - own[path.token, path.frame]).sum())
        assert cost == pytest.approx(least(n_tokens - 1, n_frames - 1))
        steps = torch.stack([path.token.diff(), path.frame.diff()])
        assert ((steps == 0) | (steps == 1)).all() and (steps.sum(0) > 0).all()


def test_what_makes_no_path_says_why():
    with pytest.raises(InputError, match="vectors of one length"):
        modality_gap.align(randn(2, 4), randn(3, 5))
    with pytest.raises(InputError, match="vectors of one length"):
        modality_gap.path_score(torch.ones(0, 4), randn(3, 4))


def test_projections_keep_what_they_say():
    s, t = randn(5, 8), 3 * randn(5, 8)
    angle, length = as_angle(s, t), as_length(s, t)
    torch.testing.assert_close(torch.cosine_similarity(angle, t), torch.ones(5).double())
    torch.testing.assert_close(angle.norm(dim=1), s.norm(dim=1))
    torch.testing.assert_close(torch.cosine_similarity(length, s), torch.ones(5).double())
    torch.testing.assert_close(length.norm(dim=1), t.norm(dim=1))


# -------------------------------------------------------------------------------- TARS


def test_the_reward_is_of_the_middles_of_right_answers():
    speech, text = [randn(3, n, 8) for n in (5, 4)], [randn(3, n, 8) for n in (6, 3, 4)]
    rewards, mean = modality_gap.reward(speech, text, [True, False, True])
    wanted = [
        torch.cosine_similarity(a[:, 1:-1].mean(1), b[:, 1:-1].mean(1), dim=-1).mean()
        for a, b in ((speech[0], text[0]), (speech[1], text[2]))
    ]
    torch.testing.assert_close(rewards, torch.stack(wanted))
    assert mean == pytest.approx(float(rewards.mean()))
    assert modality_gap.reward(speech, text, [False] * 3)[1] == 0
    same, _ = modality_gap.reward(text[:1], text[:1], [True])
    assert float(same) == pytest.approx(1)
    with pytest.raises(InputError, match="needs 3 or more"):
        modality_gap.reward([randn(3, 2, 8)], text[:1], [True])
    with pytest.raises(InputError, match="2 spoken and 3 written runs with 1 marks"):
        modality_gap.reward(speech, text, [True])


# -------------------------------------------------------------------------------- conditions

LAYER = 2  # of the toy's head that copies


@pytest.fixture(scope="module")
def toy() -> answering.AnsweringToy:
    return answering.copying(layer=LAYER)


def told(shift: int) -> Items:
    """Clips of the classes, one or more further on."""
    return Items(
        answering.item((n + shift) % 4, n).replaced(id=f"{n}", answer=NAMES[n % 4])
        for n in range(4)
    )


def logit_of(item: int):
    return metrics.read_at(lambda rows: rows[:, item], name=f"logit of {NAMES[item]}")


def test_conditions_help_each_other_up_to_the_planted_layer(toy):
    result = modality_gap.cross_patch(
        toy, {"as told": told(0), "next": told(1)}, layers=[0, LAYER, LAYER + 1], progress=False
    )
    one = result.select(metric="log_prob").mean()
    gap = float(one.controls["unpatched"].select(into="as told").values) - float(
        one.controls["unpatched"].select(into="next").values
    )
    assert gap > 0.5
    helped = one.select(into="next", source="as told").values.tolist()
    assert helped == pytest.approx([gap, gap, 0], abs=1e-9)
    harmed = one.select(into="as told", source="next").values.tolist()
    assert harmed == pytest.approx([-gap, -gap, 0], abs=1e-9)
    for name in ("as told", "next"):
        assert one.select(into=name, source=name).values.abs().max() < 1e-12
    other = one.controls["other_item"].select(into="next", source="as told", layer=0)
    assert float(other.values) < 0.1 * gap


def test_mixtures_of_a_linear_toy_are_straight(toy, tmp_path):
    conditions = {"a": told(0), "b": told(1), "c": told(2)}
    result = modality_gap.interpolate(
        toy, conditions, steps=2, layers=[1, 4], metric=logit_of(1), progress=False
    )
    assert result.coords["mixture"] == ["1 a", "0.5 a, 0.5 b", "0.5 a, 0.5 c", "1 b",
                                        "0.5 b, 0.5 c", "1 c"]  # fmt: skip
    straight = result.controls["straight"]
    torch.testing.assert_close(result.values, straight.values, atol=1e-9, rtol=0)
    half = result.select(mixture="0.5 a, 0.5 b", layer=1).values[0]  # items 0 and 1 say class 1
    torch.testing.assert_close(half, torch.tensor([0.5, 0.5, 0, 0]).double(), atol=1e-6, rtol=0)
    again = Result.load(result.save(tmp_path / "mixed.nc"))
    torch.testing.assert_close(again.values, result.values)
    bent = modality_gap.interpolate(toy, conditions, steps=2, layers=[1], progress=False)
    assert (bent.values - bent.controls["straight"].values).abs().max() > 0.01  # a log-probability


def test_what_are_no_conditions_says_why(toy):
    with pytest.raises(InputError, match="conditions are two or more"):
        modality_gap.cross_patch(toy, {"a": told(0)})
    with pytest.raises(ItemError, match="'b' holds other items"):
        modality_gap.cross_patch(toy, {"a": told(0), "b": told(0)[:2]})
    other = Items(item.replaced(answer="c0") for item in told(1))
    with pytest.raises(ItemError, match="has another answer in condition 'b': pass metric="):
        modality_gap.interpolate(toy, {"a": told(0), "b": other})
    with pytest.raises(SiteError, match="conditions exchange states"):
        modality_gap.cross_patch(
            toy, {"a": told(0), "b": told(1)}, "decoder.attn.pattern", metric=logit_of(1)
        )


# -------------------------------------------------------------------------------- the shipped model


def test_the_gap_is_that_of_the_slow_loop(embedded):
    items = asked(3)
    result = modality_gap.gap(embedded, items, template=SAYS, layers=[0, -1], progress=False)
    assert result.coords["layer"] == [0, 5]
    for item in items:
        said = " ".join(word.label for word in item.words)
        heard = embedded.prepare([item.clip], [item.text])
        read = embedded.prepare(None, [f"The transcript says: {said}. {item.text}"])
        name = "decoder.blocks.5.hook_resid_post"
        speech, text = (embedded.run_with_cache(x)[1][name][0] for x in (heard, read))
        speech = speech[heard.tokens[0] == embedded.audio_token_id]
        tokens = [embedded.tokenizer.decode([t]).strip() for t in read.tokens[0].tolist()]
        start = tokens.index(item.words[0].label)
        text = text[start : start + len(item.words)]
        at = {"layer": 5, "stimulus": item.id}
        wanted = {
            "cosine": float(torch.cosine_similarity(speech.mean(0), text.mean(0), dim=0)),
            "distance": float((speech.mean(0) - text.mean(0)).norm()),
            "path_score": modality_gap.path_score(text, speech),
            "best_score": float(cosines(text, speech).amax(1).mean()),
        }
        for metric, value in wanted.items():
            found = float(result.select(metric=metric, **at).values)
            assert found == pytest.approx(value, rel=1e-3), metric
    assert (result.select(metric="in_word").values >= 0).all()
    assert set(result.controls) == {"other_item", "shuffled"}


def test_projections_are_hand_made_patches(embedded):
    items = asked(2)
    result = modality_gap.project(embedded, items, layers=[1], worst=1, progress=False)
    forms = Forms.of(embedded, items, None, "{words}\n{text}", "decoder.resid_pre", [1])
    (batch,) = forms.items[[0]].batches(embedded, 1)
    states, (spoken,) = forms.spoken(batch)
    read = forms.read(0)[0]
    path, similar = modality_gap.align(read, spoken.states[0])
    worst = int(path.by_token(similar).argmin())
    mine = path.of_frames(similar) == worst
    value = states[0].clone()
    value[0, spoken.positions[mine]] = as_angle(
        spoken.states[0][mine], read[worst].expand(int(mine.sum()), -1)
    )
    edit = Edit("decoder.resid_pre", edits.Put(value), layer=1)
    score = metrics.log_prob(items[0].answer)
    wanted = patching.run(embedded, batch.inputs, edit, score) - patching.run(
        embedded, batch.inputs, [], score
    )
    at = {"metric": "log_prob", "kind": "angle", "layer": 1, "stimulus": items[0].id}
    assert float(result.select(**at).values) == pytest.approx(float(wanted), abs=1e-4)
    assert result.controls["identity"].values.abs().max() < 1e-4
    again = rerun(result, embedded)
    torch.testing.assert_close(again.values, result.values)


@pytest.mark.slow
def test_drift_and_reward_are_two_measures(embedded):
    items = asked(3)
    drift = modality_gap.tars_drift(embedded, items, progress=False)
    assert drift.values.shape == (3, 6) and (drift.values.abs() <= 1 + 1e-9).all()
    with pytest.raises(ItemError, match="fewer than 3 tokens"):
        modality_gap.tars_reward(embedded, items, progress=False)
    long = modality_gap.tars_reward(
        embedded, items, options={"min_new_tokens": 5}, max_new_tokens=6, progress=False
    )
    wrong = modality_gap.tars_reward(
        embedded,
        items,
        right=lambda item, text: False,
        options={"min_new_tokens": 5},
        max_new_tokens=6,
        progress=False,
    )
    assert (wrong.values == 0).all() and long.meta["title"] != drift.meta["title"]


def test_what_has_no_gap_says_why(embedded, toy):
    items = asked(2)
    with pytest.raises(SiteError, match="no vectors at positions of the decoder"):
        modality_gap.gap(embedded, items, site="encoder.resid_post")
    with pytest.raises(InputError, match="no control 'silence'"):
        modality_gap.gap(embedded, items, controls=["silence"])
    with pytest.raises(InputError, match="a template holds"):
        modality_gap.gap(embedded, items, template="what is said?")
    with pytest.raises(ItemError, match="does not tell what is said in it"):
        modality_gap.gap(embedded, Items(item.replaced(words=()) for item in items))
    with pytest.raises(ControlError, match="other_item needs two items"):
        modality_gap.gap(embedded, Items(items[[0]]), words=lambda item: "two")
    with pytest.raises(InputError, match="kinds are some of"):
        modality_gap.project(embedded, items, kinds=["turn"])


@pytest.mark.slow
def test_the_path_follows_words_of_unheard_speakers(embedded, data_dir):
    result = modality_gap.gap(
        embedded, spoken_items(12, seed=31), template=SAYS, layers=[2], progress=False
    )
    for metric, control in (("path_score", "other_item"), ("in_word", "shuffled")):
        one = result.select(metric=metric)
        assert float(one.mean().values) > float(one.controls[control].mean().values), metric


@pytest.mark.slow
def test_the_study_runs_on_the_demonstration_items(embedded):
    found = modality_gap.study(embedded, demo_items(), progress=False)
    assert set(found) == {"gap", "project"}
    assert np.isfinite(found["gap"].mean().values.numpy()).all()
