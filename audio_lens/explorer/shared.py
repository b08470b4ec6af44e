"""A session as a file, which anyone with the model can open again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audio_lens import files
from audio_lens.errors import InputError
from audio_lens.explorer.clips import Sound
from audio_lens.explorer.session import Session
from audio_lens.explorer.touches import touch_of

if TYPE_CHECKING:
    from audio_lens.models.base import HookedAudioTransformer

FORM = 1
NAME = "audio_lens explorer"


def to_dict(session: Session) -> dict[str, Any]:
    """Clips, question and touches as JSON holds them."""
    return {
        "written_by": NAME,
        "form": FORM,
        "model": session.model.cfg.model_name,
        "question": session.question,
        "language": session.language,
        "touches": [touch.to_dict() for touch in session.touches],
        "clip": session.clip.to_dict(),
        "other": None if session.other is None else session.other.to_dict(),
    }


def from_dict(model: HookedAudioTransformer, written: Any) -> Session:
    """The session that `to_dict` wrote.

    Raises:
        InputError: what is none, or one of another model.
        AudioError: a clip that cannot be used.
    """
    check_form(written)
    if written["model"] != model.cfg.model_name:
        raise InputError(
            f"these edits are of {written['model']}, and the model here is {model.cfg.model_name}: "
            "open them with --model"
        )
    other = written["other"]
    return Session(
        model,
        Sound.from_dict(model, written["clip"]),
        written["question"],
        None if other is None else Sound.from_dict(model, other),
        written["language"],
        [touch_of(touch) for touch in written["touches"]],
    )


def check_form(written: Any) -> None:
    """Raise for what is no file of edits.

    Raises:
        InputError: saying so.
    """
    kinds = {"model": str, "touches": list, "clip": dict}
    optional = {"question": str, "language": str, "other": dict}
    is_ours = isinstance(written, dict) and written.get("written_by") == NAME
    if not is_ours or written.get("form") != FORM:
        raise InputError(
            "this is no file of edits of the explorer (its button Save writes one), or one of "
            "another version"
        )
    for name, kind in (kinds | optional).items():
        value = written.get(name)
        if not isinstance(value, kind) and not (value is None and name in optional):
            raise InputError(f"a file of edits lacks {name!r}, or holds something else there")
        written.setdefault(name, None)


def save(session: Session, path: str | Path) -> Path:
    """Write a session to a JSON file, its clips inside.

    Raises:
        OutputError: a file that cannot be written.
    """
    return files.write(path, json.dumps(to_dict(session)).encode())


def read(path: str | Path) -> dict[str, Any]:
    """What a file of edits holds, checked; `from_dict` opens it with a model.

    Raises:
        InputError: a file that is not there or is none.
    """
    try:
        written = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a file of edits: {error}") from error
    check_form(written)
    return written
