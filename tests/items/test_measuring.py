"""The metrics of items under edits, measured batch by batch."""

import pytest
import speech
import torch

from audio_lens import Edit, Items, edits, intervene, metrics
from audio_lens.inputs import InputError
from audio_lens.items import measured

KNOCKED = Edit("decoder.attn.attn_scores", edits.Block("audio"), layer=3, where="last")


@pytest.fixture(scope="module")
def items() -> Items:
    one, two, three = speech.spoken_items(3, seed=1)
    return Items([one, two.replaced(text="What is the second digit?"), three])


def test_the_values_are_those_of_every_item_by_itself(embedded, items):
    both = measured(embedded, items, lambda batch: [(batch.inputs, []), (batch.inputs, [KNOCKED])])
    assert both.metrics == ["log_prob", "logit_diff"] and both.values.shape == (3, 2, 2)
    for row, item in enumerate(items):
        inputs = embedded.prepare([item.clip], [item.text])
        with intervene(embedded, KNOCKED):
            logits = embedded(inputs)
        told = metrics.logit_diff(item.answer, item.against).bind(embedded, inputs)
        assert both.values[row, 1].tolist() == pytest.approx(
            [told(embedded(inputs)).item(), told(logits).item()], abs=1e-4
        )


def test_pairs_run_on_the_side_that_cells_name(embedded, items):
    pairs = items.pairs()
    swapped = measured(embedded, pairs, lambda batch: [(batch.pair.corrupted, [])])
    clean = measured(embedded, items, lambda batch: [(batch.inputs, [])])
    assert (swapped.values[:, 1] < clean.values[:, 1] - 1).all()


def test_metrics_of_a_word_for_each_item_are_read_by_row(embedded, items):
    words = [str(item.answer) for item in items]
    named = {"of each": metrics.log_prob(words), "of one": metrics.log_prob("nine")}
    values = measured(embedded, items, lambda batch: [(batch.inputs, [])], named).values
    own = measured(embedded, items, lambda batch: [(batch.inputs, [])]).values
    assert torch.equal(values[:, 0], own[:, 0]) and not torch.equal(values[:, 1], own[:, 0])


def test_words_for_another_number_of_items_are_named(embedded, items):
    with pytest.raises(InputError, match="3 rows need as many answers, got 2"):
        measured(embedded, items, lambda b: [(b.inputs, [])], metrics.log_prob(["one", "two"]))


def test_a_metric_of_all_rows_at_once_is_refused(embedded, items):
    with pytest.raises(InputError, match="one value for each"):
        measured(embedded, items, lambda b: [(b.inputs, [])], {"mean": lambda x: x.mean()})
