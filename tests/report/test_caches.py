"""The page of a cache: norms and logit lens are what the model holds, and can be heard."""

import numpy as np
import pytest
import torch
from browsing import at, last_sound, until
from pages import Page

from audio_lens import InputError, TokenError
from audio_lens.analysis.logit_lens import Streams, read_streams
from audio_lens.analysis.prompts import Places, Prompt
from audio_lens.hooks import HookNameError
from audio_lens.models.embedded import default_pair
from audio_lens.report import cache_figure, cache_page
from audio_lens.report.cache_page import Columns
from audio_lens.timeline import Span
from families import FAMILIES

RATE = 16_000
NASTY = "</script><img src=x onerror=alert(1)>\"'&amp; {{7*7}} %{x} \N{SNOWMAN}"
rng = np.random.default_rng(0)


@pytest.fixture
def inputs(embedded):
    pair = default_pair()
    return embedded.prepare(pair.clean, text=pair.question)


def family_prompt(name, seconds, **overrides):
    family = FAMILIES[name]
    model = family.hooked(family.build(**family.impulse_model, **overrides))
    wave = rng.normal(0, 0.1, int(seconds * RATE)).astype(np.float32)
    inputs = family.clips(model, [wave])
    return Prompt.of(model, inputs, audio=wave), wave


# ------------------------------------------------------------------------ what is read


@pytest.mark.parametrize(
    "name, seconds",
    [("whisper", 1.3), ("qwen2_audio", 1.3), ("qwen3_asr", 7.3), ("granite_speech", 3.0)],
)
def test_last_lens_is_what_the_model_writes(name, seconds):
    prompt, _ = family_prompt(name, seconds)
    streams = read_streams(prompt, ["decoder", "encoder"], lens=True)
    decoder, encoder = streams
    with torch.no_grad():
        chances = prompt.model(prompt.inputs)[0].softmax(-1)
    at_text = chances[decoder.text.index]
    lens = decoder.lens
    n_audio = len(decoder.audio)
    assert lens.probs[-1, n_audio:, 0] == pytest.approx(at_text.amax(-1), abs=1e-5)
    assert lens.probs[-1, :n_audio, 0] == pytest.approx(
        chances[decoder.audio.index].amax(-1), abs=1e-5
    )
    assert encoder.lens is None
    assert len(encoder.audio) > 0 and encoder.norms.shape == (
        prompt.model.cfg.encoder.n_layers + 1,
        len(encoder.audio),
    )


@pytest.mark.parametrize("overrides", [{}, {"do_stable_layer_norm": True}])
def test_lens_of_ctc_encoders_labels_frames(overrides):
    prompt, _ = family_prompt("wav2vec2", 0.7, head="ForCTC", **overrides)
    (encoder,) = read_streams(prompt, ["encoder"], lens=True, tokens=[3])
    with torch.no_grad():
        chances = prompt.model(prompt.inputs)[0].softmax(-1)
    heard = chances[encoder.audio.index]
    assert encoder.lens.probs[-1, :, 0] == pytest.approx(heard.amax(-1), abs=1e-5)
    assert encoder.lens.tokens[-1, :, 0].tolist() == heard.argmax(-1).tolist()
    assert encoder.lens.watched["3"][-1] == pytest.approx(heard[:, 3], abs=1e-5)


def test_norms_are_of_what_each_layer_reads(embedded, inputs):
    _, cache = embedded.run_with_cache(inputs)
    (decoder,) = read_streams(Prompt.of(embedded, inputs), ["decoder"], lens=False, cache=cache)
    assert decoder.names == ["0", "1", "2", "3", "4", "5", "out"]
    assert decoder.lens is None
    index = torch.cat([decoder.audio.index, decoder.text.index])
    wanted = cache["resid_pre", 2][0, index].norm(dim=-1)
    assert decoder.norms[2] == pytest.approx(wanted.numpy(), rel=1e-5)
    wanted = cache["resid_post", 5][0, index].norm(dim=-1)
    assert decoder.norms[-1] == pytest.approx(wanted.numpy(), rel=1e-5)


