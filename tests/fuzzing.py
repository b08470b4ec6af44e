"""Damages whole files and reads them: ``python tests/fuzzing.py KIND --seconds 60 --seed 0``.

Ends with 1, and what was given in hexadecimal, where anything but an error of the library comes
out. Rounds count the seed up until the time is over, so that a failure's own seed repeats it alone.
"""

from __future__ import annotations

import argparse
import faulthandler
import functools
import io
import json
import logging
import os
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import numpy as np
import soundfile
import torch
from hypothesis import strategies as st

from audio_lens import AudioLensError, HookedAudioTransformer, Span, read_textgrid
from audio_lens.audio import read
from audio_lens.patching import SweepResult, load
from audio_lens.patching.engine.checkpoint import Checkpoint

EXAMPLES = 200  # of a round
MOST_BYTES = 16 * 2**30  # of memory; what asks for more fails
MOST_S, HANGS_S = 10.0, 30.0  # of one file; what hangs ends the process
FORMATS = ("WAV", "FLAC", "OGG", "AIFF", "MP3", "AU", "CAF", "W64", "RF64", "NIST", "VOC")
STRANGE = (None, True, -1, 0, 1, 2, 3, 7, 1.5, -0.5, 2**31, 2**64, 1e300, float("nan"), "", "x")
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**36)

Reader = Callable[[Path], Any]


# -------------------------------------------------------------------------------- whole files


@functools.cache
def sound(format: str) -> bytes:
    """A tenth of a second."""
    file = io.BytesIO()
    soundfile.write(file, 0.5 * np.sin(np.arange(1_600) / 10), 16_000, format=format)
    return file.getvalue()


@functools.cache
def grid(is_short: bool) -> bytes:
    """A TextGrid of words, in either of its two forms."""
    head = 'File type = "ooTextFile"\nObject class = "TextGrid"\n\n'
    if is_short:
        rows = ['"IntervalTier"', '"words"', 0, 1, 2, 0, 0.5, '"seven"', 0.5, 1, '"two"']
        return (head + "\n".join(map(str, [0, 1, "<exists>", 1, *rows])) + "\n").encode()
    return (
        head + "xmin = 0\nxmax = 1\ntiers? <exists>\nsize = 1\nitem []:\n    item [1]:\n"
        '        class = "IntervalTier"\n        name = "words"\n        xmin = 0\n'
        "        xmax = 1\n        intervals: size = 2\n        intervals [1]:\n"
        '            xmin = 0\n            xmax = 0.5\n            text = "seven"\n'
        "        intervals [2]:\n            xmin = 0.5\n            xmax = 1\n"
        '            text = "two"\n'
    ).encode()


@functools.cache
def result() -> bytes:
    """A saved map."""
    coords = {"layer": [0, 1], "time": [Span(0.0, 0.5, "a"), Span(0.5, 1.0)]}
    ends = torch.tensor(1.0), torch.tensor(0.0)
    made = SweepResult(torch.ones(2, 2), ("layer", "time"), coords, *ends, "a.b", "denoise")
    with tempfile.TemporaryDirectory() as folder:
        return made.save(Path(folder) / "map.nc").read_bytes()


IDENTITY = {"model": "a", "cells": "b"}


