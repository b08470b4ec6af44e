"""The page of a map: self-contained, escaped, with the right sound and the right picture."""

import base64
import gzip
import io
import json
import math
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import plotly.offline
import pytest
import soundfile
import torch

from audio_lens.patching.result import SweepResult
from audio_lens.report import map_page
from audio_lens.timeline import Span

RATE = 16_000
NASTY = "</script><img src=x onerror=alert(1)>\"'&amp; {{7*7}} \N{SNOWMAN}"
WINDOWS = [Span(i / 10, (i + 1) / 10) for i in range(5)]
WORDS = [Span(0.1, 0.25, "seven"), Span(0.3, 0.45, NASTY)]
rng = np.random.default_rng(0)
CLEAN = rng.uniform(-0.9, 0.9, RATE // 2).astype(np.float32)
CORRUPTED = rng.uniform(-0.9, 0.9, RATE // 2).astype(np.float32)


def sweep(coords=None, direction="denoise", clean=1.0):
    coords = coords or {"layer": [0, 1, 2], "time": WINDOWS}
    shape = [len(names) for names in coords.values()]
    values = torch.linspace(-0.2, 1.0, math.prod(shape)).reshape(shape)
    return SweepResult(
        values, tuple(coords), coords, torch.tensor(clean), torch.tensor(0.0),
        "decoder.resid_pre", direction, ["a note " + NASTY], {"model": NASTY},
    )  # fmt: skip


class Page(HTMLParser):
    """The elements of a page: tags with attributes, and the text inside by element id or tag."""

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.tags, self.text, self._open = [], {}, []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open.append(dict(attrs).get("id", tag))

    def handle_endtag(self, tag):
        if self._open:
            self._open.pop()

    def handle_data(self, data):
        if self._open:
            self.text[self._open[-1]] = self.text.get(self._open[-1], "") + data

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    def json(self, id):
        return json.loads(self.text[id])

    def trace(self, name, clip=0):
        traces = self.json("figure")["data"]
        return next(t for t in traces if t["name"] == name and t.get("meta", clip) == clip)


def page_of(tmp_path, result=None, **options):
    return Page(map_page(result or sweep(), CLEAN, tmp_path / "map.html", **options))


def samples_of(uri):
    head, data = uri.split(",")
    assert head == "data:audio/wav;base64"
    return soundfile.read(io.BytesIO(base64.b64decode(data)))


def test_both_clips_are_inside_sample_by_sample(tmp_path):
    page = page_of(tmp_path, corrupted_audio=CORRUPTED)
    players = page.all("audio")
    for player, samples in zip(players, (CLEAN, CORRUPTED), strict=True):
        heard, rate = samples_of(player["src"])
        assert rate == RATE
        np.testing.assert_allclose(heard, samples, atol=1 / 32_768)
    assert ["hidden" in player for player in players] == [False, True]


def test_audio_files_are_read_and_resampled(tmp_path):
    soundfile.write(tmp_path / "clip.wav", np.stack([CLEAN[::2]] * 2, axis=1), RATE // 2)
    page = Page(map_page(sweep(), tmp_path / "clip.wav", tmp_path / "map.html"))
    heard, rate = samples_of(page.all("audio")[0]["src"])
    assert (len(heard), rate) == (RATE // 2, RATE)


def test_audio_that_the_windows_do_not_fit_is_refused(tmp_path):
    path = tmp_path / "map.html"
    with pytest.raises(ValueError, match=r"reach to 0\.50 s, but the audio is 0\.25 s .* 32000 Hz"):
        map_page(sweep(), CLEAN, path, sampling_rate=2 * RATE)
    assert not path.exists()
    map_page(sweep(), CLEAN[: int(0.46 * RATE)], path)  # less than a frame too short


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="needs a browser")
@pytest.mark.parametrize("coords", [{"layer": [3], "time": WINDOWS}, {"time": WINDOWS}])
def test_arrow_keys_walk_maps_of_one_row(tmp_path, coords):
    path = map_page(sweep(coords), CLEAN, tmp_path / "map.html")
    press = """<script>const timer = setInterval(() => {
      if (!stage.dataset.ready) return;
      clearInterval(timer);
      stage.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
      document.body.dataset.said = document.getElementById("status").textContent;
    }, 50)</script>"""
    path.write_text(path.read_text(encoding="utf-8") + press, encoding="utf-8")
    options = ["headless", "no-sandbox", "disable-gpu", "no-first-run", "virtual-time-budget=6000"]
    options += [f"disable-{what}" for what in ("quic", "sync", "background-networking")]
    options += ["disable-component-update", f"user-data-dir={tmp_path / 'browser'}", "dump-dom"]
    command = [CHROMIUM, *(f"--{option}" for option in options), path.as_uri()]
    page = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    layer = "layer 3, " if "layer" in coords else ""
    assert f'data-said="{layer}0.10\N{EN DASH}0.20 s: effect 0.1"' in page


def test_nothing_is_loaded_from_a_network(tmp_path):
    page = page_of(tmp_path, corrupted_audio=CORRUPTED, words=WORDS)
    loaded = [attrs[key] for _, attrs in page.tags for key in ("src", "href") if key in attrs]
    assert loaded and all(address.startswith("data:") for address in loaded)
    policy = next(m["content"] for m in page.all("meta") if "http-equiv" in m)
    assert policy.startswith("default-src 'none'") and "http" not in policy
    assert "showSendToCloud: false" in page.text["script"]  # plotly's button that uploads
    assert "url(" not in page.text["style"] and "@import" not in page.text["style"]


def test_plotly_travels_compressed_and_whole(tmp_path):
    packed = page_of(tmp_path).text["plotly-gz"]
    code = gzip.decompress(base64.b64decode(packed)).decode()
    assert code == plotly.offline.get_plotlyjs()


def test_ten_seconds_stay_under_three_megabytes(tmp_path):
    long = np.tile(CLEAN, 20)
    coords = {"layer": list(range(8)), "time": [Span(i / 10, (i + 1) / 10) for i in range(100)]}
    path = map_page(sweep(coords), long, tmp_path / "map.html", words=WORDS)
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
    page = page_of(tmp_path, sweep({"layer": [0], "time": WORDS}))
    assert "<img" not in page.trace("map")["customdata"][0][2][0]
    assert NASTY in page.text["td"]
    assert not page.all("img")


def test_map_and_clip_share_the_seconds(tmp_path):
    page = page_of(tmp_path, words=WORDS)
    figure, heat = page.json("figure"), page.trace("map")
    assert heat["x"] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert heat["y"] == ["0", "1", "2"]
    np.testing.assert_allclose(heat["z"], sweep().effect, atol=1e-6)
    for number in (2, 3, 4):
        assert figure["layout"][f"xaxis{number}"]["matches"] == "x"
    assert figure["layout"]["xaxis"]["range"] == [0, 0.5]
    words = page.trace("words")
    assert words["base"] == [0.1, 0.3] and words["x"] == pytest.approx([0.15, 0.15])
    assert {shape["x0"] for shape in figure["layout"]["shapes"]} == {0.1, 0.25, 0.3, 0.45}


def test_columns_know_their_stretch_of_audio(tmp_path):
    page = page_of(tmp_path, sweep({"layer": [0, 1], "time": [Span(0.3, 0.4), Span(0.0, 0.2)]}))
    assert page.json("windows") == [[0.0, 0.2], None, [0.3, 0.4]]
    heat = page.trace("map")
    assert [row[1] for row in heat["z"]] == [None, None]
    assert heat["customdata"][0][2][0] == "layer 0, 0.30\N{EN DASH}0.40 s"


def test_scale_is_symmetric_around_zero(tmp_path):
    heat = page_of(tmp_path).trace("map")
    assert heat["zmin"] == -heat["zmax"] and heat["zmid"] == 0


def test_table_lists_the_strongest_with_a_button_each(tmp_path):
    page = page_of(tmp_path)
    first = page.all("button")[0]
    assert (first["data-start"], first["data-end"]) == ("0.4", "0.5")
    assert len(page.all("button")) == 10


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
    layout = page.json("figure")["layout"]
    assert page.json("windows") == [] and not page.all("button")
    assert layout["xaxis4"]["type"] == "category" and "matches" not in layout["xaxis4"]
    assert layout["xaxis3"]["title"]["text"] == "time in the clip (s)"
    above_map = layout["yaxis4"]["domain"][1]
    assert all(shape["y0"] > above_map for shape in layout["shapes"])


def test_head_and_time_put_time_across(tmp_path):
    heat = page_of(tmp_path, sweep({"time": WINDOWS, "head": [0, 1]})).trace("map")
    np.testing.assert_allclose(
        heat["z"], sweep({"time": WINDOWS, "head": [0, 1]}).effect.T, atol=1e-6
    )


def test_one_axis_is_bars_as_wide_as_their_windows(tmp_path):
    page = page_of(tmp_path, sweep({"time": [Span(0.0, 0.2), Span(0.3, 0.4)]}, "noise"))
    bars = page.trace("map")
    assert bars["type"] == "bar"
    assert bars["x"] == pytest.approx([0.1, 0.35]) and bars["width"] == pytest.approx([0.2, 0.1])
    assert page.json("windows") == [[0.0, 0.2], [0.3, 0.4]]


def test_a_map_that_means_nothing_says_so(tmp_path):
    page = page_of(tmp_path, sweep(clean=0.0))
    assert "do not differ" in page.text["li"]
    assert "No cell has an effect" in page.text["td"]
    assert "NaN" not in page.text["figure"]


def test_several_metrics_and_stimuli(tmp_path):
    result = SweepResult(
        torch.tensor([[[0.0, 1.0], [1.0, 1.0]], [[0.0, 0.0], [4.0, 0.0]]]),
        ("metric", "stimulus", "layer"),
        {"metric": ["logit", "kl"], "stimulus": ["a", "b"], "layer": [0, 1]},
        torch.ones(2, 2),
        torch.zeros(2, 2),
        "encoder.mlp_out",
        "denoise",
    )
    with pytest.raises(ValueError, match="logit, kl"):
        page_of(tmp_path, result)
    page = page_of(tmp_path, result, metric="logit")
    assert "mean of" in page.text["dt"] and "2 stimuli" in page.text["dd"]
    assert "+0.500" in page.text["td"]


def test_three_axes_ask_for_a_selection(tmp_path):
    with pytest.raises(ValueError, match=r"result\.select\(layer=0\)"):
        page_of(tmp_path, sweep({"layer": [0], "head": [0, 1], "time": WINDOWS}))