def test_a_prompt_of_a_batch(embedded, inputs):
    pair = default_pair()
    two = embedded.prepare([pair.corrupted, pair.clean], text=pair.question)
    _, cache = embedded.run_with_cache(two)
    for part in ("encoder", "decoder"):
        (one,) = read_streams(Prompt.of(embedded, two, row=1), [part], True, cache=cache)
        (alone,) = read_streams(Prompt.of(embedded, inputs), [part], True)
        assert one.norms == pytest.approx(alone.norms, rel=1e-4)
        assert one.labels == alone.labels


def test_parts_without_a_vocabulary(embedded, inputs, tmp_path):
    path = tmp_path / "c.html"
    with pytest.raises(InputError, match=r"encoder of .* no vocabulary .*the decoder has one"):
        cache_page(embedded, inputs, path, parts="encoder", lens=True)
    prompt, wave = family_prompt("wav2vec2", 0.5)
    with pytest.raises(InputError, match="to see norms"):
        cache_page(prompt.model, prompt.inputs, path, audio=wave, tokens=[3])
    with pytest.raises(InputError, match="lens=False"):
        cache_page(embedded, inputs, path, lens=False, tokens=[" two"])
    with pytest.raises(InputError, match="no part ear: there is decoder, encoder"):
        cache_page(embedded, inputs, path, parts="ear")
    with pytest.raises(TokenError):
        cache_page(embedded, inputs, path, tokens=["no such single token"])
    _, lean = embedded.run_with_cache(inputs, names_filter="decoder.blocks.0.hook_resid_pre")
    with pytest.raises(HookNameError):
        cache_page(embedded, inputs, path, cache=lean)
    assert not path.exists()
    views = Page(cache_page(prompt.model, prompt.inputs, path, audio=wave)).data["views"]
    assert [view["key"] for view in views] == ["norm"]


def test_columns_of_several_positions():
    seconds = torch.tensor([0.1, 0.1, 0.2, 0.2], dtype=torch.float64)  # patches: two bands
    audio = Places(torch.zeros(4, dtype=torch.long), torch.arange(4), seconds)
    streams = Streams("encoder", ["out"], np.ones((1, 4)), audio, audio.none(), [], None)
    columns = Columns.of(streams, 0.3)
    assert columns.edges == pytest.approx([0.05, 0.15, 0.25]) and columns.is_pooled
    assert columns.means(np.array([[1.0, 3.0, 5.0, 7.0]])).tolist() == [[2.0, 6.0]]
    assert columns.firsts(np.array([[1, 3, 5, 7]])).tolist() == [[1, 5]]


# ------------------------------------------------------------------------ what is in the file


def test_page_holds_audio_on_its_seconds_and_text_beside(embedded, inputs, tmp_path):
    page = Page(cache_page(embedded, inputs, tmp_path / "c.html", tokens=[" two"]))
    assert [(view["part"], view["key"]) for view in page.data["views"]] == [
        ("decoder", "lens"), ("decoder", " two"), ("decoder", "norm"), ("encoder", "norm"),
    ]  # fmt: skip
    decoder, view = page.data["parts"]["decoder"], page.data["views"][0]
    audio, text = decoder["traces"]
    timeline = embedded.timeline(inputs)
    seconds = timeline.seconds("decoder")[timeline.audio_span]
    spans = np.array(audio["meta"]["spans"])
    assert len(decoder["edges"]) == len(seconds) + 1
    assert spans.mean(1)[5:-5] == pytest.approx(seconds[5:-5].numpy(), abs=1e-6)
    assert (spans[:, 1] - spans[:, 0])[5:-5] == pytest.approx(0.1)
    assert text["name"] == "text" and len(decoder["names"][1]) == len(timeline.text_span)
    assert np.shape(view["z"]) == (7, len(seconds) + len(timeline.text_span))
    assert view["strings"][view["tokens"][-1][-1][0]] == "\N{OPEN BOX}two"
    assert "\N{OPEN BOX}two" in page.text["td"]


