"""Where a study lies: a folder, or a bucket of an object store. Small objects by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from audio_lens import buckets, files
from audio_lens.errors import ExtraError
from audio_lens.studies.errors import StudyError


@runtime_checkable
class Place(Protocol):
    """Objects by name, with "/" between folders; one that is written is there whole."""

    url: str

    def read(self, name: str) -> bytes | None:
        """What an object holds; None where there is none."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Put an object in place."""
        ...

    def remove(self, name: str) -> None:
        """Take an object away; one that is not there is no error."""
        ...

    def names(self, folder: str) -> list[str]:
        """Names of the objects in a folder and below it, from the folder on."""
        ...

    def zarr(self, name: str, read_only: bool = False) -> Any:
        """A store of zarr in a folder."""
        ...


class Folder:
    """A folder of this machine, or one that several machines share."""

    def __init__(self, path: str | Path):
        self.path = Path(path).resolve()
        self.url = str(self.path)

    def read(self, name: str) -> bytes | None:
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StudyError(f"{self.path / name} cannot be read: {error.strerror}") from error

    def write(self, name: str, data: bytes) -> None:
        target = self.path / name
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise files.OutputError(f"{target.parent} cannot be made: {error.strerror}") from error
        files.write(target, data)

    def remove(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def names(self, folder: str) -> list[str]:
        found: list[str] = []
        top = self.path / folder
        for parent, _, held in os.walk(top):
            beneath = Path(parent).relative_to(top).as_posix()
            found += held if beneath == "." else [f"{beneath}/{name}" for name in held]
        return sorted(found)

    def zarr(self, name: str, read_only: bool = False) -> Any:
        return need_zarr().storage.LocalStore(self.path / name, read_only=read_only)


class Bucket(buckets.Bucket):
    """A folder of an object store, by its address, with arrays in it."""

    def zarr(self, name: str, read_only: bool = False) -> Any:
        inner = buckets.opened(f"{self.url}/{name}")
        return need_zarr().storage.ObjectStore(inner, read_only=read_only)


def place_of(out: str | Path) -> Place:
    """The place of an address.

    Raises:
        BucketError: an address that is none.
        ExtraError: naming the extra that an object store needs.
    """
    return Bucket(str(out)) if buckets.is_address(out) else Folder(out)


def need_zarr() -> Any:
    """The library that holds a study's arrays.

    Raises:
        ExtraError: naming the extra that brings it.
    """
    try:
        import zarr
        import zarr.storage
    except ImportError as error:
        raise ExtraError("a study needs zarr: pip install 'audio_lens[scale]'") from error
    return zarr
