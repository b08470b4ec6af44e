"""Any kind of audio becomes mono float32 at the model's rate, or a clear error."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from audio_lens import AudioError
from audio_lens.audio import check, is_clip, load, read, resample, sources_of

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
    assert close(load(np.stack([left, right], axis=1), RATE, RATE), mean)
    rows = np.stack([left, right])
    assert close(load((rows, RATE), RATE), mean)
    assert close(load((torch.from_numpy(rows), RATE), RATE), mean)
    assert close(load({"array": rows, "sampling_rate": RATE}, RATE), mean)
    assert close(load({"array": rows.tolist()}, RATE, RATE), mean)
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


def test_clips_as_data_sets_hold_them(tmp_path: Path) -> None:
    path = tmp_path / "clip.wav"
    soundfile.write(path, tone(8_000), 8_000, subtype="FLOAT")
    expected, content = read(path), path.read_bytes()
    for clip in (
        {"array": tone(8_000), "sampling_rate": 8_000},
        {"array": tone(8_000).tolist(), "sampling_rate": np.int64(8_000), "path": None},
        {"array": torch.from_numpy(tone(8_000)), "sampling_rate": 8_000, "path": "elsewhere.wav"},
        {"bytes": content, "path": "elsewhere.wav"},
        {"bytes": None, "path": str(path)},
        {"path": path},
        (torch.from_numpy(tone(8_000))[None], 8_000),
        io.BytesIO(content),
    ):
        for said in (None, 8_000, 44_100):
            assert close(load(clip, RATE, said), expected)
    assert close(load({"array": tone(8_000)}, RATE, 8_000), expected)


@pytest.mark.parametrize(
    "clip, message",
    [
        ({}, "holds no audio: array and sampling_rate, bytes, or path"),
        ({"path": None, "bytes": None}, "holds no audio"),
        ({"array": tone()}, "pass sampling_rate="),
        ({"array": [[0.1], [0.2, 0.3]], "sampling_rate": RATE}, "no array of numbers"),
        ({"array": ["a"], "sampling_rate": RATE}, "must be real numbers"),
        ({"array": tone(), "rate": RATE}, "got unknown rate"),
        ({"bytes": b"RIFF"}, "4 bytes cannot be read as audio"),
        ({"bytes": "RIFF"}, "bytes of a clip are bytes, got str"),
        ({"path": "nothing.wav"}, "no audio file at nothing.wav"),
        ({"array": tone(), "sampling_rate": [RATE]}, "positive number of Hz"),
    ],
)
def test_mappings_that_are_no_clip(clip: dict, message: str) -> None:
    with pytest.raises(AudioError, match=message):
        load(clip, RATE)


@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf"), 0.5, True, "16000"])
def test_rates_that_are_none(rate: Any) -> None:
    with pytest.raises(AudioError, match="positive number of Hz"):
        load({"array": tone(), "sampling_rate": rate}, RATE)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.float32, np.float64])
def test_16_bit_values_in_other_dtypes_are_scaled_and_said(dtype: type) -> None:
    whole = np.round(tone() * 2**15).astype(np.int16)
    with pytest.warns(UserWarning, match=r"reach 16384: taken as 16-bit values and divided"):
        assert np.array_equal(load(whole.astype(dtype), RATE, RATE), load(whole, RATE, RATE))
    silence = np.zeros(9, dtype)
    assert not load(silence, RATE, RATE).any()


@pytest.mark.parametrize(
    "samples, said",
    [
        (tone() * 2.3, "float32 reach 1.15, and full scale is 1"),
        (torch.from_numpy(tone() * 4).double(), "float32 reach 2, and full scale is 1"),
        (tone() * 20, "float32 reach 10, and full scale is 1"),
        (torch.from_numpy(tone() * 40_000), "reach 20000, and full scale is 1"),
        (np.round(tone() * 2**20).astype(np.int32), "int32 reach 524288"),
        (np.round(tone() * 2**31).astype(np.int64), "int64 reach"),
        (np.round(tone() * 2**31), "float32 reach"),
    ],
)
def test_samples_beyond_full_scale_are_refused(samples: Any, said: str) -> None:
    with pytest.raises(AudioError, match=said):
        load(samples, RATE, RATE)


def test_what_resampling_overshoots_stays_as_it_is() -> None:
    loud = tone() * 2.18
    assert close(load(loud, RATE, RATE), loud)


@pytest.mark.parametrize("shape", [(4, 800), (3, 800), (800, 4), (9, 800)])
def test_stacked_clips_are_no_channels(shape: tuple[int, int]) -> None:
    with pytest.raises(AudioError, match=r"average the \d channels first.*if these are \d clips"):
        load(np.zeros(shape), RATE, RATE)


@pytest.mark.parametrize("rows", [np.zeros((2, 800)), torch.zeros(2, 800), np.zeros((2, 2))])
def test_two_rows_are_two_readings(rows: Any) -> None:
    said = r"2 rows of \d+ samples may be two channels or two clips.*array\.T.*list\(array\)"
    with pytest.raises(AudioError, match=said):
        load(rows, RATE, RATE)


class Decoded:
    """As torchcodec's `AudioDecoder`, which data sets hold."""

    def __init__(self, data: torch.Tensor, sample_rate: int, is_broken: bool = False):
        self.made = SimpleNamespace(data=data, sample_rate=sample_rate, pts_seconds=0.0)
        self.is_broken = is_broken

    def get_all_samples(self) -> SimpleNamespace:
        if self.is_broken:
            raise RuntimeError("no stream")
        return self.made


def test_decoders_are_decoded() -> None:
    left, right = torch.from_numpy(tone()), torch.from_numpy(tone(hz=880))
    for channels in ([left], [left, right], [left, right, left, right]):
        data = torch.stack(channels)
        assert close(load(Decoded(data, RATE), RATE), data.mean(0).numpy())
    assert is_clip(Decoded(left[None], RATE))
    slow = load(Decoded(left[None], RATE // 2), RATE)
    assert close(slow, load(tone(), RATE, RATE // 2))
    assert close(load(Decoded(left[None], RATE), RATE, 8_000), tone())  # it knows its own rate
    with pytest.raises(AudioError, match="cannot be decoded: no stream"):
        load(Decoded(left[None], RATE, is_broken=True), RATE)
    with pytest.raises(AudioError, match="holds no samples"):
        load(Decoded(torch.zeros(1, 0), RATE), RATE)


def test_lists_of_samples_and_lists_of_clips() -> None:
    assert is_clip([0.1, 0.2]) and is_clip((tone(), RATE)) and is_clip(np.array([tone()]))
    assert not any(map(is_clip, ([], [tone()], (tone(), tone()), ["a.wav"], [[0.1, 0.2]])))
    assert len(sources_of([tone(), tone()])) == 2 and len(sources_of((tone(), RATE))) == 1


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
