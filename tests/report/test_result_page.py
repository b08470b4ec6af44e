"""The page of results over items: what it says, and its figures in a browser."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from browsing import until
from pages import Page

from audio_lens import Result
from audio_lens.report import result_page

EVIL = "<a href='javascript:alert(1)'>x</a>"
AXES = {"stream": ["audio", "text"], "group": ["own", "last"], "layer": [0, 1, 2]}


def residence() -> Result:
    """Two metrics, three axes, a control, an interval and a value that is not known."""
    values = torch.arange(48.0).reshape(2, 2, 2, 2, 3)  # metric, stimulus, stream, group, layer
    values[:, :, 0, 0, 0] = torch.nan
    mean = values.mean(1)
    coords = {"metric": ["log_prob", EVIL], "stimulus": ["a", "b"]} | AXES
    control = Result(torch.tensor([0.5, 0.25]), ("metric",), {"metric": coords["metric"]})
    return Result(
        values,
        tuple(coords),
        coords,
        low=mean - 1,
        high=mean + 1,
        controls={f"noise {EVIL}": control},
        n_kept=2,
        dropped={"the clean side is wrong": 3, "unfit": 0},
        report=[f"It stays there {EVIL}."],
        meta={"model": "embedded", "seed": "3"},
    )


def share() -> Result:
    values = torch.tensor([0.75, 0.95])
    return Result(values, ("stimulus",), {"stimulus": ["a", "b"]}, n_kept=2)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    results = {"residence": residence(), f"share {EVIL}": share()}
    return result_page(results, tmp_path / "page.html", title="Found", question=f"Where? {EVIL}")


def test_the_page_says_all_there_is(path: Path) -> None:
    page, text = Page(path), path.read_text(encoding="utf-8")
    assert "<a href" not in text and "http" not in text.replace("http-equiv", "")
    assert page.text["title"] == "Found" and EVIL in page.text["h2"]
    for part in (
        *("stream text, group last, layer 2", "17 [16, 18]", "41 [40, 42]", "0.85"),
        *("left out: the clean side is wrong", "It stays there", "embedded"),
    ):
        assert part in text
    assert "unfit" not in text
    assert [len(figures) for figures in page.data["results"]] == [2, 1]
    facets = [one["facets"] for one in page.data["results"][0]]
    assert {"metric": EVIL} in facets


def test_maps_without_intervals_are_chosen_by_their_third_axis(tmp_path: Path) -> None:
    maps = replace(residence(), low=None, high=None)
    page = Page(result_page(maps, tmp_path / "page.html"))
    facets = [one["facets"] for one in page.data["results"][0]]
    assert len(facets) == 4 and {"metric": EVIL, "stream": "text"} in facets


def test_a_result_alone_is_called_as_the_page(tmp_path: Path) -> None:
    page = Page(result_page(residence(), tmp_path / "page.html"))
    assert "What was found" in page.text["h2"]


def test_a_result_of_one_axis_has_its_controls_as_marks(tmp_path: Path) -> None:
    one = residence().select(stream="audio", group="last")
    ((first, _),) = [Page(result_page(one, tmp_path / "page.html")).data["results"][0]]
    names = [trace["name"] for trace in first["figure"]["data"]]
    assert len(names) == 2 and names[1].startswith("noise")


def test_what_is_no_page_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no results"):
        result_page({}, tmp_path / "page.html")
    coords = {"a": [0, 1], "b": [0, 1], "c": [*range(300)]}
    wide = Result(torch.zeros(2, 2, 300), tuple(coords), coords)
    with pytest.raises(ValueError, match="wide has 300 figures, by c: select a part"):
        result_page({"wide": wide}, tmp_path / "page.html")


def test_figures_are_chosen_in_the_browser(tmp_path: Path, browse: Any) -> None:
    maps = replace(residence(), low=None, high=None)
    page = browse(result_page({"maps": maps, "share": share()}, tmp_path / "page.html"))
    drawn = "document.querySelector('.figure').data[0]"
    assert page.evaluate(f"{drawn}.z.length * {drawn}.z[0].length") == 6
    assert page.evaluate("document.querySelectorAll('.figure')[1].data.length") == 1
    page.select_option("select[data-facet=stream]", "text")
    until(page, f"Math.max(...{drawn}.z.flat()) === 17")
    page.select_option("select[data-facet=metric]", EVIL)
    until(page, f"Math.max(...{drawn}.z.flat()) === 41")
