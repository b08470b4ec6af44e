"""The gap between what is heard and what is read, by sequence and along the path of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from audio_lens.analysis.modality_gap.aligning import cosines, distances, paths
from audio_lens.analysis.modality_gap.forms import TEMPLATE, Forms, Said, Spoken
from audio_lens.analysis.modality_gap.projecting import project
from audio_lens.errors import InputError
from audio_lens.items import Items, analysis, found, method, statistics
from audio_lens.items.collect import Place
from audio_lens.models import HookedAudioTransformer
from audio_lens.progress import track
from audio_lens.results import Result

OTHER, SHUFFLED = "other_item", "shuffled"
CONTROLS = (OTHER, SHUFFLED)
SEQUENCE = ("cosine", "distance")
TOKENS = ("path_score", "path_distance", "best_score", "slope")
IN_WORD = "in_word"
CANNOT = (
    "States that point one way are alike whatever they are of: read every number against that of "
    "another item's words. Near states need not be used alike."
)


@method("modality_gap.gap")
def gap(
    model: HookedAudioTransformer,
    items: Items,
    *,
    words: Said = None,
    template: str = TEMPLATE,
    site: str = "decoder.resid_post",
    layers: Sequence[int] | None = None,
    where: Place = "audio",
    controls: Sequence[str] = CONTROLS,
    by: str | None = None,
    size: int = 8,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """How near the states of words that are heard are to those of the same words read, by layer.

    The written form of an item is text alone, ``template`` with its words in it. Metrics of the
    sequence: "cosine" and "distance" of the means over all positions. Of tokens, along the path
    that dynamic time warping finds through all cosines (2510.12116): "path_score" (the alignment
    path score) and "path_distance", means along it; "best_score", the mean over tokens of the
    cosine of their best frame, in any order; "slope", tokens for each frame; and, where words have
    times, "in_word": the share of the path's steps whose frame lies inside their token's word.

    Args:
        model: an audio LLM, which reads text alone as well.
        items: with what is said in them.
        words: what that is: a label, or a function of the item; None takes the label "transcript",
            else the labels of ``words``.
        template: the written form, with {words} and the item's {text}.
        site: ``decoder.activation``.
        layers: of it; None takes all.
        where: the words' place in the spoken form.
        controls: "other_item", the path to the words of another item, and "shuffled", to the same
            tokens in random order.
        by: a label whose values are drawn in place of items for intervals, such as "group".
        size: of the batches.
        seed: of the controls and intervals.
        progress: as in `patching.sweep`.

    Raises:
        SiteError, InputError: a site that has no vectors at the decoder's positions, a model that
            reads no text alone, a template without words, a control that is none.
        ItemError: items without words, or that the model does not take in writing.
        ControlError: items that all say the same, for "other_item".
    """
    if odd := [name for name in controls if name not in CONTROLS]:
        raise InputError(f"no control {odd[0]!r}; there is {', '.join(CONTROLS)}")
    forms = Forms.of(model, items, words, template, site, layers, where)
    running = _Running(forms, list(controls), seed)
    values = running.measured(size, progress)
    axes = {"metric": running.metrics, "layer": forms.layers}

    def of(name: str) -> Result:
        return found(values[name], axes, items, by=by, seed=seed)

    result = of("own")
    result.controls = {name: of(name) for name in controls}
    result.meta |= {
        "title": f"words heard and read at {forms.site}",
        "value": "value",
        "template": template,
    }
    result.report = [*_told(result), CANNOT]
    return result


@dataclass(frozen=True)
class _Running:
    """The measures of all items, and of their controls."""

    forms: Forms
    controls: list[str]
    seed: int

    @cached_property
    def others(self) -> Int[Tensor, " n"]:
        return statistics.other_item(len(self.forms.items), self.forms.said, seed=self.seed)

    @cached_property
    def owners(self) -> list[Int[Tensor, " tokens"] | None]:
        return [self.forms.owners(row) for row in range(len(self.forms.items))]

    @property
    def metrics(self) -> list[str]:
        timed = any(owner is not None for owner in self.owners)
        return [*SEQUENCE, *TOKENS, *([IN_WORD] if timed else [])]

    def measured(
        self, size: int, progress: bool | None
    ) -> dict[str, Float[Tensor, "n metrics layers"]]:
        count = len(self.forms.items)
        if OTHER in self.controls:
            _ = self.others  # raises before anything runs
        shape = (count, len(self.metrics), len(self.forms.layers))
        values = {
            name: torch.full(shape, torch.nan, dtype=torch.float64)
            for name in ("own", *self.controls)
        }
        with track("modality gap", count, "items", show=progress) as advance:
            done = 0
            for batch in self.forms.items.batches(self.forms.model, size):
                _, heard = self.forms.spoken(batch)
                for row, spoken in zip(batch.rows, heard, strict=True):
                    for name, text, owner in self._texts(row):
                        values[name][row] = self._scores(text, spoken, row, owner)
                done += len(batch)
                advance(len(batch), done)
        return values

    def _texts(
        self, row: int
    ) -> Iterator[tuple[str, Float[Tensor, "layers tokens d"], Int[Tensor, " tokens"] | None]]:
        """What is read, of the item itself and of its controls, and whose word each token is."""
        own, owner = self.forms.read(row), self.owners[row]
        yield "own", own, owner
        if OTHER in self.controls:
            yield OTHER, self.forms.read(int(self.others[row])), None
        if SHUFFLED in self.controls and own.shape[1] > 1:
            generator = torch.Generator().manual_seed(self.seed + row)
            order = torch.randperm(own.shape[1], generator=generator)
            yield SHUFFLED, own[:, order], None if owner is None else owner[order]

    def _scores(
        self,
        text: Float[Tensor, "layers tokens d"],
        spoken: Spoken,
        row: int,
        owner: Int[Tensor, " tokens"] | None,
    ) -> Float[Tensor, "metrics layers"]:
        speech = spoken.states
        one, other = text.double().mean(1), speech.double().mean(1)
        similar, far = cosines(text, speech).cpu(), distances(text, speech).cpu()
        ways = paths(similar)
        scores = [
            torch.cosine_similarity(one, other, dim=-1).cpu(),
            (one - other).norm(dim=-1).cpu(),
            torch.tensor([way.mean(x) for way, x in zip(ways, similar, strict=True)]),
            torch.tensor([way.mean(x) for way, x in zip(ways, far, strict=True)]),
            similar.amax(2).mean(1),
            torch.tensor([way.slope for way in ways]),
        ]
        if IN_WORD in self.metrics:
            inside = self._inside(spoken, row, owner, text.shape[1])
            scores.append(torch.tensor([way.mean(inside) for way in ways]))
        return torch.stack([score.double() for score in scores])

    def _inside(
        self, spoken: Spoken, row: int, owner: Int[Tensor, " tokens"] | None, n_tokens: int
    ) -> Float[Tensor, "tokens frames"]:
        """1 where a frame lies in the word of a token; NaN where nobody knows."""
        if owner is None:
            return torch.full((n_tokens, len(spoken.seconds)), torch.nan)
        words = self.forms.items[row].words
        begin, end = (
            torch.tensor([getattr(words[int(n)], name) for n in owner])[:, None]
            for name in ("start_s", "end_s")
        )
        return ((spoken.seconds >= begin) & (spoken.seconds < end)).double()


def _told(result: Result) -> Iterator[str]:
    layers = result.coords["layer"]
    for metric in ("cosine", "path_score", IN_WORD):
        if metric not in result.coords["metric"]:
            continue
        one = result.select(metric=metric)
        means = one.mean().values
        top = int(means.nan_to_num(nan=-1).argmax())
        beside = [
            f"{name} {float(control.mean().values[top]):.3f}"
            for name, control in one.controls.items()
            if bool(control.mean().values[top].isfinite())
        ]
        told = f" ({', '.join(beside)})" if beside else ""
        yield (
            f"{metric} is highest at layer {layers[top]}: {float(means[top]):.3f}{told}; in the "
            f"last, {float(means[-1]):.3f}."
        )


@analysis("modality_gap")
def study(
    model: HookedAudioTransformer, items: Items, *, seed: int = 0, progress: bool | None = None
) -> dict[str, Result]:
    """How near are words heard to the same words read, and does moving them nearer help?"""
    options: dict[str, Any] = {"seed": seed, "progress": progress}
    return {"gap": gap(model, items, **options), "project": project(model, items, **options)}
