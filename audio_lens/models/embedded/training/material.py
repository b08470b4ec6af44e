"""Spoken digits as trimmed 16 kHz words: real recordings (FSDD) and espeak-ng voices.

Everything downstream knows exactly where a word is, because a word enters a clip as the samples
of one :class:`Utterance`, cut from its first to its last audible frame.
"""

import os
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from jaxtyping import Float

from audio_lens.audio import read, resample
from audio_lens.errors import AudioLensError
from audio_lens.models.embedded import DIGITS

RATE = 16_000
SEEN_SPEAKERS = ("george", "jackson", "yweweler")
UNSEEN_SPEAKERS = ("nicolas", "theo")
TRAIN_TAKES = range(5, 50)
TEST_TAKES = range(5)
WORD_RMS = 0.06
LONGEST_WORD_S = 1.2

Wave = Float[np.ndarray, " _"]
"""Float samples at 16 kHz; clips of one list differ in length."""

_ACCENTS = (
    "en-us",
    "en-gb",
    "en-gb-scotland",
    "en-gb-x-gbclan",
    "en-gb-x-rp",
    "en-gb-x-gbcwmd",
    "en-029",
    "en-us-nyc",
)
_TRAIN_VARIANTS = (
    *("m1", "m2", "m3", "m4", "m5", "m7", "m8", "f1", "f2", "f3", "f5", "croak", "whisper"),
    *("Adam", "Alex", "Alicia", "Andrea", "Andy", "Annie", "aunty", "boris", "Denis", "Diogo"),
    *("Gene", "Henrique", "Hugo", "iven", "Jacky", "john", "klatt", "klatt3", "Lee", "linda"),
    *("Marco", "max", "michel", "Mike", "Nguyen", "pablo", "quincy", "rob", "steph", "travis"),
)
_HELD_OUT_VARIANTS = ("m6", "f4", "belinda", "david", "edward", "grandma", "klatt2", "victor")

# Non-native accents: digits respelled so that a foreign voice's own letter-to-sound rules say
# the English word (zero to nine, in order).
_RESPELLED = {
    "fr-fr": "ziro ouane tou sri faure faïve sixe sévène éïte naïne",
    "fr-be": "zirau ouanne tou trie fore faïve sixe sévenne éïte naïne",
    "de": "siro wann tu sri for feif sicks sewwen eit nein",
    "nl": "zieroo wan toe srie foor faaif siks sevven eet naain",
    "it": "zìro uàn tu trì for fàiv sics sèven éit nàin",
    "es": "síro uán tu zri for fáif sics séven éit náin",
    "pl": "ziro łan tu sri for fajw siks sewen ejt najn",
}


class MissingData(AudioLensError, FileNotFoundError):
    """The folder of real recordings is not there; the message says where it was looked for."""


@dataclass(frozen=True)
class Utterance:
    """One spoken word.

    Attributes:
        word: the digit, as English text.
        speaker: who says it; words are only ever joined with words of the same speaker.
        wave: float32 samples at 16 kHz, from the word's onset to its offset.
    """

    word: str
    speaker: str
    wave: Wave


@dataclass(frozen=True)
class Voice:
    """An espeak-ng voice: accent and variant, with a speaking rate and a pitch.

    Attributes:
        name: ``accent+variant`` as espeak-ng's ``-v`` takes it.
        speed: words per minute.
        pitch: espeak-ng's 0 to 99.
    """

    name: str
    speed: int
    pitch: int

    @property
    def speaker(self) -> str:
        return f"{self.name}/{self.speed}/{self.pitch}"


def data_root() -> Path:
    """The folder of real recordings: ``$AUDIO_LENS_DATA``, else ``../shared/data`` of the repo.

    Raises:
        MissingData: neither is there.
    """
    repository = Path(__file__).resolve().parents[4]
    named = os.environ.get("AUDIO_LENS_DATA")
    root = Path(named) if named else repository.parent / "shared" / "data"
    if not root.is_dir():
        raise MissingData(f"no recordings at {root}; set AUDIO_LENS_DATA to the data folder")
    return root


