"""The page of attention: the right seconds in the data, on screen and in the ear."""

import itertools
import sys

import numpy as np
import pytest
import soundfile
from browsing import at, last_sound, until
from pages import Page

from audio_lens import InputError
from audio_lens.analysis.attention import ClipAttention, Query, read_attention, sites_of
from audio_lens.analysis.prompts import Prompt
from audio_lens.hooks import HookNameError
from audio_lens.models.embedded import default_pair
from audio_lens.report import attention_figure, attention_page
from audio_lens.report.packing import TOP_LEVEL, coarser, fitted, letters_of
from audio_lens.timeline import Span
from families import FAMILIES

RATE = 16_000
NASTY = "</script><img src=x onerror=alert(1)>\"'&amp; {{7*7}} %{x} \N{SNOWMAN}"
LAYER, HEAD, START_S, END_S = 3, 2, 1.39, 1.47  # of the planted pattern: two audio tokens
SEGMENTED = ("qwen3_asr", "audioflamingo3")
rng = np.random.default_rng(0)


@pytest.fixture
def inputs(embedded):
    pair = default_pair()
    return embedded.prepare(pair.clean, text=pair.question)


@pytest.fixture
def planted(embedded, inputs):
    """The embedded model with a head that looks at one stretch only, for as long as the test."""
    there = embedded.timeline(inputs).positions("decoder", START_S, END_S)
    assert there.stop - there.start == 2

    def plant(pattern, hook):
        pattern[:, HEAD, -6:] = 0
        pattern[:, HEAD, -6:, there] = 0.3
        pattern[:, HEAD, -6:, 0] = 0.4
        return pattern

    with embedded.hooks([(f"decoder.blocks.{LAYER}.attn.hook_pattern", plant)]):
        yield embedded


def family_prompt(name, *seconds, **overrides):
    """A tiny random model of a family, hearing noise."""
    family = FAMILIES[name]
    model = family.hooked(family.build(**family.impulse_model, **overrides))
    waves = [rng.normal(0, 0.1, int(s * RATE)).astype(np.float32) for s in seconds]
    return model, family.clips(model, waves), waves


# ------------------------------------------------------------------------ what is read


def test_planted_pattern_is_read_at_its_seconds(planted, inputs):
    prompt = Prompt.of(planted, inputs).alone()
    (found,) = read_attention(prompt, ["decoder.attn"])
    pattern = found.of_head(LAYER, HEAD)[-1]
    heard = np.flatnonzero(pattern)
    assert found.edges[heard] == pytest.approx([1.39, 1.43], abs=0.011)
    assert pattern[heard] == pytest.approx([0.3, 0.3])
    assert found.on_audio[LAYER, HEAD, -1] == pytest.approx(0.6)
    assert found.entropy[LAYER, HEAD, -1] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    "name, seconds",
    [("whisper", 1.3), ("wav2vec2", 0.9), ("granite_speech", 3.0), *((n, 7.3) for n in SEGMENTED)],
)
def test_shares_are_what_the_patterns_hold(name, seconds):
    model, inputs, waves = family_prompt(name, seconds)
    prompt = Prompt.of(model, inputs, audio=waves[0])
    _, cache = model.run_with_cache(inputs, attention=True)
    for one in read_attention(prompt, sites_of(prompt)):
        part = one.site.split(".")[0]
        assert one.share.sum(-1) == pytest.approx(one.on_audio, abs=1e-5)
        assert one.share.shape[:2] == (len(one.layers), len(one.heads))
        assert (one.on_audio > 0).all() and (one.on_audio < 1 + 1e-5).all()
        assert (
            0 <= one.edges[0] < one.edges[-1] <= seconds + 0.02 and (np.diff(one.edges) > 0).all()
        )
        pattern = cache[f"{part}.blocks.1.{one.site.split('.')[1]}.hook_pattern"]
        keys = prompt.places("decoder" if one.site == "decoder.attn" else "encoder")
        if part == "decoder":
            first = prompt.text_places().index[-1]
            wanted = pattern[0, :, first, keys.index].sum(-1)
            assert one.on_audio[1, :, -1] == pytest.approx(wanted, abs=1e-5)
        else:
            wanted = sum(
                pattern[row][:, keys.of_row(row)][:, :, keys.of_row(row)].sum((1, 2))
                for row in range(len(pattern))
            )
            bins = keys.bins(prompt.seconds, 250)[1].bincount()
            assert (one.on_audio[1] * bins.numpy()).sum(-1) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("name", SEGMENTED)
