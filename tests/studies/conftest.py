"""The study that engines are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from audio_lens import studies


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from study_tools import all_items

    return all_items(tmp_path_factory.mktemp("t"))


@pytest.fixture(scope="module")
def here(table: Path, tmp_path_factory: pytest.TempPathFactory) -> studies.Study:
    """The study in this process."""
    from study_tools import by_case

    study = by_case(table, tmp_path_factory.mktemp("here") / "out")
    study.run()
    return study
