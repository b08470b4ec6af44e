"""A headless browser for pages; it fails the test on console errors and network requests."""

from pathlib import Path

import pytest

from browsers import RECORD_SOUND


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
