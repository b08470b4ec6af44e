"""A study written down: a TOML file that the command line runs."""

from __future__ import annotations

import tempfile
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from audio_lens.arguments import suggest
from audio_lens.studies.engines import Engine, Here, Ray, Slurm
from audio_lens.studies.errors import StudyError
from audio_lens.studies.harvest import harvest_study
from audio_lens.studies.planning import StudyPlan
from audio_lens.studies.study import DEMO, Study

ENGINES: Mapping[str, type] = {"here": Here, "ray": Ray, "slurm": Slurm}
_NEEDED = ("items", "out")


@dataclass(frozen=True)
class StudyFile:
    """What a file says of a study.

    Attributes:
        path: of the file; paths in it are relative to its folder.
        arguments: of `Study`.
        kind: of the engine: "here", "ray" or "slurm".
        options: of the engine.
    """

    path: Path
    arguments: Mapping[str, Any]
    kind: str = "here"
    options: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def read(path: str | Path) -> StudyFile:
        """A file: the arguments of `Study` by name, and a table ``[engine]`` with its ``kind``.

        Raises:
            StudyError: no such file, no TOML, or one that lacks ``items`` or ``out``.
        """
        path = Path(path)
        try:
            held = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise StudyError(f"no study file at {path}") from None
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise StudyError(f"{path} cannot be read as TOML: {error}") from error
        lacking = [name for name in _NEEDED if name not in held]
        if lacking:
            raise StudyError(f"{path} does not say {' and '.join(lacking)}")
        options = held.pop("engine", {})
        if not isinstance(options, dict):
            raise StudyError(f"{path}: engine is a table: [engine] and kind = ... below it")
        kind = options.pop("kind", "here")
        for name in _NEEDED:
            if "://" not in str(held[name]) and held[name] != DEMO:
                held[name] = str(path.parent / str(held[name]))
        return StudyFile(path, held, kind, options)

    def study(self) -> Study:
        """The study, new or as far as it is.

        Raises:
            StudyError, ItemError, OutputError: as `Study`.
        """
        try:
            return Study(**self.arguments)
        except TypeError as error:
            raise StudyError(f"{self.path}: {error}") from error

    def harvest(self) -> Study:
        """The study of activations, new or as far as it is.

        Raises:
            StudyError, ItemError, OutputError: as `harvest`.
        """
        return harvest_study(**self.arguments)

    def plan(self, workers: int, tflops: float) -> StudyPlan:
        """What the study would cost; its place is left as it is.

        Raises:
            StudyError, ItemError, LoadingError: as `Study` and `Study.explain`.
        """
        with tempfile.TemporaryDirectory() as folder:
            return Study(**{**self.arguments, "out": folder}).explain(workers, tflops)

    def engine(self, kind: str | None = None, workers: int | None = None) -> Engine:
        """What runs it; options of the file are of its own kind.

        Raises:
            StudyError: an unknown kind or option, or workers where there is one.
        """
        chosen = self.kind if kind is None else kind
        if chosen not in ENGINES:
            raise StudyError(f"no engine {chosen!r}; {suggest(chosen, ENGINES)}")
        options = dict(self.options) if chosen == self.kind else {}
        if workers is not None:
            options["workers"] = workers
        made = ENGINES[chosen]
        for name in options:
            if name not in made.__dataclass_fields__:
                raise StudyError(
                    f"the engine {chosen!r} takes no {name!r}; "
                    f"{suggest(name, made.__dataclass_fields__)}"
                    if made.__dataclass_fields__
                    else f"the engine {chosen!r} takes no options, and {name!r} is given"
                )
        return made(**options)
