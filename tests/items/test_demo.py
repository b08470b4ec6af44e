"""The items that come with the package."""

from __future__ import annotations

import torch

from audio_lens import HookedAudioTransformer, Items
from audio_lens.items import demo_items
from audio_lens.items.pairs import answered
from audio_lens.models.embedded.training import questions


def told_alike(items: Items, stream: str) -> Items:
    """The items of which one stream is moved, so that clip and transcript agree."""
    return items.pairs(stream=stream).corrupted


def test_clip_and_transcript_contradict_each_other_in_one_digit() -> None:
    items = demo_items()
    assert len(items) == 16 and len(set(items.values("group"))) == 4
    for item in items:
        said = [word.label for word in item.words]
        wrong = [item.against if word == item.answer else word for word in said]
        asked = item.text.partition(". ")[2]
        assert item.text == questions.written(asked, wrong)
        assert item.other_text == questions.written(asked, said)
        assert said.index(item.answer) == ("first", "second", "third").index(item.labels["asked"])


def test_either_counterpart_takes_the_contradiction_away(embedded: HookedAudioTransformer) -> None:
    """The model then answers what both streams say."""
    items = demo_items().usable(embedded)
    for stream, answers in (("audio", items.values("against")), ("text", items.values("answer"))):
        alike = told_alike(items, stream)
        right = torch.zeros(len(items), dtype=torch.bool)
        for batch in alike.batches(embedded):
            said = answered(embedded, batch.inputs, [answers[row] for row in batch.rows])
            right[batch.rows] = torch.from_numpy(said)
        assert right.sum() >= 14, stream
