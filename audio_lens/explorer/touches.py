"""Touches: what one does to a clip and a model on the page, as plain data and as edits."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from audio_lens.arguments import number, whole
from audio_lens.edits import Block, Edit, Put, Scale
from audio_lens.edits.do import Number
from audio_lens.errors import InputError
from audio_lens.sites import Site, unit_count
from audio_lens.timeline import Seconds

if TYPE_CHECKING:
    from audio_lens.models.base import HookedAudioTransformer

SOURCES = ("silence", "noise", "other")
LONGEST_S = 24 * 3600.0
MOST_SCALE = 100.0
SHOWN = {
    "silence": "silenced",
    "noise": "replaced by noise",
    "other": "taken from the other clip",
}


# what a stretch of a layer is taken from, as `edits.Put` takes it
Sources = Callable[["Stretch"], Any]


@dataclass(frozen=True)
class Touch(ABC):
    """One thing done to the clip or the model."""

    kind: ClassVar[str]

    @abstractmethod
    def check(self, model: HookedAudioTransformer) -> None:
        """Raise for what the model does not have.

        Raises:
            InputError, SiteError: saying what there is.
        """

    @abstractmethod
    def edit(self, sources: Sources) -> Edit | None:
        """The edit of the model; None where the sound is changed instead."""

    @property
    @abstractmethod
    def label(self) -> str:
        """What is done, in words."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it; `touch_of` reads it."""
        return {"kind": self.kind, **asdict(self)}


@dataclass(frozen=True)
class Stretch(Touch):
    """Seconds of the clip are replaced: in the sound, or in the stream that enters a layer.

    Attributes:
        by: "silence", "noise" (as loud as the clip) or "other" (the other clip at these seconds).
            In a layer the stream is put in that a whole clip of it has there.
        part: "encoder", "decoder" ...; None is the sound itself.
        layer: whose incoming stream; None with the sound.
    """

    start_s: Seconds
    end_s: Seconds
    by: str = "silence"
    part: str | None = None
    layer: int | None = None
    kind: ClassVar[str] = "stretch"

    def __post_init__(self) -> None:
        _check_span(self.start_s, self.end_s)
        _check_choice("by", self.by, SOURCES)
        if (self.part is None) != (self.layer is None):
            raise InputError("a stretch of a layer names part= and layer=, one of the sound none")

    @property
    def is_sound(self) -> bool:
        """Whether the sound itself is changed."""
        return self.part is None

    def check(self, model: HookedAudioTransformer) -> None:
        if self.part is not None:
            _check_layer(Site.parse(f"{self.part}.resid_pre", model), self.layer)

    def edit(self, sources: Sources) -> Edit | None:
        if self.part is None:
            return None
        place = (self.start_s, self.end_s)
        return Edit(f"{self.part}.resid_pre", Put(sources(self)), layer=self.layer, where=place)

    @property
    def label(self) -> str:
        where = "in the sound" if self.is_sound else f"entering {self.part} layer {self.layer}"
        return f"{_seconds(self.start_s, self.end_s)} {SHOWN[self.by]}, {where}"


@dataclass(frozen=True)
class Head(Touch):
    """What an attention head gives is multiplied: by 0 it is off.

    Attributes:
        site: of its attention: "decoder.attn", "decoder.cross_attn", "encoder.attn" ...
    """

    site: str
    layer: int
    head: int
    g: Number = 0.0
    kind: ClassVar[str] = "head"

    def __post_init__(self) -> None:
        number("g", self.g, least=-MOST_SCALE, most=MOST_SCALE)

    def check(self, model: HookedAudioTransformer) -> None:
        _check_head(model, self.site, self.layer, self.head)

    def edit(self, sources: Sources) -> Edit:
        return Edit(f"{self.site}.z", Scale(self.g), layer=self.layer, head=self.head)

    @property
    def label(self) -> str:
        done = "off" if self.g == 0 else f"times {self.g:g}"
        return f"{_head(self.site, self.layer, self.head)} {done}"


