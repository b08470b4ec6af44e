"""The Python code that does what a session does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from audio_lens.edits import Block, Edit, Put, Scale
from audio_lens.errors import InputError
from audio_lens.explorer.touches import Stretch

if TYPE_CHECKING:
    from audio_lens.explorer.session import Session

MADE = {
    "silence": "silence = np.zeros_like(clip)",
    "noise": (
        "loudness = float(np.sqrt(np.mean(np.square(clip)))) or 0.05\n"
        "noise = loudness * np.random.default_rng(0).standard_normal(len(clip))\n"
        "noise = np.clip(noise, -1, 1).astype(np.float32)"
    ),
}


def python_code(session: Session) -> str:
    """Code that prints the same probabilities, with `Edit` objects.

    It reads the clips from files of their names; a recording has to be saved as one first.
    """
    sources = list(dict.fromkeys(t.by for t in session.touches if isinstance(t, Stretch)))
    pieces = [
        _imports(session, sources),
        _clips(session, sources),
        _question(session),
        _sound(session),
        _changes(session),
        _answers(session),
    ]
    return "\n\n".join(piece for piece in pieces if piece) + "\n"


def _imports(session: Session, sources: list[str]) -> str:
    names = ["HookedAudioTransformer", "metrics", "patching"]
    if session.edits:
        names += ["Edit", "edits"]
    if any(isinstance(t, Stretch) and t.is_sound for t in session.touches):
        names.append("corruptions")
    numpy = ["import numpy as np"] if sources else []
    listed = ", ".join(sorted(names, key=lambda name: (not name[0].isupper(), name)))
    return "\n".join([*numpy, "import torch", "", f"from audio_lens import {listed}"])


def _clips(session: Session, sources: list[str]) -> str:
    model = session.model
    lines = [
        f"model = HookedAudioTransformer.from_pretrained({model.cfg.model_name!r}, "
        f"dtype={model.dtype})",
        "rate = model.cfg.sampling_rate",
        f"clip = model.load_audio({session.clip.name!r}, None)",
    ]
    if "other" in sources and session.other is not None:
        lines += [
            f"other = model.load_audio({session.other.name!r}, None)[: len(clip)]",
            "other = np.pad(other, (0, len(clip) - len(other)))",
        ]
    return "\n".join([*lines, *(MADE[by] for by in sources if by in MADE)])


def _question(session: Session) -> str:
    options = "" if session.language is None else f", language={session.language!r}"
    return (
        "def asked(samples):\n"
        f"    return model.prepare(samples, text={session.question!r}, sampling_rate=rate{options})"
    )


def _sound(session: Session) -> str:
    lines = ["heard = clip"]
    for touch in session.touches:
        if isinstance(touch, Stretch) and touch.is_sound:
            span = f"({touch.start_s!r}, {touch.end_s!r})"
            lines.append(
                f"heard, _ = corruptions.OtherUtterance({touch.by}, rate, span={span})(heard, rate)"
            )
    return "\n".join(lines)


def _changes(session: Session) -> str:
    lines = []
    for touch in session.touches:
        edit = touch.edit(lambda stretch: _Named(f"asked({stretch.by})"))
        if edit is not None:
            lines += [f"    # {touch.label}", f"    {edit_code(edit)},"]
    return "\n".join(["changes = [", *lines, "]"]) if lines else "changes = []"


class _Named(str):
    """A source by the code that makes it."""

    def __repr__(self) -> str:
        return str(self)


def edit_code(edit: Edit) -> str:
    """An edit as Python writes it.

    Raises:
        InputError: an edit that no touch makes.
    """
    do = edit.do
    if isinstance(do, Scale):
        done = f"edits.Scale({do.g!r})"
    elif isinstance(do, Block):
        done = f"edits.Block({do.keys!r})"
    elif isinstance(do, Put):
        done = f"edits.Put({do.given!r})"
    else:
        raise InputError(f"the explorer writes no code for {edit}")
    options = {"layer": edit.layer, "head": edit.head}
    told = [f"{name}={value!r}" for name, value in options.items() if value is not None]
    told += [] if edit.where == "all" else [f"where={edit.where!r}"]
    return f"Edit({', '.join([repr(edit.site), done, *told])})"


def _answers(session: Session) -> str:
    options = [f"    {one.word!r}: metrics.prob({one.token})," for one in session.answers()]
    return "\n".join(
        [
            "answers = {",
            *options,
            "}",
            "for word, value in patching.run(model, asked(heard), changes, answers).items():",
            '    print(f"{word}: {value.item():.6f}")',
        ]
    )
