"""Metrics of a run: numbers that say how strongly a model gives an answer.

A metric is anything that maps logits ``b t d_vocab`` (``b labels`` of a classifier) to a scalar or
to one value per row. Those here take words, names of classes or token ids and are bound to a model
and inputs by the sweep (or by `bind`), since words need a tokenizer and "the last position" needs
the mask.
"""

from audio_lens.identity import NoIdentityError, versioned
from audio_lens.metrics.answers import forced_choice, kl, log_prob, logit_diff, prob, read_at
from audio_lens.metrics.reading import (
    Metric,
    MetricError,
    MetricFn,
    Reading,
    at_positions,
    blamed,
    bound,
    check,
    measured,
    named,
)
from audio_lens.metrics.streams import of_stream, streams_read
from audio_lens.metrics.transcripts import (
    ctc_diff,
    ctc_log_prob,
    insertion_rate,
    sequence_log_prob,
    wer,
)

__all__ = [
    "Metric",
    "MetricError",
    "MetricFn",
    "NoIdentityError",
    "Reading",
    "at_positions",
    "blamed",
    "bound",
    "check",
    "ctc_diff",
    "ctc_log_prob",
    "forced_choice",
    "insertion_rate",
    "kl",
    "log_prob",
    "logit_diff",
    "measured",
    "named",
    "of_stream",
    "prob",
    "read_at",
    "sequence_log_prob",
    "streams_read",
    "versioned",
    "wer",
]
