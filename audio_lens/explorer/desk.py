"""What a page may ask of its session, in messages and events: the same over HTTP and in notebooks.

A message is ``{"do": name, "session": id, ...}``, an event ``{"event": name, ...}``.
"""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from audio_lens.errors import InputError
from audio_lens.explorer import shared
from audio_lens.explorer.clips import Sound
from audio_lens.explorer.code import python_code
from audio_lens.explorer.heads import Listening, attention_sites, listening
from audio_lens.explorer.maps import head_map, layer_map
from audio_lens.explorer.session import Session
from audio_lens.explorer.touches import touch_of
from audio_lens.explorer.worker import Event, Job, Worker, shared_worker
from audio_lens.sites import Site, unit_count

MOST_SESSIONS = 16
BESIDE = ("map", "head_map", "said", "heads")  # what is asked anew whenever touches change

Message = dict[str, Any]


@dataclass(eq=False)
class Seat:
    """A tab: its session, and what was read for it last."""

    session: Session
    drawn: Sound | None = None  # as the tab has it
    listening: Listening | None = None


class Desk:
    """Takes messages from tabs, each with a session of its own.

    Args:
        start: what every tab starts with.
        is_shared: whether all tabs have this very session, as in a notebook.
        most_sessions: how many tabs are kept; the one that was used least lately goes.
    """

    def __init__(
        self,
        start: Session,
        is_shared: bool = False,
        most_sessions: int = MOST_SESSIONS,
        worker: Worker | None = None,
    ):
        self.start, self.is_shared, self.most_sessions = start, is_shared, most_sessions
        self.worker = worker or shared_worker()
        self._seats: OrderedDict[str, Seat] = OrderedDict()

    def ask(
        self, message: Any, reply: Callable[[Event | None], None], content: bytes | None = None
    ) -> Job:
        """Have a message answered by events, and None at the end, in the worker's thread.

        Raises:
            InputError: a message that is none.
        """
        do, seat = self._checked(message)
        handler = getattr(self, f"_do_{do}")
        steps = handler(message) if content is None else handler(message, content)
        is_beside = do in BESIDE
        job = Job(steps, reply, (seat, do) if is_beside else None, not is_beside)
        if do in CHANGES:
            self.worker.cancel(lambda key: key[0] == seat)
        self.worker.submit(job)
        return job

    def _checked(self, message: Any) -> tuple[str, str]:
        if not isinstance(message, dict) or not hasattr(self, f"_do_{message.get('do')}"):
            raise InputError("a message says what to do")
        seat = message.get("session", "")
        if not isinstance(seat, str):
            raise InputError("a session is named by text")
        return message["do"], seat

    def __len__(self) -> int:
        """How many tabs there are."""
        return len(self._seats)

    # ---------------------------------------------------------------- in the worker's thread

    def _seat(self, message: Message) -> Seat:
        name = message.get("session", "")
        if name not in self._seats:
            raise InputError(
                f"this tab was put away, since {self.most_sessions} newer ones are open: reload it"
            )
        self._seats.move_to_end(name)
        return self._seats[name]

    def _do_open(self, message: Message) -> Iterator[Event]:
        session = self.start if self.is_shared else self.start.fork()
        yield from self._taken(session, secrets.token_hex(8))

    def _taken(self, session: Session, name: str) -> Iterator[Event]:
        """A session takes a seat."""
        self._seats[name] = Seat(session)
        self._seats.move_to_end(name)
        while len(self._seats) > self.most_sessions:
            self._seats.popitem(last=False)
        yield {"event": "opened", "session": name}
        yield _scene(session)
        yield from _told(self._seats[name])

    def _do_load(self, message: Message) -> Iterator[Event]:
        seat = self._seat(message)
        session = shared.from_dict(seat.session.model, message.get("written"))
        if self.is_shared:
            session = seat.session.become(session)
        yield from self._taken(session, message["session"])

    def _do_clip(self, message: Message, content: bytes = b"") -> Iterator[Event]:
        seat = self._seat(message)
        name = _file_name(message.get("name"))
        if message.get("which") == "other":
            seat.session.hear_beside(content, name)
        else:
            seat.session.hear(content, name)
        yield _scene(seat.session)
        yield from _told(seat)

    def _do_ask(self, message: Message) -> Iterator[Event]:
        seat = self._seat(message)
        seat.session.ask(message.get("question"))
        yield _scene(seat.session)
        yield from _told(seat)

    def _do_touch(self, message: Message) -> Iterator[Event]:
        seat, began = self._seat(message), time.perf_counter()
        seat.session.touch(touch_of(message.get("touch")), message.get("at"))
        yield from _told(seat, began)

    def _do_drop(self, message: Message) -> Iterator[Event]:
        seat, began = self._seat(message), time.perf_counter()
        seat.session.drop(message.get("at"))  # type: ignore[arg-type]  # checked there
        yield from _told(seat, began)

    def _do_undo(self, message: Message) -> Iterator[Event]:
        seat, began = self._seat(message), time.perf_counter()
        seat.session.undo()
        yield from _told(seat, began)

    def _do_redo(self, message: Message) -> Iterator[Event]:
        seat, began = self._seat(message), time.perf_counter()
        seat.session.redo()
        yield from _told(seat, began)

    def _do_clear(self, message: Message) -> Iterator[Event]:
        seat, began = self._seat(message), time.perf_counter()
        seat.session.clear()
        yield from _told(seat, began)

    def _do_said(self, message: Message) -> Iterator[Event]:
        yield {"event": "said", "text": self._seat(message).session.said()}

    def _do_map(self, message: Message) -> Iterator[Event]:
        session = self._seat(message).session
        asked = [message.get(name) for name in ("part", "by", "token")]
        for picture in layer_map(session, *asked):  # type: ignore[arg-type]  # checked there
            yield {"event": "map", **asdict(picture)}
        yield {"event": "map_done"}

    def _do_heads(self, message: Message) -> Iterator[Event]:
        seat = self._seat(message)
        seat.listening = listening(seat.session, _text(message, "site"))
        yield {"event": "heads", **seat.listening.summary()}
        if message.get("layer") is not None:
            yield from self._do_head(message)

    def _do_head(self, message: Message) -> Iterator[Event]:
        seat, site = self._seat(message), _text(message, "site")
        if seat.listening is None or seat.listening.site != site:
            seat.listening = listening(seat.session, site)
        layer, head = message.get("layer"), message.get("head")
        found = seat.listening.of_head(layer, head)  # type: ignore[arg-type]  # checked there
        yield {"event": "head", "site": site, "layer": layer, "head": head, **found}

    def _do_head_map(self, message: Message) -> Iterator[Event]:
        session, site = self._seat(message).session, _text(message, "site")
        found = head_map(session, site, message.get("token"))  # type: ignore[arg-type]
        yield {"event": "head_map", **asdict(found)}

    def _do_other(self, message: Message) -> Iterator[Event]:
        session = self._seat(message).session
        if session.other is None:
            raise InputError("there is no other clip: choose one first")
        yield {"event": "other", **session.other.drawn()}

    def _do_code(self, message: Message) -> Iterator[Event]:
        yield {"event": "code", "text": python_code(self._seat(message).session)}

    def _do_save(self, message: Message) -> Iterator[Event]:
        yield {"event": "file", "written": shared.to_dict(self._seat(message).session)}