def test_segments_lie_behind_each_other(name):
    model, inputs, waves = family_prompt(name, 7.3)
    assert len(inputs.features) > 1
    prompt = Prompt.of(model, inputs, audio=waves[0])
    (found,) = read_attention(prompt, ["encoder.attn"])
    cut = np.searchsorted(found.edges, model.cfg.segment_s)
    assert 0 < cut < len(found.edges) - 2
    share = found.share
    assert (share[:, :, : cut - 1, cut + 1 :] == 0).all()
    assert (share[:, :, cut + 1 :, : cut - 1] == 0).all()
    assert found.queries[0].span[0] == pytest.approx(0, abs=0.05)
    assert found.queries[-1].span[1] == pytest.approx(7.3, abs=0.1)


def test_a_cache_says_the_same_as_a_run(embedded, inputs):
    pair = default_pair()
    two = embedded.prepare([pair.corrupted, pair.clean], text=pair.question)
    _, cache = embedded.run_with_cache(two, attention=True)
    sites = ["decoder.attn", "encoder.attn"]
    of_cache = read_attention(Prompt.of(embedded, two, row=1), sites, cache=cache)
    of_run = read_attention(Prompt.of(embedded, inputs), sites)
    for one, other in zip(of_cache, of_run, strict=True):
        assert one.share == pytest.approx(other.share, abs=1e-5)
        assert one.queries == other.queries
    _, lean = embedded.run_with_cache(two)
    with pytest.raises(HookNameError, match="attention=True"):
        read_attention(Prompt.of(embedded, two), sites, cache=lean)
    with pytest.raises(InputError, match="2 rows of the decoder, these inputs 1"):
        read_attention(Prompt.of(embedded, inputs), sites, cache=cache)


def test_clips_of_one_prompt_are_told_apart(embedded):
    pair = default_pair()
    inputs = embedded.prepare([[pair.clean, pair.corrupted]], text=pair.question)
    both = [Prompt.of(embedded, inputs, clip=clip) for clip in (0, 1)]
    of_clip = [read_attention(prompt, ["decoder.attn", "encoder.attn"]) for prompt in both]
    for one in of_clip:
        for found in one:
            assert (found.edges[0], found.edges[-1]) == pytest.approx((0, 3.12), abs=0.05)
    first, second = (one[0].on_audio[..., -1] for one in of_clip)
    assert (first + second <= 1 + 1e-5).all() and (first > 0).all() and (second > 0).all()
    assert len(of_clip[0][0].queries) > len(of_clip[1][0].queries)
    recorded = [soundfile.read(path)[0] for path in (pair.clean, pair.corrupted)]
    for prompt, samples in zip(both, recorded, strict=True):
        np.testing.assert_allclose(prompt.samples, samples, atol=1e-4)


def test_what_the_model_writes_is_shown_too(embedded, inputs):
    prompt = Prompt.of(embedded, inputs)
    answered = prompt.answered(5)
    written = embedded.generate(inputs, max_new_tokens=5, return_type="tokens")
    assert answered.tokens == written[0].tolist() and len(answered.tokens) > len(prompt.tokens)
    (found,) = read_attention(answered, ["decoder.attn"], [0], [0])
    assert [query.label for query in found.queries][-2] == "\N{OPEN BOX}two"


