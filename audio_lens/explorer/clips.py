"""The clips of the explorer: samples with a name, in memory and in a file of edits."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile
from jaxtyping import Float

from audio_lens import audio
from audio_lens.drawing.clips import Clip, hop_of, log_mels
from audio_lens.errors import InputError
from audio_lens.timeline import Span

if TYPE_CHECKING:
    from audio_lens.models.base import HookedAudioTransformer

MOST_BYTES = 32_000_000  # of an upload
MOST_S = 120.0  # of a clip, where the model takes more
_LOUD = 0.05  # of the noise for a silent clip


@dataclass(frozen=True, eq=False)
class Sound:
    """Samples at the model's rate.

    Attributes:
        name: of the file; code names it.
        words: what is said when, where that is known.
    """

    name: str
    samples: Float[np.ndarray, " samples"]
    rate: int
    words: Sequence[Span] = ()

    @staticmethod
    def of(
        model: HookedAudioTransformer,
        source: Any,
        name: str | None = None,
        words: Sequence[Span] = (),
    ) -> Sound:
        """A clip from what `prepare` takes, or from the bytes of a sound file.

        Raises:
            AudioError: what cannot be read, or is longer than the explorer or the model takes.
            InputError: too many bytes.
        """
        if isinstance(source, Sound):
            return source
        rate = model.cfg.sampling_rate
        if isinstance(source, bytes):
            if len(source) > MOST_BYTES:
                raise InputError(f"a clip has at most {MOST_BYTES / 1e6:.0f} MB")
            source = {"bytes": source}
        if name is None:
            name = Path(source).name if isinstance(source, (str, Path)) else "clip.wav"
        native = None if isinstance(source, (str, Path, Mapping)) else rate
        samples = audio.load(source, rate, native, longest_s=_longest(model))
        return Sound(name, samples, rate, words)

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.rate

    def as_long_as(self, other: Sound) -> Sound:
        """Cut, or lengthened by silence, to the length of another."""
        n = len(other.samples)
        samples = np.pad(self.samples[:n], (0, max(0, n - len(self.samples))))
        words = [word for word in self.words if word.end_s <= other.seconds]
        return Sound(self.name, samples, self.rate, words)

    def of_kind(self, by: str) -> Float[np.ndarray, " samples"]:
        """Silence or noise as long, and noise as loud, as the clip."""
        if by == "silence":
            return np.zeros_like(self.samples)
        loudness = float(np.sqrt(np.mean(np.square(self.samples)))) or _LOUD
        noise = np.random.default_rng(0).standard_normal(len(self.samples))
        return np.clip(loudness * noise, -1, 1).astype(np.float32)

    def with_samples(self, samples: Float[np.ndarray, " samples"]) -> Sound:
        """The same with other samples."""
        return Sound(self.name, samples, self.rate, self.words)

    # ---------------------------------------------------------------- for pages and files

    def drawn(self) -> dict[str, Any]:
        """What a page draws and plays: 16-bit samples and a spectrogram, in base64."""
        clip = Clip(self.name, self.samples, self.rate)
        (mel,) = log_mels([clip], hop_of([clip]))
        levels = np.round(np.clip(self.samples, -1, 1) * 32_767).astype("<i2")
        return {
            "name": self.name,
            "rate": self.rate,
            "seconds": self.seconds,
            "pcm": _text(levels.tobytes()),
            "mel": {"bands": len(mel), "db": _text(np.ascontiguousarray(mel.T).tobytes())},
            "words": [[word.start_s, word.end_s, word.label] for word in self.words],
        }

    def to_dict(self) -> dict[str, Any]:
        """The clip as JSON holds it, exact to the bit."""
        file = io.BytesIO()
        whole = np.round(self.samples * 32_768)
        is_16_bit = np.array_equal(whole / 32_768, self.samples) and np.abs(whole).max() < 32_768
        samples, kind = (whole.astype("i2"), "PCM_16") if is_16_bit else (self.samples, "FLOAT")
        soundfile.write(file, samples, self.rate, format="WAV", subtype=kind)
        words = [[word.start_s, word.end_s, word.label] for word in self.words]
        return {"name": self.name, "wav": _text(file.getvalue()), "words": words}

    @staticmethod
    def from_dict(model: HookedAudioTransformer, written: Any) -> Sound:
        """The clip that `to_dict` wrote.

        Raises:
            InputError, AudioError: what is no clip.
        """
        try:
            content = base64.b64decode(written["wav"], validate=True)
            words = [Span(float(a), float(b), str(label)) for a, b, label in written["words"]]
            name = str(written["name"])
        except (KeyError, TypeError, ValueError, binascii.Error) as error:
            raise InputError(f"a clip of the file cannot be read: {error!r}") from error
        return Sound.of(model, content, name, words)


def _longest(model: HookedAudioTransformer) -> float:
    return min(MOST_S, model.cfg.max_audio_s)


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()
