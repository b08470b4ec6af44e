"""Object stores: objects by name in a folder of a bucket (``s3://bucket/folder``)."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from audio_lens.errors import AudioLensError, ExtraError
from audio_lens.files import OutputError

RETRIES: Mapping[str, Any] | None = None  # of requests to an object store: as the library does


class BucketError(AudioLensError, OSError):
    """An object store that cannot be reached or read, or an address of none."""


def is_address(out: Any) -> bool:
    """Whether something is the address of an object store, and no folder."""
    return "://" in str(out)


class Bucket:
    """A folder of an object store, by its address: ``s3://bucket/folder``, ``gs://``, ``az://``.

    Credentials, region and endpoint come from the environment, as the store's own tools read them.

    Raises:
        BucketError: an address that is none.
        ExtraError: naming the extra that an object store needs.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self.store = opened(self.url)

    def __getstate__(self) -> dict[str, str]:
        return {"url": self.url}  # a connection goes into no other process

    def __setstate__(self, state: dict[str, str]) -> None:
        self.__init__(state["url"])

    def read(self, name: str) -> bytes | None:
        """What an object holds; None where there is none.

        Raises:
            BucketError: a store that does not answer, or refuses.
        """
        try:
            return bytes(need_obstore().get(self.store, name).bytes())
        except FileNotFoundError:
            return None
        except Exception as error:  # of the network, of credentials, of the bucket
            raise BucketError(f"{self.url}/{name} cannot be read: {_first(error)}") from error

    def part(self, name: str, start: int, stop: int) -> bytes:
        """Some bytes of an object.

        Raises:
            BucketError: no such object, or a store that does not answer, or refuses.
        """
        try:
            return bytes(need_obstore().get_range(self.store, name, start=start, end=stop))
        except Exception as error:
            raise BucketError(f"{self.url}/{name} cannot be read: {_first(error)}") from error

    def write(self, name: str, data: bytes) -> None:
        """Put an object in place; it is there whole or not at all.

        Raises:
            OutputError: a store that does not answer, or refuses.
        """
        try:
            need_obstore().put(self.store, name, data)
        except Exception as error:
            raise OutputError(f"{self.url}/{name} cannot be written: {_first(error)}") from error

    def remove(self, name: str) -> None:
        """Take an object away; one that is not there is no error."""
        with contextlib.suppress(FileNotFoundError):
            need_obstore().delete(self.store, name)

    def names(self, folder: str = "") -> list[str]:
        """Names of the objects in a folder and below it, from the folder on.

        Raises:
            BucketError: a store that does not answer, or refuses.
        """
        try:
            listed = need_obstore().list(self.store, prefix=folder or None)
            paths = [str(one["path"]) for batch in listed for one in batch]
        except Exception as error:
            raise BucketError(f"{self.url}/{folder} cannot be listed: {_first(error)}") from error
        return sorted(path.removeprefix(f"{folder}/") for path in paths)


def opened(url: str) -> Any:
    """A folder of an object store, as obstore has it.

    Raises:
        BucketError: an address that is none.
        ExtraError: naming the extra that an object store needs.
    """
    obstore = need_obstore()
    try:
        return obstore.store.from_url(url, retry_config=RETRIES)
    except Exception as error:  # what the library raises is of no public class
        raise BucketError(f"{url} is no address of an object store: {_first(error)}") from error


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


def _first(error: Exception) -> str:
    """What an error of the library says before it shows its inside."""
    return str(error).partition(": <?xml")[0].partition("\n")[0]