def test_places_that_do_not_exist(embedded, inputs):
    prompt = Prompt.of(embedded, inputs)
    with pytest.raises(InputError, match=r"cross_attn: in this model there is decoder\.attn"):
        sites_of(prompt, "decoder.cross_attn")
    with pytest.raises(InputError, match="decoder has layers 0 to 5"):
        read_attention(prompt, ["decoder.attn"], layers=[6])
    with pytest.raises(InputError, match="no prompt 1"):
        Prompt.of(embedded, inputs, row=1)
    with pytest.raises(InputError, match="no clip 1"):
        Prompt.of(embedded, inputs, clip=1)
    with pytest.raises(InputError, match="audio="):
        Prompt.of(embedded, embedded.inputs_from_mapping({
            "input_ids": inputs.tokens, "input_features": inputs.features,
            "feature_attention_mask": inputs.feature_mask,
        }))  # fmt: skip


def test_audio_of_another_clip_is_refused(embedded, inputs):
    with pytest.raises(
        InputError, match=r"audio is 4\.00 s long, the clip in the inputs at most 3"
    ):
        Prompt.of(embedded, inputs, audio=np.zeros(4 * RATE, dtype=np.float32))


def test_padding_that_the_model_hears_is_no_part_of_the_clip():
    model, inputs, waves = family_prompt("voxtral", 4.3)
    (found,) = read_attention(Prompt.of(model, inputs, audio=waves[0]), ["encoder.attn"])
    assert found.edges[-1] == pytest.approx(4.3, abs=0.03)
    assert (found.on_audio < 0.99).any()


# ------------------------------------------------------------------------ how it is made small


def random_attention(layers=4, heads=3, bins=200, timed=True):
    share = rng.dirichlet(np.full(bins, 0.05), (layers, heads, bins)).astype(np.float32)
    edges = np.linspace(0, 10, bins + 1)
    spans = itertools.pairwise(edges)
    queries = [Query("", span) for span in spans] if timed else [Query("a")] * bins
    sums = share.sum(-1)
    site = "encoder.attn" if timed else "decoder.attn"
    return ClipAttention(site, [*range(layers)], [*range(heads)], share, sums, sums, edges, queries)


def test_letters_hold_shares_to_a_64th_of_the_root():
    found = random_attention(1, 2, 50)
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    for head, letters in enumerate(letters_of(found)[0]):
        levels = np.array([alphabet.index(letter) for letter in letters]).reshape(50, 50)
        peak = found.peaks()[0, head]
        error = np.abs(levels / TOP_LEVEL - np.sqrt(found.share[0, head] / peak))
        assert error.max() <= 0.5 / TOP_LEVEL + 1e-6


@pytest.mark.parametrize("bins", [200, 201])
def test_coarser_keeps_what_is_attended_to(bins):
    found = random_attention(1, 1, bins)
    half = coarser(found)
    assert len(half.queries) == (bins + 1) // 2 == len(half.edges) - 1
    assert (half.edges[0], half.edges[-1]) == (0, 10)
    assert half.share.sum(-1) == pytest.approx(half.on_audio, abs=1e-4)
    first = found.share[0, 0, :2, :2].sum() / 2
    assert half.share[0, 0, 0, 0] == pytest.approx(first)
    tokens = coarser(random_attention(1, 1, bins, timed=False))
    assert len(tokens.queries) == bins and tokens.share.shape[-1] == (bins + 1) // 2


def test_too_much_is_made_coarser_then_layers_are_left_out():
    found = [random_attention()]
    (coarse,) = fitted(found, 60_000, keeps_layers=True)
    assert coarse.layers == [0, 1, 2, 3] and len(coarse.queries) < 200
    (fewer,) = fitted(found, 12_000, keeps_layers=False)
    assert fewer.layers[-1] == 3 and len(fewer.layers) < 4 and len(fewer.share) == len(fewer.layers)
    with pytest.raises(ValueError, match="choose fewer with layers="):
        fitted(found, 12_000, keeps_layers=True)


# ------------------------------------------------------------------------ what is in the file


def test_ten_seconds_stay_under_three_megabytes(tmp_path):
    shape = {"encoder_layers": 12, "decoder_layers": 12, "max_source_positions": 500}
    model, inputs, waves = family_prompt("whisper", 10, **shape)
    path = attention_page(model, inputs, tmp_path / "a.html", audio=waves[0], answer=0)
    assert path.stat().st_size < 3e6
    page = Page(path)
    assert [view["site"] for view in page.data["views"]] == ["decoder.cross_attn", "encoder.attn"]