@dataclass(frozen=True)
class Deafened(Touch):
    """A head may not attend to the audio, or to a stretch of it.

    In a language model the text's other keys share what the audio had. Where nothing but audio can
    be attended to (cross-attention, an encoder), nothing takes the place of the whole.

    Attributes:
        start_s, end_s: the stretch; None for all audio.
    """

    site: str
    layer: int
    head: int
    start_s: Seconds | None = None
    end_s: Seconds | None = None
    kind: ClassVar[str] = "deafened"

    def __post_init__(self) -> None:
        if (self.start_s is None) != (self.end_s is None):
            raise InputError("a stretch has start_s= and end_s=; all audio has neither")
        if self.start_s is not None:
            _check_span(self.start_s, self.end_s)

    def check(self, model: HookedAudioTransformer) -> None:
        _check_head(model, self.site, self.layer, self.head)

    def edit(self, sources: Sources) -> Edit:
        keys = "audio" if self.start_s is None else (self.start_s, self.end_s)
        shares = self.start_s is not None or self._has_text
        at = "attn_scores" if shares else "pattern"
        where = "text" if self._has_text else "all"
        site = f"{self.site}.{at}"
        return Edit(site, Block(keys), layer=self.layer, head=self.head, where=where)

    @property
    def _has_text(self) -> bool:
        """Whether text is attended to beside the audio."""
        return self.site == "decoder.attn"

    @property
    def label(self) -> str:
        to = "the audio" if self.start_s is None else _seconds(self.start_s, self.end_s or 0.0)
        return f"{_head(self.site, self.layer, self.head)} deaf to {to}"


KINDS: dict[str, type[Touch]] = {kind.kind: kind for kind in (Stretch, Head, Deafened)}


def touch_of(written: Any) -> Touch:
    """The touch that `Touch.to_dict` wrote.

    Raises:
        InputError: what is none, naming what is wrong with it.
    """
    if not isinstance(written, Mapping) or written.get("kind") not in KINDS:
        raise InputError(f"a touch has a kind, one of {', '.join(KINDS)}; got {written!r:.200}")
    kind = KINDS[written["kind"]]
    given = {name: value for name, value in written.items() if name != "kind"}
    known = {field.name: str(field.type) for field in fields(kind)}  # type: ignore[arg-type]
    if unknown := given.keys() - known.keys():
        raise InputError(f"a {kind.kind} has {', '.join(known)}; got {', '.join(unknown)}")
    for name, value in given.items():
        _check_type(name, value, known[name])
    try:
        return kind(**given)
    except TypeError as error:
        raise InputError(f"a {kind.kind} lacks something: {error}") from error


def _check_type(name: str, value: Any, wanted: str) -> None:
    if value is None and "None" in wanted:
        return
    if wanted.startswith("int"):
        whole(name, value)
    elif wanted.startswith(("Seconds", "Number")):
        number(name, value)
    elif not isinstance(value, str):
        raise InputError(f"{name} is text, got {value!r:.100}")


def _check_span(start_s: Seconds, end_s: Seconds | None) -> None:
    number("start_s", start_s, least=0, most=LONGEST_S, unit="seconds")
    number("end_s", end_s, least=0, most=LONGEST_S, unit="seconds")
    if not math.isfinite(start_s) or end_s is None or end_s <= start_s:
        raise InputError(f"a stretch ends behind its start: got {start_s} to {end_s} s")


def _check_choice(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InputError(f"{name} is one of {', '.join(known)}; got {value!r}")


def _check_layer(site: Site, layer: int | None) -> None:
    if layer is None or site.n_layers is None or not 0 <= layer < site.n_layers:
        raise InputError(f"{site} has layers 0 to {(site.n_layers or 1) - 1}; got {layer}")


def _check_head(model: HookedAudioTransformer, name: str, layer: int, head: int) -> None:
    site = Site.parse(f"{name}.z", model)
    _check_layer(site, layer)
    count = unit_count(model, site)
    if not 0 <= head < count:
        raise InputError(f"{name} has heads 0 to {count - 1}; got {head}")


def _seconds(start_s: Seconds, end_s: Seconds | None) -> str:
    return f"{start_s:.2f}\N{EN DASH}{end_s:.2f} s"


def _head(site: str, layer: int, head: int) -> str:
    return f"{site.replace('.attn', '').replace('.cross_attn', ' cross')} head {layer}.{head}"
