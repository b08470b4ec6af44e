"""Scores of edges, and circuits: planted paths, convergence, files, real speech."""

from __future__ import annotations

import pytest
import torch

import tiny
from analysis.toy_items import hearing, item_of
from audio_lens import HookedAudioTransformer, Items, metrics
from audio_lens.analysis import paths
from audio_lens.analysis.paths.circuits import circuit_of
from audio_lens.errors import InputError
from audio_lens.timeline import Span
from items.speech import spoken_items
from toys import Cue, gate_toy, two_path_toy

THROUGH = 0.5
PLANTED = {
    ("audio", "L0G0.k"),
    ("audio", "L0G0.v"),
    ("text", "L0H0.q"),
    ("text", "L1H1.q"),
    ("text", "L1G1.k"),
    ("L0H0", "L1G1.v"),
    ("L0H0", "logits"),
    ("L1H1", "logits"),
}


@pytest.fixture(scope="module")
def toy():
    return hearing(two_path_toy(THROUGH))


@pytest.fixture(scope="module")
def cues():
    clean = Items(item_of(Cue(heard), id=str(heard)) for heard in (1, 2, 3))
    said = [item.replaced(against="0") for item in clean]
    other = [item_of(Cue(0), id=str(heard)) for heard in (1, 2, 3)]
    return Items(said).pairs(other)


@pytest.fixture(scope="module")
def scores(toy, cues):
    return paths.eap(toy, cues, progress=False)


def score(result, sender: str, receiver: str) -> float:
    return result.select(metric="logit_diff", sender=sender, receiver=receiver).mean().values.item()


def test_scores_of_a_linear_toy_are_exact(scores):
    """Corrupting an edge loses what it carries: the difference falls from 1.5 to -1.5."""
    assert score(scores, "L0H0", "logits") == pytest.approx(-2.0)
    assert score(scores, "L0H0", "L1G1.v") == pytest.approx(-2.0 * THROUGH)
    assert score(scores, "L1H1", "logits") == pytest.approx(-2.0 * THROUGH)
    assert score(scores, "audio", "L0G0.v") == pytest.approx(-2.0 * (1 + THROUGH))
    assert score(scores, "audio", "logits") == 0
    backwards = scores.select(sender="L1H1", receiver="L0H0.q").values
    assert backwards.isnan().all()
    explained = scores.controls["input_edges"].of_metric("logit_diff").mean().values
    assert explained.item() == pytest.approx(1)


def test_more_steps_leave_less_of_the_gap():
    """The way from one side to the other crosses the kink of an "or" of what is heard and read."""
    toy = hearing(gate_toy("and"))
    clean = Items([item_of(Cue(1, read=1), answer="0", against="3", id="1")])
    pairs = clean.pairs([item_of(Cue(2, read=1), id="1")])
    read = {"joined": metrics.logit_diff(0, 3)}
    left = []
    for steps in (2, 8, 32):
        found = paths.eap_ig(toy, pairs, steps=steps, metric=read)
        left.append(abs(1 - found.controls["input_edges"].estimate.item()))
    assert left[0] >= left[1] >= left[2]
    assert left[2] < 0.1


def test_a_circuit_of_the_planted_edges_carries_all(toy, cues, scores):
    graph = paths.Graph.of(toy)
    planted = circuit_of(graph, graph.mask(sorted(PLANTED)))
    found = paths.faithfulness(toy, cues, planted, progress=False)
    kept = {at: found.select(kept=at).estimate for at in found.coords["kept"]}
    torch.testing.assert_close(kept["circuit"], torch.ones(2).double(), atol=1e-8, rtol=0)
    torch.testing.assert_close(kept["all but it"], torch.zeros(2).double(), atol=1e-8, rtol=0)
    assert found.controls["identity"].estimate.tolist() == pytest.approx([1, 1])
    assert found.controls["empty"].estimate.tolist() == pytest.approx([0, 0])
    assert "8 of" in found.report[0] and "keep 1.00 of the effect" in found.report[0]
    pruned = paths.prune(toy, scores, 4)
    assert set(pruned.edges) == {
        edge for edge in PLANTED if edge[0] != "text" and "k" not in edge[1]
    }


def test_without_a_node_its_share_is_lost(toy, cues, scores):
    pruned = paths.prune(toy, scores, 4)
    found = paths.minimality(toy, cues, pruned, progress=False).select(metric="logit_diff")
    lost = dict(zip(found.coords["node"], found.estimate.tolist(), strict=True))
    assert lost == pytest.approx({"audio": 1, "L0H0": 1, "L1H1": THROUGH / (1 + THROUGH)})
    by_edge = paths.minimality(toy, cues, pruned, units="edges", progress=False)
    direct = by_edge.select(metric="logit_diff", edge="L0H0 -> logits").estimate
    assert direct.item() == pytest.approx(1 / (1 + THROUGH))


