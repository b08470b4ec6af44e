"""What is written to disk: beside the old file first, and in its place only when it is whole."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from audio_lens.arguments import path_of
from audio_lens.errors import AudioLensError

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
    beside = _beside(target)
    try:
        with open(beside, "xb") as file:
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


def _unwritable(path: str | Path, error: OSError) -> OutputError:
    reason = error.strerror or str(error)
    return OutputError(f"{path} cannot be written ({reason}); what was there is unchanged")
