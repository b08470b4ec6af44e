"""How far a study is: items done, failures by reason, busy workers, time left."""

from __future__ import annotations

import collections
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from audio_lens.studies.store import Store
from audio_lens.studies.worker import UnitReport


@dataclass(frozen=True)
class Status:
    """How far a study is.

    Attributes:
        items, units: how many there are; ``done_items``, ``done_units`` of them are done, failures
            counted.
        failed: how many items have no numbers, by why.
        busy: of every worker, the share of its time in the method itself.
        per_second: items, over all workers, since the first began.
        left_s: seconds that are left at that pace; None where nothing is known.
    """

    items: int
    units: int
    done_items: int
    done_units: int
    failed: Mapping[str, int] = field(default_factory=dict)
    busy: Mapping[str, float] = field(default_factory=dict)
    per_second: float | None = None
    left_s: float | None = None

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to run."""
        return self.done_units == self.units

    @property
    def n_failed(self) -> int:
        """Items without numbers."""
        return sum(self.failed.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        told = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {n: dict(x) if isinstance(x, Mapping) else x for n, x in told.items()}

    def __str__(self) -> str:
        lines = [
            f"{self.done_items} of {self.items} items ({self.done_units} of {self.units} units)"
        ]
        if self.per_second is not None and not self.is_done:
            left = "" if self.left_s is None else f", {self.left_s / 60:.0f} min left"
            lines.append(f"{self.per_second:.3g} items a second{left}")
        lines += [f"{worker}: busy {share:.0%}" for worker, share in self.busy.items()]
        lines += [f"{count} items without numbers: {why}" for why, count in self.failed.items()]
        return "\n".join(lines)


def status_of(store: Store) -> Status:
    """The status of a study, by what its store holds."""
    done = store.done()
    reports = [report for report in reports_of(store) if report.unit in done]
    items, done_items = len(store.items), sum(len(store.rows(unit)) for unit in done)
    pace = _pace(reports)
    failed = collections.Counter(reason(why) for why in store.failures().values())
    return Status(
        items=items,
        units=len(store),
        done_items=done_items,
        done_units=len(done),
        failed=dict(failed.most_common()),
        busy=_busy(reports),
        per_second=pace,
        left_s=None if not pace else (items - done_items) / pace,
    )


def reports_of(store: Store) -> list[UnitReport]:
    """What every unit cost that is done."""
    held = (store.place.read(f"units/{name}") for name in store.place.names("units"))
    return [UnitReport(**json.loads(text)) for text in held if text is not None]


def _pace(reports: Sequence[UnitReport]) -> float | None:
    if not reports:
        return None
    span = max(one.end for one in reports) - min(one.start for one in reports)
    return sum(one.items for one in reports) / span if span > 0 else None


def _busy(reports: Sequence[UnitReport]) -> dict[str, float]:
    """The share of its own span that every worker spent in the method."""
    by_worker: dict[str, list[UnitReport]] = {}
    for one in reports:
        by_worker.setdefault(one.worker, []).append(one)
    spans = {
        worker: max(x.end for x in own) - min(x.start for x in own)
        for worker, own in by_worker.items()
    }
    return {
        worker: sum(x.busy_s for x in own) / spans[worker]
        for worker, own in sorted(by_worker.items())
        if spans[worker] > 0
    }


def reason(why: str) -> str:
    """Of a traceback the last line, of a message the first, without the item's name."""
    lines = why.strip().splitlines() or [""]
    line = lines[-1] if lines[0].startswith("Traceback") else lines[0]
    return line.partition(": ")[2] if line.startswith("item ") and ": " in line else line
