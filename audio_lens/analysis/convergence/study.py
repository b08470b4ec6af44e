"""Measures that the library knows of a model over items, and their test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from audio_lens.analysis.convergence.measure import Measure
from audio_lens.analysis.convergence.testing import agreement, change_points
from audio_lens.analysis.encoder_lens.lens import encoder_lens
from audio_lens.analysis.encoder_lens.streams import check_readable, site_of_streams
from audio_lens.analysis.grounding.residence import residence
from audio_lens.analysis.grounding.streams import check as check_conflicts
from audio_lens.analysis.logit_lens.scores import information, probability
from audio_lens.analysis.similarity.comparing import shape
from audio_lens.arguments import listed, suggest
from audio_lens.errors import InputError
from audio_lens.items import ItemError, Items, analysis, method
from audio_lens.models import HookedAudioTransformer
from audio_lens.models.layers import needed
from audio_lens.results import Result

ENCODER, DECODER = "encoder", "decoder"


@method(
    "convergence.converge",
    whole="it compares curves of all items: make studies of the methods that measure them",
)
def converge(
    model: HookedAudioTransformer,
    items: Items,
    names: Sequence[str] | None = None,
    *,
    by: str | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """Do several measures of one part of a model change at the same depth? See `agreement`.

    Args:
        model: the model.
        items: with answers.
        names: of `MEASURES`; None takes all that can be had of this model and these items.
        by: a label whose values are drawn in place of items for intervals, such as "group".
        seed: of whatever is drawn.
        progress: as in `patching.sweep`.

    Raises:
        InputError: a measure that is none, or no two of one part.
        ItemError: measures that the items do not have what for.
        As the methods that measure.
    """
    return agreement(measures(model, items, names, by=by, seed=seed, progress=progress), seed=seed)


def measures(
    model: HookedAudioTransformer,
    items: Items,
    names: Sequence[str] | None = None,
    *,
    by: str | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> list[Measure]:
    """The measures that `converge` takes, for others beside them.

    Raises:
        As `converge`.
    """
    run = _Run(model, items, by, seed, progress)
    if names is None:
        return [known.make(run) for known in MEASURES.values() if _can_be_had(known, run)]
    asked = listed("names", names, str, "names")
    if odd := [name for name in asked if name not in MEASURES]:
        raise InputError(f"no measure {odd[0]!r}; {suggest(odd[0], MEASURES)}")
    for name in asked:
        MEASURES[name].check(run)
    return [MEASURES[name].make(run) for name in asked]


@dataclass(frozen=True)
class _Run:
    """What measures are made of."""

    model: HookedAudioTransformer
    items: Items
    by: str | None
    seed: int
    progress: bool | None

    def of(self, result: Result, name: str, part: str, done: int) -> Measure:
        """What a method found, as a measure."""
        groups = None
        if self.by is not None:
            values = self.items.values(self.by)
            by_id = {item.id: one for item, one in zip(self.items, values, strict=True)}
            groups = [by_id[one] for one in result.coords["stimulus"]]
        n_layers = needed(getattr(self.model.cfg, part), f"{name} is of a part that is not there")
        return Measure.of(result, name, part, n_layers.n_layers, done=done, groups=groups)

    @property
    def options(self) -> dict[str, Any]:
        return {"seed": self.seed, "progress": self.progress}

    @cached_property
    def shapes(self) -> Result:
        return shape(self.model, self.items, controls=False, **self.options)

    # ---------------------------------------------------------------- what can be had

    def check_encoder(self) -> None:
        if not site_of_streams(self.model).startswith(ENCODER):
            raise InputError(f"{self.model.cfg.family} has no encoder with blocks")

    def check_read(self) -> None:
        check_readable(self.model)
        self.items.check_answers(self.model)

    def check_written(self) -> None:
        if self.model.cfg.decoder is None or self.model.cfg.output_kind != "tokens":
            raise InputError(f"{self.model.cfg.family} has no decoder that writes tokens")
        self.items.check_answers(self.model)

    def check_counterparts(self) -> None:
        self.check_written()
        check_conflicts(self.model, self.items, ["audio"])

    # ---------------------------------------------------------------- the measures

    def right(self) -> Measure:
        """What of its answers the decoder makes of each stream of the encoder."""
        read = encoder_lens(self.model, self.items, reads="answers", controls=False, **self.options)
        return self.of(read.select(metric="right"), "encoder_right", ENCODER, 0)

    def norm(self) -> Measure:
        """How long what leaves a block of the encoder is."""
        return self.of(self.shapes.select(metric="norm"), "encoder_norm", ENCODER, 1)

    def near_last(self) -> Measure:
        """How near what leaves a block of the encoder is to what leaves the last."""
        near = self.shapes.select(metric="cosine_to_last")
        return self.of(near, "encoder_cosine_to_last", ENCODER, 1)

    def information(self) -> Measure:
        """Whether the answer is the likeliest option by the logit lens."""
        read = information(self.model, self.items, **self.options)
        return self.of(read, "lens_information", DECODER, 0)

    def probability(self) -> Measure:
        """How likely the answer is by the logit lens."""
        read = probability(self.model, self.items, **self.options)
        return self.of(read, "lens_probability", DECODER, 0)

    def patched(self) -> Measure:
        """What of the audio's news the last position holds, in the metric's units."""
        moved = residence(self.model, self.items, streams=["audio"], controls=[], **self.options)
        last = moved.select(stream="audio", group="last")
        gap = moved.controls["gap"].select(stream="audio").values
        return self.of(
            replace(last, values=last.values * gap[:, None]), "patching_last", DECODER, 0
        )


@dataclass(frozen=True)
class Known:
    """A measure that can be had of some models and items.

    Attributes:
        make: it.
        check: raises where it cannot be had.
    """

    make: Callable[[_Run], Measure]
    check: Callable[[_Run], None]


MEASURES: dict[str, Known] = {
    "encoder_right": Known(_Run.right, _Run.check_read),
    "encoder_norm": Known(_Run.norm, _Run.check_encoder),
    "encoder_cosine_to_last": Known(_Run.near_last, _Run.check_encoder),
    "lens_information": Known(_Run.information, _Run.check_written),
    "lens_probability": Known(_Run.probability, _Run.check_written),
    "patching_last": Known(_Run.patched, _Run.check_counterparts),
}


def _can_be_had(known: Known, run: _Run) -> bool:
    try:
        known.check(run)
    except (InputError, ItemError):
        return False
    return True


# -------------------------------------------------------------------------------- the command


@analysis("convergence")
def study(
    model: HookedAudioTransformer, items: Items, *, seed: int = 0, progress: bool | None = None
) -> dict[str, Result]:
    """Do measures of one part of the model change at the same depth, more than by chance?"""
    held = measures(model, items, seed=seed, progress=progress)
    return {
        "agreement": agreement(held, seed=seed),
        "change_points": change_points(held, seed=seed),
    }
