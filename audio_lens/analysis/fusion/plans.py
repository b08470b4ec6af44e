"""Which layers give and which take in IRI, by the recoveries of a grid; and the edits of that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from audio_lens import edits
from audio_lens.arguments import whole
from audio_lens.edits import Edit
from audio_lens.errors import InputError
from audio_lens.items import statistics
from audio_lens.results import Result

COMPONENTS = ("attn_out", "mlp_out")
GIVERS, TAKERS = 3, 10  # as published, of 32 layers


@dataclass(frozen=True)
class Plan:
    """What IRI does to one component, but for how much.

    Attributes:
        component: "attn_out" or "mlp_out".
        givers: the layers whose output is added, with their recoveries as weights.
        takers: the layers that it is added to.
    """

    component: str
    givers: Mapping[int, float]
    takers: Sequence[int]

    @staticmethod
    def of(grid: Result, component: str, givers: int, takers: int, metric: str | None) -> Plan:
        """The layers of a grid that recover most at the last token."""
        named = grid.coords["metric"][0] if metric is None else metric
        curve = (
            grid.select(metric=named, component=component, group="last")
            .mean()
            .values.nan_to_num(nan=-torch.inf)
        )
        ranked = curve.argsort(descending=True, stable=True).tolist()
        numbers = grid.coords["layer"]
        best = [n for n in ranked[:givers] if curve[n] > 0]
        return Plan(
            component,
            {numbers[n]: float(curve[n]) for n in sorted(best)},
            sorted(numbers[n] for n in ranked[:takers]),
        )

    @property
    def acts(self) -> bool:
        """Whether any taker lies behind a giver."""
        return bool(self.givers) and min(self.givers) < max(self.takers)

    def edit(self, alpha: float) -> Edit:
        """The edit that does it, by so much."""
        do = edits.Enrich(list(self.givers), list(self.givers.values()), list(self.takers), alpha)
        layers = sorted({*self.givers, *self.takers})
        return Edit(f"decoder.{self.component}", do, layer=layers, where="last")

    def __str__(self) -> str:
        if not self.givers:
            return f"{self.component}: no layer recovers anything, and none gives"
        given = ", ".join(f"{n} ({weight:.2f})" for n, weight in self.givers.items())
        takers = ", ".join(map(str, self.takers))
        return f"{self.component}: layers {given} give, by their recovery, to {takers}"

    def elsewhere(self, n_layers: int, seed: int) -> Plan:
        """The same with other givers, which get the weights in another order.

        Raises:
            ControlError: too few other layers.
        """
        others = statistics.random_sites(self.givers, range(n_layers), seed=seed)
        return Plan(
            self.component, dict(zip(others, self.givers.values(), strict=True)), self.takers
        )


def enrichment(
    grid: Result,
    lambda_attn: float,
    lambda_mlp: float,
    *,
    givers: int | None = None,
    takers: int = TAKERS,
    metric: str | None = None,
) -> list[Edit]:
    """The edits of IRI, for `intervene`, `generate` and whatever else runs the model.

    At the last token, the output a of a taking layer becomes ``a + lambda * sum of RR_k * a_k``
    over the giving layers k before it, as long as a was; for attention and MLP apart. While the
    model writes, every new token is the last in turn.

    Args:
        grid: what `fcct` found, with the components "attn_out" and "mlp_out" and the group "last".
        lambda_attn, lambda_mlp: how much; 0 changes nothing.
        givers: how many layers give, those that recover most; None for 3, or half of them.
        takers: how many take, those that recover most.
        metric: whose recoveries; None takes the first.

    Raises:
        InputError: a grid in which no layer recovers anything, or numbers that are none.
    """
    plans = plans_of(grid, givers, takers, metric)
    return edits_of(plans, (lambda_attn, lambda_mlp))


def plans_of(
    grid: Result, givers: int | None, takers: int, metric: str | None = None
) -> list[Plan]:
    """What is done to attention and to the MLP.

    Raises:
        InputError: a grid in which no layer recovers anything, or numbers that are none.
    """
    count = len(grid.coords["layer"])
    givers = min(GIVERS, max(1, count // 2)) if givers is None else givers
    whole("givers", givers, least=1)
    whole("takers", takers, least=1)
    plans = [Plan.of(grid, component, givers, takers, metric) for component in COMPONENTS]
    if not any(plan.acts for plan in plans):
        raise InputError("no layer recovers anything at the last token that a later one could take")
    return plans


def edits_of(plans: Sequence[Plan], lambdas: Sequence[float]) -> list[Edit]:
    """The edits of those plans that do anything."""
    given = zip(plans, lambdas, strict=True)
    return [plan.edit(alpha) for plan, alpha in given if plan.acts]
