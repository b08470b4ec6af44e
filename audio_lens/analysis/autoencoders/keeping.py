"""What training writes down on its way, and goes on from, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from audio_lens import files
from audio_lens.analysis.autoencoders.autoencoder import Autoencoder
from audio_lens.analysis.autoencoders.learning import Learner, Setting
from audio_lens.analysis.autoencoders.rows import Stream
from audio_lens.errors import InputError

STATE = "training."  # begins the names of tensors that only training needs
STREAM = ("epoch", "pool", "offset")


def keep(
    path: Path,
    made: Autoencoder,
    learner: Learner | None,
    asked: Mapping[str, Any],
    stream: Stream,
) -> None:
    """Write the autoencoder so far, and what its training goes on from; None where it has ended.

    Raises:
        OutputError: a file that cannot be written; the old one stays.
    """
    head = {"asked": json.dumps(asked)}
    if learner is None:
        files.write(path, made.packed({}, head))
        return
    held, numbers = learner.state()
    at = {name: getattr(stream, name) for name in STREAM}
    head |= {"numbers": json.dumps(numbers), "stream": json.dumps(at)}
    files.write(path, made.packed({f"{STATE}{name}": x for name, x in held.items()}, head))


@dataclass(frozen=True)
class Kept:
    """What a file holds of a run.

    Attributes:
        made: the autoencoder so far.
        is_whole: whether the run has ended.
    """

    made: Autoencoder
    is_whole: bool
    held: Mapping[str, Tensor] = field(repr=False)
    numbers: Mapping[str, float] = field(default_factory=dict)
    stream: Mapping[str, int] = field(default_factory=dict)

    @staticmethod
    def read(path: Path, asked: Mapping[str, Any], device: Any = None) -> Kept | None:
        """What a file holds of this run; None where there is no file.

        Raises:
            InputError: a file of another run, naming what differs, or of none.
        """
        if not path.exists():
            return None
        made = Autoencoder.load(path)
        with safe_open(str(path), "pt", device=str(device or "cpu")) as file:
            head = file.metadata()
            names = [name for name in file.keys() if name.startswith(STATE)]  # noqa: SIM118
            held = {name.removeprefix(STATE): file.get_tensor(name) for name in names}
        there = json.loads(head.get("asked", "{}"))
        odd = sorted(name for name in {*asked, *there} if asked.get(name) != there.get(name))
        if odd:
            raise InputError(
                f"{path} holds an autoencoder of another run (other {', '.join(odd)}): name "
                "another file, or read it with Autoencoder.load"
            )
        numbers, stream = (json.loads(head.get(name, "{}")) for name in ("numbers", "stream"))
        return Kept(made, not held, held, numbers, stream)

    def learner(self, setting: Setting, stream: Stream) -> Learner:
        """The run on its way again, with the stream where it stood."""
        for name in STREAM:
            setattr(stream, name, self.stream[name])
        learner = Learner.again(setting, self.held, self.numbers)
        learner.history = {name: list(x) for name, x in self.made.history.items()}
        return learner