@functools.cache
def sweep() -> bytes:
    """A checkpoint of a sweep."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.ckpt"
        Checkpoint(path, IDENTITY).save(torch.ones(1, 4), torch.ones(4) > 0, torch.ones(2, 1))
        return path.read_bytes()


@functools.cache
def checkpoint() -> Path:
    """The folder of the shipped model."""
    from audio_lens.models import embedded

    return Path(embedded.__file__).parent / "checkpoint"


# -------------------------------------------------------------------------------- damage


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """The file with a few bytes set, moved, doubled or cut; mostly near its head."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 6))):
        near = draw(st.sampled_from((64, 512, len(content))))
        at = draw(st.integers(0, max(0, min(near, len(content)) - 1)))
        kind = draw(st.sampled_from(("byte", "number", "cut", "insert", "drop", "double")))
        size = draw(st.integers(1, 8))
        if kind == "byte":
            content[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif kind == "number":
            order = draw(st.sampled_from(("little", "big")))
            number = draw(st.sampled_from(NUMBERS)) % 256**size
            content[at : at + size] = number.to_bytes(size, order)
        elif kind == "cut":
            del content[at:]
        elif kind == "insert":
            content[at:at] = draw(st.binary(min_size=1, max_size=16))
        elif kind == "drop":
            del content[at : at + size]
        else:
            content[at:at] = content[at : at + 64]
    return bytes(content)


@st.composite
def configs(draw: st.DrawFn) -> bytes:
    """The config of the shipped model, in which values were changed, dropped or added."""
    held = json.loads((checkpoint() / "config.json").read_text())
    for _ in range(draw(st.integers(1, 3))):
        place = held
        while nested := [key for key, one in place.items() if isinstance(one, dict)]:
            if not draw(st.booleans()):
                break
            place = place[draw(st.sampled_from(nested))]
        if not place:
            continue
        name = draw(st.sampled_from(sorted(place)))
        what = draw(st.sampled_from(("strange", "strange", "drop", "list", "nest")))
        if what == "drop":
            del place[name]
        else:
            value = draw(st.sampled_from(STRANGE))
            place[name] = {"strange": value, "list": [value], "nest": {name: value}}[what]
    text = json.dumps(held).encode()
    return draw(damaged(text)) if draw(st.integers(0, 9)) == 0 else text


# -------------------------------------------------------------------------------- reading


def read_sweep(path: Path) -> None:
    Checkpoint(path, IDENTITY).load(torch.ones(2, 1))


def read_config(path: Path) -> None:
    """Load the shipped model with this config."""
    folder = path.parent / "model"
    folder.mkdir(exist_ok=True)
    for file in checkpoint().iterdir():
        link = folder / file.name
        if file.name != "config.json" and not link.exists():
            link.symlink_to(file)
    (folder / "config.json").write_bytes(path.read_bytes())
    HookedAudioTransformer.from_pretrained(folder)


def read_broken(path: Path) -> float:
    return 1 / (len(path.read_bytes()) % 2)


KINDS: dict[str, tuple[st.SearchStrategy[bytes], Reader]] = {
    "sounds": (st.sampled_from(FORMATS).flatmap(lambda one: damaged(sound(one))), read),
    "textgrids": (st.booleans().flatmap(lambda short: damaged(grid(short))), read_textgrid),
    "results": (st.builds(result).flatmap(damaged), load),
    "sweeps": (st.builds(sweep).flatmap(damaged), read_sweep),
    "configs": (configs(), read_config),
    "broken": (st.binary(min_size=1), read_broken),
}


class Foreign(Exception):
    """Something else than an error of the library came out, or it took too long."""


def tried(content: bytes, path: Path, reader: Reader) -> bool:
    """Whether the file was refused.

    Raises:
        Foreign: what should not come out.
    """
    path.write_bytes(content)
    faulthandler.dump_traceback_later(HANGS_S, exit=True)
    started, is_refused = time.monotonic(), False
    try:
        reader(path)
    except AudioLensError:
        is_refused = True
    except Exception as error:
        raise Foreign(f"{traceback.format_exc()[-2000:]}") from error
    finally:
        faulthandler.cancel_dump_traceback_later()
    if time.monotonic() - started > MOST_S:
        raise Foreign(f"took {time.monotonic() - started:.1f} s")
    return is_refused


def one_round(kind: str, seed: int, path: Path, until: float) -> tuple[int, int]:
    """How many files were tried and how many refused, from one seed."""
    strategy, reader = KINDS[kind]
    counts = [0, 0]

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],  # no time goes into making a failure smaller
        suppress_health_check=list(hypothesis.HealthCheck),
        report_multiple_bugs=False,
    )
    @hypothesis.given(content=strategy)
    def test(content: bytes) -> None:
        if time.monotonic() > until:
            return
        counts[0] += 1
        counts[1] += tried(content, path, reader)

    test()
    return counts[0], counts[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    until, seed, n_tried, n_refused = time.monotonic() + asked.seconds, asked.seed, 0, 0
    faulthandler.enable()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "damaged"
        print(f"the file that is read: {path}", flush=True)  # it stays where a signal ends this
        while time.monotonic() < until:
            print(f"{asked.kind}, seed {seed}", flush=True)  # also where a signal ends it
            try:
                tried_now, refused_now = one_round(asked.kind, seed, path, until)
            except Foreign as error:
                print(f"{asked.kind}, seed {seed}: {error}\n{path.read_bytes().hex()[:20_000]}")
                return 1
            n_tried, n_refused, seed = n_tried + tried_now, n_refused + refused_now, seed + 1
    print(f"{asked.kind}: {n_tried} files, {n_refused} refused, seeds {asked.seed} to {seed - 1}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
