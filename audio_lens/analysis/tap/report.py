"""The report of a study: claims with their verdicts, and every result that they rest on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audio_lens import files
from audio_lens.analysis.tap.claims import Claim
from audio_lens.analysis.tap.stages import Part, packed, unpacked
from audio_lens.errors import InputError
from audio_lens.results import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

MAP = "map"
CANNOT = (
    "A confirmed place can move the answer, under these corruptions and on items like these; that "
    "nothing else does is not said."
)


@dataclass(frozen=True, eq=False, repr=False)
class Report(Mapping[str, Result]):
    """What Temporal Attribution Patching found. As a mapping: every result, by name.

    Attributes:
        parts: what every stage gave, in order.
        meta: model, hashes of weights and items, versions, seed, in words.
        arguments: what was asked, in words.
    """

    parts: dict[str, Part]
    meta: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Result:
        for part in self.parts.values():
            if name in part.results:
                return part.results[name]
        raise KeyError(f"no result {name!r}; there is {', '.join(self) or 'none'}")

    def __iter__(self) -> Iterator[str]:
        return (name for part in self.parts.values() for name in part.results)

    def __len__(self) -> int:
        return sum(len(part.results) for part in self.parts.values())

    # ---------------------------------------------------------------- what was found

    @property
    def claims(self) -> list[Claim]:
        """Every node that was tested, with its verdict; none where pairs left nothing to test."""
        told = self._facts("claims").get("claims", [])
        return [Claim.of(one) for one in told]

    @property
    def confirmed(self) -> list[Claim]:
        """Those that held."""
        return [claim for claim in self.claims if claim.is_confirmed]

    @property
    def k(self) -> dict[str, int]:
        """How many nodes of every kind were tested."""
        return dict(self._facts("choice").get("k", {}))

    @property
    def agreement(self) -> dict[str, dict[str, float | int | None]]:
        """How well attribution ordered the nodes of every kind, by what was then measured."""
        return dict(self._facts("claims").get("agreement", {}))

    @property
    def place(self) -> str | None:
        """The confirmed windows that later stages look at, in words; None without any."""
        return self._facts("claims").get("place")

    @property
    def hand_over(self) -> float | None:
        """The layer from which the last position holds more than the audio's; None unknown."""
        if "hand_over" not in self:
            return None
        layer = float(self["hand_over"].mean().values.flatten()[0])
        return None if layer != layer else layer

    @property
    def n_kept(self) -> int:
        return int(self._facts("pairs").get("n_kept", 0))

    @property
    def dropped(self) -> dict[str, int]:
        """How many pairs were left out, by why."""
        return dict(self._facts("pairs").get("dropped", {}))

    @property
    def notes(self) -> list[str]:
        """What every stage says, and what was left out."""
        said = [line for part in self.parts.values() for line in part.facts.get("notes", [])]
        return [*said, CANNOT]

    def _facts(self, stage: str) -> dict[str, Any]:
        return self.parts[stage].facts if stage in self.parts else {}

    # ---------------------------------------------------------------- as text, as data, as a file

    def __str__(self) -> str:
        return "\n".join([*claim_lines(self.claims), *self.notes])

    __repr__ = __str__

    def found(self) -> dict[str, Any]:
        """What was found beside the results, as JSON holds it."""
        return {
            "claims": [claim.to_dict() for claim in self.claims],
            "k": self.k,
            "agreement": self.agreement,
            "place": self.place,
            "hand_over": self.hand_over,
            "n_kept": self.n_kept,
            "n_dropped": sum(self.dropped.values()),
            "dropped": self.dropped,
            "notes": self.notes,
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON holds it: `found`, and every result by its name."""
        results = {name: self[name].to_dict() for name in self}
        return {**self.found(), "results": results, "meta": self.meta, "arguments": self.arguments}

    def save(self, path: str | Path) -> Path:
        """Write the report as one file, which `load` reads again.

        Raises:
            OutputError: a path that cannot be written; an old file stays.
        """
        head = {"meta": self.meta, "arguments": self.arguments}
        return files.write(path, packed(self.parts, head))

    @staticmethod
    def load(path: str | Path) -> Report:
        """Read a report that `save` wrote.

        Raises:
            InputError: no such file, one that holds something else, or a study that is not done.
        """
        parts, head = unpacked(path)
        if "meta" not in head:
            raise InputError(
                f"{path} keeps the stages of a study that may not be done: call tap again with it "
                "as checkpoint="
            )
        return Report(parts, dict(head["meta"]), dict(head["arguments"]))

    def plot(self) -> go.Figure:
        """The layer × time map of exact effects: the first metric, clean put into corrupted.

        Raises:
            InputError: a study that has none.
        """
        if MAP not in self:
            raise InputError("nothing was located: this report has no map")
        result = self[MAP]
        return result.select(direction="denoise").plot(metric=result.coords["metric"][0])


def claim_lines(claims: list[Claim]) -> list[str]:
    """A table of claims as text."""
    if not claims:
        return ["no claims"]
    rows = [_row(claim) for claim in claims]
    width = max(len(row[0]) for row in rows)
    return [
        f"{place:<{width}}  {effect}  {controls}  {verdict}"
        for place, effect, controls, verdict in rows
    ]


def _row(claim: Claim) -> tuple[str, str, str, str]:
    low, high = claim.interval
    controls = ", ".join(f"{name} {x:+.2f}" for name, x in claim.controls.items())
    why = f" ({claim.why})" if claim.why else ""
    return (
        claim.place,
        f"{claim.effect:+.2f} [{low:+.2f}, {high:+.2f}]",
        controls,
        claim.verdict + why,
    )
