"""Any kind of audio becomes mono float32 at the model's rate, or a clear error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from audio_lens import AudioError
from audio_lens.audio import check, load, read, resample

RATE = 16_000


def tone(rate: int = RATE, seconds: float = 0.5, hz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(int(rate * seconds)) / rate)).astype("float32")


def close(ours: np.ndarray, expected: np.ndarray, tolerance: float = 1e-6) -> bool:
    return ours.dtype == np.float32 and np.abs(ours - expected).max() <= tolerance


# -------------------------------------------------------------------------------- what it takes


@pytest.mark.parametrize("form", [str, Path])
def test_files(tmp_path: Path, form: type) -> None:
    path = tmp_path / "clip.wav"
    soundfile.write(path, tone(), RATE, subtype="FLOAT")
    assert close(load(form(path), RATE), tone())
    assert close(read(form(path)), tone())


@pytest.mark.parametrize("format", ["flac", "ogg", "wav"])
def test_file_formats(tmp_path: Path, format: str) -> None:
    soundfile.write(tmp_path / f"clip.{format}", tone(), RATE)
    assert close(read(tmp_path / f"clip.{format}"), tone(), tolerance=0.05)


@pytest.mark.parametrize(
    "samples",
    [
        tone(),
        tone().astype(np.float64),
        torch.from_numpy(tone()),
        torch.from_numpy(tone()).requires_grad_(),
        torch.from_numpy(tone()).double(),
    ],
)
def test_arrays_and_tensors(samples: np.ndarray | torch.Tensor) -> None:
    assert close(load(samples, RATE, RATE), tone())


def test_half_precision_tensors() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        assert close(load(torch.from_numpy(tone()).to(dtype), RATE, RATE), tone(), 2e-3)


@pytest.mark.parametrize("dtype", [np.int16, np.int32])
def test_integers_are_scaled_to_one(dtype: type) -> None:
    full_scale = np.iinfo(dtype).max + 1.0
    whole = np.round(tone() * full_scale).astype(dtype)
    assert close(load(whole, RATE, RATE), tone(), tolerance=1e-4)
    assert close(load(torch.from_numpy(whole), RATE, RATE), tone(), tolerance=1e-4)


def test_channels_are_averaged_in_both_layouts(tmp_path: Path) -> None:
    left, right = tone(), tone(hz=880)
    mean = (left + right) / 2
    assert close(load(np.stack([left, right]), RATE, RATE), mean)
    assert close(load(np.stack([left, right], axis=1), RATE, RATE), mean)
    assert close(load(torch.from_numpy(left)[None], RATE, RATE), left)
    soundfile.write(tmp_path / "stereo.wav", np.stack([left, right], axis=1), RATE, "FLOAT")
    assert close(read(tmp_path / "stereo.wav"), mean)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_resampling_keeps_the_signal(tmp_path: Path, rate: int) -> None:
    ours = load(tone(rate), RATE, rate)
    assert abs(len(ours) - RATE // 2) <= 1
    inner = slice(800, 7000)  # edges ring
    assert close(ours[inner], tone()[inner], tolerance=1e-3)
    soundfile.write(tmp_path / "clip.wav", tone(rate), rate, subtype="FLOAT")
    assert np.array_equal(read(tmp_path / "clip.wav"), ours)


def test_same_rate_is_untouched() -> None:
    assert resample(tone(), RATE, RATE) is not None
    assert np.array_equal(resample(tone(), RATE, RATE), tone())


# -------------------------------------------------------------------------------- what it refuses


def test_files_that_are_no_audio(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match=r"no audio file at .*nothing\.wav"):
        load(tmp_path / "nothing.wav", RATE)
    with pytest.raises(AudioError, match="no audio file"):
        load(tmp_path, RATE)
    (tmp_path / "empty.wav").touch()
    with pytest.raises(AudioError, match=r"empty\.wav is empty \(0 bytes\)"):
        load(tmp_path / "empty.wav", RATE)
    (tmp_path / "text.wav").write_text("this is no sound")
    with pytest.raises(AudioError, match=r"text\.wav cannot be read as audio"):
        load(tmp_path / "text.wav", RATE)
    soundfile.write(tmp_path / "header.wav", np.zeros(0, "float32"), RATE)
    with pytest.raises(AudioError, match=r"header\.wav holds no samples"):
        load(tmp_path / "header.wav", RATE)
    soundfile.write(tmp_path / "nan.wav", np.full(9, np.nan), RATE, subtype="FLOAT")
    with pytest.raises(AudioError, match=r"nan\.wav holds NaN"):
        load(tmp_path / "nan.wav", RATE)


@pytest.mark.parametrize(
    "samples, message",
    [
        (np.zeros(0), "holds no samples"),
        (np.zeros((0, 2)), "holds no samples"),
        (np.array([0.0, np.nan]), "holds NaN or infinite"),
        (np.array([0.0, np.inf]), "holds NaN or infinite"),
        (torch.tensor([0.0, float("nan")]), "holds NaN or infinite"),
        (np.zeros((2, 3, 4)), r"got shape \(2, 3, 4\); a batch is a list"),
        (np.zeros((9, 9)), r"got shape \(9, 9\)"),
        (np.ones(()), r"got shape \(\)"),
        (np.array(["a", "b"]), "must be real numbers"),
        (np.zeros(4, dtype=complex), "must be real numbers"),
        (np.zeros(4, dtype=bool), "must be real numbers"),
        (np.zeros(4, dtype=np.uint8), "no agreed zero"),
        ([0.1, 0.2], "a path, an array or a tensor, got list"),
        (None, "got NoneType"),
        (b"RIFF", "got bytes"),
    ],
)
def test_samples_that_are_no_clip(samples: object, message: str) -> None:
    with pytest.raises(AudioError, match=message):
        load(samples, RATE, RATE)


def test_arrays_need_their_sampling_rate() -> None:
    with pytest.raises(AudioError, match="pass sampling_rate="):
        load(tone(), RATE)
    with pytest.raises(AudioError, match="positive number of Hz, got 0"):
        load(tone(), RATE, 0)


def test_a_file_keeps_its_own_rate(tmp_path: Path) -> None:
    path = tmp_path / "clip.wav"
    soundfile.write(path, tone(8_000), 8_000, subtype="FLOAT")
    for said in (None, 8_000, 44_100):
        assert np.array_equal(load(path, RATE, said), read(path, RATE))


def test_check_takes_sound_files_only(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "clip.wav", tone(), RATE)
    check(tmp_path / "clip.wav")
    (tmp_path / "text.wav").write_text("this is no sound")
    for name in ("text.wav", "nothing.wav"):
        with pytest.raises(AudioError, match=name):
            check(tmp_path / name)


def test_too_short_to_resample() -> None:
    with pytest.raises(AudioError, match=r"1 sample\(s\) at 44100 Hz are none at 16000"):
        load(np.zeros(1), RATE, 44_100)
