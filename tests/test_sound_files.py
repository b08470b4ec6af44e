"""Sound files that are cut off or far too long are refused, most before they are decoded."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
import soundfile

from audio_lens import AudioError
from audio_lens.audio import check, load, read
from audio_lens.sound_files import seconds

RATE = 16_000
KNOWN = ["AIFF", "AU", "AVR", "CAF", "MAT4", "MAT5", "MPC2K", "NIST", "OGG", "RF64", "SVX", "VOC"]
KNOWN += ["W64", "WAV", "WAVEX"]  # whose headers alone tell that something is missing
FOUND = ["FLAC", "MP3"]  # where decoding does


def content(format: str, n_samples: int = 8_000) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, 0.5 * np.sin(np.arange(n_samples) / 10), RATE, format=format)
    return file.getvalue()


@pytest.mark.parametrize("format", KNOWN + FOUND)
@pytest.mark.parametrize("share", [0.6, 0.97])
def test_files_that_are_cut_off(tmp_path: Path, format: str, share: float) -> None:
    whole = content(format)
    path = tmp_path / f"clip.{format.lower()}"
    path.write_bytes(whole)
    assert len(read(path)) == 8_000
    assert seconds(path) == 0.5
    check(path)
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(AudioError, match=r"clip\.\w+ (is cut off|cannot be read)"):
        read(path)
    if format in KNOWN:
        with pytest.raises(AudioError, match=r"is cut off|cannot be read"):
            check(path)


def test_the_message_says_what_is_missing() -> None:
    whole = content("WAV")
    with pytest.raises(AudioError, match="header tells of 8000 samples, and it holds 7990"):
        load(io.BytesIO(whole[:-20]), RATE)


@pytest.mark.parametrize("marker", [0xFFFFFFFF, 0x7FFFF000])
def test_streams_of_a_length_not_known_at_first_are_whole(marker: int) -> None:
    """As ffmpeg and sox pipe them."""
    whole = bytearray(content("WAV"))
    size = whole.index(b"data") + 4
    whole[4:8] = whole[size : size + 4] = marker.to_bytes(4, "little")
    assert len(load(io.BytesIO(whole), RATE)) == 8_000


def flac_of(n_declared: int) -> bytes:
    """Half a second whose header tells of another length."""
    whole = bytearray(content("FLAC"))
    field = int.from_bytes(whole[18:26], "big") >> 36 << 36  # the count's 36 bits are the last
    whole[18:26] = (field | n_declared).to_bytes(8, "big")
    return bytes(whole)


@pytest.mark.parametrize(
    "n_declared, longest_s, said",
    [
        (2**36 - 1, math.inf, "4294967.30 s long, and 24 hours are read at most"),
        (4 * 3600 * RATE, 30.0, "14400.00 s long and this model takes 30 s"),
        (4 * 3600 * RATE, math.inf, "cut off or damaged.* 230400000 samples"),
    ],
)
def test_lengths_of_headers(n_declared: int, longest_s: float, said: str) -> None:
    with pytest.raises(AudioError, match=said):
        load(io.BytesIO(flac_of(n_declared)), RATE, longest_s=longest_s)


def test_long_files_are_refused_before_they_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    soundfile.write(tmp_path / "long.flac", np.zeros(40 * RATE), RATE)
    monkeypatch.setattr(soundfile.SoundFile, "read", None)
    with pytest.raises(AudioError, match=r"long\.flac is 40\.00 s long and this model takes 30 s"):
        read(tmp_path / "long.flac", longest_s=30.0)


def test_headers_without_a_rate() -> None:
    whole = bytearray(content("WAV"))
    whole[24:28] = (2**31 - 1).to_bytes(4, "little")
    with pytest.raises(AudioError, match="its header tells of 2147483647 Hz"):
        load(io.BytesIO(whole), RATE)
