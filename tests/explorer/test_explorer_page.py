"""The explorer in a browser: load, drop a clip, drag, touch, undo, copy the code and run it."""

from __future__ import annotations

import contextlib
import io
import shutil
from urllib.parse import urlsplit

import pytest

from audio_lens.explorer.server import Explorer
from audio_lens.explorer.widget import started
from audio_lens.models.embedded import default_pair
from browsers import RECORD_SOUND
from browsers import until as until_within

pytestmark = pytest.mark.unchecked
PAIR = default_pair()
OWN = "document.querySelector('#explorer').dataset"
LEFT, RIGHT = 72, 12  # of the picture, in drawing.js
NOW = """() => Object.fromEntries([...document.querySelectorAll('.answer')].map(
  (row) => [row.dataset.token, Number(row.dataset.now)]))"""


def until(page, expression) -> None:
    """Wait for what the model has to compute first."""
    until_within(page, expression, patience_s=60)


@pytest.fixture(scope="module")
def address(embedded):
    with Explorer(started(embedded)).running() as address:
        yield address


@pytest.fixture
def tab(browser, address):
    """Open a tab of the explorer; the test fails on errors and on requests to anybody else."""
    troubles: list[str] = []
    context = browser.new_context(viewport={"width": 1280, "height": 1100})
    context.set_default_timeout(30_000)

    def note(request) -> None:
        if not request.url.startswith((address, "data:", "blob:")):
            troubles.append(f"request: {request.url}")

    def open_tab():
        page = context.new_page()
        page.add_init_script(RECORD_SOUND)
        page.on("request", note)
        page.on("pageerror", lambda error: troubles.append(f"error: {error}"))
        page.on(
            "console",
            lambda told: told.type in ("error", "warning") and troubles.append(told.text),
        )
        page.goto(address)
        until(page, f"{OWN}.ready === 'true'")
        return page

    yield open_tab
    context.close()
    assert not troubles


def settled(page) -> None:
    """Wait until nothing is under way that changes the answer."""
    until(page, f"{OWN}.busy === '0'")


def drag(page, start_s, end_s, seconds) -> None:
    """Drag over the waveform."""
    box = page.locator("canvas").bounding_box()
    x, y = (lambda s: box["x"] + LEFT + s / seconds * (box["width"] - LEFT - RIGHT)), box["y"] + 80
    page.mouse.move(x(start_s), y)
    page.mouse.down()
    page.mouse.move(x((start_s + end_s) / 2), y)
    page.mouse.move(x(end_s), y)
    page.mouse.up()


def press(page, name) -> None:
    page.click(f'[data-is="{name}"]')
    settled(page)


def answered(page) -> dict[str, float]:
    return page.evaluate(NOW)


def test_a_clip_is_dropped_touched_and_its_code_gives_the_same(tab, tmp_path, monkeypatch):
    page = tab()
    other_page = tab()
    before, elsewhere = answered(page), answered(other_page)
    page.set_input_files('[data-is="file"]', PAIR.corrupted)
    until(page, f"document.querySelector('[data-is=clip]').textContent === '{PAIR.corrupted.name}'")
    settled(page)
    dropped = answered(page)
    assert max(dropped, key=dropped.get) != max(before, key=before.get)

    drag(page, 0.3, 0.95, 3.11)
    start, end = map(float, page.evaluate(f"{OWN}.stretch").split())
    assert (start, end) == pytest.approx((0.3, 0.95), abs=0.02)
    press(page, "put-silence")
    silenced = answered(page)
    assert silenced != dropped
    until(page, f"{OWN}.headed === {OWN}.turn")
    page.click('.cell[data-at="2.4"]')
    page.wait_for_selector('[data-is="turn-off"]')
    press(page, "turn-off")
    ablated = answered(page)
    assert ablated != silenced
    press(page, "undo")
    assert answered(page) == pytest.approx(silenced, abs=1e-6)
    press(page, "redo")
    press(page, "deafen")

    page.click('[data-is="code"]')
    page.wait_for_selector("dialog[open]")
    code = page.text_content('[data-is="text"]')
    assert "edits.Scale(0)" in code and "OtherUtterance(silence" in code
    shutil.copy(PAIR.corrupted, tmp_path)
    monkeypatch.chdir(tmp_path)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(code, "copied.py", "exec"), {})
    lines = (line.rpartition(": ") for line in said.getvalue().splitlines())
    printed = sorted((float(value) for _, _, value in lines), reverse=True)
    shown = sorted(answered(page).values(), reverse=True)
    assert shown[:3] == pytest.approx(printed[:3], abs=1e-5)
    assert answered(other_page) == elsewhere  # the second tab was not disturbed


