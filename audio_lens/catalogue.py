"""The table of model families: what each is made of, and how closely it matches its original.

The figures are measured, not computed here: `python -m benchmarks.parity --write` makes
``catalogue.json``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib import resources

FILE = "catalogue.json"
_ROUNDED = 1e-12  # a larger difference in float64 means that something was rounded on the way


@dataclass(frozen=True)
class Entry:
    """One kind of model.

    Attributes:
        name: as transformers or its recipe calls it, with its head where it has several.
        family: the file of `audio_lens.models` that implements it, or ``recipes/name``.
        parts: those that have positions, in the order sound takes.
        hooks_per_block: hook points in one block of each stack.
        hooks_elsewhere: hook points outside the blocks.
        seconds_per_position: distance in seconds of neighbouring positions of each part in time.
        float32, float64: largest difference from Hugging Face (of recipes: from the published
            computation, written anew) in any output, residual stream or pattern of random models
            with every parameter random, relative to the largest value. Of float64, in batches that
            the original itself computes in float64.
        not_float64: the same in float64 of the other batches, by name; None where the original is
            NaN.
    """

    name: str
    family: str
    parts: list[str]
    hooks_per_block: dict[str, int]
    hooks_elsewhere: int
    seconds_per_position: dict[str, float]
    float32: float
    float64: float
    not_float64: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Catalogue:
    """All entries, and the versions they were measured with."""

    entries: list[Entry]
    versions: dict[str, str]

    @staticmethod
    def load() -> Catalogue:
        """The catalogue that ships with the package."""
        text = (resources.files("audio_lens") / FILE).read_text(encoding="utf-8")
        held = json.loads(text)
        return Catalogue([Entry(**entry) for entry in held["entries"]], held["versions"])

    def rows(self) -> list[dict[str, str]]:
        """The table in words, one row per entry."""
        return [
            {
                "model": entry.name,
                "file": f"{entry.family}.py",
                "parts": ", ".join(entry.parts),
                "hooks per block": ", ".join(
                    f"{part} {count}" for part, count in entry.hooks_per_block.items()
                ),
                "others": str(entry.hooks_elsewhere),
                "seconds per position": ", ".join(
                    f"{part} {step:g}" for part, step in entry.seconds_per_position.items()
                ),
                "float32": f"{entry.float32:.0e}",
                "float64": f"{entry.float64:.0e}",
            }
            for entry in self.entries
        ]

    def not_in_float64(self) -> str:
        """What the column float64 leaves out, and by how much it differs there, in a sentence."""
        nan, rounded = [], []
        for entry in self.entries:
            for batch, difference in entry.not_float64.items():
                if difference is None:
                    nan.append(f"{batch} ({entry.name})")
                elif difference > _ROUNDED:
                    rounded.append(f"{batch} ({entry.name}: {difference:.0e})")
        return (
            "float64 leaves out the batches in which the original's softmax, in float32, sums rows "
            f"of another length than ours: {', '.join(rounded) or 'none'}; and those in which it "
            f"is NaN in float64: {', '.join(nan) or 'none'}."
        )
