"""What is said when: from TextGrid files, or by forced alignment with a CTC model."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from audio_lens.arguments import path_of
from audio_lens.audio import AudioSource
from audio_lens.errors import AudioLensError, ExtraError
from audio_lens.inputs import InputError
from audio_lens.models.base import HookedAudioTransformer
from audio_lens.running import evaluating
from audio_lens.timeline import Span, Timeline

Frames = tuple[int, int]
"""First frame and the first behind."""


class AlignmentError(AudioLensError, ValueError):
    """A file that holds no alignment, or a text that cannot be laid over its audio."""


@dataclass(frozen=True)
class Alignment:
    """Where a CTC model hears a text.

    Attributes:
        words: from the first letter of each word to its last; none where the labels have no word
            boundaries (phones).
        labels: the frames of each letter or phone. CTC marks many with a single frame: the blanks
            between them belong to none.
        log_prob: of the best path, in nats; low for a text that is not what is said.
    """

    words: list[Span]
    labels: list[Span]
    log_prob: float


# -------------------------------------------------------------------------------- files


def read_textgrid(path: str | Path) -> dict[str, list[Span]]:
    """The intervals of a Praat TextGrid, tier by tier, for instance "words" and "phones".

    Intervals without a label are left out, and so are tiers of points, which last no time. Needs
    the extra ``align``.

    Raises:
        AlignmentError: no such file, not a TextGrid, or one without a labelled interval.
    """
    try:
        from praatio import textgrid
        from praatio.data_classes.interval_tier import Interval, IntervalTier
    except ImportError as error:
        raise ExtraError("TextGrids need praatio: pip install 'audio_lens[align]'") from error
    path = path_of("a TextGrid", path)
    if not path.is_file():
        raise AlignmentError(f"no TextGrid at {path}")
    try:
        grid = textgrid.openTextgrid(str(path), includeEmptyIntervals=False)
        found = {
            tier.name: [
                Span(entry.start, entry.end, entry.label)
                for entry in tier.entries
                if isinstance(entry, Interval)
            ]
            for tier in grid.tiers
            if isinstance(tier, IntervalTier)
        }
    except Exception as error:  # of its parser, which raises what it meets
        raise AlignmentError(f"{path} cannot be read as a TextGrid: {error}") from error
    if not any(found.values()):
        raise AlignmentError(f"{path} holds no labelled interval: is it whole?")
    return found


# -------------------------------------------------------------------------------- CTC


@torch.no_grad()
def align(
    model: HookedAudioTransformer,
    audio: AudioSource,
    text: str | Sequence[int],
    sampling_rate: int | None = None,
) -> Alignment:
    """Lay a text over a clip: the likeliest path of a CTC model that says exactly this text.

    Args:
        model: a model with a CTC head, such as wav2vec 2.0 for recognition.
        audio: the clip, as ``model.prepare`` takes it.
        text: what is said, as the model's tokenizer writes it (some know only capitals), or label
            ids.
        sampling_rate: of a clip given as samples, in Hz.

    Spans meet halfway between the centres of the model's frames, so a span holds exactly the
    positions that its label or word has on ``model.timeline``.

    Raises:
        InputError: a model without a CTC head.
        AlignmentError: nothing to align, or more labels than the clip has frames for.
        TokenError: text that the tokenizer cannot write.
        AudioError: unusable audio.
    """
    from audio_lens.models.kinds.ctc import ctc_of  # whoever has a model has loaded it

    if model.cfg.output_kind != "ctc":
        raise InputError(
            f"{model.cfg.model_name} has no CTC head: align with a model that has one, such as "
            "facebook/wav2vec2-base-960h"
        )
    inputs = model.prepare(audio, [text], sampling_rate)
    labels, blank = inputs.labels, ctc_of(model.cfg).blank
    labels = None if labels is None else labels[0].cpu()
    if labels is None or not len(labels):
        raise AlignmentError("an empty text lies nowhere")
    timeline = model.timeline(inputs)
    with evaluating(model):
        log_probs = model(inputs)[0].double().cpu()[timeline.valid("encoder")].log_softmax(-1)
    states = best_path(log_probs, labels, blank)
    emitted, edges = _emitted(labels, blank)[states], _edges(timeline).tolist()
    spans = [
        Span(edges[first], edges[behind], name)
        for name, (first, behind) in zip(
            _names(model, labels.tolist()), _frames(states, len(labels)), strict=True
        )
    ]
    delimiter = getattr(model.tokenizer, "word_delimiter_token", None)
    return Alignment(
        words=[] if delimiter is None else _words(spans, delimiter),
        labels=[span for span in spans if span.label != delimiter],
        log_prob=float(log_probs.gather(1, emitted[:, None]).sum()),
    )


def _names(model: HookedAudioTransformer, labels: list[int]) -> list[str]:
    """How the tokenizer writes each label; their numbers where there is none."""
    if model.tokenizer is None:
        return [str(label) for label in labels]
    return model.tokenizer.convert_ids_to_tokens(labels)


def best_path(
    log_probs: Float[Tensor, "t v"], labels: Int[Tensor, " n"], blank: int
) -> Int[Tensor, " t"]:
    """The likeliest CTC path through all labels (Viterbi), as one state per frame.

    State ``2 i + 1`` is label ``i``; even states are the blanks before, between and behind.

    Raises:
        AlignmentError: more labels than frames (equal neighbours need a blank between them).
    """
    emitted = _emitted(labels, blank)
    n_frames, n_states = len(log_probs), len(emitted)
    repeats = int((labels[1:] == labels[:-1]).sum())
    if n_frames < len(labels) + repeats:
        raise AlignmentError(
            f"{len(labels)} labels with {repeats} repeated need {len(labels) + repeats} frames; "
            f"the clip has {n_frames}"
        )
    scores = log_probs[:, emitted]
    may_skip = torch.zeros(n_states, dtype=torch.bool)
    may_skip[3::2] = labels[1:] != labels[:-1]
    never = torch.tensor(-torch.inf, dtype=scores.dtype)
    best = torch.full((n_states,), -torch.inf, dtype=scores.dtype)
    best[:2] = scores[0, :2]
    steps = torch.zeros(n_frames, n_states, dtype=torch.int8)
    for frame in range(1, n_frames):
        stay, step, skip = (_shifted(best, by) for by in range(3))
        came = torch.stack([stay, step, torch.where(may_skip, skip, never)])
        best, steps[frame] = came.max(0)
        best = best + scores[frame]
    state = n_states - 1 if best[-1] > best[-2] else n_states - 2
    states = [state]
    for frame in range(n_frames - 1, 0, -1):
        state -= int(steps[frame, state])
        states.append(state)
    return torch.tensor(states[::-1])


def _emitted(labels: Int[Tensor, " n"], blank: int) -> Int[Tensor, " s"]:
    """What each state writes: labels with blanks before, between and behind."""
    emitted = torch.full((2 * len(labels) + 1,), blank)
    emitted[1::2] = labels
    return emitted


def _shifted(best: Float[Tensor, " s"], by: int) -> Float[Tensor, " s"]:
    """The value of the state ``by`` before each."""
    return torch.cat([torch.full((by,), -torch.inf, dtype=best.dtype), best])[: len(best)]


def _frames(states: Int[Tensor, " t"], n_labels: int) -> list[Frames]:
    """The frames of every label."""
    where = [(states == 2 * i + 1).nonzero().flatten() for i in range(n_labels)]
    return [(int(frames[0]), int(frames[-1]) + 1) for frames in where]


def _edges(timeline: Timeline) -> Float[Tensor, " edges"]:
    """Where the frames that hold audio begin and end: halfway between their centres."""
    centres = timeline.seconds("encoder")[timeline.valid("encoder")]
    between = (centres[1:] + centres[:-1]) / 2
    half = (centres[1] - centres[0]) / 2 if len(centres) > 1 else torch.tensor(torch.inf)
    ends = torch.stack([centres[0] - half, centres[-1] + half]).clamp(0, timeline.duration_s())
    return torch.cat([ends[:1], between, ends[1:]])


def _words(spans: Sequence[Span], delimiter: str) -> list[Span]:
    """One span for the letters between delimiters."""
    groups = itertools.groupby(spans, key=lambda span: span.label == delimiter)
    words = [list(letters) for is_delimiter, letters in groups if not is_delimiter]
    return [
        Span(word[0].start_s, word[-1].end_s, "".join(letter.label or "" for letter in word))
        for word in words
    ]