def trim(wave: Wave, floor_db: float = 38.0) -> Wave:
    """Cut a word at its first and last 10 ms frame within ``floor_db`` of its loudest frame."""
    hop = RATE // 100
    frames = wave[: len(wave) // hop * hop].reshape(-1, hop)
    power = np.square(frames).mean(axis=1)
    audible = np.flatnonzero(power > power.max() * 10 ** (-floor_db / 10))
    return wave[audible[0] * hop : (audible[-1] + 1) * hop]


def level(wave: Wave, rms: float = WORD_RMS) -> Wave:
    """Scale a word to a root mean square of ``rms``, peaks at most 0.99."""
    gain = rms / np.sqrt(np.square(wave).mean())
    return (wave * min(gain, 0.99 / np.abs(wave).max())).astype(np.float32)


def resampled(utterance: Utterance, factor: float) -> Utterance:
    """The word played ``factor`` times as fast: pitch, formants and tempo all move."""
    wave = resample(utterance.wave, round(RATE * factor), RATE)
    return replace(utterance, speaker=f"{utterance.speaker}*{factor:.2f}", wave=wave)


def band_limited(utterance: Utterance) -> Utterance:
    """The word through an 8 kHz channel, as the FSDD recordings came."""
    wave = resample(resample(utterance.wave, RATE, RATE // 2), RATE // 2, RATE)
    return replace(utterance, speaker=f"{utterance.speaker}~8k", wave=wave)


def fsdd_words(speakers: Sequence[str], takes: Iterable[int]) -> dict[str, list[Utterance]]:
    """Real recordings by speaker, ten digits for every take asked for.

    A recording that is longer than :data:`LONGEST_WORD_S` after trimming is left out.

    Args:
        speakers: names among :data:`SEEN_SPEAKERS` and :data:`UNSEEN_SPEAKERS`.
        takes: numbers 0 to 49; 0 to 4 are the data set's own test split.

    Raises:
        MissingData: the data folder is not there.
    """
    folder = data_root() / "fsdd" / "recordings"
    takes = list(takes)

    def said(digit: int, speaker: str, take: int) -> Utterance:
        wave = read(folder / f"{digit}_{speaker}_{take}.flac")
        return Utterance(DIGITS[digit], speaker, level(trim(wave)))

    return _short_enough(
        {
            speaker: [said(digit, speaker, take) for digit in range(10) for take in takes]
            for speaker in speakers
        }
    )


@cache
def _voices(variants: tuple[str, ...], per_accent: int, seed: int) -> tuple[Voice, ...]:
    """Some of the variants for every English accent, and half as many for every foreign one."""
    draw = np.random.default_rng(seed)
    english = [f"{a}+{v}" for a in _ACCENTS for v in draw.choice(variants, per_accent, False)]
    few = per_accent // 2
    foreign = [f"{a}+{v}" for a in _RESPELLED for v in draw.choice(variants, few, False)]
    return tuple(
        Voice(name, int(draw.integers(120, 200)), int(draw.integers(20, 80)))
        for name in english + foreign
    )


def train_voices() -> tuple[Voice, ...]:
    """The espeak-ng voices of the training material."""
    return _voices(_TRAIN_VARIANTS, 12, seed=1)


def held_out_voices() -> tuple[Voice, ...]:
    """Voices whose variant never occurs in training."""
    return _voices(_HELD_OUT_VARIANTS, 3, seed=2)


def other_setting(voice: Voice, number: int) -> Voice:
    """The same voice at another rate and pitch, fixed by ``number``."""
    draw = np.random.default_rng([number, voice.speed, voice.pitch])
    return replace(voice, speed=int(draw.integers(120, 220)), pitch=int(draw.integers(20, 80)))


def espeak_word(voice: Voice, word: str, cache_folder: Path) -> Utterance:
    """Synthesise one digit in a process of its own (espeak-ng repeats itself only then).

    Args:
        voice: who says it.
        word: one of :data:`DIGITS`.
        cache_folder: where the wav is kept and looked for.
    """
    path = cache_folder / voice.name / f"{word}_{voice.speed}_{voice.pitch}.wav"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        accent = voice.name.partition("+")[0]
        spelling = dict(zip(DIGITS, _RESPELLED.get(accent, " ".join(DIGITS)).split(), strict=True))
        partial = path.with_suffix(".part")
        command = ["espeak-ng", "-v", voice.name, "-s", str(voice.speed), "-p", str(voice.pitch)]
        subprocess.run([*command, "-w", str(partial), spelling[word]], check=True)
        partial.rename(path)
    return Utterance(word, voice.speaker, level(trim(read(path))))


def espeak_words(voices: Iterable[Voice], cache_folder: Path) -> dict[str, list[Utterance]]:
    """The ten digits of each voice, by speaker; those over :data:`LONGEST_WORD_S` are left out."""
    return _short_enough(
        {
            voice.speaker: [espeak_word(voice, word, cache_folder) for word in DIGITS]
            for voice in voices
        }
    )


def _short_enough(spoken: dict[str, list[Utterance]]) -> dict[str, list[Utterance]]:
    longest = LONGEST_WORD_S * RATE
    return {name: [u for u in said if len(u.wave) <= longest] for name, said in spoken.items()}
