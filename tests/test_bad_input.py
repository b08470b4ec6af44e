"""Bad input is refused by the library's own errors, before any work, and the docs say so."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bad_input import page

CASES = Path(__file__).parent / "bad_input"
ASKED_OF_A_RUN = {"Caches", "What a study costs"}  # subjects, which take a run to have
MOST_S = 5.0


@pytest.fixture(scope="module")
def found() -> list[page.Outcome]:
    """What became of every case, in a process of its own."""
    ran = subprocess.run([sys.executable, CASES], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return [page.Outcome(**one) for one in json.loads(ran.stdout)]


def test_every_case_is_refused_by_an_error_of_the_library(found: list[page.Outcome]) -> None:
    assert len(found) > 400
    assert [one for one in found if not one.is_ours] == []


def test_every_case_is_refused_before_the_model_runs(found: list[page.Outcome]) -> None:
    ran = {one.subject for one in found if one.n_blocks}
    assert ran <= ASKED_OF_A_RUN


def test_every_case_is_refused_at_once(found: list[page.Outcome]) -> None:
    assert [one for one in found if one.seconds > MOST_S] == []


def test_messages_name_no_objects(found: list[page.Outcome]) -> None:
    """By where they lie in memory, which helps nobody."""
    assert [one for one in found if re.search(r" at 0x[0-9a-f]{6}", one.message)] == []
    assert [one for one in found if not one.message or "\x1b" in one.message] == []


def test_the_page_says_what_is_said(found: list[page.Outcome]) -> None:
    assert page.written() == page.table(found), "python tests/bad_input --write"
