"""Arguments as they can be meant: numbers that are finite and within bounds, names, paths."""

from __future__ import annotations

import difflib
import errno
import math
import os
import reprlib
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from pathlib import Path
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
    if bounds[0] == 0:
        what, bounds = what.replace("a number", "a positive number"), (None, *bounds[1:])
    above, least, most = (None if one is None else f"{one:,}" for one in bounds)
    said = [
        f"above {above}" if above is not None else "",
        f"of {least} to {most}" if least is not None and most is not None else "",
        f"of at least {least}" if least is not None and most is None else "",
        f"of at most {most}" if most is not None and least is None else "",
    ]
    told = " ".join(filter(None, (what, f"of {unit}" if unit else "", *said)))
    return InputError(f"{name} must be {told}, got {reprlib.repr(value)}")


def numbers(name: str, value: Any, *, least: int | None = None, most: int | None = None) -> list:
    """One whole number or several, as a list.

    Raises:
        InputError: naming the option and the number that is none.
    """
    many = [value] if isinstance(value, (Real, str)) else listed(name, value, object, "numbers")
    return [whole(name, one, least=least, most=most) for one in many]


def names(name: str, value: Any) -> list[str]:
    """One name or several, as a list.

    Raises:
        InputError: for anything else.
    """
    return [value] if isinstance(value, str) else listed(name, value, str, "names")


def listed(name: str, value: Any, kind: type | tuple[type, ...], what: str) -> list:
    """What stands in a list, tuple or range, all of one kind.

    Raises:
        InputError: for anything else.
    """
    is_list = isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping))
    many = list(value) if is_list else None
    if many is None or not all(isinstance(one, kind) for one in many):
        raise InputError(f"{name} must be a list of {what}, got {reprlib.repr(value)}")
    return many


def text(name: str, value: Any) -> str:
    """The value, if it is a text.

    Raises:
        InputError: for anything else.
    """
    if not isinstance(value, str):
        raise InputError(f"{name} must be a text, got {reprlib.repr(value)}")
    return value


def path_of(name: str, value: Any) -> Path:
    """A path that may exist.

    Raises:
        InputError: for what is no path, or one that no file can have.
    """
    if not isinstance(value, (str, os.PathLike)):
        raise InputError(f"{name} must be a path, got {reprlib.repr(value)}")
    path = Path(value)
    try:
        os.lstat(path)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise InputError(f"{name} is too long for a path: {reprlib.repr(str(path))}") from error
    except ValueError as error:  # a zero byte, or half a letter
        raise InputError(f"no file can be called {reprlib.repr(str(path))}: {error}") from error
    return path


def suggest(name: str, known: Iterable[str], count: int = 5) -> str:
    """The known names nearest to a mistaken one, as the end of an error message."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=count, cutoff=0.4)
    holding = sorted((k for k in known if name in k), key=lambda k: not k.endswith(name))
    nearest = list(dict.fromkeys([*close[:1], *holding, *close])) or known
    return "nearest names: " + ", ".join(nearest[:count])
