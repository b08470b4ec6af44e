"""Metrics of one of several streams that a model writes at once."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch

from audio_lens.arguments import text, whole
from audio_lens.errors import KindError
from audio_lens.inputs import InputError
from audio_lens.metrics.reading import Metric, Reading, named
from audio_lens.models.config import TEXT

if TYPE_CHECKING:
    from audio_lens.models.base import HookedAudioTransformer


def of_stream(stream: str, metric: Metric) -> Metric:
    """A metric of one of the streams a model writes at once (``model.cfg.streams``).

    Args:
        stream: "text", "audio.0" ...
        metric: one of this package at a single position; its words are ids of tokens in that
            stream, or words where the stream is the text. Your own function: `read_at`.

    Raises:
        TypeError: for a bare function, or a metric that names its stream already.
    """
    if not isinstance(metric, Metric) or metric.names_stream:
        raise KindError(
            "of_stream takes a metric that names no stream yet; a function of the stream's logits "
            "is one by metrics.read_at(fn)"
        )
    return _OfStream(text("stream", stream), metric)


def streams_read(metric: Any) -> frozenset[str] | None:
    """The streams that a metric, or several, are known to read alone; None for all there are."""
    wanted = named(metric).values()
    if not all(isinstance(one, _OfStream) for one in wanted):
        return None
    return frozenset(one.stream for one in wanted)


@dataclass(frozen=True)
class _OfStream(Metric):
    stream: str
    metric: Metric

    names_stream: ClassVar[bool] = True

    def of_rows(self, rows: Sequence[int], count: int) -> Metric:
        return replace(self, metric=self.metric.of_rows(rows, count))

    @property
    def name(self) -> str:
        return f"{self.metric.name} in {self.stream}"

    @property
    def needs_reference(self) -> bool:
        return self.metric.needs_reference

    def _bind(self, model, inputs, reference) -> Reading:
        columns = model.cfg.columns(self.stream)
        width = columns.stop - columns.start
        own = None if reference is None else reference[..., columns]
        writing = cast("HookedAudioTransformer", _WritingStream(model, self.stream, width))
        reading = self.metric._bind(writing, inputs, own)
        tokens = reading.tokens
        if tokens is None:
            tokens = torch.arange(width, device=inputs.device).expand(len(inputs), -1)
        return replace(reading, tokens=columns.start + tokens)


class _WritingStream:
    """A model as a metric of one of its streams sees it: with the tokens of that stream alone."""

    def __init__(self, model: HookedAudioTransformer, stream: str, width: int):
        self.model, self.stream, self.width = model, stream, width

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def to_single_token(self, word: str | int) -> int:
        if isinstance(word, str) and self.stream != TEXT:
            raise InputError(
                f"{word!r} is a word, and {self.stream} writes none: name its tokens by their ids, "
                f"0 to {self.width - 1}"
            )
        if not isinstance(word, str):
            whole("a token", word)
        token = self.model.to_single_token(word) if isinstance(word, str) else operator.index(word)
        if not 0 <= token < self.width:
            raise InputError(f"{self.stream} has {self.width} tokens, so none is {token}")
        return token
