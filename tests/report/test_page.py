"""The page of maps: self-contained, escaped, right on screen and right in the ear."""

import base64
import gzip
import io
import math

import numpy as np
import plotly.offline
import pytest
import soundfile
import torch
from browsing import at, last_sound, until
from pages import Page

from audio_lens import audio
from audio_lens.models.embedded import default_pair
from audio_lens.patching.result import SweepResult
from audio_lens.report import map_page
from audio_lens.report import page as maps
from audio_lens.timeline import Band, Span

RATE = 16_000
NASTY = "</script><img src=x onerror=alert(1)>\"'&amp; {{7*7}} %{x} \N{SNOWMAN}"
WINDOWS = [Span(i / 10, (i + 1) / 10) for i in range(5)]
BANDS = [Band(100, 800), Band(800, 3000), Band(3000, 8000)]
WORDS = [Span(0.1, 0.25, "seven"), Span(0.3, 0.45, NASTY)]
PHONES = [Span(0.1, 0.2, "s"), Span(0.2, 0.25, "e")]
rng = np.random.default_rng(0)
CLEAN, CORRUPTED = rng.uniform(-0.9, 0.9, (2, RATE // 2)).astype(np.float32)
EN_DASH = "\N{EN DASH}"


def sweep(coords=None, direction="denoise", clean=1.0, site="decoder.resid_pre", metrics=()):
    coords = coords or {"layer": [0, 1, 2], "time": WINDOWS}
    if metrics:
        coords = {"metric": list(metrics)} | coords
    shape = [len(names) for names in coords.values()]
    values = torch.linspace(-0.2, 1.0, math.prod(shape)).reshape(shape)
    baselines = torch.full(shape[:1] if metrics else (), clean), torch.zeros(shape[: bool(metrics)])
    return SweepResult(
        values, tuple(coords), coords, *baselines, site, direction,
        ["a note " + NASTY], {"model": NASTY},
    )  # fmt: skip


class MapPage(Page):
    """A map page, with its views and the traces of its clips."""

    @property
    def views(self):
        return self.data["views"]

    def trace(self, name, clip=0):
        return next(t for t in self.data["clips"][clip]["traces"] if t["name"] == name)


def unpacked(text):
    return gzip.decompress(base64.b64decode(text)).decode()


def write(tmp_path, results=None, **options):
    return map_page(results or sweep(), CLEAN, tmp_path / "map.html", **options)


def page_of(tmp_path, results=None, **options):
    return MapPage(write(tmp_path, results, **options))


def sound_of(clip):
    return soundfile.read(io.BytesIO(base64.b64decode(clip["flac"])))


# ------------------------------------------------------------------------ what is in the file


def test_both_clips_are_inside_sample_by_sample(tmp_path):
    page = page_of(tmp_path, corrupted_audio=CORRUPTED)
    *pair, difference = page.data["clips"]
    for clip, samples in zip(pair, (CLEAN, CORRUPTED), strict=True):
        heard, rate = sound_of(clip)
        assert rate == page.data["rate"] == RATE
        np.testing.assert_allclose(heard, samples, atol=1 / 32_768)
    assert difference["name"] == "difference" and difference["flac"] is None


def test_audio_files_are_read_and_resampled(tmp_path):
    soundfile.write(tmp_path / "clip.wav", np.stack([CLEAN[::2]] * 2, axis=1), RATE // 2)
    page = MapPage(map_page(sweep(), tmp_path / "clip.wav", tmp_path / "map.html"))
    heard, rate = sound_of(page.data["clips"][0])
    assert (len(heard), rate) == (RATE // 2, RATE)


def test_audio_that_the_windows_do_not_fit_is_refused(tmp_path):
    path = tmp_path / "map.html"
    with pytest.raises(ValueError, match=r"reach to 0\.50 s, but the audio is 0\.25 s .* 32000 Hz"):
        map_page(sweep(), CLEAN, path, sampling_rate=2 * RATE)
    assert not path.exists()
    map_page(sweep(), CLEAN[: int(0.46 * RATE)], path)  # less than a frame too short


def test_nothing_is_loaded_from_a_network(tmp_path):
    page = page_of(tmp_path, corrupted_audio=CORRUPTED, words=WORDS)
    loaded = [attrs[key] for _, attrs in page.tags for key in ("src", "href") if key in attrs]
    assert loaded and all(address.startswith("data:") for address in loaded)
    policy = next(m["content"] for m in page.all("meta") if "http-equiv" in m)
    assert policy.startswith("default-src 'none'") and "http" not in policy
    assert "showSendToCloud: false" in page.text["script"]  # plotly's button that uploads
    assert "url(" not in page.text["style"] and "@import" not in page.text["style"]


def test_plotly_travels_compressed_and_whole(tmp_path):
    assert unpacked(page_of(tmp_path).text["plotly-gz"]) == plotly.offline.get_plotlyjs()


def test_ten_seconds_stay_under_three_megabytes(tmp_path):
    pair = default_pair()
    clean, corrupted = (soundfile.read(path)[0] for path in (pair.clean, pair.corrupted))
    clean, corrupted = (np.resize(clip, 10 * RATE) for clip in (clean, corrupted))
    coords = {"layer": list(range(32)), "time": [Span(i / 10, (i + 1) / 10) for i in range(100)]}
    results = [sweep(coords, way, metrics=["a", "b"]) for way in ("denoise", "noise")]
    path = map_page(results, clean, tmp_path / "map.html", corrupted_audio=corrupted, words=WORDS)
    assert path.stat().st_size < 3e6


@pytest.mark.real
def test_ten_seconds_of_real_speech_stay_under_three_megabytes(tmp_path, data_dir):
    speech = audio.read(data_dir / "speech/jfk.flac", RATE)
    clean, corrupted = speech[: 10 * RATE], speech[-10 * RATE :]
    values = np.random.default_rng(0).normal(size=(2, 32, 100))
    coords = {"layer": list(range(32)), "time": [Span(i / 10, (i + 1) / 10) for i in range(100)]}
    results = [sweep(coords, way) for way in ("denoise", "noise")]
    for result, numbers in zip(results, values, strict=True):
        result.values = torch.tensor(numbers)
    path = map_page(results, clean, tmp_path / "map.html", corrupted_audio=corrupted)
    assert path.stat().st_size < 3e6


def test_everything_is_escaped(tmp_path):
    plain = page_of(tmp_path, words=WORDS[:1], title="plain")
    nasty = page_of(tmp_path, words=WORDS, title=NASTY)
    assert [tag for tag, _ in nasty.tags] == [tag for tag, _ in plain.tags]
    assert nasty.text["title"] == nasty.text["h1"] == NASTY
    assert NASTY in nasty.text["dd"] and NASTY in nasty.text["li"]
    drawn = nasty.trace("words")["text"][1]
    assert "<" not in drawn and drawn.startswith("&lt;/script&gt;")


def test_labels_in_hover_texts_and_table_are_escaped(tmp_path):
    page = page_of(tmp_path, {NASTY: sweep({"layer": [0], "time": WORDS}), "other": sweep()})
    assert "<img" not in page.views[0]["trace"]["customdata"][0][2][0]
    assert NASTY in page.text["td"] and NASTY in page.text["option"]
    assert not page.all("img")


def test_map_and_clip_share_the_seconds(tmp_path):
    page = page_of(tmp_path, words=WORDS, phones=PHONES)
    view, clip = page.views[0], page.data["clips"][0]
    heat, layout = view["trace"], view["layout"]
    assert heat["x"] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert heat["y"] == ["0", "1", "2"]
    assert [[cell[1] for cell in row] for row in heat["customdata"]] == [
        pytest.approx(row, abs=1e-3) for row in sweep().effect.tolist()
    ]
    assert (heat["xaxis"], heat["yaxis"]) == ("x5", "y5")
    assert [trace["name"] for trace in clip["traces"]] == ["words", "phones", "wave", "mel"]
    for number in range(2, 6):
        assert layout[f"xaxis{number}"]["matches"] == "x"
    assert layout["xaxis"]["range"] == [0, 0.5]
    words = page.trace("words")
    assert words["base"] == [0.1, 0.3] and words["x"] == pytest.approx([0.15, 0.15])
    assert words["meta"]["spans"] == [[0.1, 0.25], [0.3, 0.45]]
    assert clip["bounds"] == [0.1, 0.25, 0.3, 0.45]


def test_columns_know_their_stretch_of_audio(tmp_path):
    page = page_of(tmp_path, sweep({"layer": [0, 1], "time": [Span(0.3, 0.4), Span(0.0, 0.2)]}))
    heat = page.views[0]["trace"]
    assert heat["meta"]["spans"] == [[0.0, 0.2], None, [0.3, 0.4]]
    assert [row[1] for row in heat["customdata"]] == [None, None]
    assert heat["customdata"][0][2][0] == f"layer 0, 0.30{EN_DASH}0.40 s"


def test_difference_shows_what_differs(tmp_path):
    corrupted = CLEAN.copy()
    corrupted[RATE // 4 :] = 0
    other = [WORDS[0], Span(0.3, 0.45, "two")]
    page = page_of(tmp_path, corrupted_audio=corrupted, words=WORDS, corrupted_words=other)
    words, mel = page.trace("words", clip=2), page.trace("mel", clip=2)
    assert words["text"][0] == "seven" and words["text"][1].endswith(" / two")
    assert mel["zmin"] == -mel["zmax"]
    z = np.frombuffer(base64.b64decode(mel["z"]["bdata"]), dtype=np.int8).reshape(80, -1)
    assert (z[:, :23] == 0).all() and (z[:, 27:] > 20).mean() > 0.9


def test_table_lists_the_strongest_with_a_button_each(tmp_path):
    page = page_of(tmp_path)
    _, first, *others = page.all("button")  # the first plays the clip
    assert (first["data-start"], first["data-end"]) == ("0.4", "0.5")
    assert len(others) == 9


@pytest.mark.parametrize(
    "coords",
    [
        {"layer": [0, 1], "head": [0, 1, 2]},
        {"position": [3, 4], "layer": [0, 1]},
        {"head": [0, 1]},
    ],
)
def test_maps_without_time_have_their_own_axis(tmp_path, coords):
    page = page_of(tmp_path, sweep(coords), words=WORDS)
    view = page.views[0]
    layout = view["layout"]
    assert view["trace"]["meta"]["spans"] == [] and len(page.all("button")) == 1
    assert layout["xaxis4"]["type"] == "category" and "matches" not in layout["xaxis4"]
    assert layout["xaxis3"]["title"]["text"] == "time in the clip (s)"
    assert layout["meta"]["bottom"] > layout["yaxis4"]["domain"][1]


def test_bands_lie_on_the_axis_of_the_spectrogram(tmp_path):
    page = page_of(tmp_path, sweep({"frequency": BANDS, "time": WINDOWS}))
    heat, layout = page.views[0]["trace"], page.views[0]["layout"]
    mel = layout["yaxis2"]["tickvals"]
    assert layout["yaxis3"]["tickvals"] == mel and layout["yaxis3"]["ticktext"][1] == "1k"
    assert np.interp([800, 3000], [500, 1000, 2000, 4000], np.array(mel)[:4]) == pytest.approx(
        heat["y"][1:3], rel=0.05
    )
    assert heat["meta"]["bands"] == [[100, 800], [800, 3000], [3000, 8000]]
    button = page.all("button")[1]
    assert (button["data-low"], button["data-high"]) == ("3000", "8000")


def test_views_are_all_sites_directions_and_metrics(tmp_path):
    heads = {"layer": [0, 1], "head": [0, 1, 2]}
    results = [
        sweep(metrics=["a", "b"]),
        sweep(direction="noise", metrics=["a", "b"]),
        sweep(heads, site="decoder.attn.z"),
    ]
    page = page_of(tmp_path, results, metric="b", quantity="recovery")
    assert [tuple(view["facets"].values()) for view in page.views] == [
        ("decoder.resid_pre", "layer by time", "denoise", "a"),
        ("decoder.resid_pre", "layer by time", "denoise", "b"),
        ("decoder.resid_pre", "layer by time", "noise", "a"),
        ("decoder.resid_pre", "layer by time", "noise", "b"),
        ("decoder.attn.z", "layer by head", "denoise", "metric"),
    ]
    assert page.data["first"] == 1
    facets = [select.get("data-facet", select.get("id")) for select in page.all("select")]
    assert facets == ["site", "axes", "direction", "metric", "quantity", "limit"]
    one = page_of(tmp_path)
    assert [select["id"] for select in one.all("select")] == ["quantity", "limit"]


def batch():
    """Two items, of which the second is answered the other way round."""
    one = sweep()
    return SweepResult(
        torch.stack([one.values, -one.values]),
        ("stimulus", *one.dims),
        {"stimulus": ["up", "down"]} | one.coords,
        torch.tensor([1.0, -1.0]),
        torch.zeros(2),
        one.site,
        one.direction,
    )


def test_every_item_of_a_batch_has_a_map(tmp_path, monkeypatch):
    page = page_of(tmp_path, batch())
    assert [view["facets"]["item"] for view in page.views] == ["mean of 2", "up", "down"]
    assert "values are means over 2" in page.text["p"]
    values = [[x[-1] for x in view["trace"]["customdata"][0]] for view in page.views]
    assert values[1][0] == pytest.approx(-values[2][0]) and values[0][0] == pytest.approx(0)
    monkeypatch.setattr(maps, "MOST_NUMBERS", 10)
    assert len(page_of(tmp_path, batch()).views) == 1


def test_a_number_is_said_once(tmp_path):
    same, other = page_of(tmp_path), page_of(tmp_path, sweep(direction="noise"))
    assert "recovery" not in same.text["th"] and "recovery" in other.text["th"]
    assert "recovery" not in same.text["option"] and "recovery" in other.text["option"]


def test_results_that_cannot_stand_on_one_page(tmp_path):
    with pytest.raises(ValueError, match="alike in site, axes, direction, metric"):
        write(tmp_path, [sweep(), sweep()])
    write(tmp_path, {"once": sweep(), "again": sweep()})
    other = sweep(direction="noise")
    one, other.meta = sweep(), {"clean_hash": "2"}
    one.meta = {"clean_hash": "1"}
    with pytest.raises(ValueError, match="different clips"):
        write(tmp_path, [one, other])
    with pytest.raises(ValueError, match="at least one"):
        map_page([], CLEAN, tmp_path / "map.html")
    with pytest.raises(ValueError, match="no metric 'c'; there is a, b"):
        write(tmp_path, sweep(metrics=["a", "b"]), metric="c")


def test_a_map_that_means_nothing_says_so(tmp_path):
    page = page_of(tmp_path, sweep(clean=0.0))
    assert "do not differ" in page.text["li"]
    assert "No cell has an effect" in page.text["td"]
    assert set(np.ravel(page.views[0]["trace"]["text"])) == {""}


def test_stimuli_are_averaged(tmp_path):
    result = SweepResult(
        torch.tensor([[[0.0, 1.0], [1.0, 1.0]], [[0.0, 0.0], [4.0, 0.0]]]),
        ("metric", "stimulus", "layer"),
        {"metric": ["logit", "kl"], "stimulus": ["a", "b"], "layer": [0, 1]},
        torch.ones(2, 2),
        torch.zeros(2, 2),
        "encoder.mlp_out",
        "denoise",
    )
    page = page_of(tmp_path, result)
    assert "mean of" in page.text["dt"] and "2 stimuli" in page.text["dd"]
    assert "+0.500" in page.text["td"]


def test_three_axes_ask_for_a_selection(tmp_path):
    with pytest.raises(ValueError, match=r"result\.select\(layer=0\)"):
        write(tmp_path, sweep({"layer": [0], "head": [0, 1], "time": WINDOWS}))


# ------------------------------------------------------------------------ in a browser

HEAT = "plot.data.find((trace) => trace.name === 'map')"


@pytest.fixture
def pair(tmp_path, browse):
    """A page of several maps with two clips, open in a browser."""
    heads = sweep({"layer": [0, 1], "head": [0, 1, 2]}, site="decoder.attn.z", metrics=["a", "b"])
    results = [sweep(metrics=["a", "b"]), sweep(direction="noise", metrics=["a", "b"]), heads]
    other = [WORDS[0], Span(0.3, 0.45, "two")]
    return browse(
        write(
            tmp_path, results, words=WORDS, phones=PHONES, corrupted_words=other,
            corrupted_audio=CORRUPTED, title=NASTY,
        )
    )  # fmt: skip


def test_hover_tells_and_click_plays_the_cell(pair):
    pair.mouse.move(*at(pair, 0.25, "1", "yaxis5"))
    pair.wait_for_selector(".hovertext")
    told = pair.text_content(".hovertext")
    cell = sweep(metrics=["a", "b"]).cells("a")[7]
    assert f"layer 1, 0.20{EN_DASH}0.30 s" in told
    assert f"effect {cell.effect:.3f}".replace("-", "\N{MINUS SIGN}") in told
    assert "recovery" in told and "a " in told and "clean 1" in told
    left, width = pair.evaluate(
        "[frame.getBoundingClientRect().left, frame.getBoundingClientRect().width]"
        .replace("frame", "document.getElementById('frame')")
    )  # fmt: skip
    assert [left, left + width] == pytest.approx(
        [at(pair, s, "1", "yaxis5")[0] for s in (0.2, 0.3)], abs=1
    )

    pair.mouse.click(*at(pair, 0.25, "1", "yaxis5"))
    played = last_sound(pair, 1)
    assert [played["from"], played["length"]] == pytest.approx([0.2, 0.1])
    assert played["rate"] == RATE
    np.testing.assert_allclose(played["samples"], CLEAN, atol=2 / 32_768)
    assert pair.text_content("#status") == f"clean, 0.20{EN_DASH}0.30 s"


def test_words_waveform_and_buttons_play(pair):
    pair.mouse.click(*at(pair, 0.17, 0, "yaxis"))
    word = last_sound(pair, 1)
    assert [word["from"], word["length"]] == pytest.approx([0.1, 0.15])
    pair.mouse.click(*at(pair, 0.2, 20, "yaxis4"))
    onwards = last_sound(pair, 2)
    assert onwards["from"] == pytest.approx(0.2, abs=0.01)
    assert onwards["from"] + onwards["length"] == pytest.approx(0.5)
    pair.click("[data-view='0'] td button >> nth=0")
    strongest = last_sound(pair, 3)
    assert [strongest["from"], strongest["length"]] == pytest.approx([0.4, 0.1])


def test_clips_and_their_difference_switch_sound_and_picture(pair):
    ends = ("\N{SNOWMAN}", "two", " / two")
    for index, samples in enumerate((CLEAN, CORRUPTED, CLEAN - CORRUPTED)):
        pair.check(f"input[name=clip][value='{index}']", force=True)
        until(pair, f"plot.data[0].text.at(-1).endsWith('{ends[index]}')")
        pair.click("#play")
        played = last_sound(pair, index + 1)
        np.testing.assert_allclose(played["samples"], samples, atol=4 / 32_768)
        assert [played["from"], played["length"]] == pytest.approx([0, 0.5], abs=1e-4)
        until(pair, "document.getElementById('play').textContent.includes('Play')")
    assert pair.evaluate("plot.data.find((trace) => trace.name === 'mel').zmax") == 40


def test_cursor_moves_while_the_clip_plays(pair):
    pair.focus("#stage")
    pair.keyboard.press(" ")
    left = "parseFloat(document.getElementById('cursor').style.left)"
    until(pair, f"{left} > 0")
    before = pair.evaluate(left)
    until(pair, f"{left} > {before} + 20")
    pair.keyboard.press("Escape")
    assert "Play" in pair.text_content("#play")


def test_choices_switch_the_map(pair):
    def shown():
        return pair.get_attribute("#stage", "data-shown")

    assert shown() == "0"
    pair.select_option("[data-facet=direction]", "noise")
    pair.wait_for_selector("#stage[data-shown='2']")
    assert "into the clean run" in pair.inner_text("header")
    pair.select_option("[data-facet=metric]", "b")
    pair.wait_for_selector("#stage[data-shown='3']")
    pair.select_option("#quantity", "value")
    until(pair, f"{HEAT}.colorbar.title.text === 'metric'")
    expected = sweep(direction="noise", metrics=["a", "b"]).select(metric="b").values
    np.testing.assert_allclose(pair.evaluate(f"{HEAT}.z"), expected, atol=1e-3)
    limit = pair.evaluate(f"[{HEAT}.zmin, {HEAT}.zmax]")
    assert limit == pytest.approx([-1.0, 1.0])
    pair.select_option("[data-facet=site]", "decoder.attn.z")  # which has no noise
    pair.wait_for_selector("#stage[data-shown='5']")
    assert pair.input_value("[data-facet=direction]") == "denoise"
    assert pair.input_value("[data-facet=metric]") == "b"
    assert pair.evaluate("plot._fullLayout.xaxis5.type") == "category"
    assert pair.locator(".below:visible").count() == 1
    assert pair.text_content("h1") == NASTY


@pytest.mark.parametrize("coords", [{"layer": [3], "time": WINDOWS}, {"time": WINDOWS}])
def test_keys_choose_and_play_a_cell(tmp_path, browse, coords):
    page = browse(write(tmp_path, sweep(coords)))
    page.focus("#stage")
    for key in ("ArrowUp", "ArrowRight", "ArrowRight", "ArrowLeft", "ArrowLeft", "ArrowLeft"):
        page.keyboard.press(key)
    page.keyboard.press("ArrowRight")
    layer = "layer 3, " if "layer" in coords else ""
    assert page.text_content("#status").startswith(f"{layer}0.10{EN_DASH}0.20 s: effect 0.1")
    assert page.is_visible("#frame")
    box = page.locator("#chosen").bounding_box()
    left, right = (at(page, seconds, 0, "yaxis")[0] for seconds in (0.1, 0.2))
    assert [box["x"], box["x"] + box["width"]] == pytest.approx([left, right], abs=1.5)
    page.keyboard.press("Enter")
    played = last_sound(page, 1)
    assert [played["from"], played["length"]] == pytest.approx([0.1, 0.1])


def test_a_cell_of_a_band_plays_through_it(tmp_path, browse):
    page = browse(write(tmp_path, sweep({"frequency": BANDS, "time": WINDOWS})))
    page.mouse.click(*at(page, 0.25, page.evaluate(f"{HEAT}.y[1] + 1"), "yaxis3"))
    assert last_sound(page, 1)["from"] == pytest.approx(0.2)
    assert page.text_content("#status").endswith(f"800{EN_DASH}3000 Hz")


def test_shift_plays_what_is_around_too(tmp_path, browse):
    page = browse(write(tmp_path, sweep({"layer": [0, 1], "time": WINDOWS[:3]})))
    page.keyboard.down("Shift")
    page.mouse.click(*at(page, 0.25, 0, "yaxis3"))
    played = last_sound(page, 1)
    assert [played["from"], played["length"]] == pytest.approx([0, 0.5])


def test_keys_go_on_from_a_click(tmp_path, browse):
    page = browse(write(tmp_path))
    page.mouse.click(*at(page, 0.25, 1, "yaxis3"))
    page.focus("#stage")
    page.keyboard.press("ArrowRight")
    assert page.text_content("#status").startswith(f"layer 1, 0.30{EN_DASH}0.40 s: effect")


def test_colours_can_end_at_one_to_compare_maps(tmp_path, browse):
    page = browse(write(tmp_path, sweep(clean=4.0)))
    limit = "plot.data.find(({ name }) => name === 'map').zmax"
    assert page.evaluate(limit) < 0.5
    page.select_option("#limit", "1")
    until(page, f"{limit} === 1")


def test_dark_and_narrow_screens(tmp_path, browse):
    page = browse(write(tmp_path, batch(), words=WORDS))
    page.emulate_media(color_scheme="dark")
    until(page, "plot._fullLayout.plot_bgcolor === '#22282d'")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(23, 27, 31)"
    page.set_viewport_size({"width": 420, "height": 900})
    until(page, "document.documentElement.scrollWidth <= 420")


def test_prints_on_few_pages(pair, tmp_path):
    pdf = pair.pdf(prefer_css_page_size=True)
    assert pdf.startswith(b"%PDF") and pdf.count(b"/Type /Page\n") <= 3
