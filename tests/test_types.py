"""Errors of types never become more; what has fewer says so."""

from __future__ import annotations

from pathlib import Path

import pytest

import type_errors
from type_errors import Counts, Error

OLD = Error("models/base.py", 3, "old")
ODD = Error("patching/sweep.py", 7, "odd")
MOST = Counts.of([OLD])


@pytest.mark.slow
def test_errors_of_types_are_as_many_as_were_kept() -> None:
    told = type_errors.complaint(type_errors.found(), Counts.kept())
    assert not told, told


def test_errors_are_counted_by_where_they_are() -> None:
    assert Counts(0, 1, {"models/base.py": 1}) == MOST
    assert Counts.of([OLD, ODD]).clean == 1
    assert Counts.of([Error("hooks.py", 1, "odd"), Error("hooks_more.py", 1, "odd")]).clean == 1


def test_as_many_errors_as_were_kept_are_fine() -> None:
    assert type_errors.complaint([OLD], MOST) == ""


def test_new_errors_are_named_and_old_ones_are_not() -> None:
    told = type_errors.complaint([OLD, ODD], MOST)
    assert "audio_lens/patching/sweep.py:7: odd" in told
    assert "models/base.py" not in told


def test_an_error_that_moves_into_a_clean_package_is_named() -> None:
    assert "sweep.py:7" in type_errors.complaint([ODD], MOST)


def test_fewer_errors_want_to_be_written_down() -> None:
    assert "make types" in type_errors.complaint([], MOST)


@pytest.mark.parametrize("errors, written", [([], 0), ([OLD], 1), ([OLD, OLD], 1)])
def test_numbers_are_written_downwards_only(
    errors: list[Error], written: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type_errors, "KEPT", tmp_path / "kept.json")
    monkeypatch.setattr(type_errors, "found", lambda: errors)
    MOST.keep()
    if len(errors) > 1:
        with pytest.raises(SystemExit, match=r"models/base[.]py:3: old"):
            type_errors.main()
    else:
        type_errors.main()
    assert Counts.kept().elsewhere == written
