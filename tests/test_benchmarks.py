"""The benchmarks run, and what they count is right."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
import typer
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner, Result

from benchmarks import (
    attribution,
    before_after,
    collecting,
    edits,
    grounding,
    growth,
    several,
    speaking,
    studies,
)
from benchmarks import patching as command
from benchmarks import patching_measure as measuring
from benchmarks.peers import METHODS, backward, limits, roofline
from benchmarks.peers.hooks_loop import HooksLoop
from benchmarks.peers.tasks import LLMS, ROWS, WHISPERS, Cell, Task, make_task, twin

PEERS = ("transformer_lens", "nnsight", "pyvene")


@pytest.fixture(autouse=True)
def small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's speed does not matter here."""
    monkeypatch.setattr(measuring, "PROBE_WIDTH", 32)


def micro_task(name: str) -> Task:
    shapes = WHISPERS if ROWS[name].kind == "whisper" else LLMS
    return make_task(name, shapes["micro"], "micro", windows=3)


def run(tmp_path: Path, *options: str) -> tuple[Result, dict]:
    """The command on micro models: its outcome and the figures it wrote."""
    app = typer.Typer()
    app.command()(command.main)
    found = tmp_path / "found.json"
    fixed = "--whisper micro --llm micro --windows 3 --repeats 1 --sample 2 --no-memory --json"
    result = CliRunner().invoke(app, [*fixed.split(), str(found), *options])
    return result, json.loads(found.read_text()) if found.exists() else {}


@pytest.mark.slow
def test_all_that_is_installed_agrees(tmp_path: Path) -> None:
    result, figures = run(tmp_path)
    assert result.exit_code == 0, result.output
    assert [row["name"] for row in figures["rows"]] == list(ROWS)
    for row in figures["rows"]:
        task = micro_task(row["name"])
        assert list(row["outcomes"]) == list(METHODS)
        for name, outcome in row["outcomes"].items():
            assert outcome["absent"] == METHODS[name].absence(task)
            assert outcome["absent"] or outcome["error"] < 1e-4
        assert row["outcomes"]["audio_lens"]["cells_run"] == row["n_cells"] == len(task.cells)
        assert row["outcomes"]["expert"]["absent"] is None


@pytest.mark.mostly_slow(3)
@pytest.mark.parametrize("name", PEERS)
def test_peers_that_are_not_installed_are_listed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(METHODS[name], "package", "no_such_package")
    result, figures = run(tmp_path, "--rows", "lm-resid", "--methods", name)
    assert result.exit_code == 0
    assert "not installed" in result.output
    assert figures["rows"][0]["outcomes"][name]["absent"] == "not installed"


def test_wrong_answers_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = HooksLoop.patch
    monkeypatch.setattr(HooksLoop, "patch", lambda self, cells: [x + 1 for x in right(self, cells)])
    result, _ = run(tmp_path, "--rows", "cross-heads", "--methods", "loop,expert")
    assert result.exit_code == 1
    assert "disagree with audio_lens: loop" in result.output


@pytest.mark.parametrize("options", [["--rows", "x"], ["--llm", "x"]])
def test_unknown_options_are_refused(tmp_path: Path, options: list[str]) -> None:
    result, figures = run(tmp_path, *options)
    assert result.exit_code == 2
    assert not figures


@pytest.mark.slow
@pytest.mark.parametrize("suffix", growth.SUFFIXES)
def test_growth_is_drawn(suffix: str, tmp_path: Path) -> None:
    if suffix != ".html":
        pytest.importorskip("matplotlib")
    app = typer.Typer()
    app.command()(growth.main)
    picture, found = tmp_path / f"growth{suffix}", tmp_path / "growth.json"
    options = f"--llm micro --rounds 1 --sample 1 --out {picture} --json {found}"
    result = CliRunner().invoke(app, options.split())
    assert result.exit_code == 0, result.output
    assert picture.stat().st_size > 1000
    figures = json.loads(found.read_text())
    assert list(figures) == ["layers", "audio positions", "heads", "stimuli"]
    for sizes in figures.values():
        assert len(sizes) in (3, 4)
        assert all(seconds > 0 for lines in sizes.values() for seconds in lines.values())


def test_a_picture_of_growth_has_a_known_kind() -> None:
    app = typer.Typer()
    app.command()(growth.main)
    assert CliRunner().invoke(app, ["--out", "x.gif"]).exit_code == 2


def test_twins_share_weights() -> None:
    model = micro_task("lm-resid").hf_model
    other = twin(model)
    assert other is not model
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert mine is theirs


