"""`audio-lens analyse`: what it prints and writes of a method, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from typer.testing import CliRunner

from audio_lens import Edit, HookedAudioTransformer, Result, cli, edits
from audio_lens.cli import complete, methods, shared
from audio_lens.items import ANALYSES, Method, found, measured
from audio_lens.models.embedded import CLIPS, clip_pairs
from families import FAMILIES

LAYERS = [2, 3]
RATE = 16_000


def blocked(model, items, *, seed=0, progress=None) -> Result:
    """Which layers read the audio?"""
    block = edits.Block("audio")
    runs = measured(
        model,
        items,
        lambda batch: [
            (batch.inputs, [Edit("decoder.attn.attn_scores", block, layer=layer, where="last")])
            for layer in LAYERS
        ],
        progress=progress,
    )
    axes = {"metric": runs.metrics, "layer": LAYERS}
    none = Result(torch.zeros(len(runs.metrics)), ("metric",), {"metric": runs.metrics})
    return found(
        runs.values,
        axes,
        items,
        seed=seed,
        controls={"identity": none},
        dropped={"answered wrongly": 1},
        report=["What is blocked is not heard."],
    )


def several(model, items, *, seed=0, progress=None) -> dict[str, Result]:
    """Where is the news?"""
    values = torch.arange(12.0).repeat(len(items), 1).reshape(-1, 2, 2, 3)
    axes = {"stream": ["audio", "text"], "group": ["own", "last"], "layer": [0, 1, 2]}
    share = torch.full((len(items),), torch.nan)
    return {
        "share": found(share, {}, items, seed=seed),
        "residence": found(values, axes, items, seed=seed),
    }


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, embedded: HookedAudioTransformer
) -> Callable[..., Any]:
    """Runs the command beside two methods of these tests; the embedded model is loaded once."""
    for name, function in (("test_blocked", blocked), ("test_several", several)):
        summary = str(function.__doc__)
        monkeypatch.setitem(ANALYSES, name, Method(name, function, summary))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shared, "load", lambda *_: embedded)

    def invoke(*arguments: Any) -> Any:
        words = ["analyse", *map(str, arguments)]
        return CliRunner().invoke(cli.app, words, env={"COLUMNS": "200"})

    return invoke


def row(**changes: Any) -> dict[str, Any]:
    """A row of a table about a shipped clip, which is copied beside it."""
    pair = clip_pairs()[0]
    return {
        "audio": "clip.wav",
        "text": pair.question,
        "answer": pair.answer,
        "against": pair.against,
    } | changes


def table(*rows: dict[str, Any]) -> Path:
    """A table in the working folder."""
    shutil.copy(clip_pairs()[0].clean, "clip.wav")
    path = Path("items.jsonl")
    path.write_text("".join(f"{json.dumps(one)}\n" for one in rows))
    return path


def refused(result: Any, *parts: str) -> None:
    assert result.exit_code == cli.BAD_INPUT, result.output
    assert "Traceback" not in result.output and result.stderr.count("error:") == 1
    for part in parts:
        assert part in result.stderr


# -------------------------------------------------------------------------------- what it gives


def test_a_method_runs_on_the_shipped_items(run: Callable[..., Any]) -> None:
    result = run("test_blocked", "--save", "r.nc", "--out", "r.html")
    assert result.exit_code == 0, result.output
    for part in (
        "test_blocked, 16 items of the shipped clips: Which layers read the audio?",
        *("log_prob", "logit_diff", "layer 3", "control identity", "of 16 items"),
        *("1 left out: answered wrongly", "What is blocked is not heard."),
        *("netcdf written to r.nc", "html written to r.html"),
    ):
        assert part in result.stdout
    saved = Result.load("r.nc")
    assert saved.values.shape == (2, 16, 2) and "identity" in saved.controls
    told = json.loads(run("test_blocked", "--json").stdout)
    estimate = saved.mean().values
    assert torch.allclose(torch.tensor(told["values"], dtype=torch.float64), estimate.double())


def test_json_is_one_object_with_named_axes(run: Callable[..., Any], tmp_path: Path) -> None:
    rows = [row(id="a"), row(id="b", text="What is the second digit?"), row(audio="gone.wav")]
    result = run("test_blocked", "--items", table(*rows), "--json", "--seed", 7, "--skip-bad")
    told = json.loads(result.stdout)
    assert told["axes"] == ["metric", "layer"] and told["coords"]["layer"] == LAYERS
    assert np.shape(told["values"]) == (2, 2) and np.shape(told["interval"]) == (2, 2, 2)
    assert told["controls"]["identity"]["values"] == [0.0, 0.0]
    assert (told["n_kept"], told["n_dropped"]) == (2, 1)
    assert told["dropped"] == {"answered wrongly": 1}
    assert (told["method"], told["model"], told["seed"]) == ("test_blocked", "embedded", 7)
    assert told["items"] == "items.jsonl" and told["report"] == ["What is blocked is not heard."]
    assert len(told["skipped"]) == 1 and "items.jsonl line 3" in told["skipped"][0]
    assert "line 3" in result.stderr and told["written"] == {}


def test_several_results_go_by_name(run: Callable[..., Any]) -> None:
    result = run("test_several", "--json", "--save", "r.nc")
    told = json.loads(result.stdout)
    assert told["values"]["share"] is None  # it is not known
    assert np.shape(told["values"]["residence"]) == (2, 2, 3)
    assert told["axes"] == {"share": [], "residence": ["stream", "group", "layer"]}
    assert told["n_kept"] == 16 and told["dropped"] == {"share": {}, "residence": {}}
    places = {f"netcdf of {name}": f"r.{name}.nc" for name in ("share", "residence")}
    assert told["written"] == places
    assert Result.load("r.residence.nc").axes == ("stream", "group", "layer")
    shown = run("test_several").stdout
    assert "stream text, group last, layer 2" in shown and "share" in shown


def test_numbers_are_not_cut_in_narrow_terminals(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared.out, "_width", 30)
    assert "stream text, group last, layer 2   11 [11, 11]" in run("test_several").stdout


def test_many_cells_are_cut_to_the_strongest(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("audio_lens.cli.analyse.SHOWN", 2)
    shown = run("test_several").stdout
    assert "the strongest 2 of 12 cells" in shown
    assert "group last, layer 2" in shown and "group own, layer 0" not in shown


def test_the_table_of_the_docs_is_one(run: Callable[..., Any]) -> None:
    page = Path(__file__).parents[1] / "docs" / "analyse.md"
    Path("conflict.jsonl").write_text(page.read_text().split("```json\n")[1].partition("```")[0])
    Path("clips").symlink_to(CLIPS)
    result = run("test_blocked", "--items", "conflict.jsonl")
    assert result.exit_code == 0 and "2 items of conflict.jsonl" in result.stdout, result.output


def test_methods_are_listed_without_importing_torch() -> None:
    code = "from audio_lens.cli import app; app(['analyse', '--json'], standalone_mode=False)"
    code += "\nimport sys; assert 'torch' not in sys.modules"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert set(json.loads(ran.stdout)["methods"]) == set(methods.listed())


def test_methods_are_found_in_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "planted_package"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "inner" / "__init__.py").write_text("")
    source = (
        'raise ImportError\n@analysis("{0}")\ndef f(model, items):\n    """Is it {0}?\n\n    So."""'
    )
    (package / "b.py").write_text(source.format("two") + "\n@method('b.f')\ndef g(): ...\n")
    (package / "inner" / "a.py").write_text(source.format("one"))
    (package / "c.py").write_text('@items.analysis("three")\ndef h(model, items): ...\n')
    monkeypatch.syspath_prepend(tmp_path)
    known = methods.listed("planted_package")
    assert list(known) == ["one", "three", "two"]
    assert known["one"].summary == "Is it one?" and known["three"].summary == ""
    assert known["one"].module == "planted_package.inner.a"


def test_all_listed_methods_can_be_had() -> None:
    for name, one in methods.listed().items():
        assert methods.get(name).summary == one.summary != ""
    names = [name for name, _ in complete.methods("")]
    assert names == sorted(methods.listed())


# -------------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["test_blokked"], "there is no method 'test_blokked'; nearest names: test_blocked"),
        (["test_blocked", "--items", "none.jsonl"], "there is no file none.jsonl"),
        (["test_blocked", "--items", "."], "is a folder: name the table in it"),
        (["test_blocked", "--save", "/proc/nowhere/r.nc"], "nowhere"),
        (["test_blocked", "--out", "."], "is a folder"),
        (["test_blocked", "--out", "x", "--save", "x"], "are one file"),
        (["--out", "x.html"], "--out is of a method: name one"),
    ],
)
def test_options_are_refused_before_a_model_is_loaded(
    arguments: list, told: str, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "load", None)
    refused(run(*arguments), told)


@pytest.mark.parametrize(
    "rows, told",
    [
        ([], ["items.jsonl holds no rows"]),
        ([row(), row(audio="gone.wav")], ["items.jsonl line 2: no audio file at gone.wav"]),
        ([row(), row(other_audio="gone.wav")], ["line 2: no audio file at gone.wav"]),
        ([row(), row(audio="empty.wav")], ["line 2: empty.wav holds no samples"]),
        ([row(id="a"), row(id="a")], ["line 2: items.jsonl line 1 is called 'a' too"]),
        ([row(), row(words="gone.TextGrid")], ["line 2: no TextGrid at gone.TextGrid"]),
        (
            [row(), row(words=[{"label": "two", "start_s": 8, "end_s": 9}])],
            ["line 2: the word 'two' lies at 8.00 to 9.00 s, and the clip lasts"],
        ),
        ([row(), row(options=["one", "nine"])], ["line 2: an item: answer 'two' is none of"]),
        ([row(), row(anwser="two")], ["line 2: no column is called 'anwser'", "answer"]),
        ([row()], ["2 items or more", "this is 1: item '0' (items.jsonl line 1)"]),
    ],
)
def test_tables_are_refused_before_a_model_is_loaded(
    rows: list, told: list, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "load", None)
    soundfile.write("empty.wav", np.zeros(0), RATE)
    refused(run("test_blocked", "--items", table(*rows)), *told)


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"audio": "nan.wav"}, ["item 'b' (items.jsonl line 2) cannot be prepared", "NaN"]),
        ({"other_audio": "nan.wav"}, ["(items.jsonl line 2)", "nan.wav holds NaN"]),
        ({"audio": "long.wav"}, ["(items.jsonl line 2)", "long.wav", "4 s"]),
        ({"answer": "two nine"}, ["item 'b' (items.jsonl line 2), answer", "two nine"]),
        ({"against": "ten"}, ["item 'b' (items.jsonl line 2), against", "ten"]),
        ({"answer": None}, ["item 'b' (items.jsonl line 2) has no answer"]),
        ({"text": None}, ["item 'b' (items.jsonl line 2) cannot be prepared"]),
    ],
)
def test_what_the_model_cannot_take_is_refused_before_it_runs(
    changes: dict,
    told: list,
    run: Callable[..., Any],
    embedded: HookedAudioTransformer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(embedded, "forward", None)
    soundfile.write("nan.wav", np.full(RATE, np.nan), RATE, subtype="FLOAT")
    soundfile.write("long.wav", np.full(6 * RATE, 0.1), RATE)
    refused(run("test_blocked", "--items", table(row(), row(id="b", **changes))), *told)


@pytest.mark.parametrize(
    "name, content, told",
    [
        ("items.jsonl", b'{"audio": "clip.wav"}\nno\n', "items.jsonl line 2 is no JSON"),
        ("items.csv", "audio\ncaf\xe9.wav\n".encode("latin-1"), "is no text in UTF-8"),
        ("items.json", b"[]", "is no table: .jsonl, .csv, .parquet are"),
        ("items.parquet", b"PAR1", "cannot be read as parquet"),
    ],
)
def test_files_that_are_no_tables_are_refused(
    name: str, content: bytes, told: str, run: Callable[..., Any]
) -> None:
    Path(name).write_bytes(content)
    refused(run("test_blocked", "--items", name), told)


def test_a_model_without_questions_needs_a_table(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whisper = HookedAudioTransformer.from_hf(FAMILIES["whisper"].build())
    monkeypatch.setattr(shared, "load", lambda *_: whisper)
    refused(run("test_blocked", "--model", "tiny"), "tiny takes no questions", "--items")


def test_outputs_overwrite_nothing_that_is_read(run: Callable[..., Any]) -> None:
    path = table(row(), row(id="b"))
    refused(run("test_blocked", "--items", path, "--save", path), "would overwrite")
    refused(run("test_blocked", "--items", path, "--out", "clip.wav"), "would overwrite")
    path = table(row(), row(id="b", audio="clip.share.nc"))
    shutil.copy("clip.wav", "clip.share.nc")
    done = run("test_several", "--items", path, "--save", "clip.nc")
    refused(done, "clip.share.nc")
    assert Result.load("clip.residence.nc").n_kept == 2  # the other one is written
