"""Sound files as mono samples; whether they are whole is asked of their headers and contents."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import soundfile
from jaxtyping import Float

from audio_lens.errors import AudioLensError

Readable = Path | io.BytesIO
MOST_HZ = 10_000_000
LONGEST_S = 24 * 3600.0  # of a clip that is held in memory
_UNKNOWN_FRAMES = 2**62  # of a stream that was written before its length was known
_UNKNOWN_BYTES = 0x7FFFF000  # from here on, what programs write that pipe a file of any length
_BLOCK = 2**26  # samples decoded at once: most files in one go
_SHORT_MP3 = 0.99  # of the frames that its tag tells, as decoders cut their own delay

# what libsndfile says of a header that tells of more than there is: declared, and there
_SHOULD_BE = re.compile(r"^ *(?:data|SSND|BODY|Data Size|riff) *: (\d+) \(should be (\d+)\)", re.M)
_OTHER_COUNTS = re.compile(
    r"'COMM' chunk \((\d+)\) not equal|from 'ds64' chunk of (\d+)|^ *Frames +: (\d+)"
    r"|^Data length (\d+) should be|^ *Rows : \d+ +Cols : (\d+)",
    re.M,
)
_SAID = ("truncated", "without an End-Of-Stream flag")
_CAF_BYTES = re.compile(r"Bytes / packet *: ([1-9]\d*)[\s\S]*^data : (\d+)$", re.M)
_NIST_COUNT = re.compile(rb"NIST_1A\n[\s\S]*?^sample_count -i (\d+)", re.M)


class AudioError(AudioLensError, ValueError):
    """Audio that cannot be used; the message names the clip and what to do."""


@contextmanager
def opened(source: Readable, name: str) -> Iterator[soundfile.SoundFile]:
    """An open sound file, whose header is one that can be meant.

    Raises:
        AudioError: missing, empty or not audio; a header of no rate, or one that tells of more than
            the file holds.
    """
    if isinstance(source, Path):
        if not source.is_file():
            raise AudioError(f"no audio file at {name}")
        if source.stat().st_size == 0:
            raise AudioError(f"{name} is empty (0 bytes)")
    try:
        with soundfile.SoundFile(source) as file:
            if not 1 <= file.samplerate <= MOST_HZ:
                raise AudioError(f"{name} cannot be used: its header tells of {file.samplerate} Hz")
            declared = _declared(file, source)
            if declared > file.frames:
                raise _cut_off(name, declared, file.frames)
            if any(word in file.extra_info for word in _SAID):
                raise AudioError(f"{name} is cut off: its end is missing. {_MEND}")
            yield file
    except soundfile.LibsndfileError as error:
        raise AudioError(f"{name} cannot be read as audio: {error.error_string}") from error
    except (RuntimeError, TypeError, OSError) as error:  # of soundfile, on headers of some formats
        raise AudioError(f"{name} cannot be read as audio: {error}") from error


def decoded(
    source: Readable, name: str, longest_s: float
) -> tuple[Float[np.ndarray, " samples"], int]:
    """Samples, with channels averaged, and their rate in Hz.

    Raises:
        AudioError: as `opened`, and a file that is longer than ``longest_s`` seconds, which its
            header tells before anything is decoded, or that ends before its header says.
    """
    with opened(source, name) as file:
        rate, is_known = file.samplerate, file.frames < _UNKNOWN_FRAMES
        most = math.ceil(min(longest_s, LONGEST_S) * rate) + 1
        if is_known and file.frames > most:
            raise too_long(name, file.frames / rate, longest_s)
        blocks, n_read = [], 0
        size = max(1, _BLOCK // file.channels)
        while len(block := _block(file, size, name, n_read)):
            blocks.append(block.mean(axis=1))
            n_read += len(block)
            if n_read > most:
                raise too_long(name, n_read / rate, longest_s)
        is_mp3 = file.format == "MP3"
        promised = 0 if is_mp3 and not _has_length(source) else file.frames
        if is_known and n_read < promised * (_SHORT_MP3 if is_mp3 else 1):
            raise _cut_off(name, file.frames, n_read)
    return np.concatenate(blocks or [np.zeros(0, dtype=np.float32)]), rate


def _block(
    file: soundfile.SoundFile, size: int, name: str, n_read: int
) -> Float[np.ndarray, "frames channels"]:
    try:
        return file.read(size, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise AudioError(
            f"{name} is cut off or damaged: of the {file.frames} samples that its header tells of, "
            f"those after {n_read} cannot all be read ({error.error_string}). {_MEND}"
        ) from error


def seconds(path: Path) -> float:
    """How long a sound file is, as its header says; nothing is decoded.

    Raises:
        AudioError: as `opened`.
    """
    with opened(path, str(path)) as file:
        return file.frames / file.samplerate


def too_long(name: str, seconds: float, longest_s: float) -> AudioError:
    """What to raise for a clip that is too long for a model, or for memory."""
    said = f"{name} is {seconds:.2f} s long"
    if longest_s < LONGEST_S:
        return AudioError(
            f"{said} and this model takes {longest_s:g} s: cut it (it would be silently truncated)"
        )
    return AudioError(f"{said}, and {LONGEST_S / 3600:g} hours are read at most: cut it")


_MEND = "Get the whole file, or save what there is to a new one"


def _cut_off(name: str, declared: int, there: int) -> AudioError:
    return AudioError(
        f"{name} is cut off: its header tells of {declared} samples, and it holds {there}. {_MEND}"
    )


def _declared(file: soundfile.SoundFile, source: Readable) -> int:
    """The frames a header tells of, where libsndfile counts what is there in its place."""
    log, counts = file.extra_info, [file.frames]
    for found in _SHOULD_BE.finditer(log):
        declared, there = map(int, found.groups())
        if there < declared < _UNKNOWN_BYTES:
            counts.append(file.frames + _frames_of(file, declared - there))
    for found in _OTHER_COUNTS.finditer(log):
        counts += [int(count) for count in found.groups() if count is not None]
    if file.format == "CAF" and (found := _CAF_BYTES.search(log)):
        counts.append((int(found[2]) - 4) // int(found[1]))
    if file.format == "NIST" and (count := _NIST_COUNT.match(_head(source, 1024))):
        counts.append(int(count[1]))
    return max(counts)


def _frames_of(file: soundfile.SoundFile, n_bytes: int) -> int:
    """Frames that so many bytes of uncompressed samples are, a started one among them."""
    width = {"PCM_S8": 1, "PCM_U8": 1, "PCM_24": 3, "PCM_32": 4, "FLOAT": 4, "DOUBLE": 8}
    return -(-n_bytes // (width.get(file.subtype, 2) * file.channels))


def _has_length(source: Readable) -> bool:
    """Whether an MP3 file tells how long it is, in a tag of its first frame."""
    head = _head(source, 10)
    start = 0
    if head[:3] == b"ID3" and len(head) == 10:  # a tag of other things before, of 7-bit bytes
        start = 10 + sum(byte << 21 - 7 * place for place, byte in enumerate(head[6:]))
    first = _head(source, 256, start)
    return any(tag in first for tag in (b"Xing", b"Info", b"VBRI"))


def _head(source: Readable, count: int, start: int = 0) -> bytes:
    if isinstance(source, io.BytesIO):
        return source.getvalue()[start : start + count]
    with open(source, "rb") as file:
        file.seek(start)
        return file.read(count)