def test_samples_come_from_all_over() -> None:
    task = micro_task("lm-resid")
    method = METHODS["loop"](task)
    chosen = measuring.chosen_batches(method, task.cells, 3, random.Random(0))
    assert [cell.layer for (cell,) in chosen] == [0, 1, 2]
    everything = measuring.chosen_batches(METHODS["expert"](task), task.cells, 0, random.Random(0))
    assert sorted(c.start for batch in everything for c in batch) == sorted(
        c.start for c in task.cells
    )


# -------------------------------------------------------------------------------- counting


def counted(run: object) -> int:
    """Operations that torch itself counts."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_whole_blocks_count_as_torch_does() -> None:
    task = micro_task("encoder-resid")
    task.hf_model.set_attn_implementation("eager")
    cfg, hf_block = task.model.cfg.encoder, task.hf_model.model.encoder.layers[0]
    x = torch.randn(1, cfg.n_ctx, cfg.d_model)
    mine = limits.Block(cfg).whole(cfg.n_ctx, cfg.n_ctx**2)
    assert mine == counted(lambda: hf_block(x, None))


def test_whole_gated_blocks_count_as_torch_does() -> None:
    task = micro_task("lm-resid")
    task.hf_model.set_attn_implementation("eager")
    cfg, lm = task.model.cfg.decoder, task.hf_model.model.language_model
    x = torch.randn(1, 9, cfg.d_model)
    angles = lm.rotary_emb(x, torch.arange(9)[None])
    run = lambda: lm.layers[0](x, position_embeddings=angles)  # noqa: E731
    assert limits.Block(cfg).whole(9, 81) == counted(run)


def test_nothing_needs_more_than_its_full_run() -> None:
    for name in ROWS:
        task = micro_task(name)
        full = counted(lambda task=task: task.hf_model(**task.whole_call(task.corrupted)))
        assert all(0 <= limits.least_work(task, cell) < full for cell in task.cells)


def test_later_cells_need_less() -> None:
    cfg = micro_task("lm-resid").model.cfg.decoder
    work = [[limits.causal_resid(cfg, Cell(l, None, t, t + 1), 20) for t in (5, 9)] for l in (0, 1)]
    assert work[0][0] > work[0][1] > work[1][1]
    assert work[0][0] > work[1][0] > work[1][1]


def test_pairs_of_a_causal_mask() -> None:
    assert limits.causal_pairs(4) == 10
    assert limits.causal_pairs(4, first=2) == 3 + 4


def test_the_roofline_counts_what_it_measures_apart() -> None:
    task = micro_task("lm-resid")
    cfg, n = task.model.cfg.decoder, task.clean["input_ids"].shape[1]
    cell = task.cells[0]
    last = cfg.n_layers - 1
    per_block = limits.causal_pairs(n, cell.start)
    pairs = limits.least_work(task, cell, roofline._only_pairs)
    assert pairs == limits.Block(cfg).pairs(last * per_block + n)
    rows = limits.least_work(task, cell, roofline._only_mlp) / limits.Block(cfg).mlp(1)
    assert rows == pytest.approx(last * (n - cell.start) + 1, rel=0.01)


def known_roofline() -> roofline.Roofline:
    speeds = {"slowness": 1.5, "slowness_of_runs": 1.25, "attention_rate": 2.0, "row_s": 0.5}
    return roofline.Roofline(8.0, 4.0, 2.0, together=16, **speeds)


def test_cells_of_few_rows_are_held_against_products_of_as_many() -> None:
    task = micro_task("cross-cells")
    cfg, n = task.model.cfg.decoder, task.clean["decoder_input_ids"].shape[1]
    # each head's cell runs the MLPs from its own block on; the last answers for the last token
    rows = cfg.n_heads * sum((cfg.n_layers - 1 - layer) * n + 1 for layer in range(cfg.n_layers))
    found = roofline.Roofline.of(task, lambda run: 1e-3)
    assert found.together == pytest.approx(rows / cfg.n_layers, abs=1)
    assert roofline.Roofline.of(micro_task("lm-resid"), lambda run: 1e-3).together > found.together


def test_two_runs_stand_side_by_side(tmp_path: Path) -> None:
    result, figures = run(tmp_path, "--rows", "lm-resid", "--methods", "expert")
    assert "limit 1.10 of the roofline" in " ".join(result.output.split())
    app = typer.Typer()
    app.command()(before_after.main)
    found = str(tmp_path / "found.json")
    printed = CliRunner().invoke(app, ["--before", found, "--after", found]).output
    assert "peak MiB" not in printed  # which nobody measured
    assert f"| lm-resid, micro ({figures['rows'][0]['n_cells']}) |" in printed


def test_the_roofline_adds_up() -> None:
    found = known_roofline()
    assert found.seconds(matmul_rate=4.0) == 3 + 2 + 1
    assert found.rate(matmul_rate=6.0) == 4.0
    measured = roofline.Roofline.of(micro_task("encoder-heads"), lambda run: 1e-3)
    assert measured.seconds(1e9) > 0


def test_a_sweep_takes_no_less_than_its_unpatched_runs() -> None:
    task = micro_task("cross-heads")
    found = known_roofline()
    runs = backward.unpatched_runs(task)
    assert found.runs_seconds(task, 4.0) == 1.25 * runs.products / 4 + runs.pairs / 2
    assert 0 < runs.forward < 2 * backward.plain_forward(task).forward  # only what is read


@pytest.mark.parametrize("name", ["encoder-resid", "cross-heads", "lm-resid"])
def test_a_plain_forward_counts_as_torch_does(name: str) -> None:
    task = micro_task(name)
    task.model.attn_mode = "explicit"
    cfg, n = task.model.cfg.decoder, backward._n_tokens(task)
    # torch counts what a causal mask hides, too
    hidden = cfg.n_layers * limits.Block(cfg).pairs(n**2 - limits.causal_pairs(n))
    counts = counted(lambda: task.model(task.corrupted))
    assert backward.plain_forward(task).forward + hidden == counts


def test_attribution_needs_two_forwards_and_what_lies_behind_the_site() -> None:
    least = {name: backward.least_forwards(micro_task(name)) for name in attribution.SINGLE}
    assert all(1.9 < n < 4.5 for n in least.values())
    assert least["encoder-resid"] > least["encoder-heads"] > least["cross-heads"]
    assert least["lm-resid"] > least["lm-heads"]


def test_several_stimuli_are_those_of_single_sweeps() -> None:
    task = micro_task("cross-cells")
    batch = several.stacked(task, 3)
    assert several.single(batch, 0).clean["input_features"].equal(task.clean["input_features"])
    together, alone, off = several.compared(task, 3, rounds=1)
    assert together > 0 and alone > 0 and off < several.RELATIVE


def test_last_heads_reach_nothing() -> None:
    task = micro_task("lm-heads")
    last = [cell for cell in task.cells if cell.layer == task.layers[-1]]
    assert all(limits.least_work(task, cell) == 0 for cell in last)
    loop = METHODS["loop"](task)
    loop.prepare()
    base = task.difference(task.hf_model(**loop.call).logits)
    assert loop.patch(last[:1]) == [base]


def test_sweeps_of_a_model_that_speaks_agree_with_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 32}
    monkeypatch.setattr(speaking, "SHAPE", speaking.SHAPE | few | {"vocab_size": 50})
    monkeypatch.setattr(speaking, "DEPTH", speaking.DEPTH | few)
    app = typer.Typer()
    app.command()(speaking.main)
    result = CliRunner().invoke(app, ["--steps", "5", "--sample", "3"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert all(row.site in result.output for row in speaking.ROWS)
    monkeypatch.setattr(speaking, "RELATIVE", -1.0)
    assert CliRunner().invoke(app, ["--steps", "5", "--sample", "1"]).exit_code == 1


@pytest.mark.slow
def test_quick_runs_all_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 32}
    monkeypatch.setattr(speaking, "SHAPE", speaking.SHAPE | few | {"vocab_size": 50})
    monkeypatch.setattr(speaking, "DEPTH", speaking.DEPTH | few)
    result, figures = run(tmp_path, "--quick", "--rows=cross-cells", "--methods=expert")
    assert result.exit_code == 0, result.output
    assert [row["size"] for row in figures["rows"]] == ["micro"]
    for title in ("4 stimuli", "attribution, in forwards", "knock-out of", "Moshi of width"):
        assert title in result.output


def test_collecting_is_measured_beside_forwards(tmp_path: Path) -> None:
    assert [item.id for item in collecting.clips(5)] == ["0", "1", "2", "3", "4"]
    forwards, kept = (collecting.measured(mode, 5, 4, None) for mode in ("forwards", "collect"))
    assert 0 < kept["cpu_s"] < 20 * forwards["cpu_s"] and kept["risen_mb"] >= 0


def test_curves_of_edits_agree(embedded):
    inputs = edits.made(embedded, 2)
    whole, *others = (way(embedded, inputs) for way in edits.WAYS.values())
    assert whole.abs().max() > 1e-3
    for curve in others:
        torch.testing.assert_close(curve, whole, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_a_small_study_of_conflict_items_stays_in_its_time(data_dir):
    app = typer.Typer()
    app.command()(grounding.main)
    result = CliRunner().invoke(app, ["--items", "3"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "share: The audio makes 0." in result.output and "3 items:" in result.output


@pytest.mark.slow
def test_studies_have_the_same_bits() -> None:
    ray = pytest.importorskip("ray")
    app = typer.Typer()
    app.command()(studies.main)
    try:
        done = CliRunner().invoke(app, ["--items", "4", "--unit", "2"])
    finally:
        ray.shutdown()
    assert done.exit_code == 0, done.output
    assert done.output.count("bit for bit the same") == 2
