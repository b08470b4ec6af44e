"""What can be wrong with a study."""

from __future__ import annotations

import traceback

import torch

from audio_lens.errors import AudioLensError


class StudyError(AudioLensError, ValueError):
    """A study that cannot be made, or a store that belongs to another one."""


def in_words(error: BaseException) -> str:
    """An error of the library in its words, without the head of a list of one; others whole.

    Of memory that is full, what was asked for.
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return str(error).partition("\n")[0] or "out of memory"
    if not isinstance(error, AudioLensError):
        return "".join(traceback.format_exception(error))
    head, *more = str(error).splitlines()
    return more[0].strip() if head.endswith(":") and len(more) == 1 else str(error)
