"""The files of a checkpoint and what they say, before anything is built of them.

Nothing here trusts a file: where it lies, what it is and how much it asks for are checked first,
and whatever a foreign library says of it becomes a `LoadingError` that names it.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

from safetensors import SafetensorError, safe_open
from transformers.utils.hub import cached_file, cached_files

from audio_lens.errors import AudioLensError
from audio_lens.models.config import MOST_LAYERS, HubError, LoadingError

Given = ParamSpec("Given")
Model = TypeVar("Model")
CONFIG = "config.json"
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_REPEATED = re.compile(r"(layers?|blocks?|depth|experts|quantizers|codebooks)$")
_MOST_LABELS = 100_000  # the largest models have thousands


class Header(NamedTuple):
    """What a file of weights says of a tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Its numbers."""
        return prod(self.shape)


@contextmanager
def told_of(source: str | Path) -> Iterator[None]:
    """Raise whatever other libraries say of a checkpoint as an error of this library, naming it.

    Raises:
        LoadingError: in place of their errors.
        HubError: of what is neither here nor to be had from the hub.
    """
    try:
        yield
    except AudioLensError:
        raise
    except Exception as error:  # what a file brings about in other libraries is theirs to choose
        first = (str(error).splitlines() or [""])[0]
        is_absent = isinstance(error, OSError) and not Path(source).exists()
        raise (HubError if is_absent else LoadingError)(
            f"{source} cannot be loaded: {first or type(error).__name__}"
            + ("" if isinstance(error, OSError | ValueError) else f" ({type(error).__name__})")
        ) from error


def reads_checkpoint(load: Callable[Given, Model]) -> Callable[Given, Model]:
    """Let errors of a loader name the checkpoint, which is its first argument; see `told_of`."""
    signature = inspect.signature(load)

    @functools.wraps(load)
    def told(*args: Given.args, **options: Given.kwargs) -> Model:
        given = signature.bind(*args, **options)
        given.apply_defaults()
        with told_of(next(iter(given.arguments.values()))):
            return load(*args, **options)

    return told


def first_line(error: Exception) -> str:
    """What an error says, shortly."""
    return (str(error).splitlines() or [type(error).__name__])[0]


# -------------------------------------------------------------------------------- JSON


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file.

    Raises:
        LoadingError: no such file, or one that holds something else.
    """
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LoadingError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise LoadingError(f"{path} is no valid JSON: {first_line(error)}") from error
    if not isinstance(held, dict):
        raise LoadingError(f"{path} holds a {type(held).__name__} where a mapping belongs")
    return held


def read_config(path: Path) -> dict[str, Any]:
    """The mapping in a config file, which asks for no more than models have.

    Raises:
        LoadingError: as `read_json`, or a number of layers or the like that no model has.
    """
    held = read_json(path)
    check_numbers(held, path)
    return held


def check_numbers(config: Any, source: str | Path) -> None:
    """Raise if a config repeats anything more often than models do.

    Raises:
        LoadingError: naming it.
    """
    for key, value in entries(config):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        most = (
            _MOST_LABELS if key == "num_labels" else MOST_LAYERS if _REPEATED.search(key) else None
        )
        if is_number and most is not None and not value <= most:
            raise LoadingError(f"{source} asks for {key}={value:.6g}: no model has so many")


def entries(held: Any) -> Iterator[tuple[str, Any]]:
    """Every key and value of a mapping, and of the mappings and lists in it."""
    waiting = [held]
    while waiting:
        one = waiting.pop()
        if isinstance(one, Mapping):
            yield from ((str(key), value) for key, value in one.items())
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one


# -------------------------------------------------------------------------------- weights


def found(source: str, name: str) -> Path | None:
    """A file of a hub id, in its local copy, or of a local directory; None where there is none."""
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    path = cached_file(
        source,
        name,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if path is None else Path(path)


def weight_files(source: str, named: str | None = None) -> list[Path]:
    """The safetensors that transformers reads of a checkpoint; none where the hub converts them.

    Args:
        named: the file that the config names, where it does (``transformers_weights``).

    Raises:
        LoadingError: a file that is missing, lies outside of the checkpoint or is a pickle.
    """
    for name in (_WHOLE, _INDEX) if named is None else (_plain_name(named, f"{source}/{CONFIG}"),):
        path = found(source, name)
        if path is not None and path.suffix == ".json":
            return _shards(source, path)
        if path is not None:
            return [path]
    if Path(source).is_dir():
        raise LoadingError(f"{source} holds no {named or f'{_WHOLE} and no {_INDEX}'}")
    return []


def _shards(source: str, index: Path) -> list[Path]:
    """The files that an index names."""
    held = read_json(index)
    by_tensor = held.get("weight_map")
    if not isinstance(by_tensor, dict) or not by_tensor or "metadata" not in held:
        raise LoadingError(
            f"{index} holds no weight_map and metadata, so it is no index of weights"
        )
    names = sorted({_plain_name(name, index) for name in by_tensor.values()})
    if not Path(source).is_dir():
        return [Path(path) for path in cached_files(source, names) or ()]
    for name in names:
        _check_inside(Path(source), name, index)
    return [Path(source) / name for name in names]


def _plain_name(name: Any, index: str | Path) -> str:
    """The name of a file, that can only lie where it should and only be safetensors.

    Raises:
        LoadingError: for any other.
    """
    if not isinstance(name, str) or not name.endswith((".safetensors", f"{_INDEX[-11:]}")):
        raise LoadingError(f"{index} names {name!r}, which is no safetensors: others can run code")
    if Path(name).is_absolute() or ".." in re.split(r"[/\\]", name):
        raise LoadingError(f"{index} names {name!r}, which lies outside of the checkpoint")
    return name


def _check_inside(folder: Path, name: str, index: Path) -> None:
    """Raise unless a file is there, and where it is said to be.

    Links may lead to the folder itself, or to where the hub's cache keeps the files of a snapshot.
    """
    path, home = folder / name, folder.resolve()
    if not path.is_file():
        raise LoadingError(f"{index} names {name}, which is not there")
    homes = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(path.resolve().is_relative_to(one) for one in homes):
        raise LoadingError(
            f"{index} names {name}, a link to {path.resolve()}, which lies outside of the "
            "checkpoint: copy the file, or load the directory it is in"
        )


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A file of safetensors.

    Raises:
        LoadingError: if it is none, or not whole.
    """
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise LoadingError(f"{path} is corrupt: {first_line(error)}") from error


def headers(files: Iterable[Path]) -> dict[str, Header]:
    """What files of weights hold, by name, without reading it.

    Raises:
        LoadingError: naming a file that is corrupt.
    """
    held = {}
    for path in files:
        with opened(path) as file:
            for key in file.keys():  # noqa: SIM118
                tensor = file.get_slice(key)
                held[key] = Header(tensor.get_dtype(), tuple(tensor.get_shape()))
    return held
