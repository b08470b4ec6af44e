"""The page of latents: what it holds, and what it plays."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from browsing import last_sound, until
from pages import Page

from audio_lens import collect
from audio_lens.analysis import autoencoders
from audio_lens.analysis.autoencoders import Features
from audio_lens.errors import InputError
from audio_lens.items import ItemError, demo_items
from audio_lens.report import feature_page
from audio_lens.timeline import Span

EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def found(embedded) -> Features:
    items = demo_items()[[0, 2, 4, 6]]
    acts = collect(embedded, items, "encoder.resid_post", layers=[2])
    made = autoencoders.train(acts, 64, 4, steps=60, progress=False)
    phones = {item.id: [Span(0, 0.5, EVIL), Span(0.5, 3.0, "Z")] for item in items}
    return autoencoders.features(embedded, items, acts, made, most=3, phones=phones)


def test_latents_have_clips_courses_and_what_is_said(found: Features) -> None:
    assert 0 < len(found.features) <= 12
    one = found.features[0]
    assert 0 < one.share < 0.1
    assert {moment.firing.item for moment in one.moments} <= found.clips.keys()
    for moment in one.moments:
        assert moment.start_s <= moment.firing.second <= moment.end_s
        at = int(np.argmin(np.abs(np.array(moment.seconds) - moment.firing.second)))
        assert moment.values[at] == pytest.approx(moment.firing.value)
        inside = [
            value
            for second, value in zip(moment.seconds, moment.values, strict=True)
            if moment.start_s < second < moment.end_s
        ]
        assert min(inside) > 0
    assert set(one.said) == {"words", "phones"}
    assert one.said["phones"][0] in (EVIL, "Z", "(nothing)")
    before, after = zip(*one.effects.values(), strict=True)
    assert sum(before) == pytest.approx(sum(before)) and before != after


def test_effects_are_those_of_the_edit(embedded, found: Features) -> None:
    """Against the model run with the edit by hand."""
    from audio_lens import intervene

    items = demo_items()[[0, 2, 4, 6]]
    acts = collect(embedded, items, "encoder.resid_post", layers=[2])
    made = autoencoders.train(acts, 64, 4, steps=60, progress=False)
    one = found.features[0]
    edit = autoencoders.steering(made, one.latent, "clamp", 2 * one.peak)
    answer = next(iter(one.effects))
    token, probs = embedded.to_single_token(answer), []
    for item in items:
        inputs = embedded.prepare(item.clip, item.text)
        with intervene(embedded, edit):
            probs.append(embedded(inputs)[0, -1].softmax(-1)[token].item())
    assert one.effects[answer][1] == pytest.approx(np.mean(probs), abs=1e-4)


def test_the_page_holds_all_and_runs_nothing_it_was_given(found: Features, tmp_path: Path) -> None:
    path = feature_page(found, tmp_path / "page.html", title=f"Latents {EVIL}")
    page, text = Page(path), path.read_text(encoding="utf-8")
    assert "<img" not in text and "http" not in text.replace("http-equiv", "")
    assert "plotly" not in page.text.get("title", "")
    assert path.stat().st_size < 1_500_000


def test_a_page_needs_latents_that_are_there(found: Features, embedded, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no latents"):
        feature_page(Features([], {}, {}, []), tmp_path / "x.html")
    items = demo_items()[:2]
    acts = collect(embedded, items, "encoder.resid_post", layers=[2])
    made = autoencoders.train(acts, 16, 2, steps=5, progress=False)
    with pytest.raises(InputError, match=r"a latent must be"):
        autoencoders.features(embedded, items, acts, made, [16])
    with pytest.raises(ItemError, match=r"not among the items"):
        autoencoders.features(embedded, items[:1], acts, made, [0])


def test_a_click_plays_from_the_moment_of_activity(found: Features, tmp_path: Path, browse) -> None:
    page = browse(feature_page(found, tmp_path / "page.html"))
    assert page.locator("#gallery .card").count() == len(found.features)
    moment = found.features[0].moments[0]
    page.locator(".moment button").first.click()
    sound = last_sound(page, 1)
    assert sound["from"] == pytest.approx(max(0, moment.start_s - 0.03), abs=1e-6)
    clip = found.clips[moment.firing.item]
    assert len(sound["samples"]) == len(clip.samples)
    assert np.allclose(sound["samples"], clip.samples, atol=1e-4)
    page.locator("#gallery .card").nth(1).click()
    until(page, f"stage.dataset.latent === '{found.features[1].latent}'")
    box = page.locator(".moment canvas").first.bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + 20)
    seconds = (
        len(found.clips[found.features[1].moments[0].firing.item].samples) / clip.sampling_rate
    )
    assert last_sound(page, 2)["from"] == pytest.approx(seconds / 2, rel=0.02)
    page.locator("#stage").focus()
    page.keyboard.press("ArrowLeft")
    until(page, f"stage.dataset.latent === '{found.features[0].latent}'")
    rows = page.locator("#effects tbody tr").count()
    assert rows == min(6, len(found.features[0].effects))


def test_what_scripts_read_is_plain_json(found: Features) -> None:
    from audio_lens.report.feature_page import _feature

    numbers = {name: i for i, name in enumerate(found.clips)}
    json.dumps([_feature(one, numbers) for one in found.features], allow_nan=False)
