"""Sound files, samples and their rates."""

from __future__ import annotations

import io

import numpy as np

from audio_lens import audio
from bad_input.world import INF, NAN, RATE, Case, inputs, model, named, wav, written

TONE = (0.5 * np.sin(np.arange(RATE) / 10)).astype(np.float32)


def _cut(path: str, share: float) -> object:
    wav(path, TONE)
    with open(path, "rb") as file:
        content = file.read()
    return audio.read(written(path, content[: int(share * len(content))]))


def _header(samples: int, longest_s: float = INF) -> object:
    """A FLAC of a second whose header tells of another length."""
    file = io.BytesIO()
    import soundfile

    soundfile.write(file, TONE, RATE, format="FLAC")
    content = bytearray(file.getvalue())
    field = int.from_bytes(content[18:26], "big") >> 36 << 36
    content[18:26] = (field | samples).to_bytes(8, "big")
    return audio.read(written("declared.flac", bytes(content)), RATE, longest_s)


def _of(samples: object, rate: object = RATE) -> object:
    return audio.load(samples, RATE, rate)


FILES = {
    "a file that is not there": lambda: audio.read("nothing.wav"),
    "a folder": lambda: audio.read("."),
    "an empty file": lambda: audio.read(written("empty.wav", b"")),
    "a text called .wav": lambda: audio.read(written("text.wav", "this is no sound")),
    "a name with a zero byte": lambda: audio.read("a\0b.wav"),
    "a name of 5,000 letters": lambda: audio.read("a" * 5000),
    "a header without samples": lambda: audio.read(wav("none.wav", TONE[:0])),
    "NaN samples in a file": lambda: audio.read(wav("nan.wav", TONE * NAN, subtype="FLOAT")),
    "infinite samples in a file": lambda: audio.read(wav("inf.wav", TONE / 0, subtype="FLOAT")),
    "a wav cut off": lambda: _cut("cut.wav", 0.6),
    "a FLAC cut off": lambda: _cut("cut.flac", 0.9),
    "an Ogg cut off": lambda: _cut("cut.ogg", 0.97),
    "an AIFF cut off": lambda: _cut("cut.aiff", 0.6),
    "an AU cut off": lambda: _cut("cut.au", 0.6),
    "a header of 2^36 samples": lambda: _header(2**36 - 1),
    "four hours, for a model of 30 s": lambda: _header(4 * 3600 * RATE, 30.0),
    "a header of more than there is": lambda: _header(2 * RATE),
    "bytes of no sound": lambda: audio.load({"bytes": b"RIFF"}, RATE),
    "a path that is a number": lambda: audio.load({"path": 3}, RATE),
}

SAMPLES = {
    "no samples": lambda: _of(np.zeros(0)),
    "NaN samples": lambda: _of(TONE * NAN),
    "infinite samples": lambda: _of(np.full(9, INF)),
    "three axes": lambda: _of(np.zeros((2, 3, 4))),
    "four clips stacked": lambda: _of(np.zeros((4, 800))),
    "texts as samples": lambda: _of(np.array(["a", "b"])),
    "complex samples": lambda: _of(np.zeros(4, complex)),
    "truth values as samples": lambda: _of(np.zeros(4, bool)),
    "unsigned samples": lambda: _of(np.zeros(4, np.uint8)),
    "samples of 20 times full scale": lambda: _of(TONE * 40),
    "24-bit values in int32": lambda: _of(np.round(TONE * 2**20).astype(np.int32)),
    "32-bit values in int64": lambda: _of(np.round(TONE * 2**31).astype(np.int64)),
    "ragged lists of samples": lambda: audio.load(
        {"array": [[0.1], [0.2, 0.3]], "sampling_rate": RATE}, RATE
    ),
    "None for a clip": lambda: _of(None),
    "a number for a clip": lambda: _of(3.5),
    "a mapping without audio": lambda: audio.load({}, RATE),
    "a mapping of unknown keys": lambda: audio.load({"array": TONE, "rate": RATE}, RATE),
    "one sample, to be resampled to none": lambda: _of(np.zeros(1), 44_100),
    "a day and an hour of samples": lambda: _of(np.zeros(25 * 3600, np.int8), 1),
}

RATES = {
    **{
        f"a sampling rate of {rate!r}": lambda rate=rate: _of(TONE, rate)
        for rate in (None, 0, -16_000, NAN, INF, 1e300, 2**70, 0.5, True, "16000")
    },
    "a model's rate of NaN": lambda: audio.load(TONE, NAN, RATE),
    "a model's rate of 1e300": lambda: audio.load(TONE, 1e300, RATE),
    "two rates for one clip": lambda: model().prepare([TONE], "?", [RATE, RATE]),
    "resampling from infinity": lambda: audio.resample(TONE, INF, RATE),
}

PREPARED = {
    "a clip longer than the model takes": lambda: model().prepare(
        np.zeros(9 * RATE), "?", sampling_rate=RATE
    ),
    "a clip too short for one token": lambda: model().prepare(np.zeros(99), "?", RATE),
    "no clips": lambda: model().prepare([], "?"),
    "an array without its rate": lambda: model().prepare(TONE, "?"),
    "no text": lambda: model().prepare(TONE, None, RATE),
    "a number for a text": lambda: model().prepare(TONE, 3, RATE),
    "three texts for two clips": lambda: model().prepare([TONE, TONE], ["a", "b", "c"], RATE),
    "a placeholder too many": lambda: model().prepare(
        TONE, 2 * model().placeholder + "what is said?", RATE
    ),
    "another clip of another length": lambda: inputs().with_audio(TONE, RATE),
    "another text of another length": lambda: inputs().with_text("what is it that is said here?"),
    "a row that does not exist": lambda: inputs()[7],
    "a row of 1.5": lambda: inputs()[1.5],
    "no rows": lambda: inputs()[[]],
    "a mask of another length": lambda: inputs()[[True, False, True]],
    "0 copies of a batch": lambda: inputs().repeat(0),
    "2.5 copies of a batch": lambda: inputs().repeat(2.5),
}

CASES: list[Case] = [
    *named("Sound files", FILES),
    *named("Samples", SAMPLES),
    *named("Sampling rates", RATES),
    *named("What `prepare` takes", PREPARED),
]
