"""How many errors of types pyright counts in the package, and the most there may be.

`python tests/type_errors.py` (`make types`) counts them and writes what has fallen. The numbers
stand in type_errors.json: of the packages that shall stay without any, and of all others. Those of
single files are kept only to tell new errors from old ones.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
KEPT = Path(__file__).with_suffix(".json")
CLEAN = (
    *("hooks", "inputs", "timeline", "cache", "results"),
    *("patching", "analysis", "metrics"),
)


@dataclass(frozen=True)
class Error:
    """One error, in a file named from the root of the package."""

    file: str
    line: int
    message: str

    @property
    def is_in_clean(self) -> bool:
        return self.file.split("/")[0].removesuffix(".py") in CLEAN

    def __str__(self) -> str:
        return f"audio_lens/{self.file}:{self.line}: {self.message}"


@dataclass
class Counts:
    """Errors of the clean packages, of all others, and of single files."""

    clean: int
    elsewhere: int
    files: dict[str, int] = field(default_factory=dict)

    @staticmethod
    def of(errors: Iterable[Error]) -> Counts:
        files = Counter(error.file for error in errors)
        clean = sum(error.is_in_clean for error in errors)
        return Counts(clean, files.total() - clean, dict(sorted(files.items())))

    @staticmethod
    def kept() -> Counts:
        """The most there may be."""
        return Counts(**json.loads(KEPT.read_text()))

    def keep(self) -> None:
        KEPT.write_text(json.dumps(asdict(self), indent=2) + "\n")

    def has_risen_from(self, most: Counts) -> bool:
        return self.clean > most.clean or self.elsewhere > most.elsewhere

    def has_fallen_from(self, most: Counts) -> bool:
        return self.clean < most.clean or self.elsewhere < most.elsewhere


def found() -> list[Error]:
    """The errors of a run of pyright with the interpreter at hand.

    Raises:
        RuntimeError: if pyright does not run.
    """
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    try:
        told = json.loads(run.stdout)["generalDiagnostics"]
    except (json.JSONDecodeError, KeyError) as error:
        raise RuntimeError(f"pyright gives no errors to count: {run.stdout}{run.stderr}") from error
    return [
        Error(
            Path(one["file"]).relative_to(ROOT / "audio_lens").as_posix(),
            one["range"]["start"]["line"] + 1,
            one["message"].splitlines()[0],
        )
        for one in told
        if one["severity"] == "error"
    ]


def complaint(errors: list[Error], most: Counts) -> str:
    """What is wrong with these errors; empty where they are as many as were kept."""
    counts = Counts.of(errors)
    told = (
        f"{counts.clean} errors of types in {', '.join(CLEAN)} (there may be {most.clean}), "
        f"{counts.elsewhere} elsewhere (there may be {most.elsewhere})"
    )
    if counts.has_risen_from(most):
        return "\n".join([f"{told}; in files that have more than before:", *_new(errors, most)])
    if counts.has_fallen_from(most):
        return f"{told}: write the new numbers by `make types`"
    return ""


def _new(errors: list[Error], most: Counts) -> list[str]:
    """The errors of files that have more of them than were kept."""
    counts = Counts.of(errors).files
    grown = {name for name, count in counts.items() if count > most.files.get(name, 0)}
    return [str(error) for error in errors if error.file in grown]


def main() -> None:
    """Write numbers that have fallen.

    Raises:
        SystemExit: where one has risen, naming the errors.
    """
    errors, most = found(), Counts.kept()
    counts = Counts.of(errors)
    if counts.has_risen_from(most):
        raise SystemExit(complaint(errors, most))
    counts.keep()
    print(f"{counts.clean} errors of types in {', '.join(CLEAN)}, {counts.elsewhere} elsewhere")


if __name__ == "__main__":
    main()
