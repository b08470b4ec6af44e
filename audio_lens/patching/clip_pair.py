"""Two sound files and what is asked about them: inputs that can be made again."""

from __future__ import annotations

import hashlib
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from audio_lens.errors import AudioLensError
from audio_lens.inputs import AudioInputs, InputError
from audio_lens.sound_files import seconds

if TYPE_CHECKING:
    from audio_lens.models.base import HookedAudioTransformer


class ChangedFileError(AudioLensError, ValueError):
    """A file that a map was made with is gone, or holds something else now."""


@dataclass(frozen=True)
class ClipPair:
    """A clean and a corrupted sound file, with the question or language of both.

    Attributes:
        clean, corrupted: the files.
        question: what an audio LLM is asked.
        language: what Whisper hears; None finds it.
    """

    clean: Path
    corrupted: Path
    question: str | None = None
    language: str | None = None

    def check_options(self, model: HookedAudioTransformer) -> None:
        """Raise for a question or language that the model does not take.

        Raises:
            InputError: naming it.
        """
        name = model.cfg.model_name
        if model.takes_question and self.language is not None:
            raise InputError(f"{name} answers questions and takes no language: leave it out")
        if not model.takes_question and self.question is not None:
            raise InputError(f"{name} takes no question: leave it out")
        language_options(model, self.language)

    @property
    def seconds(self) -> tuple[float, float]:
        """How long the two clips are, as their files say."""
        return seconds(self.clean), seconds(self.corrupted)

    def inputs(self, model: HookedAudioTransformer) -> tuple[AudioInputs, AudioInputs]:
        """Inputs of both clips with the same text; the shorter is lengthened with silence.

        Raises:
            AudioError: a file that cannot be used.
            InputError: a question or language the model does not take, or clips too long for it.
        """
        self.check_options(model)
        rate = model.cfg.sampling_rate
        clips = [model.load_audio(path, None) for path in (self.clean, self.corrupted)]
        longest = max(map(len, clips))
        clean, corrupted = (np.pad(clip, (0, longest - len(clip))) for clip in clips)
        options = language_options(model, self.language)
        made = model.prepare(clean, text=self.question, sampling_rate=rate, **options)
        return made, made.with_audio(corrupted, sampling_rate=rate)

    def record(self) -> dict[str, Any]:
        """What `from_record` reads: paths, hashes of the files, and what is asked."""
        files = {
            name: {"path": str(path.resolve()), "sha256": _sha256(path)}
            for name, path in (("clean", self.clean), ("corrupted", self.corrupted))
        }
        return files | {"question": self.question, "language": self.language}

    @staticmethod
    def from_record(record: dict[str, Any], **moved: Path | None) -> ClipPair:
        """The pair that was recorded, if its files still hold the same.

        Args:
            record: what `record` gave.
            moved: where "clean" or "corrupted" lies now, if elsewhere.

        Raises:
            ChangedFileError: a file that is gone, or holds something else.
        """
        paths = {}
        for name in ("clean", "corrupted"):
            path = Path(moved.get(name) or record[name]["path"])
            if not path.is_file():
                raise ChangedFileError(
                    f"the {name} clip is not at {path} any more: say where it is ({name}=)"
                )
            if _sha256(path) != record[name]["sha256"]:
                raise ChangedFileError(
                    f"{path} is not the {name} clip the map was made with (the hash of the file "
                    f"differs): say where the original is ({name}=), or make a new map"
                )
            paths[name] = path
        return ClipPair(**paths, question=record["question"], language=record["language"])


def language_options(model: HookedAudioTransformer, language: str | None) -> dict[str, str | None]:
    """The language as an option of `prepare`, for models that take one.

    Raises:
        InputError: if one is named and the model takes none.
    """
    if "language" in inspect.signature(model.prepare).parameters:
        return {"language": language}
    if language is not None:
        raise InputError(f"{model.cfg.model_name} takes no language: leave it out")
    return {}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
