"""Places: positions by name, wherever ``where=`` stands.

A place is one of

- ``"all"``, ``"audio"``, ``"text"``, ``"last"`` (the last position that holds something);
- a `Span` or ``(start_s, end_s)`` in seconds; a `Band` of Hz, where positions have frequencies;
- `Words`: an occurrence in the prompt's text;
- an index, a slice, a list of indices (from the end where negative), or a bool mask ``b t``;
- a list with one of these per prompt;
- ``a | b``, ``a - b`` and ``~a`` of these, of which one side must not be a plain Python value:
  ``Words("the audio") | "last"``, ``places.AUDIO - (0.0, 0.5)``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from audio_lens.combining import Combinable, Either, Outside, Without
from audio_lens.inputs import AudioInputs, InputError
from audio_lens.sites import Site
from audio_lens.timeline import NO_CLIP, Band, Span, Track

if TYPE_CHECKING:
    from audio_lens.models.base import HookedAudioTransformer

Name = Literal["all", "audio", "text", "last"]
Where = Any  # what the head of this file lists


@dataclass(frozen=True)
class Named(Combinable):
    """A place by its name, for ``|``, ``-`` and ``~``."""

    name: Name


ALL, AUDIO, TEXT, LAST = map(Named, get_args(Name))


@dataclass(frozen=True)
class Words(Combinable):
    """The tokens of an occurrence of some characters in the prompt's text.

    Tokens that hold any of the characters count, whatever the tokenizer makes of them. Special
    tokens (``<|audio_bos|>``) are no text, unless the characters occur nowhere else.

    Attributes:
        text: what to look for.
        occurrence: which one, from 0 on; "all" takes every one.
    """

    text: str
    occurrence: int | Literal["all"] = 0

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise InputError("Words need some text to look for")


def locate(
    model: HookedAudioTransformer,
    inputs: AudioInputs | Mapping[str, Any],
    site: str | Site,
    where: Where,
) -> Bool[Tensor, "b t"]:
    """The positions of a site that a place holds; rows of the batch may be unequal.

    One row per prompt, or per segment of a clip where these run through the part one by one
    (encoders and connectors). "audio" at keys and values of cross-attention, which lie on the
    encoder's positions, is what cross-attention reads.

    Args:
        site: ``part.activation``, as in `patching.sweep`.
        where: a place; see `audio_lens.places`. Padding is in none but in bool masks.

    Raises:
        SiteError: no such site.
        InputError: no place, or one that selects nothing in some prompt.
    """
    site = Site.parse(site, model) if isinstance(site, str) else site
    return Ground.of(model, model.as_inputs(inputs), site.positions_of).held(where)


@dataclass(frozen=True, eq=False)
class Ground:
    """The positions of a part, on which places are looked for.

    Attributes:
        tracks: one per entry of the part's batch axis, `prompts` the prompt of each.
        n_written: how many of the last positions the model has written behind its prompts.
    """

    model: HookedAudioTransformer
    inputs: AudioInputs
    part: str
    tracks: tuple[Track, ...]
    prompts: tuple[int, ...]
    n_written: int = 0

    @staticmethod
    def of(model: HookedAudioTransformer, inputs: AudioInputs, part: str) -> Ground:
        """The ground of a part, in some inputs.

        Raises:
            ValueError: no such part.
        """
        found = [
            (row, track)
            for row, own in enumerate(model.timeline(inputs).rows)
            for track in own.segments(part)
        ]
        return Ground(model, inputs, part, tuple(t for _, t in found), tuple(n for n, _ in found))

    def grown(self, count: int) -> Ground:
        """The same with so many positions behind the prompts, which the model has written."""
        nan, none = torch.full((count,), torch.nan), torch.full((count,), NO_CLIP)
        written = Track(nan.double(), none, torch.ones(count, dtype=torch.bool))
        bare = (replace(track, hertz=None) for track in self.tracks)
        tracks = tuple(Track.joined([track, written]) for track in bare)
        return replace(self, tracks=tracks, n_written=count) if count else self

    @functools.cached_property
    def valid(self) -> Bool[Tensor, "b t"]:
        """Which positions hold something."""
        return torch.stack([track.valid for track in self.tracks])

    @functools.cached_property
    def is_audio(self) -> Bool[Tensor, "b t"]:
        """Which positions hold audio."""
        return self.valid & torch.stack([track.clip != NO_CLIP for track in self.tracks])

    @property
    def n_positions(self) -> int:
        """Positions of an entry, padding included."""
        return self.valid.shape[1]

    @property
    def n_prompts(self) -> int:
        return len(self.inputs)

    def held(self, where: Where) -> Bool[Tensor, "b t"]:
        """The positions of a place.

        Raises:
            InputError: no place, or one that selects nothing in some prompt.
        """
        mask = self.mask(where)
        if self.n_written:  # prompts were looked at when they were read
            return mask
        found = torch.zeros(self.n_prompts, dtype=torch.bool)
        found[torch.tensor(self.prompts)[mask.any(1)]] = True
        if not found.all():
            row = int((~found).nonzero()[0])
            raise InputError(
                f"{described(where)} selects no position of the {self.part} in prompt {row}"
                f"{self._hint(where)}"
            )
        return mask

    def _hint(self, where: Where) -> str:
        if "audio" in (where, getattr(where, "name", None)) and self.model.decoder_needs_encoder:
            return (
                "; audio reaches this decoder by cross-attention: choose a site there, like "
                f"{self.part}.cross_attn.k or {self.part}.cross_attn.attn_scores"
            )
        return ""

    def mask(self, where: Where) -> Bool[Tensor, "b t"]:
        """The positions of a place; a prompt may have none.

        Raises:
            InputError: no place, or one that does not fit these inputs.
        """
        if isinstance(where, (Either, Without, Outside)):
            return self._joined(where)
        if isinstance(where, Named):
            return self._named(where.name)
        if isinstance(where, str):
            return self._named(where)
        if isinstance(where, Words):
            return self._words(where)
        if isinstance(where, (Span, tuple)):
            return self._inside(_span(where))
        if isinstance(where, Band):
            return torch.stack([track.within(where) for track in self.tracks])
        if isinstance(where, torch.Tensor) and where.dtype == torch.bool:
            return self._given(where)
        if isinstance(where, (int, slice, torch.Tensor)) and not isinstance(where, bool):
            return self._indexed(where)
        if isinstance(where, Sequence) and len(where):
            is_index = all(isinstance(one, int) and not isinstance(one, bool) for one in where)
            return self._indexed(list(where)) if is_index else self._by_prompt(where)
        raise InputError(f"{where!r} is no place: {_FORMS}")

    def _joined(self, where: Either | Without | Outside) -> Bool[Tensor, "b t"]:
        if isinstance(where, Outside):
            return self.valid & ~self.mask(where.place)
        one, other = self.mask(where.one), self.mask(where.other)
        return one | other if isinstance(where, Either) else one & ~other

    def _named(self, name: str) -> Bool[Tensor, "b t"]:
        if name == "all":
            return self.valid
        if name == "audio":
            return self.is_audio
        if name == "text":
            return self.valid & ~self.is_audio
        if name != "last":
            raise InputError(f"no place is named {name!r}: {_FORMS}")
        later = self.valid.flip(1).cumsum(1).flip(1)
        return self.valid & (later == 1)

    def _inside(self, span: Span) -> Bool[Tensor, "b t"]:
        if not any(torch.isfinite(track.seconds).any() for track in self.tracks):
            raise InputError(f"positions of the {self.part} have no time: {span} cannot be found")
        return torch.stack([track.inside(span) for track in self.tracks])

    def _given(self, mask: Tensor) -> Bool[Tensor, "b t"]:
        expected = (len(self.tracks), self.n_positions - self.n_written)
        if mask.ndim != 2 or mask.shape[1] != expected[1] or len(mask) not in (1, self._base):
            raise InputError(
                f"a mask of the {self.part} is {expected[0]} by {expected[1]} here, not "
                f"{' by '.join(map(str, mask.shape))}"
            )
        mask = mask.cpu().repeat(expected[0] // len(mask), 1)
        return torch.nn.functional.pad(mask, (0, self.n_written))

    @property
    def _base(self) -> int:
        """Entries of one copy of the batch."""
        return len(self.tracks) // self.inputs.copies

    def _indexed(self, index: int | slice | list[int] | Tensor) -> Bool[Tensor, "b t"]:
        """Indices count positions of the prompt."""
        n_prompt = self.n_positions - self.n_written
        chosen = torch.zeros(self.n_positions, dtype=torch.bool)
        try:
            at = index if isinstance(index, (int, slice)) else torch.as_tensor(index)
            chosen[:n_prompt][at] = True
        except (IndexError, TypeError) as error:
            raise InputError(
                f"the {self.part} has {n_prompt} positions here, which {index} does not fit"
            ) from error
        return self.valid & chosen

    def _by_prompt(self, places: Sequence[Where]) -> Bool[Tensor, "b t"]:
        count = self.n_prompts // self.inputs.copies
        if len(places) != count:
            raise InputError(
                f"a list of {len(places)} places goes with {len(places)} prompts; here are {count}"
            )
        mask = torch.zeros_like(self.valid)
        for entry, prompt in enumerate(self.prompts):
            own = replace(self, tracks=(self.tracks[entry],), prompts=(prompt,))
            mask[entry] = own._of_one(places[prompt % count])[0]
        return mask

    def _of_one(self, where: Where) -> Bool[Tensor, "1 t"]:
        if isinstance(where, torch.Tensor) and where.dtype == torch.bool and where.ndim == 1:
            return self._given(where[None])
        return self.mask(where)

    # ---------------------------------------------------------------- words

    def _words(self, words: Words) -> Bool[Tensor, "b t"]:
        tokens, tokenizer = self._tokens(), self.model.need_tokenizer(f"{words}")
        mask = torch.zeros_like(self.valid)
        for entry, prompt in enumerate(self.prompts):
            is_text = (self.valid & ~self.is_audio)[entry, : tokens.shape[1]]
            index = is_text.nonzero()[:, 0]
            ids = tokens[prompt].cpu()[index].tolist()
            special = getattr(tokenizer, "all_special_ids", ())
            is_special = [one in special for one in ids]
            text, spans = characters(tokenizer.decode, ids)
            found = _occurrence(words, prompt, text, spans, is_special)
            mask[entry, index[list(found)]] = True
        return mask

    def _tokens(self) -> Int[Tensor, "b t"]:
        """The tokens that stand at the positions.

        Raises:
            InputError: a part whose positions hold none.
        """
        if self.part == "encoder" and not self.inputs.features.is_floating_point():
            return self.inputs.features  # an encoder that reads text
        tokens = self.model.text_of(self.inputs) if self.part == "decoder" else None
        if tokens is None:
            raise InputError(f"positions of the {self.part} hold no words: choose others")
        return tokens


_FORMS = (
    "one is 'all', 'audio', 'text' or 'last', a Span or (start_s, end_s), a Band, Words, an index, "
    "a slice, a list of indices, a bool mask, a list of these per prompt, or a | b, a - b, ~a of "
    "them"
)


def described(where: Where) -> str:
    """A place for people."""
    if isinstance(where, Named):
        return repr(where.name)
    if isinstance(where, Either):
        return f"{described(where.one)} | {described(where.other)}"
    if isinstance(where, Without):
        return f"{described(where.one)} - {described(where.other)}"
    if isinstance(where, Outside):
        return f"~({described(where.place)})"
    if isinstance(where, Words):
        return f"the words {where.text!r}"
    if isinstance(where, Band):
        return f"the band {where}"
    if isinstance(where, (Span, tuple)):
        span = _span(where)
        return f"the window {span.start_s:g} to {span.end_s:g} s"
    return "the mask" if isinstance(where, torch.Tensor) else repr(where)


def _span(where: Span | tuple) -> Span:
    try:
        return Span.of(where)
    except ValueError as error:
        raise InputError(f"{where!r} is no place: {_FORMS} ({error})") from error


def characters(decode: Callable[..., str], ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    """The text of some tokens, and from where to where in it each token reaches.

    Tokens that share a character (pieces of its bytes) all reach over it.
    """
    ends, text = [0], ""
    for count in range(1, len(ids) + 1):
        # pieces of a character come out as U+FFFD until its last one is there
        text = decode(list(ids[:count]), skip_special_tokens=False)
        ends.append(max(ends[-1], len(text.rstrip("\N{REPLACEMENT CHARACTER}"))))
    ends[-1] = max(ends[-1], len(text))
    reach, nearest = [0] * len(ids), ends[-1]
    for n in reversed(range(len(ids))):
        nearest = ends[n + 1] if ends[n + 1] > ends[n] else nearest
        reach[n] = nearest
    return text, list(zip(ends[:-1], reach, strict=True))


def _occurrence(
    words: Words,
    prompt: int,
    text: str,
    spans: list[tuple[int, int]],
    is_special: Sequence[bool],
) -> list[int]:
    """The tokens of the occurrences asked for."""

    def touched(start: int) -> list[int]:
        stop = start + len(words.text)
        return [n for n, (first, last) in enumerate(spans) if first < stop and start < last]

    found = [touched(start) for start in _starts(words.text, text)]
    plain = [tokens for tokens in found if not any(is_special[n] for n in tokens)]
    found, nth = plain or found, words.occurrence
    wanted = found if nth == "all" else found[nth : nth + 1 or None]
    if not wanted:
        often = f"only {len(found)} times " if found else "not "
        raise InputError(f"{words.text!r} is {often}in the text of prompt {prompt}: {text!r}")
    return sorted({token for tokens in wanted for token in tokens})


def _starts(part: str, text: str) -> Iterator[int]:
    at = text.find(part)
    while at >= 0:
        yield at
        at = text.find(part, at + 1)
