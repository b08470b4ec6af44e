"""`audio-lens tap`: what it prints and writes of a report, by itself and among the methods."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from audio_lens import HookedAudioTransformer, cli
from audio_lens.analysis import tap
from audio_lens.analysis.tap.claims import Claim, Trial
from audio_lens.analysis.tap.stages import Part
from audio_lens.cli import shared
from audio_lens.items import ANALYSES, Items, Method
from audio_lens.results import Result

FIELDS = {"site", "layer", "head", "start_s", "end_s", "effect", "interval", "controls", "verdict"}
CONTROLS = {"other_item": 0.1, "random_sites": 0.0}


def claim(verdict: str, why: str = "") -> Claim:
    place = {"kind": "window", "site": "decoder.resid_pre", "layer": 3, "head": None}
    place |= {"neuron": None, "start_s": 0.8, "end_s": 1.0}
    trial = Trial("counterpart", "log_prob", "denoise", 0.7, 0.6, 0.8, CONTROLS, {}, why=why)
    found = {"estimate": 0.3, "effect": 0.7, "interval": (0.6, 0.8), "controls": CONTROLS}
    return Claim(**place, **found, verdict=verdict, why=why, trials=(trial,))


def located(
    model: HookedAudioTransformer,
    items: Items,
    *,
    seed: int = 0,
    progress: Any = None,
    **given: Any,
) -> tap.Report:
    """Where is it?"""
    one = Result(torch.arange(6.0), ("layer",), {"layer": list(range(6))})
    claims = [claim("confirmed"), claim("refused", "too weak")]
    facts = {"claims": [x.to_dict() for x in claims], "notes": [f"asked with {sorted(given)}"]}
    parts = {
        "pairs": Part(facts={"hold": True, "n_kept": len(items), "dropped": {"wrong": 2}}),
        "claims": Part({"map": one}, facts),
    }
    return tap.Report(parts, {"model": "embedded"})


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, embedded: HookedAudioTransformer
) -> Callable[..., Any]:
    monkeypatch.setitem(ANALYSES, "tap", Method("tap", located, str(located.__doc__)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shared, "load", lambda *_: embedded)

    def invoke(*arguments: Any) -> Any:
        return CliRunner().invoke(cli.app, [*map(str, arguments)], env={"COLUMNS": "200"})

    return invoke


def test_claims_are_printed_and_the_report_written(run: Callable[..., Any]) -> None:
    result = run("tap", "--k", 2, "--stride", 0.1, "--save", "tap.zip", "--out", "tap.html")
    assert result.exit_code == 0, result.output
    for part in (
        *("tap, 16 items of the shipped clips: Where is it?", "decoder.resid_pre, layer 3"),
        *("0.80-1.00 s", "+0.70 [+0.60, +0.80]", "other_item +0.10", "confirmed"),
        *("refused (too weak)", "asked with ['checkpoint', 'k', 'rank', 'windows']"),
        *("report written to tap.zip", "html written to tap.html"),
    ):
        assert part in result.stdout
    assert [one.verdict for one in tap.Report.load("tap.zip").claims] == ["confirmed", "refused"]
    page = Path("tap.html").read_text()
    assert "refused: too weak" in page and "0.70 [0.60, 0.80]" in page


@pytest.mark.parametrize("command", [("tap",), ("analyse", "tap")])
def test_json_has_claims(run: Callable[..., Any], command: tuple[str, ...]) -> None:
    told = json.loads(run(*command, "--json", "--seed", 3).stdout)
    assert all(one.keys() >= FIELDS for one in told["claims"])
    first = told["claims"][0]
    assert (first["head"], first["interval"], first["controls"]) == (None, [0.6, 0.8], CONTROLS)
    assert (told["method"], told["seed"], told["n_kept"], told["n_dropped"]) == ("tap", 3, 16, 2)
    assert told["values"]["map"] == [0, 1, 2, 3, 4, 5] and told["axes"]["map"] == ["layer"]


def test_what_cannot_be_used_is_refused_before_the_model_runs(run: Callable[..., Any]) -> None:
    for arguments, why in (
        (("--items", "gone.jsonl"), "there is no file"),
        (("--save", "/proc/nowhere/tap.zip"), "nowhere"),
        (("--out", "a", "--save", "a"), "--save"),
    ):
        result = run("tap", *arguments)
        assert result.exit_code == cli.BAD_INPUT and why in result.stderr


@pytest.mark.real
@pytest.mark.slow
def test_the_shipped_clips_give_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, embedded: HookedAudioTransformer
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shared, "load", lambda *_: embedded)
    result = CliRunner().invoke(cli.app, ["tap", "--k", "2", "--json", "--save", "tap.zip"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["claims"] and all(one.keys() >= FIELDS for one in told["claims"])
    assert [one.to_dict() for one in tap.Report.load("tap.zip").claims] == told["claims"]
