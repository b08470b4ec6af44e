"""A headless browser for pages; it fails the test on console errors and network requests."""

import os
import shutil
from pathlib import Path

import pytest

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
OPTIONS = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
# note every stretch of sound that a page starts: [seconds of the buffer, from, for how long]
RECORD_SOUND = """
  window.started = [];
  const start = AudioBufferSourceNode.prototype.start;
  AudioBufferSourceNode.prototype.start = function (when, from, length) {
    window.started.push({ from, length, samples: [...this.buffer.getChannelData(0)],
                          rate: this.buffer.sampleRate });
    return start.call(this, when, from, length);
  };
"""


@pytest.fixture(scope="session")
def browser():
    """Chromium, where there is one."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium (or CHROMIUM=path of it)")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield chromium
        chromium.close()


@pytest.fixture
def browse(browser):
    """Open a page of this library and wait until it is drawn: ``browse(path)``.

    ``page.evaluate("started")`` lists what it played: from, length (seconds), rate and samples.
    """
    troubles: list[str] = []
    context = browser.new_context(viewport={"width": 1280, "height": 1000})
    context.set_default_timeout(60_000)

    def note_request(request) -> None:
        if not request.url.startswith(("file:", "data:", "blob:")):
            troubles.append(f"request: {request.url}")

    def open_page(path: Path):
        page = context.new_page()
        page.add_init_script(RECORD_SOUND)
        page.on("request", note_request)
        page.on("pageerror", lambda error: troubles.append(f"error: {error}"))
        page.on(
            "console",
            lambda message: message.type in ("error", "warning") and troubles.append(message.text),
        )
        page.goto(path.as_uri())
        page.wait_for_selector("#stage[data-ready]")
        return page

    yield open_page
    context.close()
    assert not troubles
