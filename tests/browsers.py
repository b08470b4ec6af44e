"""A headless browser for tests of pages, and what it notes of sound."""

from __future__ import annotations

import os
import shutil
import time

import pytest

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
OPTIONS = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
PATIENCE_S = 20
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


def until(page, expression: str, patience_s: float = PATIENCE_S) -> None:
    """Wait until an expression is true in the page (whose policy forbids wait_for_function)."""
    deadline = time.monotonic() + patience_s
    while not page.evaluate(expression):
        if time.monotonic() > deadline:
            raise AssertionError(f"never came true: {expression}")
        page.wait_for_timeout(30)
