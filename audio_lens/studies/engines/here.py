"""One worker, in this process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from audio_lens.progress import track
from audio_lens.studies.worker import Worker


@dataclass(frozen=True)
class Here:
    """Runs a study in this process, unit by unit."""

    def run(self, out: str, units: Sequence[int], progress: bool | None = None) -> None:
        """Run them; stopped by Ctrl-C it keeps every unit that is done."""
        worker = Worker(out)
        count, done = sum(len(worker.store.rows(unit)) for unit in units), 0
        with track("study", count, "items", show=progress) as advance:
            for told in worker.each(units):
                done += told.items
                advance(told.items, done)
