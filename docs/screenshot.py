"""A picture of a page that this library wrote: ``python docs/screenshot.py map.html docs/map.png``.

The README's picture: ``audio-lens map --out map.html``, then the above. Needs Chromium and the
extra ``dev``.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

WIDTH_PX, HEIGHT_PX = 1180, 900


def screenshot(page: Path, picture: Path) -> None:
    """Open the page in a headless browser and write the whole of it as PNG."""
    chromium = (
        os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": WIDTH_PX, "height": HEIGHT_PX})
        tab.goto(page.resolve().as_uri())
        tab.wait_for_selector("#stage[data-ready]")
        tab.screenshot(path=picture, full_page=True)
        browser.close()


if __name__ == "__main__":
    screenshot(*map(Path, sys.argv[1:]))
