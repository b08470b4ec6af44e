"""Every edit at every site of every family equals a hook written by hand, element by element."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from subjects import SITES, batch, tiny_model
from torch import Tensor

from audio_lens import AudioInputs, Edit, HookedAudioTransformer, edits, intervene
from audio_lens.sites import Site, unit_count

QUICK = SITES[::60]
CASES = [
    pytest.param(name, site, id=f"{name}: {site}", marks=[] if (name, site) in QUICK else slow)
    for slow in [[pytest.mark.slow]]
    for name, site in SITES
]


class Doubling:
    """A dictionary that reconstructs badly."""

    def encode(self, x: Tensor) -> Tensor:
        return torch.cat([x.relu(), (-x).relu()], dim=-1)

    def decode(self, latents: Tensor) -> Tensor:
        one, other = latents.chunk(2, dim=-1)
        return 0.9 * one - 0.8 * other


@dataclass
class Case:
    """A do, and what it makes of one vector (or of one query's scores) by hand."""

    do: Any
    by_hand: Callable[..., Tensor]


def vectors(site: Site, shape: tuple[int, ...], source: dict[str, Tensor]) -> Iterator[Case]:
    """Edits of what has vectors; ``by_hand(v, s)`` gets the source's vector beside it."""
    d = shape[-1]
    generator = torch.Generator().manual_seed(3)
    basis = torch.randn(d, min(2, d), generator=generator, dtype=torch.float64)
    vector = torch.randn(d, generator=generator, dtype=torch.float64)
    inside = basis @ torch.linalg.pinv(basis)
    dictionary = Doubling()
    yield Case(edits.Put(source), lambda v, s: s)
    yield Case(edits.Put(0.5), lambda v, s: torch.full_like(v, 0.5))
    yield Case(edits.Mix(source, 0.3), lambda v, s: 0.7 * v + 0.3 * s)
    yield Case(edits.Scale(-2), lambda v, s: -2 * v)
    yield Case(edits.Add(vector, 1.5), lambda v, s: v + 1.5 * vector)
    if site.unit != "neuron":
        yield Case(edits.Project(basis), lambda v, s: v - inside @ v)
        yield Case(edits.Project(basis, keep=True), lambda v, s: inside @ v)
        yield Case(edits.Swap(basis, source), lambda v, s: v + inside @ (s - v))
        yield Case(
            edits.Erase(basis, 2 * basis, vector, 0.3),
            lambda v, s: v - 0.6 * basis @ (basis.mT @ (v - vector)),
        )
        yield Case(
            edits.Latents(dictionary, lambda z: z.clamp(max=0.1)),
            lambda v, s: (
                v
                + dictionary.decode(dictionary.encode(v).clamp(max=0.1))
                - dictionary.decode(dictionary.encode(v))
            ),
        )


def of_attention(site: Site, keys: Tensor) -> Iterator[Case]:
    """Edits of one query's scores or pattern; ``by_hand(x, own keys)``."""

    def sharpened(pattern: Tensor, own: Tensor) -> Tensor:
        powers = torch.where(own, pattern**1.7, pattern)
        share = pattern[own].sum() / powers[own].sum() if pattern[own].sum() > 0 else 1.0
        return torch.where(own, powers * share, pattern)

    def multiplied(scores: Tensor, own: Tensor, size: Callable[[Tensor], Tensor]) -> Tensor:
        own = own & scores.isfinite()
        return torch.where(own, scores + 0.4 * size(scores), scores)

    if site.last == "pattern":
        yield Case(edits.Block(keys), lambda p, own: torch.where(own, 0.0, p))
        yield Case(edits.Weights(2.5, keys, False), lambda p, own: torch.where(own, 2.5 * p, p))
        yield Case(
            edits.Weights(2.5, keys),
            lambda p, own: torch.where(own, 2.5 * p, p) / torch.where(own, 2.5 * p, p).sum(),
        )
        yield Case(edits.Sharpen(1.7, keys), sharpened)
        yield Case(edits.Scale(0.5), lambda p, own: 0.5 * p)
        return
    yield Case(edits.Bias(0.7, keys), lambda s, own: torch.where(own, s + 0.7, s))
    yield Case(edits.Multiply(0.4, keys), lambda s, own: multiplied(s, own, lambda x: x))
    yield Case(edits.Multiply(0.4, keys, "mult_abs"), lambda s, own: multiplied(s, own, torch.abs))
    yield Case(
        edits.Weights(2.5, keys),
        lambda s, own: torch.where(own, s + torch.tensor(2.5, dtype=s.dtype).log(), s),
    )
    yield Case(edits.Scale(0.5), lambda s, own: 0.5 * s)


@dataclass
class Scene:
    """Some elements of a site to edit, in some inputs."""

    model: HookedAudioTransformer
    inputs: AudioInputs
    site: Site
    layer: int | None
    where: Tensor
    unit: int | None

    @staticmethod
    def of(name: str, site: Site) -> Scene:
        model = tiny_model(name)
        inputs = model.as_inputs(batch(name, 0))
        valid = model.timeline(inputs).mask(site.positions_of)
        generator = torch.Generator().manual_seed(len(str(site)))
        where = valid & (torch.rand(valid.shape, generator=generator) < 0.5)
        where |= valid & (valid.cumsum(1) == 2)  # one of every row at least
        unit = None if site.unit is None else unit_count(model, site) - 1
        layer = None if site.n_layers is None else 1
        return Scene(model, inputs, site, layer, where, unit)

    @property
    def name(self) -> str:
        return self.site.hook_name(self.layer)

    def edit(self, do: Any) -> Edit:
        units = {} if self.site.unit is None else {self.site.unit: self.unit}
        return Edit(str(self.site), do, layer=self.layer, where=self.where, **units)

    def edited(self, do: Any) -> Tensor:
        with torch.no_grad(), intervene(self.model, self.edit(do)):
            return self.model(self.inputs)

    def by_hand(self, change: Callable[[Tensor, int, int], Tensor]) -> Tensor:
        """The output with ``change(vector or scores, row, position)`` of every element."""

        def write(x: Tensor, hook: Any) -> Tensor:
            x = x.clone()
            for row, position in self.where.nonzero().tolist():
                at = self.index(row, position)
                changed = change(x[at], row, position)
                one = ... if self.site.unit != "neuron" else self.unit
                x[at][one] = changed[one]
            return x

        with torch.no_grad():
            return self.model.run_with_hooks(self.inputs, fwd_hooks=[(self.name, write)])

    def index(self, row: int, position: int) -> tuple:
        """Of a vector, or of the scores of a query."""
        if self.site.reads_attention:
            return (row, self.unit, position)
        return (row, position, self.unit) if self.site.unit == "head" else (row, position)


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-10, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize(("name", "site"), CASES)
def test_every_edit_equals_a_hook_by_hand(name: str, site: Site) -> None:
    scene = Scene.of(name, site)
    with torch.no_grad():
        base, cache = scene.model.run_with_cache(scene.inputs, names_filter=[scene.name])
        _, other = scene.model.run_with_cache(batch(name, 100), names_filter=[scene.name])
    source = {scene.name: other[scene.name]}
    if site.reads_attention:
        part = "encoder" if site.sublayer == "cross_attn" else site.positions_of
        valid = scene.model.timeline(scene.inputs).mask(part)
        keys = valid & (valid.cumsum(1) % 2 == 1)
        tried = [(c, lambda x, b, t, c=c: c.by_hand(x, keys[b])) for c in of_attention(site, keys)]
    else:
        value = source[scene.name]
        tried = [
            (c, lambda x, b, t, c=c: c.by_hand(x, value[scene.index(b, t)]))
            for c in vectors(site, tuple(cache[scene.name].shape), source)
        ]
    for case, change in tried:
        found = scene.edited(case.do)
        assert close(found, scene.by_hand(change)), case.do
        assert not torch.equal(found, base), f"{case.do} changed nothing"
