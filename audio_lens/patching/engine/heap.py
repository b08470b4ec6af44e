"""Keeping freed memory in the process while a sweep runs on a CPU.

A sweep allocates and frees the same large tensors thousands of times. The C library by default
gives such memory back to the system each time, and every new page costs a fault: up to a tenth of
a sweep's time.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of glibc's mallopt
_KEEP = 1 << 30
_USUAL_MMAP, _USUAL_TRIM = 32 << 20, 64 << 20  # where glibc's own adjustment ends


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Inside a ``with`` block freed memory is used again; on leaving it goes back to the system.

    Without effect where the C library is not glibc.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(_MMAP_THRESHOLD, _KEEP)
    libc.mallopt(_TRIM_THRESHOLD, _KEEP)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, _USUAL_MMAP)
        libc.mallopt(_TRIM_THRESHOLD, _USUAL_TRIM)
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