def test_the_map_draws_itself_and_a_cell_is_chosen_and_heard(tab):
    page = tab()
    until(page, f"Number({OWN}.cells) > 0")
    first = int(page.evaluate(f"{OWN}.cells"))
    until(page, f"{OWN}.drawn === {OWN}.turn")
    assert int(page.evaluate(f"{OWN}.cells")) > first
    box = page.locator("canvas").bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + 260)
    until(page, f"{OWN}.stretch !== ''")
    assert page.input_value('[data-is="level"]').startswith("decoder")
    page.click('[data-is="hear"]')
    until(page, "started.length === 1")
    heard = page.evaluate("started.at(-1)")
    start, end = map(float, page.evaluate(f"{OWN}.stretch").split())
    assert (heard["from"], heard["length"]) == pytest.approx((start, end - start), abs=2e-3)


@pytest.mark.slow
def test_what_a_head_attends_to_is_heard_in_context_and_cut_out(tab):
    page = tab()
    until(page, f"{OWN}.headed === {OWN}.turn")
    page.click('.cell[data-at="3.2"]')
    page.click('[data-is="hear-context"]')
    until(page, "started.length === 1")
    context = page.evaluate("started.at(-1)")
    page.click('[data-is="hear-cut"]')
    until(page, "started.length === 2")
    cut = page.evaluate("started.at(-1)")
    assert len(context["samples"]) == pytest.approx(3.11 * 16_000, rel=0.02)
    assert 0 < len(cut["samples"]) < len(context["samples"])


def test_keys_choose_a_stretch_and_undo(tab):
    page = tab()
    page.focus('[data-is="stage"]')
    for key in ("ArrowRight", "Shift+ArrowRight", "ArrowUp"):
        page.keyboard.press(key)
    assert page.evaluate(f"{OWN}.stretch") == "0.05 0.3"
    assert page.input_value('[data-is="level"]') == "decoder 0"
    press(page, "put-noise")
    assert page.locator(".touches .off").count() == 1
    page.focus('[data-is="stage"]')
    page.keyboard.press("Control+z")
    until(page, "document.querySelectorAll('.touches .off').length === 0")


@pytest.mark.slow
def test_edits_are_saved_and_opened_again(tab, tmp_path):
    page = tab()
    drag(page, 1.2, 1.8, 3.11)
    press(page, "put-other")
    touched = answered(page)
    with page.expect_download() as download:
        page.click('[data-is="save"]')
    download.value.save_as(tmp_path / "edits.json")
    other = tab()
    other.set_input_files('[data-is="edits-file"]', tmp_path / "edits.json")
    until(other, "document.querySelectorAll('.touches .off').length === 1")
    settled(other)
    assert answered(other) == pytest.approx(touched, abs=1e-6)


@pytest.mark.slow
def test_what_cannot_be_is_said(tab, tmp_path):
    page = tab()
    (tmp_path / "bad.wav").write_bytes(b"no sound")
    page.set_input_files('[data-is="file"]', tmp_path / "bad.wav")
    until(page, "!document.querySelector('.problem').hidden")
    assert "cannot be read as audio" in page.text_content(".problem")


@pytest.mark.parametrize("width", [1280, 420])
@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
def test_nothing_is_wider_than_the_screen(browser, address, width, scheme):
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    page.goto(address)
    until(page, f"{OWN}.ready === 'true'")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert urlsplit(page.url).hostname == "127.0.0.1"
    context.close()
