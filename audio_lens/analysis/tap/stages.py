"""Stages whose outcome is kept in one file as soon as each is done, so that a study can go on."""

from __future__ import annotations

import io
import json
import logging
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from audio_lens import files
from audio_lens.arguments import path_of
from audio_lens.errors import InputError
from audio_lens.patching.engine.checkpoint import CheckpointError
from audio_lens.results import Result

HEAD, FORMAT = "study.json", 1
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """What a stage gave.

    Attributes:
        results: by name.
        facts: what is no result, as JSON holds it.
    """

    results: dict[str, Result] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def packed(
    parts: Mapping[str, Part], head: Mapping[str, Any], known: dict[str, bytes] | None = None
) -> bytes:
    """All parts as one file: a zip of JSON and netCDF, nothing compressed.

    Args:
        known: results that were written before, by their places; new ones are added.
    """
    memory, written = io.BytesIO(), {} if known is None else known
    told = {
        name: {"facts": part.facts, "results": list(part.results)} for name, part in parts.items()
    }
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(memory, "w") as file:
        file.writestr(HEAD, json.dumps({"format": FORMAT, **head, "stages": told}))
        for stage, part in parts.items():
            for name, result in part.results.items():
                place = _place(stage, name)
                if place not in written:
                    written[place] = result.save(Path(folder) / "result.nc").read_bytes()
                file.writestr(place, written[place])
    return memory.getvalue()


def unpacked(path: str | Path) -> tuple[dict[str, Part], dict[str, Any]]:
    """What `packed` wrote, with the rest of its head.

    Raises:
        InputError: no such file, or one that holds something else.
    """
    path = path_of("path", path)
    if not path.is_file():
        raise InputError(f"no saved study at {path}")
    try:
        with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(path) as file:
            if any(one.compress_type != zipfile.ZIP_STORED for one in file.infolist()):
                raise InputError("its parts are compressed, and those of a study are not")
            head = json.loads(file.read(HEAD))
            if head.pop("format") != FORMAT:
                raise InputError("it is of another version")
            parts = {}
            for stage, told in head.pop("stages").items():
                results = {}
                for name in told["results"]:
                    place = Path(folder) / "result.nc"
                    place.write_bytes(file.read(_place(stage, name)))
                    results[name] = Result.load(place)
                parts[stage] = Part(results, dict(told["facts"]))
    except (InputError, OSError, zipfile.BadZipFile, *_ODD) as error:
        raise InputError(f"{path} holds no saved study: {error}") from error
    return parts, head


# of JSON, of netCDF, and of zip files: encrypted, or packed in an unknown way
_ODD = (KeyError, TypeError, ValueError, AttributeError, NotImplementedError, RuntimeError)


def _place(stage: str, name: str) -> str:
    return f"{stage}/{name}.nc"


@dataclass
class Stages:
    """The stages of a study, done once each.

    Attributes:
        identity: what makes the study this one; parts of another are never taken.
        path: where parts are kept; None nowhere.
        failure: why they could not be kept the last time.

    Raises:
        CheckpointError: a file that holds something else, or the stages of another study.
        OutputError: a path that cannot be written.
    """

    identity: dict[str, str]
    path: Path | None = None
    parts: dict[str, Part] = field(default_factory=dict)
    failure: str = ""
    _written: dict[str, bytes] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.path is None:
            return
        self.path = path_of("checkpoint", self.path)
        if not self.path.exists():
            files.try_out(self.path)
            return
        try:
            self.parts, head = unpacked(self.path)
        except InputError as error:
            raise CheckpointError(f"{self.path} is no checkpoint of tap: {error}") from error
        held = head.get("identity", {})
        other = [name for name, one in self.identity.items() if held.get(name) != one]
        if other:
            raise CheckpointError(
                f"{self.path} belongs to another study ({', '.join(other)} differ): name another "
                "file, or delete it"
            )

    def done(self, name: str, make: Callable[[], Part]) -> Part:
        """The part of a stage: as it was kept, or made now and kept."""
        if name not in self.parts:
            self.parts[name] = make()
            self._keep()
        return self.parts[name]

    def _keep(self) -> None:
        if self.path is None:
            return
        try:
            with files.locked(self.path):
                files.write(
                    self.path, packed(self.parts, {"identity": self.identity}, self._written)
                )
            self.failure = ""
        except files.OutputError as error:
            if not self.failure:
                log.warning("what is done could not be kept: %s; the study goes on", error)
            self.failure = str(error)
