"""Pictures of what this library shows in browsers.

    python docs/screenshot.py map.html docs/map.png   # of audio-lens map --out map.html
    python docs/screenshot.py explorer docs/explorer.png   # the explorer, with a head touched

Needs Chromium and the extra ``dev``.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

WIDTH_PX, HEIGHT_PX, PATIENCE_S = 1180, 900, 120
OWN = "document.querySelector('#explorer').dataset"


@contextmanager
def tab() -> Iterator[Page]:
    """A tab of a headless browser."""
    chromium = (
        os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser.new_page(viewport={"width": WIDTH_PX, "height": HEIGHT_PX})
        browser.close()


def screenshot(page: Path, picture: Path) -> None:
    """Open a page and write the whole of it as PNG."""
    with tab() as opened:
        opened.goto(page.resolve().as_uri())
        opened.wait_for_selector("#stage[data-ready]")
        opened.screenshot(path=picture, full_page=True)


def explorer(picture: Path) -> None:
    """Touch a head in the explorer, choose a word, and write what is seen as PNG."""
    from audio_lens import HookedAudioTransformer
    from audio_lens.explorer.server import Explorer
    from audio_lens.explorer.widget import started

    with (
        Explorer(started(HookedAudioTransformer.from_pretrained("embedded"))).running() as address,
        tab() as opened,
    ):
        opened.goto(address)
        _until(opened, f"{OWN}.headed && {OWN}.headed === {OWN}.turn")
        opened.click('.cell[data-at="2.0"]')
        opened.click('[data-is="halve"]')
        _until(opened, f"{OWN}.busy === '0' && {OWN}.drawn === {OWN}.turn")
        _until(opened, f"{OWN}.headed === {OWN}.turn")
        box = opened.locator("canvas").bounding_box()
        opened.mouse.click(box["x"] + 0.46 * box["width"], box["y"] + 14)  # the word "two"
        opened.screenshot(path=picture, full_page=True)


def _until(page: Page, expression: str) -> None:
    until = time.monotonic() + PATIENCE_S
    while not page.evaluate(expression):
        if time.monotonic() > until:
            raise TimeoutError(f"never came true: {expression}")
        page.wait_for_timeout(50)


if __name__ == "__main__":
    what, to = sys.argv[1:]
    explorer(Path(to)) if what == "explorer" else screenshot(Path(what), Path(to))
