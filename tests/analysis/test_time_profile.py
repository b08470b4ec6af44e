"""Time profiles: when each token of a Q-Former listens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor

from audio_lens import AudioInputs, HookedAudioTransformer
from audio_lens.analysis.time_profile import time_profile
from audio_lens.inputs import InputError
from families import FAMILIES
from families.base import Family

READING = ("granite_speech", "salmonn", "desta2", "desta25")


def tiny(family: str, **batch: Any) -> tuple[HookedAudioTransformer, AudioInputs]:
    """In float64."""
    made: Family = FAMILIES[family]
    model = made.hooked(made.build(dtype=torch.float64))
    return model, model.as_inputs(made.batch(dtype=torch.float64, **batch))


def granite(**batch: Any) -> tuple[HookedAudioTransformer, AudioInputs]:
    return tiny("granite_speech", **batch)


def pattern(model: HookedAudioTransformer, inputs: AudioInputs, layer: int) -> Tensor:
    name = f"connector.blocks.{layer}.cross_attn.hook_pattern"
    return model.run_with_cache(inputs, names_filter=name)[1][name]


def sums(profile: xr.DataArray) -> np.ndarray:
    return profile.sum("time", skipna=False).values


@pytest.mark.parametrize("family", READING)
def test_rows_are_shares_of_the_clip(family: str) -> None:
    """Of every token that enters the language model, in the order in which they enter."""
    model, inputs = tiny(family)
    profile = time_profile(model, inputs)
    places = model.audio_places(inputs)
    n_clips, n_frames = len(inputs.features), model.encoder_length(inputs)
    assert profile.shape == (n_clips, int(places.index.max()) + 1, n_frames)
    assert sums(profile)[places.clip, places.index] == pytest.approx(1)
    assert np.isfinite(sums(profile)).sum() == len(places.index)
    assert (profile.fillna(0) >= 0).all()


@pytest.mark.parametrize("family", ["desta2", "desta25"])
def test_blocks_that_desta_reads_count_by_their_share(family: str) -> None:
    model, inputs = tiny(family)
    whole = pattern(model, inputs, layer=1).mean(1)
    shares = model.connector.tap_weights.softmax(-1)
    n_tokens, n_taps = shares.shape
    expected = sum(
        shares[:, tap, None] * rows.chunk(n_taps, dim=2)[tap]
        for tap, rows in enumerate(whole.chunk(n_taps, dim=1))
    )
    profile = time_profile(model, inputs, layer=1)
    assert profile.values == pytest.approx(expected.detach().numpy())
    assert profile.shape[1] == n_tokens
    assert (profile > 0).all()  # padding is heard, and `audio` says what it is
    assert profile.audio.sum("time").values.tolist() == [87, 30]


def test_windows_of_granite() -> None:
    """Tokens listen to their own window; what the last one is filled up with does not count."""
    model, inputs = granite(lengths=[40], words=[4])
    profile = time_profile(model, inputs, layer=1)
    assert profile.dims == ("clip", "token", "time") and profile.shape == (1, 9, 40)
    own = np.arange(9)[:, None] // 3 == np.arange(40) // 15
    assert np.array_equal(profile[0] > 0, own)
    assert sums(profile) == pytest.approx(np.ones((1, 9)))
    assert profile.time.values == pytest.approx(model.timeline(inputs).seconds("encoder").numpy())
    assert profile.audio.all()
    heard = (profile * profile.time).sum("time")[0]
    assert np.array_equal(heard // 0.3, np.arange(9) // 3) and len(np.unique(heard)) == 9


def test_layers_and_heads() -> None:
    model, inputs = granite(lengths=[30], words=[4])
    patterns = [pattern(model, inputs, layer) for layer in (0, 1)]
    one = time_profile(model, inputs, layer=1, head=2)
    assert one.values == pytest.approx(patterns[1][:, 2].numpy())
    mean = time_profile(model, inputs)
    assert mean.values == pytest.approx(torch.stack(patterns).mean((0, 2)).numpy())


def test_tokens_that_a_shorter_clip_does_not_have() -> None:
    model, inputs = granite(lengths=[61, 20])
    profile = time_profile(model, inputs)
    exists = np.array([[True] * 15, [True] * 6 + [False] * 9])
    assert np.array_equal(np.isfinite(sums(profile)), exists)
    assert profile.audio.sum("time").values.tolist() == [
        61,
        30,
    ]  # the mask knows whole windows only


def test_hooks_stay_in_force_and_none_stays_behind() -> None:
    model, inputs = granite(lengths=[30], words=[4])
    name = "connector.blocks.0.cross_attn.hook_pattern"

    def first_frame_only(pattern: Tensor, hook: Any) -> Tensor:
        pattern[..., 1:] = 0
        return pattern

    with model.hooks([(name, first_frame_only)]):
        changed = time_profile(model, inputs, layer=0)
    assert (changed[0, :3, 0] == 1).all()
    assert not any(point.has_hooks() for point in model.hook_dict.values())


@pytest.mark.parametrize(
    "choice, message",
    [
        ({"layer": 2}, "block 2 of the connector does not read the audio; those that do: 0, 1"),
        ({"head": 4}, "no head 4: the connector's cross-attention has 4"),
    ],
)
def test_what_is_not_there(choice: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        time_profile(*granite(), **choice)


@pytest.mark.parametrize("family", ["whisper", "qwen2_audio"])
def test_other_models_have_none(family: str) -> None:
    with pytest.raises(InputError, match="no cross-attention, and so no time profile"):
        time_profile(*tiny(family))


def test_prompts_without_audio_have_none() -> None:
    model, _ = granite()
    text = {"input_ids": torch.tensor([[7, 8, 9]]), "attention_mask": torch.ones(1, 3).long()}
    with pytest.raises(InputError, match="hold no audio"):
        time_profile(model, text)
