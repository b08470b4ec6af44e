"""What the command line is given."""

from __future__ import annotations

from typing import Any

import numpy as np
from typer.testing import CliRunner

from audio_lens import AudioLensError
from audio_lens.cli import BAD_INPUT, app
from bad_input.world import Case, named, result, shipped, wav, written


class Refused(AudioLensError, ValueError):
    """A command that ended with the exit code of bad input and one line about it."""


def run(*arguments: Any) -> Any:
    done = CliRunner().invoke(app, [str(one) for one in arguments])
    if done.exit_code != BAD_INPUT:
        return done.output
    said = " ".join(done.stderr.translate(dict.fromkeys(map(ord, "╭─╮│╰╯"))).split())
    raise Refused(said.partition("Error ")[2] or said)


def _map(*arguments: Any) -> Any:
    return run("map", *arguments)


COMMANDS = {
    "map --window nan": lambda: _map("--window", "nan"),
    "map --window inf": lambda: _map("--window", "inf"),
    "map --window 1e-7": lambda: _map("--window", "1e-7"),
    "map --window -1": lambda: _map("--window", "-1"),
    "map --window wide": lambda: _map("--window", "wide"),
    "map --stride nan": lambda: _map("--stride", "nan"),
    "map --verify -1": lambda: _map("--verify", "-1"),
    "map --verify 1.5": lambda: _map("--verify", "1.5"),
    "map --site nothing": lambda: _map("--site", "nothing"),
    "map --axes depth": lambda: _map("--axes", "depth"),
    "map --axes layer,time,head": lambda: _map("--axes", "layer,time,head"),
    "map --direction up": lambda: _map("--direction", "up"),
    "map --answer ''": lambda: _map("--answer", ""),
    "map of the same answers": lambda: _map("--answer", "seven", "--against", "seven"),
    "map of a clip alone": lambda: _map("--clean", shipped().clean),
    "map of a clip that is not there": lambda: _map(
        "--clean", "a.wav", "--corrupted", "b.wav", "--answer", "a", "--against", "b"
    ),
    "map over its own clip": lambda: _map(
        "--clean", wav("own.wav", np.ones(16_000)), "--corrupted", shipped().corrupted,
        "--answer", "a", "--against", "b", "--out", "own.wav",
    ),
    "map to a folder that cannot be made": lambda: _map("--out", "/proc/nowhere/map.html"),
    "map with a model that is not there": lambda: _map("--model", "./nowhere"),
    "map with an unknown device": lambda: _map("--device", "nowhere"),
    "map with an unknown dtype": lambda: _map("--dtype", "float33"),
    "reproduce a file that is not there": lambda: run("reproduce", "nothing.nc"),
    "reproduce a text": lambda: run("reproduce", written("text.nc", "no result")),
    "reproduce a map of no recipe": lambda: run("reproduce", result().save("bare.nc")),
    "ask without a question": lambda: run("ask", shipped().clean, "--question", ""),
    "ask about a text": lambda: run("ask", written("text.wav", "no"), "--question", "what?"),
    "transcribe with a model that answers": lambda: run(
        "transcribe", shipped().clean, "--model", "embedded"
    ),
    "classify --top 0": lambda: run("classify", shipped().clean, "-m", "embedded", "--top", "0"),
    "attention --layer 99": lambda: run("attention", "--layer", "99"),
    "attention --head -99": lambda: run("attention", "--head", "-99"),
    "attention --site decoder.mlp": lambda: run("attention", "--site", "decoder.mlp"),
    "attention --textgrid of no clip": lambda: run("attention", "--textgrid", "a.TextGrid"),
    "lens --part head": lambda: run("lens", "--part", "head"),
    "lens --token of two tokens": lambda: run("lens", "--token", "seven two"),
    "info of a file": lambda: run("info", written("model.txt", "weights")),
}  # fmt: skip

CASES: list[Case] = named("The command line", COMMANDS)
