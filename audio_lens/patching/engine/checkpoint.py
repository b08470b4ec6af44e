"""What a sweep has computed so far, on disk, so that an interrupted one can go on."""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from audio_lens import files
from audio_lens.arguments import number, path_of
from audio_lens.errors import AudioLensError

EVERY_S = 2.0
log = logging.getLogger(__name__)


class CheckpointError(AudioLensError, ValueError):
    """A checkpoint that belongs to another sweep, or is none."""


class Checkpoint:
    """A file that holds the values of finished cells.

    Args:
        path: where; its folder must exist, and no device stand there.
        identity: what makes the sweep this one and no other; values of a file that says otherwise
            are never mixed in.
        every_s: seconds from one save to the next that `keep` makes.

    Attributes:
        failure: why the last save failed; None if it did not.

    Raises:
        CheckpointError: if there is no folder to write to.
        InputError: if ``every_s`` is no number of seconds.
    """

    def __init__(self, path: str | Path, identity: dict[str, str], every_s: float | int = EVERY_S):
        self.path, self.identity, self.every_s = path_of("checkpoint", path), identity, every_s
        self.failure: str | None = None
        self._due = -math.inf
        self._written: tuple[int, ...] | None = None
        number("checkpoint_every_s", every_s, least=0, unit="seconds")
        is_other = self.path.exists() and not self.path.is_file()
        if is_other or not self.path.parent.is_dir():
            raise CheckpointError(f"no file can be written at {self.path}")
        self._read()  # raises before any work

    def load(
        self, baselines: Float[Tensor, "runs ..."]
    ) -> tuple[Float[Tensor, "..."], Bool[Tensor, " cells"]] | None:
        """Values and which cells are finished; None where nothing was saved.

        Args:
            baselines: the metrics of both unpatched runs; others mean another model.

        Raises:
            CheckpointError: if the file holds another sweep, or none.
        """
        saved = self._read()
        if saved is None:
            return None
        before = saved["baselines"]
        if before.shape != baselines.shape:
            raise CheckpointError(f"{self.path} was made with other metrics or stimuli")
        if not torch.allclose(before, baselines, rtol=1e-3, atol=1e-6):
            raise CheckpointError(
                f"{self.path} was made with another model: clean and corrupted metrics were "
                f"{before.flatten().tolist()}, now {baselines.flatten().tolist()}"
            )
        return saved["values"], saved["done"]

    def _read(self) -> dict[str, Tensor] | None:
        """What was saved, of this sweep; None where nothing was.

        Raises:
            CheckpointError: if the file holds another sweep, or something else.
        """
        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                held = json.loads((file.metadata() or {}).get("identity", "{}"))
                saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if not isinstance(held, dict) or saved.keys() != {"values", "done", "baselines"}:
                raise CheckpointError("it holds something else")
        except Exception as error:
            raise CheckpointError(f"{self.path} is no checkpoint of a sweep: {error}") from error
        self._check_same(held)
        return saved

    def _check_same(self, held: dict[str, str]) -> None:
        """Raise unless a file's identity is this one.

        Raises:
            CheckpointError: naming what differs.
        """
        other = [key for key in self.identity if held.get(key) != self.identity[key]]
        if "weights" in other:
            raise CheckpointError(
                f"{self.path} was made with another model, or with other weights of this one: name "
                "another file, or delete it"
            )
        if other:
            raise CheckpointError(
                f"{self.path} belongs to another sweep ({', '.join(other)} differ): name another "
                "file, or delete it"
            )

    def save(
        self,
        values: Float[Tensor, "..."],
        done: Bool[Tensor, " cells"],
        baselines: Float[Tensor, "runs ..."],
    ) -> None:
        """Write everything; the old file stays until the new one is whole.

        What another process has written there since is kept, and taken over into ``values`` and
        ``done``.

        Raises:
            OutputError: if it cannot be written.
            CheckpointError: if another sweep's file has come to stand there.
        """
        with files.locked(self.path):
            if self._stamp() != self._written:
                held = self.load(baselines)
                if held is not None:
                    unite(values, done, *held)
            tensors = {"values": values, "done": done, "baselines": baselines}
            data = save(
                {name: x.contiguous() for name, x in tensors.items()},
                metadata={"identity": json.dumps(self.identity)},
            )
            files.write(self.path, data)
            self._written = self._stamp()

    def _stamp(self) -> tuple[int, ...] | None:
        """What tells the file that stands there from any other."""
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size

    def keep(
        self,
        values: Float[Tensor, "..."],
        done: Bool[Tensor, " cells"],
        baselines: Float[Tensor, "runs ..."],
        at_once: bool = False,
    ) -> None:
        """`save` if it is time to: the first call always is, and ``at_once``.

        A file that cannot be written stops no sweep: the log says so the first time, and
        `failure` does.
        """
        if not at_once and time.monotonic() < self._due:
            return
        failed_before = self.failure is not None
        try:
            self.save(values, done, baselines)
            self.failure = None
        except (files.OutputError, CheckpointError) as error:
            self.failure = f"what is done could not be kept: {error}"
            if not failed_before:
                log.warning("%s; the sweep goes on", self.failure)
        self._due = time.monotonic() + self.every_s


def unite(
    values: Float[Tensor, "..."],
    done: Bool[Tensor, " cells"],
    more: Float[Tensor, "..."],
    more_done: Bool[Tensor, " cells"],
) -> None:
    """Add, in place, the finished cells of another run that are not finished here."""
    new = more_done & ~done
    values[..., new] = more[..., new]
    done |= new
