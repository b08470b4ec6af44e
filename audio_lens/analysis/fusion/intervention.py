"""IRI: late layers are given again what the layers that carry the answer wrote (2511.05923)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens import metrics
from audio_lens.analysis.fusion.grid import fcct
from audio_lens.analysis.fusion.plans import COMPONENTS, TAKERS, Plan, edits_of, plans_of
from audio_lens.analysis.fusion.recovery import clean_of, metrics_of_part, need_decoder
from audio_lens.arguments import listed, number
from audio_lens.items import Items, Pairs, found, measured, method
from audio_lens.items.batches import Batch
from audio_lens.items.measuring import Cell
from audio_lens.models import HookedAudioTransformer
from audio_lens.results import Result

AXES = ("lambda_attn", "lambda_mlp")
LAMBDAS = (0.0, 0.1, 0.2, 0.4)
RIGHT, SAID = "right", "said"


@method("fusion.iri", whole="it chooses on one part of all items")
def iri(
    model: HookedAudioTransformer,
    items: Items | Pairs,
    *,
    lambdas: Sequence[float] = LAMBDAS,
    givers: int | None = None,
    takers: int = TAKERS,
    share: float = 0.5,
    split: str = "group",
    metric: Any = None,
    by: str | None = None,
    size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """Whether more answers are right where late layers are given the evidence again (2511.05923).

    On one part of the items, recoveries of attention and MLP outputs at the last token (`fcct`)
    choose the layers, and accuracy chooses both lambdas; the other part, all of it, is then
    answered under the edits (`enrichment`).

    Args:
        model: a model with a decoder.
        items: items, or pairs for the recoveries; answers are those of the clean clips.
        lambdas: what is tried of both; 0 is tried always.
        givers, takers: as in `enrichment`.
        share: of the items that are answered in the end.
        split: the label that is on one side only, besides the group.
        metric: as in `items.measured`.
        by, size, seed, progress: as in `trace`.

    Returns:
        The gain over the unedited run in "right" (the share of right answers) and in each metric,
        by item, lambda_attn and lambda_mlp. ``meta`` names the lambdas that were chosen. Controls:
        "identity" is both lambdas 0, "random_sites" gives from other layers with the same weights.

    Raises:
        InputError: lambdas that are none or negative, or items in which no layer recovers anything.
        ItemError: items that cannot be split, or as in `trace`.
        ControlError: too few layers to give from others.
    """
    need_decoder(model)
    tried = _tried(lambdas)
    chosen_on, held_out = items.split(split, share, seed)
    grid = fcct(
        model,
        chosen_on,
        components=COMPONENTS,
        groups={"last": "last"},
        metric=metrics_of_part(metric, items, chosen_on),
        controls=(),
        size=size,
        seed=seed,
        progress=progress,
    )
    plans = plans_of(grid, givers, takers)
    others = [plan.elsewhere(len(grid.coords["layer"]), seed) for plan in plans]
    here, there = (
        _answered(model, part, given, tried, metrics_of_part(metric, items, part), size, progress)
        for part, given in ((chosen_on, [plans]), (held_out, [plans, others]))
    )
    at = here.best()
    result = there.told({"by": by, "seed": seed}, at, len(here.items))
    result.report += [*_said(result, at, there), _chosen(here, at), *map(str, plans)]
    return result


def _tried(lambdas: Sequence[float]) -> list[float]:
    """In order, and 0 among them."""
    given = listed("lambdas", lambdas, object, "numbers")
    return sorted({0.0, *(float(number("lambdas", one, least=0)) for one in given)})


@dataclass(frozen=True)
class _Answers:
    """The metrics of items, unedited and under the edits of some plans.

    Attributes:
        values: unedited, then all lambdas of the first plans, of the second ...
        tried: what each lambda was.
    """

    items: Items
    metrics: list[str]
    values: Float[Tensor, "n metrics cells"]
    tried: list[float]

    @property
    def before(self) -> float:
        """The share of right answers, unedited."""
        return float(self.values[:, 0, 0].mean())

    def gains(self, number: int) -> Float[Tensor, "n metrics attn mlp"]:
        """What is gained over the unedited run by the plans of a number."""
        gained = self.values[..., 1:] - self.values[..., :1]
        return gained.unflatten(-1, (-1, len(self.tried), len(self.tried)))[:, :, number]

    def best(self) -> dict[str, float]:
        """The lambdas with most right answers; of equal ones, by the first metric, the smallest."""
        means = self.gains(0)[:, :2].mean(0).flatten(1)
        best = max(range(means.shape[1]), key=lambda n: means[:, n].tolist())
        return dict(zip(AXES, list(itertools.product(self.tried, self.tried))[best], strict=True))

    def told(self, drawn: Mapping[str, Any], at: Mapping[str, float], n_before: int) -> Result:
        """The gains beside those of the controls: lambdas of 0, and the second plans."""
        axes = {"metric": self.metrics, **dict.fromkeys(AXES, self.tried)}
        own = self.gains(0)
        identity = found(own[..., 0, 0], {"metric": self.metrics}, self.items, **drawn)
        elsewhere = found(self.gains(1), axes, self.items, **drawn)
        return found(
            own,
            axes,
            self.items,
            controls={"identity": identity, "random_sites": elsewhere},
            dropped={"layers and lambdas were chosen on them": n_before},
            meta={name: f"{value:g}" for name, value in at.items()},
            **drawn,
        )


def _answered(
    model: HookedAudioTransformer,
    part: Items | Pairs,
    several: Sequence[Sequence[Plan]],
    tried: Sequence[float],
    metric: Any,
    size: int,
    progress: bool | None,
) -> _Answers:
    items = clean_of(part)
    items.check_answers(model)
    wanted = items.metrics(model) if metric is None else metric
    said = metrics.read_at(lambda rows: rows.argmax(-1).double(), name=SAID)

    def cells(batch: Batch) -> Iterator[Cell]:
        yield batch.inputs, []
        for plans in several:
            for lambdas in itertools.product(tried, tried):
                yield batch.inputs, edits_of(plans, lambdas)

    runs = measured(
        model, items, cells, {SAID: said, **wanted}, size=size, what="answers", progress=progress
    )
    answers = torch.tensor([model.to_single_token(str(item.answer)) for item in items])
    right = (runs.values[:, 0] == answers[:, None]).double()
    values = torch.cat([right[:, None], runs.values[:, 1:]], dim=1)
    return _Answers(items, [RIGHT, *runs.metrics[1:]], values, list(tried))


def _said(result: Result, at: Mapping[str, float], there: _Answers) -> list[str]:
    """What was gained with the lambdas that were chosen, in words."""
    own, other = (
        one.select(metric=RIGHT, **at).cells()[0]
        for one in (result, result.controls["random_sites"])
    )
    found = "more are right" if own.low > max(0, other.value) else "no gain that can be told from 0"
    return [
        f"of {len(there.items)} other items {there.before:.2f} are right unedited, "
        f"{own.value:+.2f} [{own.low:+.2f}, {own.high:+.2f}] under the edits, {other.value:+.2f} "
        f"where other layers give: {found}",
        "no gain is what to expect where no late layer dilutes the evidence",
    ]


def _chosen(here: _Answers, at: Mapping[str, float]) -> str:
    """On what the lambdas were chosen, in words."""
    attn, mlp = (here.tried.index(at[name]) for name in AXES)
    gain = float(here.gains(0)[:, 0, attn, mlp].mean())
    named = ", ".join(f"{name} {value:g}" for name, value in at.items())
    return f"chosen on {len(here.items)} items: {named} ({here.before:.2f} right, {gain:+.2f})"
