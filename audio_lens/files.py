"""What is written to disk: beside the old file first, and in its place only when it is whole."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from audio_lens.arguments import path_of
from audio_lens.errors import AudioLensError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

_PATIENCE_S, _PAUSE_S = 10.0, 0.01  # with who holds a lock
_NAME_LENGTH = 40  # of the old name, in the name of the file beside it


class OutputError(AudioLensError, OSError):
    """A file that cannot be written; what was there before is still there."""


def write(path: str | Path, data: bytes) -> Path:
    """Put a file in place as a whole: until the end, and if anything fails, the old one stays.

    A link stays a link: its target is replaced. The permissions of the old file are kept.

    Raises:
        OutputError: a folder that does not exist, a folder or a device in the file's place, a file
            that may not be written, or a disk that is full.
    """
    target = _target(path)
    _clear(target)
    beside = _beside(target)
    try:
        with open(beside, "xb") as file:
            _flock(file.fileno())  # says that somebody is at it, where process ids do not
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, beside)
        os.replace(beside, target)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
    return Path(path)


def try_out(path: str | Path) -> None:
    """Raise now where `write` would raise later; leaves everything as it is.

    Raises:
        OutputError: as `write`, as far as a small file can tell.
    """
    beside = _beside(_target(path))
    try:
        with open(beside, "xb") as file:
            file.write(b"\n")
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Inside a ``with`` block no other process is inside one for the same file.

    For reading a file and writing it anew. The lock is a file beside it, ``.name.lock``, that goes
    away again; it binds who asks for it, and ends with its process. Where the file system has no
    locks there is none.

    Raises:
        OutputError: a folder that cannot be written to, or a lock that another process does not
            give back.
    """
    target = _target(path)
    place = target.with_name(f".{target.name[:_NAME_LENGTH]}.lock")
    try:
        handle = _acquired(place, time.monotonic() + _PATIENCE_S)
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            place.unlink()  # while it is held, so that nobody else's goes away
        os.close(handle)


def _acquired(place: Path, until: float) -> int:
    """The descriptor of a lock file that is held.

    Raises:
        OSError: if another process holds it for too long.
    """
    while True:
        handle = os.open(place, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _flock(handle)
            # who held it before may have taken the file away: a lock on that binds nobody
            if place.exists() and os.fstat(handle).st_ino == place.stat().st_ino:
                return handle
        except BlockingIOError:
            if time.monotonic() > until:
                os.close(handle)
                raise
        except FileNotFoundError:
            pass
        os.close(handle)
        time.sleep(_PAUSE_S)


def _flock(handle: int) -> None:
    """Lock a file, or do nothing where the system has no locks.

    Raises:
        BlockingIOError: while another process holds it.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # a file system without locks
        return


def check_apart(outputs: Mapping[str, Path], inputs: Iterable[Path] = ()) -> None:
    """Raise where a file would be written over another output, or over what is read.

    Args:
        outputs: files to write, by the name they have for the user.

    Raises:
        OutputError: naming both.
    """
    read, named = list(inputs), list(outputs.items())
    for place, (name, path) in enumerate(named):
        for other, beside in named[:place]:
            if _same(path, beside):
                raise OutputError(f"{other} and {name} are one file, {path}: name two")
        if any(_same(path, one) for one in read):
            raise OutputError(f"{name} would overwrite {path}, which is read: name another file")


def _same(path: Path, other: Path) -> bool:
    if os.path.realpath(path) == os.path.realpath(other):
        return True
    return path.exists() and other.exists() and path.samefile(other)


def _target(path: str | Path) -> Path:
    """The file behind links, if one may stand there."""
    path = path_of("path", path)
    if path.is_dir():
        raise OutputError(f"{path} is a folder: name the file to write")
    if path.exists() and not path.is_file():
        raise OutputError(f"{path} is a device or a pipe, which no file replaces: name a file")
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OutputError(f"{path} is a link that leads to itself: name a file")
    if not target.parent.is_dir():
        raise OutputError(
            f"there is no folder {target.parent} to write {target.name} to: make it, or name "
            "another"
        )
    if target.exists() and not os.access(target, os.W_OK):
        raise OutputError(f"{path} may not be written: change its permissions or name another file")
    return target


def _beside(target: Path) -> Path:
    """A name in the same folder that nobody else has, in this process or another."""
    mark = f"{os.getpid()}-{secrets.token_hex(4)}"
    return target.with_name(f".{target.name[:_NAME_LENGTH]}.{mark}.part")


def _clear(target: Path) -> None:
    """Take away what writers of this file left beside it that were killed on the way."""
    name = re.escape(f".{target.name[:_NAME_LENGTH]}.")
    left = re.compile(rf"{name}(\d+)-[0-9a-f]{{8}}\.part")
    with contextlib.suppress(OSError):
        for path in target.parent.iterdir():
            found = left.fullmatch(path.name)
            if found is not None and _has_ended(int(found[1])) and _is_free(path):
                path.unlink(missing_ok=True)


def _is_free(path: Path) -> bool:
    """Whether nobody holds the file, on another machine or in another container."""
    with open(path, "rb") as file:
        try:
            _flock(file.fileno())
        except BlockingIOError:
            return False
    return True


def _has_ended(process: int) -> bool:
    """Whether there is no such process on this machine; no for what cannot be told."""
    if os.name != "posix" or process == 0:
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def _unwritable(path: str | Path, error: OSError) -> OutputError:
    reason = error.strerror or str(error)
    return OutputError(f"{path} cannot be written ({reason}); what was there is unchanged")
