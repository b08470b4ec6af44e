"""The explorer in notebooks: the same page as a widget, and its session in Python."""

from __future__ import annotations

import functools
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audio_lens.errors import ExtraError, InputError
from audio_lens.explorer import markup, shared
from audio_lens.explorer.desk import Desk
from audio_lens.explorer.session import Session
from audio_lens.explorer.worker import Event

if TYPE_CHECKING:
    from audio_lens.models.base import HookedAudioTransformer


def explore(
    model: HookedAudioTransformer,
    clip: Any = None,
    question: str | None = None,
    *,
    other: Any = None,
    language: str | None = None,
    edits: str | Path | None = None,
) -> Any:
    """Touch a model in a notebook and hear it answer.

    The widget has the clip, the layer by time map, the heads and the answer's probabilities; what
    is done there can be read in Python, too: ``widget.session.edits``, ``widget.session.inputs``,
    ``widget.session.answers()``. ``audio-lens explore`` is the same as a page.

    Args:
        model: one that writes text token by token, or names a class.
        clip: a path, or what ``prepare`` takes as audio; None is a shipped one.
        question: what an audio LLM is asked; of Whisper, what it has written so far.
        other: another clip to take stretches from.
        language: what Whisper hears.
        edits: a file that the button Save wrote, in place of all of these.

    Returns:
        An anywidget; its ``session`` is a `Session`.

    Raises:
        InputError: a question that the model needs or does not take, edits beside a clip, a file
            that holds none, or a model that answers in another way.
        AudioError: a clip that cannot be used.
        ExtraError: without anywidget.
    """
    kind = _widget_class()
    return kind(started(model, clip, question, other=other, language=language, edits=edits))


def started(
    model: HookedAudioTransformer,
    clip: Any = None,
    question: str | None = None,
    *,
    other: Any = None,
    language: str | None = None,
    edits: str | Path | None = None,
) -> Session:
    """The session that is begun with; arguments and errors as of `explore`."""
    if edits is not None:
        if any(given is not None for given in (clip, question, other, language)):
            raise InputError("a file of edits holds clips and question: leave the others out")
        return shared.from_dict(model, shared.read(edits))
    if clip is None:
        return _shipped(model, question, other, language)
    return Session(model, clip, question, other, language)


def _shipped(
    model: HookedAudioTransformer, question: str | None, other: Any, language: str | None
) -> Session:
    """A clip that comes with the package, with its words and its counterpart."""
    from audio_lens.explorer.clips import Sound
    from audio_lens.models.embedded import default_pair

    pair = default_pair()
    clip = Sound.of(model, pair.clean, words=pair.words)
    beside = Sound.of(model, pair.corrupted, words=pair.corrupted_words) if other is None else other
    if question is None and model.takes_question:
        question = pair.question
    return Session(model, clip, question, beside, language)


@functools.cache
def _widget_class() -> type:
    """The widget; made when it is first needed, since anywidget may be missing.

    Raises:
        ExtraError: without anywidget.
    """
    try:
        import anywidget
    except ImportError as error:
        raise ExtraError(
            "the explorer in notebooks needs anywidget: pip install 'audio_lens[explore]'"
        ) from error

    class ExplorerWidget(anywidget.AnyWidget):
        """The explorer in a notebook.

        Attributes:
            session: what is seen there.
        """

        _esm = markup.script("widget.js")
        _css = markup.style()

        def __init__(self, session: Session):
            super().__init__()
            self.session = session
            self._desk = Desk(session, is_shared=True)
            self.on_msg(_Listener(self))

    return ExplorerWidget


class _Listener:
    """Takes messages of a widget; holds it loosely, so that a widget that is gone is freed."""

    def __init__(self, widget: Any):
        self._widget = weakref.ref(widget)

    def __call__(self, widget: Any, message: Any, buffers: list[Any]) -> None:
        asked = message.get("message") if isinstance(message, dict) else None
        number = message.get("number") if isinstance(message, dict) else None

        def reply(event: Event | None) -> None:
            there = self._widget()
            if there is not None:
                there.send({"number": number, "event": event})

        try:
            content = bytes(buffers[0]) if buffers else None
            widget._desk.ask(asked, reply, content)
        except InputError as error:
            reply({"event": "error", "message": str(error)})
            reply(None)
