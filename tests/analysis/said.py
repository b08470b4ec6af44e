"""Items of the toy with a planted subspace."""

from __future__ import annotations

import itertools

from audio_lens import Item, Items
from toys import N_CLASSES, Cue, said_by

CUE = [Cue(0).at_token]  # the position that holds the class


def said_items(speakers: range = range(N_CLASSES)) -> Items:
    """Every two classes said by every speaker; another one says the counterpart."""
    return Items(
        Item(
            said_by(speaker, heard),
            "0",
            answer=str(heard),
            against=str(other),
            labels={"class": str(heard), "speaker": str(speaker)},
            group=f"speaker {speaker}",
            id=f"{speaker}: {heard} not {other}",
            other_audio=said_by((speaker + 2) % N_CLASSES, other),
        )
        for speaker in speakers
        for heard, other in itertools.permutations(range(N_CLASSES), 2)
    )
