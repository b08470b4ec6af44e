"""Numbers that options take: finite, of the right kind, and within what can be meant."""

from __future__ import annotations

import math
import reprlib
from numbers import Integral, Real
from typing import Any

from audio_lens.errors import InputError

Number = float | int


def number(
    name: str,
    value: Any,
    *,
    above: Number | None = None,
    least: Number | None = None,
    most: Number | None = None,
    unit: str = "",
) -> Any:
    """The value, if it is a finite number within bounds.

    Args:
        name: of the option, for the message.
        above: it lies above this.
        least, most: it lies in these, bounds included.
        unit: what it counts, e.g. "seconds".

    Raises:
        InputError: naming the option, what it takes and what was given.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not (is_number and math.isfinite(value) and _within(value, above, least, most)):
        raise _refused(name, "a number", value, (above, least, most), unit)
    return value


def whole(
    name: str,
    value: Any,
    *,
    least: int | None = None,
    most: int | None = None,
    unit: str = "",
) -> Any:
    """The value, if it is a whole number within bounds; `number` says what they are.

    Raises:
        InputError: naming the option, what it takes and what was given.
    """
    is_whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not (is_whole and _within(value, None, least, most)):
        raise _refused(name, "a whole number", value, (None, least, most), unit)
    return value


def _within(value: Any, above: Number | None, least: Number | None, most: Number | None) -> bool:
    return (
        (above is None or value > above)
        and (least is None or value >= least)
        and (most is None or value <= most)
    )


def _refused(
    name: str, what: str, value: Any, bounds: tuple[Number | None, ...], unit: str
) -> InputError:
    above, least, most = (None if one is None else f"{one:,}" for one in bounds)
    said = [
        f"above {above}" if above is not None else "",
        f"of {least} to {most}" if least is not None and most is not None else "",
        f"of at least {least}" if least is not None and most is None else "",
        f"of at most {most}" if most is not None and least is None else "",
    ]
    told = " ".join(filter(None, (what, f"of {unit}" if unit else "", *said)))
    return InputError(f"{name} must be {told}, got {reprlib.repr(value)}")
