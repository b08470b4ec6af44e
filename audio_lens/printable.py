"""Text of others as a terminal may show it."""

from __future__ import annotations

import re

# C0 and C1 codes but tab and line feed, line and paragraph separators, and marks that turn the
# direction of writing around
_STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """The text with what steers a terminal written out, as ``\\x1b``; line breaks and tabs stay."""
    return _STEERS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
