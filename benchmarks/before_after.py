"""Two runs of `benchmarks.patching` on one machine, beside each other, as a table in Markdown.

    python -m benchmarks.patching --json before.json    # in a tree with the older audio_lens
    python -m benchmarks.patching --json after.json
    python -m benchmarks.before_after --before before.json --after after.json

Rows measured one by one are joined by naming several files. Columns that no run measured are left
out. Both runs hold the cells against the work and the machine as they found it, so shares of the
limit can be compared where seconds cannot.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.patching_measure import OWN

Row = dict[str, Any]
HEADS = (
    "sweep (cells)",
    "rows together",
    "GFLOP/s: square, products here, attention here",
    "over the limit, before",
    "after",
    "over the roofline, before",
    "after",
    "expert's script over the limit",
    "a cell of the script takes times ours",
    "whole sweep over its floor, before",
    "after",
    "peak MiB, before",
    "after",
    "attribution in forwards (floor)",
)


def table(before: Sequence[Row], after: Sequence[Row]) -> str:
    """The rows that both runs have."""
    earlier = {(row["name"], row["size"]): row for row in before}
    pairs = [(earlier.get((row["name"], row["size"])), row) for row in after]
    body = [cells(old, row) for old, row in pairs if old is not None]
    measured = [i for i in range(len(HEADS)) if any(line[i] for line in body)]
    lines = [[line[i] for i in measured] for line in (HEADS, ("---",) * len(HEADS), *body)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cells(old: Row, new: Row) -> tuple[str, ...]:
    """One row of the table."""
    ours_old, ours = old["outcomes"][OWN], new["outcomes"][OWN]
    expert = new["outcomes"].get("expert", {})  # where the script was not asked for
    rates = (new[name] for name in ("gflops", "gflops_here", "attention_gflops"))
    least = f"({new['least_attribution_forwards']:.1f})"
    return (
        f"{new['name']}, {new['size']} ({new['n_cells']})",
        str(new["rows_together"]),
        ", ".join(f"{rate:.0f}" for rate in rates),
        *(_short(one["over_limit"]) for one in (ours_old, ours)),
        *(_short(one["over_roofline"]) for one in (ours_old, ours)),
        _short(expert.get("over_limit")),
        _short(expert.get("times_own_cell")),
        *(_short(_over_floor(row)) for row in (old, new)),
        *(_whole(one["peak_mib"]) for one in (ours_old, ours)),
        f"{new['attribution_forwards']:.1f} {least}",
    )


def _over_floor(row: Row) -> float:
    """Seconds of the whole sweep over the least of both unpatched runs and all cells."""
    return row["outcomes"][OWN]["sweep_s"] / (row["runs_s"] + row["cells_s"])


def _short(number: float | None) -> str:
    return "" if number is None else f"{number:.2f}"


def _whole(number: float | None) -> str:
    return "" if number is None else f"{number:.0f}"


def main(
    before: Annotated[list[Path], typer.Option(help="What `benchmarks.patching --json` wrote.")],
    after: Annotated[list[Path], typer.Option(help="The same of another state of the library.")],
) -> None:
    """Print both beside each other."""
    earlier, later = ([json.loads(path.read_text()) for path in paths] for paths in (before, after))
    told = {key: value for key, value in later[0].items() if key != "rows"}
    print(", ".join(f"{name} {value}" for name, value in told.items()), end="\n\n")
    print(table(_rows(earlier), _rows(later)))


def _rows(files: Sequence[dict[str, Any]]) -> list[Row]:
    return [row for file in files for row in file["rows"]]


if __name__ == "__main__":
    typer.run(main)
