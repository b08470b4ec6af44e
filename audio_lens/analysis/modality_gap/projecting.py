"""What the answer becomes when heard states are turned towards read ones, or made as long."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from audio_lens.analysis.modality_gap.aligning import cosines, paths
from audio_lens.analysis.modality_gap.forms import TEMPLATE, Forms, Said, Spoken
from audio_lens.arguments import listed, whole
from audio_lens.edits import Put
from audio_lens.edits.edit import Edit
from audio_lens.errors import InputError
from audio_lens.items import Batch, Items, found, measured, method, statistics
from audio_lens.items.collect import Place
from audio_lens.items.measuring import Cell
from audio_lens.models import HookedAudioTransformer
from audio_lens.results import Result

KINDS = ("angle", "length")
OTHER, RANDOM, IDENTITY = "other_item", "random_direction", "identity"
CONTROLS = (OTHER, RANDOM, IDENTITY)
_LEAST = 1e-30


@method("modality_gap.project")
def project(
    model: HookedAudioTransformer,
    items: Items,
    *,
    kinds: Sequence[str] = KINDS,
    worst: int | None = None,
    words: Said = None,
    template: str = TEMPLATE,
    site: str = "decoder.resid_pre",
    layers: Sequence[int] | None = None,
    where: Place = "audio",
    metric: Any = None,
    controls: Sequence[str] = CONTROLS,
    by: str | None = None,
    size: int = 8,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """What the answer gains when heard states take the direction, or the length, of read ones.

    At one layer, every frame s becomes of its token t on the path: by "angle" as long as it was
    and in the direction of t, by "length" as long as t in its own direction (2510.12116). Values
    are changes: the metric minus that of the unedited run.

    Args:
        model, items, words, template, layers, where: as in `gap`.
        kinds: of "angle" and "length".
        worst: only the frames of so many tokens, whose cosines along the path are lowest; None
            takes all.
        site: what is edited, ``decoder.activation``.
        metric: as in `items.measured`; None takes the items' answers.
        controls: "other_item" (towards the words of another item), "random_direction" (of "angle":
            directions drawn for every frame) and "identity" (the same states put back).
        by, size, seed, progress: as in `gap`.

    Raises:
        As `gap`; InputError for a kind that is none.
    """
    asked = listed("kinds", kinds, str, "names")
    if not asked or (odd := [one for one in asked if one not in KINDS]):
        raise InputError(f"kinds are some of {', '.join(KINDS)}, got {(odd or ['none'])[0]!r}")
    if odd := [name for name in controls if name not in CONTROLS]:
        raise InputError(f"no control {odd[0]!r}; there is {', '.join(CONTROLS)}")
    if worst is not None:
        whole("worst", worst, least=1)
    forms = Forms.of(model, items, words, template, site, layers, where)
    others = statistics.other_item(len(items), forms.said, seed=seed) if OTHER in controls else None
    runs = _Runs(forms, asked, worst, others, list(controls), seed)
    told = measured(model, items, runs, metric, size=size, what="projection", progress=progress)
    changes = told.values[..., 1:] - told.values[..., :1]
    parts = dict(zip(runs.names, changes.split(runs.counts, dim=-1), strict=True))
    whole_axes = {"metric": told.metrics, "kind": asked, "layer": forms.layers}

    def of(name: str) -> Result:
        own = name in ("own", OTHER)
        axes = whole_axes if own else {k: v for k, v in whole_axes.items() if k != "kind"}
        sizes = [len(along) for along in list(axes.values())[1:]]
        return found(parts[name].unflatten(-1, sizes), axes, items, by=by, seed=seed)

    result = of("own")
    result.controls = {name: of(name) for name in runs.names if name != "own"}
    which = "all frames" if worst is None else f"frames of the {worst} worst tokens"
    result.meta |= {
        "title": f"{which} moved towards what is read, at {forms.site}",
        "value": "change of the metric",
    }
    result.report = list(_told(result, told.values[..., 0]))
    return result


@dataclass(frozen=True)
class _Runs:
    """The runs of a batch: unedited, and each kind and control at each layer."""

    forms: Forms
    kinds: list[str]
    worst: int | None
    others: Int[Tensor, " n"] | None
    controls: list[str]
    seed: int

    @property
    def names(self) -> list[str]:
        there = [OTHER] if self.others is not None else []
        there += [RANDOM] if RANDOM in self.controls and "angle" in self.kinds else []
        return ["own", *there, *([IDENTITY] if IDENTITY in self.controls else [])]

    @property
    def counts(self) -> list[int]:
        n_layers = len(self.forms.layers)
        return [n_layers * (len(self.kinds) if x in ("own", OTHER) else 1) for x in self.names]

    def __call__(self, batch: Batch) -> Iterator[Cell]:
        states, heard = self.forms.spoken(batch)
        rows = [*batch.rows, *(self._other(row) for row in batch.rows)]
        read = {row: self.forms.read(row) for row in dict.fromkeys(rows)}
        yield batch.inputs, []
        for name in self.names:
            for kind in self.kinds if name in ("own", OTHER) else ["angle"]:
                for edit in self._edits(name, kind, batch, states, heard, read):
                    yield batch.inputs, [edit]

    def _other(self, row: int) -> int:
        """Whose words the control takes; the item's own where it does not run."""
        return row if self.others is None else int(self.others[row])

    def _edits(
        self,
        name: str,
        kind: str,
        batch: Batch,
        states: Float[Tensor, "layers b t d"],
        heard: Sequence[Spoken],
        read: Mapping[int, Float[Tensor, "layers _ d"]],
    ) -> list[Edit]:
        """The edit of every layer."""
        values = states.clone()
        places = torch.zeros(states.shape[:3], dtype=torch.bool)
        for place, (row, spoken) in enumerate(zip(batch.rows, heard, strict=True)):
            text = read[self._other(row) if name == OTHER else row]
            moved, chosen = self._moved(name, kind, text, spoken.states, row)
            at = spoken.positions
            for layer in range(len(states)):
                own = at[chosen[layer]]
                values[layer, place, own] = moved[layer, chosen[layer]]
                places[layer, place, own] = True
        return [
            Edit(str(self.forms.site), Put(values[n]), layer=layer, where=places[n])
            for n, layer in enumerate(self.forms.layers)
        ]

    def _moved(
        self,
        name: str,
        kind: str,
        read: Float[Tensor, "layers tokens d"],
        speech: Float[Tensor, "layers frames d"],
        row: int,
    ) -> tuple[Float[Tensor, "layers frames d"], Bool[Tensor, "layers frames"]]:
        """The frames as they become, and which of them do."""
        similar = cosines(read, speech).cpu()
        ways = paths(similar)
        token = torch.stack([w.of_frames(x) for w, x in zip(ways, similar, strict=True)])
        chosen = torch.ones_like(token, dtype=torch.bool)
        if self.worst is not None:
            means = [w.by_token(x) for w, x in zip(ways, similar, strict=True)]
            each = zip(token, means, strict=True)
            chosen = torch.stack([_worst(own, mean, self.worst) for own, mean in each])
        if name == IDENTITY:
            return speech, chosen
        towards = read.gather(1, token[..., None].expand(-1, -1, read.shape[-1]).to(read.device))
        if name == RANDOM:
            generator = torch.Generator().manual_seed(self.seed + row)
            towards = torch.randn(speech.shape, generator=generator).to(speech)
        return (as_angle if kind == "angle" else as_length)(speech, towards), chosen


