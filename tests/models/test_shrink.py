"""Shrinking by labels: change points, indices, and the way back."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from audio_lens.models.compose.runs import FILLER, change_points, frames_at, indices_of, mask_of

ROWS = st.integers(1, 12).flatmap(
    lambda width: st.lists(
        st.lists(st.integers(0, 3), min_size=width, max_size=width), min_size=1, max_size=3
    )
)


def first_of_runs(row: list[int]) -> list[tuple[int, int]]:
    """Index and label of the first frame of every run."""
    runs = [list(run) for _, run in itertools.groupby(enumerate(row), key=lambda pair: pair[1])]
    return [run[0] for run in runs]


@given(ROWS)
def test_of_every_run_the_first_frame_is_kept(rows):
    kept = indices_of(change_points(torch.tensor(rows)))
    for row, index in zip(rows, kept.tolist(), strict=True):
        starts = [at for at, _ in first_of_runs(row)]
        assert index == starts + [FILLER] * (kept.shape[1] - len(starts))


@given(ROWS)
def test_runs_of_the_blank_can_be_dropped(rows):
    """And still they tell repeated labels apart, as in CTC."""
    kept = indices_of(change_points(torch.tensor(rows), blank=0))
    for row, index in zip(rows, kept.tolist(), strict=True):
        starts = [at for at, label in first_of_runs(row) if label != 0]
        assert index == starts + [FILLER] * (kept.shape[1] - len(starts))


@given(ROWS)
def test_indices_give_their_mask_and_frames_back(rows):
    labels = torch.tensor(rows)
    mask = change_points(labels, blank=1)
    kept = indices_of(mask)
    assert torch.equal(mask_of(kept, labels.shape[1]), mask)
    frames = torch.randn(*labels.shape, 2)
    found = frames_at(frames, kept)
    assert torch.equal(found[kept != FILLER], frames[mask])
    assert not found[kept == FILLER].any()


def test_a_row_of_blanks_keeps_nothing():
    kept = indices_of(change_points(torch.zeros(2, 5, dtype=torch.long), blank=0))
    assert kept.shape == (2, 0)
    assert frames_at(torch.randn(2, 5, 3), kept).shape == (2, 0, 3)


def test_gradients_reach_the_kept_frames_alone():
    frames = torch.randn(1, 4, 3, requires_grad=True)
    kept = indices_of(change_points(torch.tensor([[2, 2, 5, 2]])))
    frames_at(frames, kept).sum().backward()
    assert frames.grad[0].any(-1).tolist() == [True, False, True, True]
