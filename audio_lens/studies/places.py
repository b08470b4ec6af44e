"""Where a study lies: a folder, or a bucket of an object store. Small objects by name."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from audio_lens import files
from audio_lens.errors import ExtraError
from audio_lens.studies.errors import StudyError

RETRIES: Mapping[str, Any] | None = None  # of requests to an object store: as the library does


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


class Bucket:
    """A folder of an object store, by its address: ``s3://bucket/folder``, ``gs://``, ``az://``.

    Credentials, region and endpoint come from the environment, as the store's own tools read them.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self.store = _bucket(self.url)

    def read(self, name: str) -> bytes | None:
        try:
            return bytes(need_obstore().get(self.store, name).bytes())
        except FileNotFoundError:
            return None
        except Exception as error:  # of the network, of credentials, of the bucket
            raise StudyError(f"{self.url}/{name} cannot be read: {_first(error)}") from error

    def write(self, name: str, data: bytes) -> None:
        try:
            need_obstore().put(self.store, name, data)
        except Exception as error:
            raise files.OutputError(
                f"{self.url}/{name} cannot be written: {_first(error)}"
            ) from error

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            need_obstore().delete(self.store, name)

    def names(self, folder: str) -> list[str]:
        try:
            listed = need_obstore().list(self.store, prefix=folder)
            paths = [str(one["path"]) for batch in listed for one in batch]
        except Exception as error:
            raise StudyError(f"{self.url}/{folder} cannot be listed: {_first(error)}") from error
        return sorted(path.removeprefix(f"{folder}/") for path in paths)

    def zarr(self, name: str, read_only: bool = False) -> Any:
        inner = _bucket(f"{self.url}/{name}")
        return need_zarr().storage.ObjectStore(inner, read_only=read_only)


def _bucket(url: str) -> Any:
    """A folder of an object store.

    Raises:
        StudyError: an address that is none.
    """
    obstore = need_obstore()
    try:
        return obstore.store.from_url(url, retry_config=RETRIES)
    except Exception as error:  # what the library raises is of no public class
        raise StudyError(f"{url} is no address of an object store: {_first(error)}") from error


def _first(error: Exception) -> str:
    """What an error of the library says before it shows its inside."""
    return str(error).partition(": <?xml")[0].partition("\n")[0]


def place_of(out: str | Path) -> Place:
    """The place of an address.

    Raises:
        ExtraError: naming the extra that an object store needs.
    """
    return Bucket(str(out)) if "://" in str(out) else Folder(out)


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


def need_obstore() -> Any:
    """The library that speaks to object stores.

    Raises:
        ExtraError: naming the extra that brings it.
    """
    try:
        import obstore
        import obstore.store
    except ImportError as error:
        raise ExtraError("an object store needs obstore: pip install 'audio_lens[s3]'") from error
    return obstore
