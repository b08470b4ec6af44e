"""The explorer: clips, questions, touches, files of edits, and its command."""

from __future__ import annotations

from typing import Any

from audio_lens import explorer
from audio_lens.explorer import Deafened, Head, Session, Stretch
from audio_lens.explorer.server import Explorer
from bad_input.commands import run
from bad_input.world import Case, model, named, shipped, written


def _session(**options: Any) -> Session:
    given: dict[str, Any] = {"clip": shipped().clean, "question": shipped().question}
    return Session(model(), **(given | options))


EXPLORED = {
    "a session without a question": lambda: _session(question=None),
    "a session of a number for a question": lambda: _session(question=3),
    "a session of a clip that is not there": lambda: _session(clip="nothing.wav"),
    "a session in a language": lambda: _session(language="en"),
    "a stretch that ends before it starts": lambda: Stretch(1.0, 0.5),
    "a stretch by music": lambda: Stretch(0.0, 0.5, "music"),
    "a stretch of a part without a layer": lambda: Stretch(0.0, 0.5, "silence", "decoder"),
    "a stretch of the other clip, where there is none": lambda: _session().touch(
        Stretch(0.0, 0.5, "other")
    ),
    "a stretch behind the clip": lambda: _session().touch(Stretch(50.0, 51.0)),
    "a stretch of layer 9": lambda: _session().touch(Stretch(0.0, 0.5, "silence", "decoder", 9)),
    "a head of cross-attention, where there is none": lambda: _session().touch(
        Head("decoder.cross_attn", 0, 0)
    ),
    "head 9": lambda: _session().touch(Head("decoder.attn", 0, 9)),
    "a head times NaN": lambda: Head("decoder.attn", 0, 0, float("nan")),
    "a head deaf to half a stretch": lambda: Deafened("decoder.attn", 0, 0, 0.5),
    "a touch of no kind": lambda: explorer.touch_of({"layer": 1}),
    "a touch taken off an empty stack": lambda: _session().drop(0),
    "a map of a part that is not there": lambda: next(
        explorer.layer_map(_session(), "ear", "silence", 1)
    ),
    "explore of edits beside a clip": lambda: explorer.explore(
        model(), shipped().clean, edits="edits.json"
    ),
    "explore of edits that are none": lambda: explorer.explore(
        model(), edits=written("none.json", "[]")
    ),
    "a server at port 70000": lambda: Explorer(_session(), 70_000),
    "explore of a clip that is not there (command)": lambda: run("explore", "nothing.wav"),
    "explore --edits of a file that is not there": lambda: run("explore", "--edits", "lost.json"),
    "explore --edits beside a clip": lambda: run(
        "explore", shipped().clean, "--edits", written("some.json", "{}")
    ),
    "explore --port 70000": lambda: run("explore", "--port", "70000"),
    "explore with a model that is not there": lambda: run("explore", "--model", "./nowhere"),
}

CASES: list[Case] = named("The explorer", EXPLORED)
