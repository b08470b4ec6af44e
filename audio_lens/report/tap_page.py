"""The page of Temporal Attribution Patching: claims with their verdicts, and what they rest on."""

from __future__ import annotations

from pathlib import Path

from audio_lens.analysis.tap import Claim, Report
from audio_lens.arguments import text
from audio_lens.errors import InputError
from audio_lens.report.html import write_drawn
from audio_lens.report.result_page import Section
from audio_lens.results import Result


def tap_page(
    report: Report,
    path: str | Path,
    *,
    title: str = "What was located, and what of it holds",
    question: str = "",
) -> Path:
    """Write a report as one page that needs no network.

    Above stands the table of claims, each with its effect, interval, controls and verdict; below
    every result with its figure: the layer × time map, heads, curves of choice and saturation,
    hand-over, scrubbing, probes.

    Args:
        report: of `analysis.tap.tap`.
        path: the HTML file to write.
        title: headline of the page.
        question: what is asked, below it.

    Returns:
        The path written.

    Raises:
        InputError: something else than a report.
        OutputError: a path that cannot be written; an old page stays.
    """
    text("title", title)
    text("question", question)
    if not isinstance(report, Report):
        raise InputError(f"tap_page takes the report of tap, got {type(report).__name__}")
    sections = [Section(name, result) for name, result in report.items() if _is_shown(result)]
    return write_drawn(
        path,
        "tap.html",
        {"results": [list(section.figures()) for section in sections]},
        title=title,
        question=question,
        claims=[_row(claim) for claim in report.claims],
        notes=report.notes,
        sections=sections,
    )


def _is_shown(result: Result) -> bool:
    """Whether a result says something to the eye: not what are mere entries of vectors."""
    return "entry" not in result.dims


def _row(claim: Claim) -> dict[str, str]:
    low, high = claim.interval
    weakest = claim.weakest
    return {
        "place": claim.place,
        "estimate": f"{claim.estimate:.2f}",
        "effect": f"{claim.effect:.2f} [{low:.2f}, {high:.2f}]",
        "weakest": f"{weakest.effect:.2f} ({weakest.name})",
        "controls": ", ".join(f"{name} {x:.2f}" for name, x in claim.controls.items()),
        "verdict": claim.verdict,
        "why": claim.why,
    }