def test_the_page_says_which_layers_are_left_out(embedded, inputs, tmp_path, monkeypatch):
    page_module = sys.modules["audio_lens.report.attention_page"]  # its name is a function's too
    monkeypatch.setattr(page_module, "ROOM_PER_S", 4_000)
    path = attention_page(embedded, inputs, tmp_path / "a.html", answer=0)
    views = {view["site"]: view["layers"] for view in Page(path).data["views"]}
    for site, shown in views.items():
        n_layers = embedded.cfg.parts[site.split(".")[0]].n_layers
        lacking = [str(layer) for layer in range(n_layers) if layer not in shown]
        note = f"{site}: layers {', '.join(lacking)} were left out"
        assert (note in path.read_text()) == (len(lacking) > 0)
    assert "were left out" in path.read_text()


def test_everything_is_escaped(embedded, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(embedded.tokenizer, "decode", lambda *args, **options: NASTY)
    words = [Span(0.1, 0.4, NASTY)]
    options = {"layers": [0], "heads": [0], "words": words, "title": NASTY, "answer": 0}
    page = Page(attention_page(embedded, inputs, tmp_path / "a.html", **options))
    assert not page.all("img") and page.text["title"] == NASTY
    assert NASTY in page.text["dd"]
    panel = page.data["views"][0]["layout"]["yaxis5"]
    assert all("<" not in text for text in panel["ticktext"])


def test_options_that_could_do_nothing_are_refused(embedded, inputs, tmp_path):
    path = tmp_path / "a.html"
    _, cache = embedded.run_with_cache(inputs, attention=True)
    with pytest.raises(InputError, match="answer="):
        attention_page(embedded, inputs, path, cache=cache, answer=3)
    model, heard, waves = family_prompt("wav2vec2", 0.5)
    with pytest.raises(InputError, match="writes no tokens"):
        attention_page(model, heard, path, audio=waves[0], answer=3)
    assert not path.exists()


def test_figure_of_a_head(planted, inputs):
    figure = attention_figure(planted, inputs, LAYER, HEAD, answer=0)
    heat = figure.data[-1]
    z = np.asarray(heat.z)
    assert heat.x[z[-1].argmax()] == pytest.approx(1.39, abs=0.011)
    assert figure.layout.title.text == f"decoder.attn, layer {LAYER}, head {HEAD}"
    assert {trace.name for trace in figure.data} >= {"wave", "mel"}


# ------------------------------------------------------------------------ in a browser


@pytest.fixture
def page(planted, inputs, tmp_path, browse):
    """The planted head, open in a browser."""
    words = default_pair().words
    return browse(
        attention_page(planted, inputs, tmp_path / "a.html", words=words, answer=0, title=NASTY)
    )


def show(page, layer, head, site=None):
    if site is not None:
        page.select_option("#site", site)
    page.select_option("#layer", str(layer))
    page.select_option("#head", str(head))
    page.select_option("#part", "0.9")
    until(page, f"stage.dataset.shown.includes(' {layer} {head} ')")


def played(sound):
    return sound["from"], sound["from"] + sound["length"]


def test_click_on_a_token_plays_where_it_listened(page):
    show(page, LAYER, HEAD)
    page.locator("#queries button").last.click()
    sound = last_sound(page, 1)
    middle = (START_S + END_S) / 2
    assert played(sound) == pytest.approx((middle - 0.05, middle + 0.05), abs=0.011)
    clip, _ = soundfile.read(default_pair().clean)
    np.testing.assert_allclose(sound["samples"], clip, atol=1e-4)
    until(page, "document.getElementById('status').textContent.includes('60.0 %')")
    assert "1.39\N{EN DASH}1.47 s" in page.text_content("#status")
    assert page.locator("#queries button").last.get_attribute("aria-pressed") == "true"


def test_click_on_a_row_of_the_pattern_plays_it(page):
    show(page, LAYER, HEAD)
    rows = page.evaluate("plot.data.at(-1).z.length")
    page.mouse.click(*at(page, 0.7, rows - 1, "yaxis5"))
    last_sound(page, 1)
    assert page.evaluate("stage.dataset.shown").endswith(f" {rows - 1}")
    box = page.evaluate("plot.layout.shapes[0]")
    assert (box["x0"], box["x1"]) == pytest.approx((START_S, END_S), abs=0.011)


def test_stretches_are_played_one_after_the_other(embedded, inputs, tmp_path, browse):
    places = [embedded.timeline(inputs).positions("decoder", s, s + 0.04).start for s in (0.5, 2.0)]

    def plant(pattern, hook):
        pattern[:, HEAD] = 0
        pattern[:, HEAD, :, places] = 0.5
        return pattern

    with embedded.hooks([(f"decoder.blocks.{LAYER}.attn.hook_pattern", plant)]):
        path = attention_page(embedded, inputs, tmp_path / "a.html", answer=0)
    page = browse(path)
    show(page, LAYER, HEAD)
    page.locator("#queries button").last.click()
    last_sound(page, 2)
    first, second = page.evaluate("started.map(({from, length}) => [from, from + length])")
    assert first == pytest.approx([0.47, 0.57], abs=0.025)
    assert second == pytest.approx([1.97, 2.07], abs=0.025)


def test_keys_choose_queries_and_heads(page):
    show(page, LAYER, HEAD - 1)
    page.focus("#stage")
    page.keyboard.press("ArrowRight")
    until(page, f"stage.dataset.shown.includes(' {LAYER} {HEAD} ')")
    last = page.evaluate("document.querySelectorAll('#queries button').length") - 1
    for index in range(last + 1):
        page.keyboard.press("ArrowDown")
        until(page, f"stage.dataset.shown.endsWith(' {index}')")
    page.keyboard.press("Enter")
    assert played(last_sound(page, 1))[0] == pytest.approx(1.38, abs=0.011)


def test_encoder_frames_and_summary(page):
    show(page, 0, 1, site="1")
    assert page.locator("#queries button").count() == 0
    page.mouse.click(*at(page, 2.0, 1.5, "yaxis5"))
    until(page, "started.length > 0")
    assert "% of its attention is on the clip" in page.text_content("#status")
    assert page.locator("#summary tbody tr").count() == 4
    page.locator("#summary tbody button").first.click()
    until(page, "stage.dataset.shown.includes(' 0 0 ')")


def test_colours_of_rows_reach_their_own_peak(page):
    show(page, LAYER, HEAD)
    page.select_option("#colours", "row")
    until(page, "Math.max(...plot.data.at(-1).z.at(-1)) === 1")
    assert page.evaluate("plot.data.at(-1).zmax") == 1


def test_hover_tells_the_share(page):
    show(page, LAYER, HEAD)
    rows = page.evaluate("plot.data.at(-1).z.length")
    page.mouse.move(*at(page, 1.41, rows - 1, "yaxis5"))
    page.wait_for_selector(".hovertext")
    share = float(page.text_content(".hovertext").split(": ")[1].split(" %")[0])
    assert share == pytest.approx(30, abs=1)


def test_rows_are_called_by_what_they_decide(page):
    axis = "plot.layout[`yaxis${plot.data.find((t) => t.name === 'attention').yaxis.slice(1)}`]"
    read = page.evaluate(f"[...{axis}.ticktext]")
    page.select_option("#rows", "label")
    until(page, f"{axis}.ticktext[1] === {read[0]!r}")
    assert read[-1] == "what comes next"


def test_every_head_is_a_small_picture(page, embedded):
    page.click("#every summary")
    cfg = embedded.cfg.decoder
    until(page, f"grid.querySelectorAll('canvas').length === {cfg.n_layers * cfg.n_heads}")
    page.click("#grid button[title='layer 1, head 2']")
    until(page, "stage.dataset.shown.includes(' 1 2 ')")
    assert page.get_attribute("#grid button[title='layer 1, head 2']", "aria-pressed") == "true"
