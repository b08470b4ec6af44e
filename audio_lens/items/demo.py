"""Items to try methods on: the shipped clips, each with a transcript that contradicts it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from audio_lens.items.item import Item
from audio_lens.items.items import Items
from audio_lens.models.embedded import ShippedPair, clip_pairs
from audio_lens.timeline import Span

PLACES = ("first", "second", "third")
QUESTIONS = ("Which digit is {place}?", "What is the {place} digit?")


def demo_items(*, transcripts: bool = True) -> Items:
    """Sixteen conflict items: what is said in a clip, and a transcript of it that is wrong.

    Each is one of the embedded model's eight clips with one of two questions about the digit in
    which it differs from its counterpart. ``answer`` is what the clip says, ``against`` what the
    transcript in front of the question says. Both counterparts move one stream alone:
    ``other_audio`` says what the transcript does, ``other_text`` has the right transcript. No text
    says which of the two to trust. The group is the voice.

    Args:
        transcripts: False leaves them out: the questions alone, whose answers only the clips tell.
    """
    items = [item for pair in clip_pairs() for item in _items_of(pair)]
    return Items(items if transcripts else map(_bare, items))


def _bare(item: Item) -> Item:
    """The item without its transcript."""
    return item.replaced(text=str(item.text).rpartition(". ")[2], other_text=None)


def _items_of(pair: ShippedPair) -> Iterator[Item]:
    """Both clips with both questions."""
    turned = replace(
        pair,
        clean=pair.corrupted,
        corrupted=pair.clean,
        words=pair.corrupted_words,
        corrupted_words=pair.words,
    )
    for side in (pair, turned):
        index = side.words.index(side.swapped)
        for number, question in enumerate(QUESTIONS):
            asked = question.format(place=PLACES[index])
            yield Item(
                side.clean,
                _told(side.corrupted_words, asked),
                answer=side.swapped.label,
                against=side.corrupted_words[index].label,
                labels={"asked": PLACES[index], "digits": len(side.words)},
                words=side.words,
                group=side.voice,
                id=f"{side.clean.stem}-{number}",
                other_audio=side.corrupted,
                other_text=_told(side.words, asked),
            )


def _told(transcript: tuple[Span, ...], question: str) -> str:
    """A transcript and a question, as the embedded model was trained on them."""
    return f"The transcript says: {' '.join(str(word.label) for word in transcript)}. {question}"
