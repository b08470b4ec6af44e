"""Regular expressions that files bring: tried in a process of its own, which can be ended."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from audio_lens.models.config import LoadingError

_LIMIT_S = 3.0  # what matching all names may take; it takes milliseconds
_TRY = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    for name in names:
        re.match(rf"(.*\\.)?({pattern})$", name), re.fullmatch(pattern, name)
"""
_PLAIN = re.compile(r"[\w.\-]*")


def patterns_of(config: Mapping[str, Any]) -> list[str]:
    """The regular expressions in an adapter's config that are more than names."""
    found: list[Any] = [config.get(key) for key in ("target_modules", "exclude_modules")]
    for key in ("alpha_pattern", "rank_pattern"):
        found += config.get(key) or ()
    of_layers = config.get("layers_pattern") or ()
    found += [of_layers] if isinstance(of_layers, str) else of_layers
    return [one for one in found if isinstance(one, str) and not _PLAIN.fullmatch(one)]


def check_patterns(patterns: Iterable[str], names: Iterable[str], source: Any) -> None:
    """Raise unless regular expressions can be matched with names, and soon.

    Raises:
        LoadingError: naming one that is wrong, or those that take too long.
    """
    patterns = list(patterns)
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise LoadingError(f"{source} holds {pattern!r}, no pattern: {error}") from error
    if not patterns:
        return
    command = [sys.executable, "-I", "-c", _TRY]
    asked = json.dumps([patterns, list(names)])
    try:
        subprocess.run(command, input=asked, text=True, timeout=_LIMIT_S, capture_output=True)
    except subprocess.TimeoutExpired as error:
        shown = ", ".join(pattern[:80] for pattern in patterns[:3])
        raise LoadingError(
            f"{source} holds patterns that take more than {_LIMIT_S:g} s to match: {shown}"
        ) from error
