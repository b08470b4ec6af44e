"""An autoencoder of the embedded encoder, trained on real speech: what it keeps and turns."""

from __future__ import annotations

import time

import pytest

from audio_lens import Items, collect
from audio_lens.analysis import autoencoders
from audio_lens.items import demo_items
from items.speech import spoken_items

LAYER, TARGET = 2, "seven"
pytestmark = [pytest.mark.slow, pytest.mark.real]


def second_word(item):
    return item.words[1]


@pytest.fixture(scope="module")
def heard(embedded):
    """Items apart from those trained on, the autoencoder, and CPU seconds of its training."""
    items = spoken_items(90, seed=21, takes=range(20))
    fitted, tested = items[:60], items[60:]
    acts = collect(embedded, fitted, "encoder.resid_post", layers=[LAYER])
    start = time.process_time()
    made = autoencoders.train(acts, 1024, 16, steps=700, progress=False)
    return fitted, tested, acts, made, time.process_time() - start


def test_little_is_lost_of_clips_that_it_never_heard(embedded, heard) -> None:
    _, tested, _, made, seconds = heard
    assert seconds <= 120
    new = collect(embedded, tested, "encoder.resid_post", layers=[LAYER])
    fvu, l0 = autoencoders.evaluate(made, new).mean().values.tolist()
    assert fvu <= 0.05
    assert l0 == pytest.approx(16, abs=0.01)


def test_answers_over_reconstructions_are_those_of_the_model(embedded, heard) -> None:
    _, tested, _, made, _ = heard
    spliced = autoencoders.splice(embedded, tested, made, progress=False)
    own, over, mean = (
        one.mean().select(metric="right").values.item()
        for one in (spliced.controls["unedited"], spliced, spliced.controls["mean"])
    )
    assert over == pytest.approx(own, rel=0.05)
    assert mean < 0.5 * own


def test_latents_of_a_word_bring_it_and_others_do_not(embedded, heard) -> None:
    fitted, tested, acts, made, _ = heard
    words = collect(embedded, fitted, "encoder.resid_post", second_word, layers=[LAYER])
    ranking = autoencoders.rank(made, words, "digit", TARGET)
    top = ranking.top(20)
    assert len(top) == 20
    active = (made.encode(acts.array()) > 0).any(0).nonzero()[:, 0].tolist()
    others = Items.of(item for item in tested if item.answer != TARGET)
    result = autoencoders.steer(
        *(embedded, others, made, top, TARGET),
        value=4 * ranking.means[top],
        among=active,
        where=second_word,
        progress=False,
    )
    says = result.mean().select(metric="says").values.item()
    controls = {n: x.mean().select(metric="says").values.item() for n, x in result.controls.items()}
    assert says >= 0.5
    assert controls["random_latents"] <= 0.05
    assert controls["unedited"] <= 0.05


def test_the_study_of_the_command_runs_on_shipped_clips(embedded) -> None:
    from audio_lens.analysis.autoencoders.study import study

    results = study(embedded, demo_items(), progress=False)
    assert {"lost", "kept"} <= results.keys()
    assert results["lost"].mean().values[0] < 1
