"""Metrics against hand computations."""

from types import SimpleNamespace

import pytest
import torch

from audio_lens import InputError, metrics
from audio_lens.inputs import AudioInputs


@pytest.fixture
def inputs() -> AudioInputs:
    """Two rows of four tokens, the second padded at its end."""
    return AudioInputs(
        features=torch.zeros(2, 3, 8),
        tokens=torch.tensor([[5, 6, 7, 8], [5, 6, 7, 0]]),
        clips_per_row=(1, 1),
        attention_mask=torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]).bool(),
    )


class Vocabulary:
    """A model as far as metrics of token ids need one."""

    cfg = SimpleNamespace(output_kind="tokens", family="toy")

    @staticmethod
    def output_attended(inputs: AudioInputs) -> torch.Tensor:
        return inputs.attended

    @staticmethod
    def to_single_token(token: int) -> int:
        return token

    @staticmethod
    def as_inputs(inputs: AudioInputs) -> AudioInputs:
        return inputs


LOGITS = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
AT_END = LOGITS[[0, 1], [3, 2]]  # the last attended position of each row


def measured(metric, inputs, **options):
    return metric.bind(Vocabulary, inputs, **options)(LOGITS)


def test_logit_diff_reads_the_last_attended_position(inputs):
    assert torch.equal(measured(metrics.logit_diff(2, 4), inputs), AT_END[:, 2] - AT_END[:, 4])


def test_one_answer_per_row(inputs):
    expected = AT_END[[0, 1], [2, 3]] - AT_END[[0, 1], [4, 1]]
    assert torch.equal(measured(metrics.logit_diff([2, 3], [4, 1]), inputs), expected)


def test_position_can_be_named(inputs):
    for position in (1, -3):
        metric = metrics.logit_diff(2, 4, position=position)
        assert torch.equal(measured(metric, inputs), LOGITS[:, 1, 2] - LOGITS[:, 1, 4])


def test_left_padding_reads_the_end(inputs):
    inputs.attention_mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]]).bool()
    assert torch.equal(
        measured(metrics.logit_diff(2, 4), inputs), LOGITS[:, 3, 2] - LOGITS[:, 3, 4]
    )


def test_log_prob_and_prob(inputs):
    expected = AT_END.softmax(-1)[:, 2]
    assert torch.allclose(measured(metrics.prob(2), inputs), expected)
    assert torch.allclose(measured(metrics.log_prob(2), inputs), expected.log())


def test_kl_from_the_clean_run(inputs):
    reference = LOGITS.flip(-1)
    p, q = (x[[0, 1], [3, 2]].softmax(-1) for x in (reference, LOGITS))
    expected = (p * (p / q).log()).sum(-1)
    assert torch.allclose(measured(metrics.kl(), inputs, reference=reference), expected)
    with pytest.raises(InputError, match="reference"):
        metrics.kl().bind(Vocabulary, inputs)


def test_sequence_log_prob(inputs):
    row = inputs[0]
    log_probs = LOGITS[:1].log_softmax(-1)
    metric = metrics.sequence_log_prob([7, 8])
    expected = log_probs[:, 1, 7] + log_probs[:, 2, 8]
    assert torch.allclose(metric.bind(Vocabulary, row)(LOGITS[:1]), expected)
    with pytest.raises(InputError, match="must end with"):
        metric.bind(Vocabulary, inputs)
    with pytest.raises(InputError, match="behind at least one"):
        metrics.sequence_log_prob([5, 6, 7, 8]).bind(Vocabulary, row)


def test_padding_is_not_read(inputs):
    with pytest.raises(InputError, match="padding"):
        metrics.prob(2, position=3).bind(Vocabulary, inputs)


def test_wer():
    pytest.importorskip("jiwer", reason="metrics.wer needs the extra 'asr'")
    assert metrics.wer("one two three four", "One two tree four ") == 0.25
    assert metrics.wer(["a b", "c"], ["a b", "d"]) == pytest.approx(1 / 3)


def test_metrics_are_named():
    assert metrics.logit_diff(" seven", " two").name == "logit difference seven - two"
    assert list(metrics.named({"mine": len})) == ["mine"]
    assert list(metrics.named(metrics.prob(" seven"))) == ["probability of seven"]