def test_ctc_pages_say_what_each_layer_would_write(tmp_path):
    prompt, wave = family_prompt("wav2vec2", 0.7, head="ForCTC")
    page = Page(cache_page(prompt.model, prompt.inputs, tmp_path / "c.html", audio=wave))
    view = page.data["views"][0]
    assert view["key"] == "lens" and "would write" in page.text["th"]
    assert view["blank"] == -1 or view["strings"][view["blank"]].startswith("#")


def test_everything_is_escaped(embedded, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(embedded.tokenizer, "decode", lambda *args, **options: NASTY)
    words = [Span(0.1, 0.4, NASTY)]
    page = Page(cache_page(embedded, inputs, tmp_path / "c.html", words=words, title=NASTY))
    assert not page.all("img") and page.text["title"] == NASTY and NASTY in page.text["dd"]
    assert all("<" not in name for name in page.data["parts"]["decoder"]["names"][1])
    assert all("<" not in string for string in page.data["views"][0]["strings"])


def test_ten_seconds_stay_under_three_megabytes(tmp_path):
    prompt, wave = family_prompt("wav2vec2", 10, head="ForCTC", num_hidden_layers=24)
    path = cache_page(prompt.model, prompt.inputs, tmp_path / "c.html", audio=wave)
    assert path.stat().st_size < 3e6


@pytest.mark.parametrize("show, part", [("norm", "encoder"), ("lens", None), (" two", None)])
def test_figures(embedded, inputs, show, part):
    figure = cache_figure(embedded, inputs, show, part=part)
    audio = next(trace for trace in figure.data if trace.name == "audio")
    assert np.shape(audio.z)[1] == len(audio.x) - 1
    if show == "lens":
        assert figure.data[-1].text[-1][-1] == "\N{OPEN BOX}two"


# ------------------------------------------------------------------------ in a browser


@pytest.fixture
def page(embedded, inputs, tmp_path, browse):
    words = [*default_pair().words[:1], Span(1.3, 1.6, NASTY)]
    path = cache_page(
        embedded, inputs, tmp_path / "c.html", words=words, title=NASTY, tokens=[" two"]
    )
    return browse(path)


def test_hover_tells_and_click_plays_the_moment(page):
    page.mouse.move(*at(page, 1.49, "out", "yaxis4"))
    page.wait_for_selector(".hovertext")
    told = page.text_content(".hovertext")
    assert "layer out, 1.49 s" in told
    page.mouse.click(*at(page, 1.49, "out", "yaxis4"))
    sound = last_sound(page, 1)
    assert sound["from"] == pytest.approx(1.44, abs=0.005)
    assert sound["length"] == pytest.approx(0.1, abs=1e-3)


def test_text_has_columns_of_its_own(page):
    page.mouse.click(*at(page, 2, "3", "yaxis5", "xaxis5"))
    assert page.evaluate("started.length") == 0
    texts = page.evaluate("plot.data.find((t) => t.name === 'text').text.flat()")
    assert "two" in texts  # without the blank before it


def test_views_can_be_chosen(page):
    for index, shown in enumerate(["decoder lens", "decoder  two", "decoder norm", "encoder norm"]):
        page.select_option("#view", str(index))
        until(page, f"stage.dataset.shown === '{shown}'")
    assert page.locator("[data-part=encoder]").is_visible()
    assert not page.locator("[data-part=decoder]").is_visible()
    assert page.evaluate("plot.data.filter((t) => t.name === 'text').length") == 0


def test_keys_walk_over_audio_and_text(page):
    asked = page.text_content("#status")
    assert asked.startswith("layer out, ") and "two 0.9" in asked  # what the question is answered
    page.mouse.click(*at(page, 0.02, "0", "yaxis4"))
    page.focus("#stage")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowUp")
    until(page, "document.getElementById('status').textContent.startsWith('layer 1, 0.0')")
    page.keyboard.press("Enter")
    assert last_sound(page, 2)["from"] == pytest.approx(0, abs=0.03)
    count = page.evaluate("plot.data.find((t) => t.name === 'audio').z[0].length")
    for _ in range(count):
        page.keyboard.press("ArrowRight")
    until(page, "document.getElementById('status').textContent.includes('user')")