def test_edges_on_no_way_to_the_logits_are_left_out(toy):
    graph = paths.Graph.of(toy)
    dead = [("audio", "L2.mlp"), ("L1H0", "logits"), ("L0H0", "L2H1.q")]
    kept = graph.connected(graph.mask([*sorted(PLANTED), *dead]))
    assert {("audio", "L2.mlp"), ("L1H0", "logits")}.isdisjoint(graph.edges(kept))
    assert set(graph.edges(kept)) == PLANTED


def test_windows_of_the_clip_are_nodes_with_seconds(toy, cues, tmp_path):
    windows = [Span(0.2, 0.3), Span(0.0, 0.1)]
    found = paths.eap(toy, cues, windows=windows)
    assert score(found, "audio 0.20-0.30 s", "L0G0.v") == pytest.approx(-3)
    assert score(found, "audio", "L0G0.v") == score(found, "audio 0.00-0.10 s", "L0G0.v") == 0
    circuit = paths.prune(toy, found, 4, windows=windows)
    assert circuit.seconds == {"audio 0.20-0.30 s": (0.2, 0.3)}
    again = paths.Circuit.load(circuit.save(tmp_path / "circuit.json"))
    assert again == circuit
    kept = paths.faithfulness(toy, cues, again).select(kept="circuit", metric="logit_diff")
    assert kept.estimate.item() == pytest.approx(1)
    figure = again.plot()
    assert len(figure.data) == len(circuit) + 1
    names, spans = figure.data[-1].text, figure.data[-1].meta["spans"]
    assert spans[names.index("audio 0.20-0.30 s")] == [0.2, 0.3]


def test_what_is_no_circuit_is_named(toy, cues, scores, embedded, tmp_path):
    circuit = paths.prune(toy, scores, 4)
    with pytest.raises(InputError, match=f"with {circuit.n_all} edges"):
        paths.faithfulness(embedded, cues, circuit)
    with pytest.raises(InputError, match="no control 'x'"):
        paths.faithfulness(toy, cues, circuit, controls=["x"])
    with pytest.raises(InputError, match="units is"):
        paths.minimality(toy, cues, circuit, units="layers")
    with pytest.raises(InputError, match="no edge audio -> nowhere"):
        paths.Graph.of(toy).mask([("audio", "nowhere")])
    with pytest.raises(InputError, match="runs backwards: L2H0"):
        paths.Graph.of(toy).mask([("L2H0", "L0H0.q")])
    with pytest.raises(InputError, match="take more"):
        paths.prune(toy, scores, 1)
    with pytest.raises(InputError, match="other windows"):
        paths.prune(toy, scores, 4, windows=[Span(0.0, 0.1)])
    with pytest.raises(InputError, match="no saved circuit"):
        paths.Circuit.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(InputError, match="does not hold a saved circuit"):
        paths.Circuit.load(tmp_path / "bad.json")
    with pytest.raises(InputError, match="one value per prompt"):
        paths.eap(toy, cues, metric=lambda logits: logits.mean())
    whisper = HookedAudioTransformer.from_hf(tiny.tiny_hf("whisper"))
    with pytest.raises(InputError, match="hears by cross-attention: use path"):
        paths.Graph.of(whisper)


@pytest.mark.slow
def test_a_quarter_of_the_edges_carries_which_digit_is_second(embedded):
    """Found on one speaker, held against another; as many edges at random carry little."""
    found_on, held_out = spoken_items(24).pairs().split(share=0.5)
    scores = paths.eap_ig(embedded, found_on, progress=False)
    circuit = paths.prune(embedded, scores, int(0.25 * paths.Graph.of(embedded).exists.sum()))
    assert circuit.share <= 0.25
    told = paths.faithfulness(embedded, held_out, circuit, progress=False).of_metric("logit_diff")
    assert told.select(kept="circuit").mean().values >= 0.8
    assert told.select(kept="all but it").mean().values.abs() <= 0.1
    assert told.controls["random_sites"].mean().values < 0.3
    assert told.controls["identity"].mean().values == pytest.approx(1, abs=1e-3)
    assert told.controls["empty"].mean().values == pytest.approx(0, abs=1e-3)
    few = held_out[list(range(4))]
    lost = paths.minimality(embedded, few, circuit, progress=False).of_metric("logit_diff")
    assert lost.select(node="audio").mean().values == pytest.approx(1, abs=0.05)
    assert lost.coords["node"] == circuit.nodes