def _worst(
    token: Int[Tensor, " frames"], means: Float[Tensor, " tokens"], count: int
) -> Bool[Tensor, " frames"]:
    """The frames of so many tokens of the lowest means, of those that have frames."""
    there = token.unique()
    return torch.isin(token, there[means[there].argsort()[:count]])


def as_angle(s: Float[Tensor, "*b d"], t: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
    """As long as s, in the direction of t."""
    return s.norm(dim=-1, keepdim=True) * t / t.norm(dim=-1, keepdim=True).clamp(min=_LEAST)


def as_length(s: Float[Tensor, "*b d"], t: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
    """As long as t, in the direction of s."""
    return as_angle(t, s)


def _told(result: Result, unedited: Float[Tensor, "n metrics"]) -> Iterator[str]:
    for metric, base in zip(result.coords["metric"], unedited.mean(0).tolist(), strict=True):
        yield f"{metric} of the unedited model: {base:.3g}."
        for kind in result.coords["kind"]:
            one = result.select(metric=metric, kind=kind)
            means = one.mean().values
            top = int(means.nan_to_num(nan=-torch.inf).argmax())
            beside = [
                f"{name} {float(control.mean().values[top]):+.3g}"
                for name, control in one.controls.items()
                if name != RANDOM or kind == "angle"
            ]
            yield (
                f"{kind}: at best {float(means[top]):+.3g} of {metric}, at layer "
                f"{result.coords['layer'][top]} ({', '.join(beside) or 'no controls'}); at worst "
                f"{float(means.nan_to_num(nan=torch.inf).min()):+.3g}."
            )
