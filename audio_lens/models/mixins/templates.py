"""Chat templates, which are small programs that a checkpoint brings: run within bounds."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from audio_lens.errors import AudioLensError
from audio_lens.inputs import InputError

_MOST_LINES = 500_000  # what a template may run through; those in use take some thousands
_COMPILED = "<template>"  # how jinja names what it makes of a template


def chat_prompt(speaker: Any, turns: list, **options: Any) -> str:
    """The prompt of a conversation, by the chat template of a tokenizer or processor.

    Raises:
        InputError: a template that fails on the conversation, or runs on and on.
    """
    try:
        with _bounded():
            return speaker.apply_chat_template(turns, tokenize=False, **options)
    except AudioLensError:
        raise
    except Exception as error:  # a template may fail in any way
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"the chat template cannot write this conversation: {said}") from error


@contextmanager
def _bounded() -> Iterator[None]:
    """Let templates run through so many lines, in this thread."""
    before, n_lines = sys.gettrace(), 0

    def count(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal n_lines
        n_lines += 1
        if n_lines > _MOST_LINES:
            raise InputError(f"the chat template runs through more than {_MOST_LINES:,} lines")
        return count

    def watch(frame: FrameType, event: str, arg: Any) -> Any:
        return count if frame.f_code.co_filename == _COMPILED else None

    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(before)
