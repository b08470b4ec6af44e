"""docs/engine.md walks a sweep through the engine: the code goes the same way."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from audio_lens import metrics, patching
from patching.subjects import pair, tiny_model

PACKAGE = Path(patching.__file__).parent
PAGE = Path(__file__).parents[2] / "docs" / "engine.md"
SECTION = re.compile(r"^### \d+\. `(\S+)`\n(.*?)(?=^##|\Z)", re.MULTILINE | re.DOTALL)
ROW = re.compile(r"^\| `(\S+\.py)` \|", re.MULTILINE)
NAME = re.compile(r"`([A-Za-z_][\w.]*)`")
OPTIONS = {"verify", "refine", "report", "meta", "rerun", "explain", "metric"}  # of users


@pytest.fixture(scope="module")
def sections() -> dict[str, str]:
    return dict(SECTION.findall(PAGE.read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def entered() -> list[str]:
    """The files that a sweep enters, in the order of the first entry."""
    model, asked = tiny_model("qwen2_audio"), pair("qwen2_audio")
    asked |= {"site": "encoder.resid_pre", "axes": ("layer", "time")}
    found: dict[str, None] = {}

    def notice(frame: FrameType, event: str, argument: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            found[path.relative_to(PACKAGE.parent).as_posix()] = None

    before = sys.getprofile()
    sys.setprofile(notice)
    try:
        patching.sweep(model, **asked, metric=metrics.logit_diff(5, 6), progress=False)
    finally:
        sys.setprofile(before)
    return list(found)


def test_the_page_names_the_files_of_a_sweep_in_their_order(sections, entered):
    assert list(sections) == entered


def test_the_page_names_every_other_file_once(sections):
    beside = ROW.findall(PAGE.read_text(encoding="utf-8"))
    files = {path.relative_to(PACKAGE.parent).as_posix() for path in PACKAGE.rglob("*.py")}
    code = {file for file in files if not file.endswith("__init__.py")}
    assert sorted([*sections, *beside]) == sorted(code)


def test_what_a_section_names_lies_in_its_file(sections):
    named = 0
    for file, text in sections.items():
        module = importlib.import_module("audio_lens." + file.removesuffix(".py").replace("/", "."))
        for name in set(NAME.findall(text)) - OPTIONS:
            place: Any = module
            for piece in name.split("."):
                assert hasattr(place, piece), f"{file} has no {name}"
                place = getattr(place, piece)
            named += 1
    assert named > 40
