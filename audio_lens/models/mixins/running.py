"""Which call of a model is running, for whoever acts inside it by the names of positions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from audio_lens.inputs import AudioInputs
from audio_lens.models.layers import KVCache


@dataclass(frozen=True, eq=False)
class Step:
    """A call that is under way.

    Attributes:
        prompts: the inputs that the model was given; while it decodes step by step, those of the
            first call.
        start: how many positions of the decoder were there before this call.
        keeps: whether the call fills a key-value cache, so that others may go on from it.
        grounds: what was found out about positions of parts in this call, by part.
        given: what earlier blocks gave to later ones in this call, by the ``id`` of the edit.
    """

    prompts: AudioInputs
    start: int = 0
    keeps: bool = False
    grounds: dict[str, Any] = field(default_factory=dict, repr=False)
    given: dict[int, dict[int, Any]] = field(default_factory=dict, repr=False)

    @property
    def is_prefill(self) -> bool:
        """Whether the prompts themselves are what is read, or the end of them."""
        return self.start == 0 or self.start < self.prompts.tokens.shape[1]


class Running:
    """What a `HookedAudioTransformer` says of the call it is in; mixed into it.

    Attributes:
        step: the call; None while nothing runs.
    """

    step: Step | None = None

    @contextmanager
    def running(self, inputs: AudioInputs, past: KVCache | None = None) -> Iterator[None]:
        """Say inside a ``with`` block that these inputs run, behind what a cache holds."""
        before = self.step
        if past is not None and past.length == 0:
            past.prompts = inputs
        prompts = inputs if past is None or past.prompts is None else past.prompts
        self.step = Step(prompts, 0 if past is None else past.length, past is not None)
        try:
            yield
        finally:
            self.step = before
