"""What every exception of the library is, beside what else it is."""

from __future__ import annotations

from typing import Any

from audio_lens.printable import printable


class AudioLensError(Exception):
    """Anything the library raises under a name of its own.

    Each of them is also a built-in exception (`ValueError`, `KeyError` ...), by what went wrong.
    Messages quote files and labels: codes in them that would steer a terminal are written out.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*(printable(one) if isinstance(one, str) else one for one in args))


class InputError(AudioLensError, ValueError):
    """Inputs or arguments that cannot be taken; the message names them and says what can."""


class KindError(AudioLensError, TypeError):
    """An argument of another kind than can be taken; the message names it."""


class RangeError(AudioLensError, IndexError):
    """A row, clip or position that does not exist; the message says which there are."""


class ExtraError(AudioLensError, ImportError):
    """What needs an extra of the package that is not installed; the message names it."""
