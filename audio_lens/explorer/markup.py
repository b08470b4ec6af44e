"""The page of the explorer: its scripts and styles, put together from the files beside it."""

from __future__ import annotations

import functools
from importlib import resources

SCRIPTS = ("player.js", "drawing.js", "skeleton.js", "heads.js", "clips.js", "explorer.js")
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<link rel="icon" href="data:,">
<title>audio_lens explorer</title>
<style>
body {{ margin: 0; background: #f6f4ef; }}
@media (prefers-color-scheme: dark) {{ body {{ background: #14171a; }} }}
{style}
</style>
</head>
<body>
<noscript>The explorer needs JavaScript, which is switched off here.</noscript>
<div id="explorer"></div>
<script type="module" nonce="{nonce}">
{script}
</script>
</body>
</html>
"""


def page(nonce: str) -> str:
    """The page, which loads nothing but what it asks of its own server.

    Args:
        nonce: what the policy of the page knows its script by.
    """
    return _PAGE.format(style=style(), nonce=nonce, script=script("http.js"))


@functools.cache
def script(link: str) -> str:
    """What the page and the widget run: all in one, ending with how they are linked to Python."""
    return "\n".join(_read(name) for name in (*SCRIPTS, link))


@functools.cache
def style() -> str:
    """Styles of the explorer, all below ``.ale``."""
    return _read("explorer.css")


def _read(name: str) -> str:
    return (resources.files("audio_lens.explorer") / "page" / name).read_text(encoding="utf-8")