CHANGES = ("load", "clip", "ask", "touch", "drop", "undo", "redo", "clear")


def _scene(session: Session) -> Event:
    """What a tab needs to know of model, clips and question."""
    model = session.model
    sites = []
    for site in attention_sites(session):
        at = Site.parse(f"{site}.z", model)
        sites.append({"site": site, "layers": at.n_layers, "heads": unit_count(model, at)})
    return {
        "event": "scene",
        "model": model.cfg.model_name,
        "question": session.question or "",
        "takes_text": "decoder" in model.cfg.parts,
        "is_asked": model.takes_question,
        "clip": session.clip.name,
        "other": None if session.other is None else session.other.name,
        "parts": {part: model.cfg.parts[part].n_layers for part in session.parts},
        "sites": sites,
    }


def _told(seat: Seat, began: float | None = None) -> Iterator[Event]:
    """What touches and answers are now; the sound where it is another."""
    session = seat.session
    answers = [asdict(one) for one in session.answers()]
    spent = None if began is None else round(1000 * (time.perf_counter() - began), 1)
    yield {
        "event": "state",
        "touches": [touch.to_dict() | {"label": touch.label} for touch in session.touches],
        "answers": answers,
        "can_undo": session.can_undo,
        "can_redo": session.can_redo,
        "ms": spent,
    }
    if seat.drawn is not session.heard:
        seat.drawn = session.heard
        yield {"event": "sound", **session.heard.drawn()}


def _text(message: Message, name: str) -> str:
    value = message.get(name)
    if not isinstance(value, str):
        raise InputError(f"{name} is text, got {value!r:.100}")
    return value


def _file_name(given: Any) -> str:
    """A name that code can hold, without folders."""
    name = str(given or "clip.wav").replace("\\", "/").rpartition("/")[2]
    return "".join(c for c in name if c.isprintable())[:100] or "clip.wav"
