"""Results of many items: estimates with intervals, told where they come from, and run again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from audio_lens import HookedAudioTransformer, Item, ItemError, Items, Result
from audio_lens.items import METHODS, MethodError, Pairs, found, method, rerun, statistics
from audio_lens.models.embedded import clip_pairs
from audio_lens.timeline import Span


@pytest.fixture(scope="module")
def items() -> Items:
    return Items(
        Item(p.clean, p.question, p.answer, p.against, group=p.answer, other_audio=p.corrupted)
        for p in clip_pairs()
    )


@method("test_answers")
@torch.no_grad()
def answers(model, items, *, where="last", scale=1.0, window=None, fn=None) -> Result:
    """How likely the answers are."""
    clean = items.clean if isinstance(items, Pairs) else items
    values = torch.zeros(len(clean), 2)
    for batch in clean.batches(model):
        logits = model(batch.inputs)
        for name, column in (("log_prob", 0), ("logit_diff", 1)):
            metric = clean[batch.rows].metrics(model)[name]
            values[batch.rows, column] = scale * metric.bind(model, batch.inputs)(logits).float()
    return found(values, {"metric": ["log_prob", "logit_diff"]}, clean, by="group")


# -------------------------------------------------------------------------------- found


def test_values_of_items_become_a_result(items: Items) -> None:
    values = torch.arange(24.0).reshape(4, 2, 3)
    axes = {"metric": ["a", "b"], "layer": [0, 2, 4]}
    result = found(values, axes, items, dropped={"wrong": 2}, report=["note"], seed=3)
    assert result.dims == ("metric", "stimulus", "layer") and result.axes == ("layer",)
    assert result.values[1, 2].tolist() == values[2, 1].tolist()
    direct = statistics.bootstrap(values, seed=3)
    assert torch.equal(result.estimate, direct.value) and torch.equal(result.low, direct.low)
    assert (result.n_kept, result.n_dropped, result.report) == (4, 2, ["note"])
    told = {"interval": "95%, by 2000 draws of 4 items", "seed": "3", "together": "mean"}
    assert result.meta == told
    assert result.coords["stimulus"] == ["0", "1", "2", "3"]
    assert [cell.value for cell in result.cells("a")] == values.mean(0)[0].tolist()


def test_a_ratio_of_items_is_one_of_means(items: Items) -> None:
    over = torch.tensor([[1.0, 0.0], [2.0, 1.0], [3.0, 0.0], [2.0, 3.0]])
    gaps = torch.tensor([2.0, 2.0, 4.0, 8.0])
    result = found(over, {"layer": [0, 1]}, items, denominators=gaps)
    assert result.estimate.tolist() == [0.5, 0.25]
    assert result.values[3].tolist() == [0.25, 0.375]
    assert [cell.value for cell in result.cells()] == [0.5, 0.25]


def test_speakers_are_drawn_in_place_of_items(items: Items) -> None:
    halves = Items(x.replaced(group="ab"[i // 2]) for i, x in enumerate(items))
    result = found(torch.tensor([0.0, 0.0, 1.0, 1.0]), {}, halves, by="group")
    assert (result.low, result.high) == (0.0, 1.0) and "2 of group" in result.meta["interval"]
    with pytest.raises(ItemError, match="item '1' has no group to draw by"):
        found(torch.zeros(2), {}, [items[0], items[1].replaced(group=None)], by="group")
    with pytest.raises(ItemError, match="values of 3 items for 4"):
        found(torch.zeros(3), {}, items)
    with pytest.raises(ValueError, match="metric is the first"):
        found(torch.zeros(4, 1, 1), {"layer": [0], "metric": ["a"]}, items)


# -------------------------------------------------------------------------------- run again


def test_methods_tell_where_their_results_come_from(
    items: Items, embedded: HookedAudioTransformer
) -> None:
    result = answers(embedded, items, scale=2.0)
    assert METHODS["test_answers"].summary == "How likely the answers are."
    assert result.meta["model"] == "embedded" and result.meta["method"] == "test_answers"
    assert result.meta["items_hash"] == items.digest() and result.meta["interval"]
    assert {"weights_hash", "dtype", "torch", "date", "seed"} <= result.meta.keys()
    assert result.recipe["arguments"]["scale"] == 2.0
    assert result.recipe["items"][0]["audio"] == str(items[0].audio)
    json.dumps(result.recipe)


def test_a_result_is_made_again_from_its_file(
    items: Items, embedded: HookedAudioTransformer, tmp_path: Path
) -> None:
    result = answers(embedded, items, scale=2.0, window=Span(0, 2))
    path = result.save(tmp_path / "answers.nc")
    again = rerun(path)
    assert torch.equal(again.values, result.values) and torch.equal(again.low, result.low)
    assert again.recipe == result.recipe
    assert torch.equal(rerun(Result.load(path), embedded, items).values, result.values)
    pairs = answers(embedded, items.pairs(stream="audio")).save(tmp_path / "pairs.nc")
    assert torch.equal(rerun(pairs, embedded).values * 2, result.values)


def test_what_cannot_be_made_again_says_why(
    items: Items, embedded: HookedAudioTransformer, tmp_path: Path
) -> None:
    result = answers(embedded, items)
    with pytest.raises(MethodError, match="recorded no method"):
        rerun(Result(torch.zeros(1), ("layer",), {"layer": [0]}))
    with pytest.raises(MethodError, match="no file holds its fn"):
        rerun(answers(embedded, items, fn=len), embedded)
    with pytest.raises(MethodError, match="the items are not what they were"):
        rerun(result, embedded, items[::-1])
    with pytest.raises(MethodError, match="has other weights"):
        rerun(result, HookedAudioTransformer.from_pretrained("embedded", dtype=torch.float64))
    result.recipe["method"] = "gone"
    with pytest.raises(MethodError, match="there is no method 'gone': import"):
        rerun(result, embedded)
    samples = items[0].replaced(audio=torch.zeros(16_000).numpy() + 0.01, sampling_rate=16_000)
    in_memory = answers(embedded, Items([samples]))
    with pytest.raises(MethodError, match="the clips of 1 items were in memory, such as '0'"):
        rerun(in_memory, embedded)
    assert torch.equal(rerun(in_memory, embedded, Items([samples])).values, in_memory.values)


def test_a_name_is_of_one_method() -> None:
    def other(model, items):
        """Another."""

    other.__module__ = "elsewhere"
    with pytest.raises(ValueError, match="has a method 'test_answers' already"):
        method("test_answers")(other)
