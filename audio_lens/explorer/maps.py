"""The maps of a session: what each layer and moment, and each head, does to the answer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens import metrics
from audio_lens.edits import Scale
from audio_lens.edits.edit import Laid
from audio_lens.errors import InputError
from audio_lens.explorer.touches import SOURCES
from audio_lens.hooks import DeadHookError
from audio_lens.patching.refine import streamed
from audio_lens.patching.result import SweepResult
from audio_lens.patching.spec import SweepSpec
from audio_lens.patching.sweep import sweep
from audio_lens.sites import Site

if TYPE_CHECKING:
    from audio_lens.explorer.session import Session

COARSE = 8  # windows of a clip in the first round
LEAST_WINDOW_S = 0.1
THRESHOLD = 0.05  # of the gap between clip and source: where windows are split
TOGETHER = 6  # cells between two pictures


@dataclass(frozen=True)
class LayerMap:
    """A map as it stands: what putting a source into one layer and stretch does to an answer.

    Attributes:
        spans: the windows in seconds, the narrowest known.
        change: of the answer's log-odds (in nats), ``layers x windows``; None where nothing is
            known yet. Log-odds are the logarithm of p / (1 - p): unlike probabilities they tell
            small effects apart where a model is sure.
        now: the log-odds that it changes.
    """

    part: str
    by: str
    token: int
    layers: list[int]
    spans: list[tuple[float, float]]
    change: list[list[float | None]]
    now: float


def layer_map(session: Session, part: str, by: str, token: int) -> Iterator[LayerMap]:
    """The map of a part, coarse at first, with the touches in force.

    Every cell is what touching that stretch and layer with `Stretch` would do. Between two pictures
    others may use the model.

    Raises:
        InputError: a part, source or token that there is not.
    """
    if part not in session.parts:
        raise InputError(f"a map is of {' or '.join(session.parts) or 'no part here'}: not {part}")
    if by not in SOURCES:
        raise InputError(f"a map puts in {', '.join(SOURCES)}; got {by!r}")
    token = session.check_token(token)
    laid = [Laid.of(session.model, edit) for edit in session.edits]
    hooks = [hook for one in laid for hook in one.hooks()]  # the same ones whenever it goes on
    pictures = streamed(session.model, _spec(session, part, by, token), TOGETHER)
    while (result := _next(session, hooks, pictures)) is not None:
        yield _read(result, part, by, token)


def _next(
    session: Session, hooks: list[Any], pictures: Iterator[SweepResult]
) -> SweepResult | None:
    """The next picture, made with the hooks attached; None behind the last."""
    result = None
    try:
        with session.model.hooks(hooks):
            result = next(pictures, None)
    except DeadHookError:
        if result is not None:
            raise
    return result  # behind the last, nothing ran that hooks could act on


def _spec(session: Session, part: str, by: str, token: int) -> SweepSpec:
    width = max(LEAST_WINDOW_S, session.clip.seconds / COARSE)
    return SweepSpec.of(
        session.model,
        clean=session.inputs,
        corrupted=session.source(by),
        site=f"{part}.resid_pre",
        axes=("layer", "time"),
        metric=log_odds(token),
        windows=width,
        direction="noise",
        refine=THRESHOLD,
    )


def _read(result: SweepResult, part: str, by: str, token: int) -> LayerMap:
    one = result.mean()
    now = float(one.clean)
    spans = [(float(span.start_s), float(span.end_s)) for span in one.coords["time"]]
    layers, change = list(one.coords["layer"]), _finite(one.values - now)
    return LayerMap(part, by, token, layers, spans, change, now)


def _finite(change: Float[Tensor, "rows columns"]) -> list[list[float | None]]:
    """Numbers for JSON; None where nothing is known, or an answer cannot be."""
    rows = change.tolist()
    return [[round(x, 6) if math.isfinite(x) else None for x in row] for row in rows]


@dataclass(frozen=True)
class HeadMap:
    """What turning off each head of a site does to an answer.

    Attributes:
        change: of the answer's log-odds (in nats), ``layers x heads``.
        now: the log-odds that it changes.
    """

    site: str
    token: int
    change: list[list[float | None]]
    now: float


def head_map(session: Session, site: str, token: int) -> HeadMap:
    """What turning off each head of a site does to an answer, with the touches in force.

    Raises:
        InputError, SiteError: a site or token that there is not.
    """
    token = session.check_token(token)
    Site.parse(f"{site}.z", session.model)
    with torch.no_grad(), session.in_force():
        result = sweep(
            session.model,
            clean=session.inputs,
            corrupted=session.inputs,
            site=f"{site}.z",
            axes=("layer", "head"),
            metric=log_odds(token),
            do=Scale(0.0),
            progress=False,
        ).mean()
    now = float(result.clean)
    return HeadMap(site, token, _finite(result.values - now), now)


def log_odds(token: int) -> metrics.Metric:
    """How much likelier an answer is than all others together, as a logarithm (nats)."""

    def of_rows(logits: Float[Tensor, "b v"]) -> Float[Tensor, " b"]:
        others = logits.clone()
        others[:, token] = -torch.inf
        return logits[:, token] - others.logsumexp(-1)

    return metrics.read_at(of_rows, name=f"log-odds of token {token}")
