"""`Edit`: one intervention, and `intervene`, which keeps edits in force."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from audio_lens.arguments import numbers
from audio_lens.edits.at import At, located
from audio_lens.edits.do import MEAN, Do
from audio_lens.hooks import DeadHookError, HookPoint
from audio_lens.inputs import AudioInputs, InputError
from audio_lens.places import Where, described
from audio_lens.sites import Site, SiteError, unit_count

if TYPE_CHECKING:
    from audio_lens.models.base import HookedAudioTransformer
    from audio_lens.models.mixins.running import Step

Indices = int | Sequence[int]
When = Literal["prefill", "decode", "both"]
_numbers = itertools.count()  # of edits as they are laid out


@dataclass(frozen=True, eq=False)
class Edit:
    """One intervention: what is done to which activation, and where.

    Attributes:
        site: ``part.activation``, as in `patching.sweep`: ``decoder.resid_pre``, ``attn.z``,
            ``decoder.attn.attn_scores``, ``connector.out`` ...
        do: what is done: `edits.Put`, `Scale`, `Add`, `Project`, `Swap`, `Mix`, `Latents`,
            `Reconstruct`, `Enrich`, and on attention scores and patterns `Block`, `Bias`,
            `Weights`, `Multiply`, `Sharpen`.
        layer: the block or blocks; None for all (and for sites outside the blocks).
        head, neuron: which of them, where the site has heads or neurons; None for all.
        where: a place (`audio_lens.places`); of scores and patterns, the queries. "all", as it
            stands here, is the whole activation, padding too: silence that an encoder hears behind
            a clip is no place, and a head that is off is off there as well.
        when: while the model writes, in the first call ("prefill"), which reads the prompts, in
            the later ones ("decode"), which read what it wrote, or in "both".

    Raises:
        InputError: a ``when`` or ``do`` that is none.
    """

    site: str
    do: Do
    layer: Indices | None = None
    head: Indices | None = None
    neuron: Indices | None = None
    where: Where = "all"
    when: When = "both"

    def __post_init__(self) -> None:
        if not isinstance(self.do, Do):
            raise InputError(
                f"do is one of audio_lens.edits (Put, Scale, Add ...), got {self.do!r}: a value is "
                "written by edits.Put(value)"
            )
        if self.when not in ("prefill", "decode", "both"):
            raise InputError(f"when is 'prefill', 'decode' or 'both', got {self.when!r}")

    def __str__(self) -> str:
        chosen = [("layer", self.layer), ("head", self.head), ("neuron", self.neuron)]
        named = [f"{name} {given}" for name, given in chosen if given is not None]
        place = [] if _is_whole(self.where) else [f"at {described(self.where)}"]
        return ", ".join([f"{type(self.do).__name__} of {self.site}", *named, *place])


@contextmanager
def intervene(
    model: HookedAudioTransformer, *edits: Edit | Sequence[Edit]
) -> Iterator[HookedAudioTransformer]:
    """Keep edits in force inside a ``with`` block, whatever runs the model there.

    They act in ``model(...)``, ``run_with_cache``, ``generate``, sweeps and attribution, in the
    order given, and pass gradients back to the model's inputs and to their own tensors. Inputs that
    stand as sources are run first, without them.

    Raises:
        SiteError: a site, head or neuron that the model does not have, or an edit that makes no
            sense there.
        InputError: a place that selects nothing in some prompt, a source of another shape, or
            ``when="decode"`` in a plain forward.
        DeadHookError: on leaving, if an edit took no effect: its site did not run, or ``when`` was
            not.
    """
    wanted = [one for given in edits for one in ([given] if isinstance(given, Edit) else given)]
    if not wanted:
        raise InputError("no edits: pass at least one Edit")
    with in_force(model, [Laid.of(model, edit) for edit in wanted]):
        yield model


@contextmanager
def in_force(model: HookedAudioTransformer, laid: Sequence[Laid]) -> Iterator[None]:
    """Keep edits that are laid out in force inside a ``with`` block.

    Raises:
        DeadHookError: on leaving, if one took no effect.
    """
    with model.hooks([hook for one in laid for hook in one.hooks()]):
        yield
    idle = [str(one.edit) for one in laid if not one.acted]
    if idle:
        raise DeadHookError(f"edits that took no effect: {'; '.join(idle)}")


def edits_of(model: HookedAudioTransformer) -> list[Edit]:
    """The edits in force, in the order in which they act."""
    functions = [fn for fns in model.hook_functions().values() for fn in fns]
    laid = {id(one): one for one in (getattr(fn, "laid", None) for fn in functions) if one}
    return [one.edit for one in sorted(laid.values(), key=lambda one: one.number)]


class Laid:
    """An edit laid out on a model.

    Attributes:
        acted: whether it changed anything so far.
        number: of those laid out, in order.
        may_miss: whether prompts that have none of its place are left as they are; else they raise.
    """

    def __init__(
        self,
        model: HookedAudioTransformer,
        edit: Edit,
        site: Site,
        names: tuple[str, ...],
        units: Bool[Tensor, " n"] | None,
        may_miss: bool = False,
    ):
        self.may_miss = may_miss
        self.model, self.edit, self.site, self.names, self.units = model, edit, site, names, units
        self.acted, self.number = False, next(_numbers)
        self._runs: dict[int, Any] = {}
        self._source: AudioInputs | None = None
        self._averaged: AudioInputs | None = None
        for source in edit.do.sources:
            if is_inputs(source, model):
                self._source = model.as_inputs(source)
                self._runs[id(source)] = self._activations(self._source)

    @staticmethod
    def of(model: HookedAudioTransformer, edit: Edit, may_miss: bool = False) -> Laid:
        """The edit laid out on a model; what can be wrong with it without inputs raises here."""
        site = Site.parse(edit.site, model)
        asked = {"head": edit.head, "neuron": edit.neuron}
        names = tuple(site.hook_name(layer) for layer in chosen_layers(site, edit.layer))
        units = chosen_units(model, site, asked)
        edit.do.check(site, asked)
        if site.reads_attention and model.attn_mode == "sdpa":
            raise DeadHookError(
                f'{edit}: attn_mode "sdpa" computes no scores and no patterns: use "auto"'
            )
        if edit.when == "decode" and site.positions_of != model.output_part:
            raise InputError(
                f"{edit}: the {site.positions_of} does not run while the model writes, so "
                'when="decode" has nothing to edit'
            )
        return Laid(model, edit, site, names, units, may_miss)

    @property
    def is_everywhere(self) -> bool:
        """Whether it takes every position."""
        return _is_whole(self.edit.where)

    def hooks(self) -> list[tuple[str, Any]]:
        """What keeps it in force, in TransformerLens form."""

        def act(x: Tensor, hook: HookPoint) -> Tensor | None:
            return self._act(x, str(hook.name))

        act.only_reads = True  # what arrives is never written to
        act.laid = self
        return [(name, act) for name in self.names]

    def _act(self, x: Float[Tensor, "..."], name: str) -> Float[Tensor, "..."] | None:
        step = self.model.step
        if not self._is_now(step):
            return None
        at = At(self.model, self.site, name, step, self.held(step))
        chosen = self._chosen(x, at)
        if chosen is not None and not chosen.any():
            return None
        self.acted = True
        changed = self.edit.do(x, At(self.model, self.site, name, step, at.held, chosen))
        return changed if chosen is None else torch.where(chosen, changed, x)

    def _is_now(self, step: Step | None) -> bool:
        if self.edit.when == "both":
            return True
        if step is None:
            raise InputError(f"{self.edit}: nothing says whether this is prefill or decode")
        if self.edit.when == "decode" and not step.keeps:
            raise InputError(
                f'{self.edit}: a plain forward has no decoding steps, so when="decode" cannot take '
                "effect: use generate, or pass past="
            )
        return step.is_prefill == (self.edit.when == "prefill")

    def _chosen(self, x: Float[Tensor, "..."], at: At) -> Bool[Tensor, "..."] | None:
        """The elements that are edited; None for all."""
        chosen = None
        if not self.is_everywhere:
            start, count = at.start, x.shape[self.site.position_dim]
            written = None if at.start else 0
            where = located(
                *(at, self.site.positions_of, self.edit.where, start + count, written),
                may_miss=self.may_miss,
            )
            if where.shape[1] != start + count or len(where) not in (1, len(x)):
                raise InputError(
                    f"{at.name} has {len(x)} rows of {count} positions in this call, and places "
                    f"lie on {len(where)} of {where.shape[1]}: it holds a part of them only"
                )
            chosen = self._along(where[:, start:], x.ndim, self.site.position_dim).to(x.device)
        if self.units is not None:
            units = self._along(self.units[None], x.ndim, self.site.split[1]).to(x.device)
            chosen = units if chosen is None else chosen & units
        return chosen

    @staticmethod
    def _along(mask: Bool[Tensor, "b n"], ndim: int, dim: int) -> Bool[Tensor, "..."]:
        shape = [1] * ndim
        shape[0], shape[dim] = mask.shape
        return mask.reshape(shape)

    # ---------------------------------------------------------------- sources that are run

    def held(self, step: Step | None) -> dict[int, Any]:
        """Activations of sources that had to be run, by the source's ``id``."""
        means = [one for one in self.edit.do.sources if isinstance(one, str) and one == MEAN]
        if not means:
            if self._source is not None and step is not None and step.prompts.copies == 1:
                step.prompts.check_pairs_with(self._source, "the inputs", "the source")
            return self._runs
        if step is None:
            raise InputError(f"{self.edit}: the mean is over prompts, and none are named here")
        prompts = step.prompts
        base = prompts[: len(prompts) // prompts.copies] if prompts.copies > 1 else prompts
        if base is not self._averaged:
            with self.model.without_hooks():
                self._averaged, self._runs = base, {id(means[0]): self._means(base)}
        return self._runs

    def _activations(self, inputs: AudioInputs) -> dict[str, Tensor]:
        with torch.no_grad():
            return self.model.run_with_cache(
                inputs, names_filter=list(self.names), return_cache_object=False
            )[1]

    def _means(self, inputs: AudioInputs) -> dict[str, Tensor]:
        """Of every point, the mean over rows and over positions that hold something."""
        valid = self.model.timeline(inputs).mask(self.site.positions_of)
        dim = self.site.position_dim
        return {
            name: x.movedim(dim, 1)[valid.to(x.device)].mean(0).unsqueeze(0).unsqueeze(dim)
            for name, x in self._activations(inputs).items()
        }


def is_inputs(source: Any, model: HookedAudioTransformer) -> bool:
    """Whether a source has to run first: inputs, or a processor's mapping."""
    is_mapping = isinstance(source, Mapping) and model.features_key in source
    return is_mapping or isinstance(source, AudioInputs)


def chosen_layers(site: Site, asked: Indices | None) -> tuple[int | None, ...]:
    """The blocks of an edit.

    Raises:
        SiteError: blocks that the site does not have.
    """
    if site.n_layers is None:
        if asked is not None:
            raise SiteError(f"{site} lies outside the blocks: it has no layers to choose")
        return (None,)
    if asked is None:
        return tuple(range(site.n_layers))
    return tuple(_indices("layers", site, asked, site.n_layers))


def chosen_units(
    model: HookedAudioTransformer, site: Site, asked: dict[str, Indices | None]
) -> Bool[Tensor, " n"] | None:
    """Which heads or neurons an edit takes; None for all.

    Raises:
        SiteError: units that the site does not have.
    """
    for unit, index in asked.items():
        if index is not None and unit != site.unit:
            raise SiteError(f"{site} has no {unit}s; {unit}={index} cannot be edited")
    index = asked.get(site.unit or "")
    if index is None:
        return None
    count = unit_count(model, site)
    chosen = _indices(f"{site.unit}s", site, index, count)
    return torch.zeros(count, dtype=torch.bool).index_fill(0, torch.tensor(chosen), True)


def _indices(what: str, site: Site, asked: Indices, count: int) -> list[int]:
    indices = [int(one) for one in numbers(what, asked)]
    is_known = all(0 <= one < count for one in indices)
    if not indices or not is_known or len(set(indices)) < len(indices):
        raise SiteError(f"{what} of {site} lie in 0 to {count - 1}, each once; got {asked}")
    return indices


def _is_whole(where: Where) -> bool:
    return isinstance(where, str) and where == "all"
