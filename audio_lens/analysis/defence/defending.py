"""What answers become when neurons are put back, put out or shifted, under attack and without."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from audio_lens import metrics
from audio_lens.analysis.defence.attacking import BENIGN, Attack
from audio_lens.analysis.defence.neurons import SITE, Ranking, check_neurons, rank
from audio_lens.arguments import listed, number
from audio_lens.edits import Add, Put
from audio_lens.edits.do import Do
from audio_lens.edits.edit import Edit
from audio_lens.errors import InputError
from audio_lens.inputs import AudioInputs
from audio_lens.items import ItemError, Items, Pairs, found, measured
from audio_lens.items.measuring import Cell
from audio_lens.items.pairs import PairBatch
from audio_lens.models import HookedAudioTransformer
from audio_lens.places import Where
from audio_lens.results import Result
from audio_lens.sites import Site

DEFENCES = ("patch", "prune", "bias")
PERCENTS = (1, 5, 20, 50, 100)
INPUTS = ("clean", "attacked")
RANDOM, UNDEFENDED, STREAM = "random_neurons", "undefended", "whole_stream"
RANKED = "ranked"
METRICS = ("right", "target", "log_prob")
CANNOT = (
    "A defence that needs the clean clip cannot be used: it shows where the attack passes. Hold "
    "each share of neurons against as many random ones: of many, any set defends.",
    "The attack does not know of the defence; one that does (adaptive) may pass it.",
)


def defend(
    model: HookedAudioTransformer,
    attack: Attack,
    ranking: Ranking | None = None,
    *,
    site: str | None = None,
    how: Sequence[str] = DEFENCES,
    percents: Sequence[float | int] = PERCENTS,
    reference: Items | None = None,
    bias: float | int = 0.5,
    where: Where = "all",
    by: str | None = None,
    size: int = 8,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """Robustness and utility: which answers are kept on clean and on attacked clips, defended.

    SPIRIT's defences (2505.13541) of the most changed neurons: "patch" puts back what they are on
    a reference, "prune" puts them to 0, "bias" adds a constant.

    Metrics: "right" (the answer is the likeliest token), "target" (the attack's is) and
    "log_prob", that of the answer; by "input" (clean or attacked), "defence" and "percent".
    Controls: "random_neurons", the same of as many drawn ones; "undefended"; and "whole_stream",
    attacked clips with all that enters the first block (of the decoder, of models whose decoder
    reads audio by cross-attention of the encoder) from the clean run, which must be as on clean
    ones.

    Args:
        model: the model.
        attack: as `attack` gives it.
        ranking: of neurons, best made on other items; None ranks these.
        site: of neurons, where they are ranked here; None takes those of the encoder's MLPs.
        how: which defences.
        percents: shares of all neurons.
        reference: items that neurons are put back from, of the same names and lengths, such as
            denoised clips; None takes the clean ones, which nobody has who is attacked.
        bias: what is added.
        where: positions that are edited, as a place; "all" is everything, padding too.
        by, size, seed, progress: as in `attack`; the seed is that of the drawn neurons, too.

    Raises:
        InputError: a defence that is none, percentages beyond 100, a ranking beside a site.
        ItemError: a reference of other items, or of other lengths.
        SiteError: a site without neurons.
    """
    asked = [name for name in listed("how", how, str, "names")]
    if not asked or (odd := [name for name in asked if name not in DEFENCES]):
        raise InputError(f"how is some of {', '.join(DEFENCES)}, got {(odd or ['none'])[0]!r}")
    shares = [number("percents", one, above=0, most=100) for one in percents]
    if not shares or len(set(shares)) < len(shares):
        raise InputError(f"percents are one or more, each once, got {list(percents)}")
    if ranking is not None and site is not None:
        raise InputError(f"the ranking is of {ranking.site}: leave out site=, got {site!r}")
    named = str(check_neurons(model, site or (SITE if ranking is None else ranking.site)))
    held = _held(attack, reference)
    if ranking is None:
        sides = Pairs(held, attack.pairs.corrupted)
        ranking = rank(model, sides, named, size=size, progress=progress)
    runs = _Runs(
        model, ranking, held, attack, asked, shares, float(number("bias", bias)), where, seed
    )
    answers = [str(item.answer) for item in attack.pairs.clean]
    told = measured(
        model,
        attack.pairs,
        runs,
        {
            "said": metrics.read_at(lambda rows: rows.argmax(-1).double(), name="likeliest"),
            "log_prob": metrics.log_prob(answers),
        },
        size=size,
        what="defence",
        progress=progress,
    )
    values = _scores(model, told.values, answers, attack.targets)
    return _Told(attack, runs, values, by, seed).result(reference is None)


def _held(attack: Attack, reference: Items | None) -> Items:
    """What neurons are put back from.

    Raises:
        ItemError: other items.
    """
    clean = attack.pairs.clean
    if reference is None:
        return clean
    by_name = {item.id: item for item in reference}
    lacking = [item.id for item in clean if item.id not in by_name]
    if lacking:
        raise ItemError(f"the reference has no item {lacking[0]!r}")
    return Items(by_name[item.id] for item in clean)


def _scores(
    model: HookedAudioTransformer,
    values: Float[Tensor, "n two cells"],
    answers: Sequence[str],
    targets: Sequence[str],
) -> Float[Tensor, "n metrics cells"]:
    said, log_prob = values.unbind(1)
    right, target = (
        torch.tensor([model.to_single_token(word) for word in words])[:, None]
        for words in (answers, targets)
    )
    return torch.stack([(said == right).double(), (said == target).double(), log_prob], dim=1)


@dataclass
class _Runs:
    """The runs of a batch: undefended, the whole stream put back, then every defence."""

    model: HookedAudioTransformer
    ranking: Ranking
    reference: Items
    attack: Attack
    how: list[str]
    percents: list[Any]
    bias: float | int
    where: Where
    seed: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the defended cells: which neurons, input, defence, percent."""
        return (2, len(INPUTS), len(self.how), len(self.percents))

    @property
    def n_before(self) -> int:
        """Cells in front of those."""
        return len(INPUTS) + 1

    @property
    def stream(self) -> str:
        """The site that everything passes."""
        cfg = self.model.cfg
        reads_audio = cfg.decoder is not None and not self.model.decoder_needs_encoder
        return "decoder.resid_pre" if reads_audio else "encoder.resid_pre"

    def masks(self) -> dict[str, list[Bool[Tensor, "layers neurons"]]]:
        """The neurons of every share, ranked and drawn."""
        return {
            RANKED: [self.ranking.top(one) for one in self.percents],
            RANDOM: [
                self.ranking.random(one, self.seed + n) for n, one in enumerate(self.percents)
            ],
        }

    def __call__(self, batch: PairBatch) -> Iterator[Cell]:
        clean, attacked = batch.pair.clean, batch.pair.corrupted
        yield clean, []
        yield attacked, []
        first = Site.parse(self.stream, self.model).hook_name(0)
        put = Put(self._activations(clean, [first]))
        yield attacked, [Edit(self.stream, put, layer=0)]
        dos = self._dos(batch)
        for masks in self.masks().values():
            for inputs in (clean, attacked):
                for do in dos:
                    for mask in masks:
                        yield inputs, self.ranking.edits(mask, do, self.where)

    def _dos(self, batch: PairBatch) -> list[Do]:
        """What each defence does to a neuron."""
        made: dict[str, Do] = {"prune": Put(0.0), "bias": Add(self.bias)}
        if "patch" in self.how:
            made["patch"] = Put(self._activations(self._reference_of(batch), self._names))
        return [made[name] for name in self.how]

    def _reference_of(self, batch: PairBatch) -> AudioInputs:
        if self.reference is self.attack.pairs.clean:
            return batch.pair.clean
        inputs = self.reference[batch.rows].prepare(self.model)
        try:
            batch.pair.clean.check_pairs_with(inputs, "the item", "its reference")
        except InputError as error:
            raise ItemError(f"{self.reference[batch.rows[0]].name}: {error}") from error
        return inputs

    @property
    def _names(self) -> list[str]:
        site = Site.parse(self.ranking.site, self.model)
        return [site.hook_name(layer) for layer in self.ranking.layers]

    @torch.no_grad()
    def _activations(self, inputs: AudioInputs, names: list[str]) -> dict[str, Tensor]:
        return self.model.run_with_cache(inputs, names_filter=names, return_cache_object=False)[1]


@dataclass
class _Told:
    """The values of all runs as a `Result`."""

    attack: Attack
    runs: _Runs
    values: Float[Tensor, "n metrics cells"]
    by: str | None
    seed: int

    def result(self, is_clean: bool) -> Result:
        before, after = self.values.split([self.runs.n_before, self._n_defended], dim=-1)
        ranked, drawn = after.unflatten(-1, self.runs.shape).unbind(2)
        axes = {"input": list(INPUTS), "defence": self.runs.how, "percent": self.runs.percents}
        result = self._found(ranked, axes)
        result.controls = {
            RANDOM: self._found(drawn, axes),
            UNDEFENDED: self._found(before[..., :2], {"input": list(INPUTS)}),
            STREAM: self._found(before[..., 2], {}),
        }
        result.dropped = dict(self.attack.pairs.dropped.counts)
        result.meta |= {
            "title": f"answers with neurons of {self.runs.ranking.site} defended",
            "value": "share of items",
            "site": self.runs.ranking.site,
            "reference": "the clean clip" if is_clean else "given items",
            "eps": f"{self.attack.eps:g}",
        }
        result.report = [*self._said(result), *CANNOT, BENIGN]
        return result

    @property
    def _n_defended(self) -> int:
        return self.values.shape[-1] - self.runs.n_before

    def _found(self, values: Tensor, axes: dict[str, list]) -> Result:
        return found(
            values,
            {"metric": list(METRICS), **axes},
            list(self.attack.pairs.clean),
            by=self.by,
            seed=self.seed,
        )

    def _said(self, result: Result) -> Iterator[str]:
        def share(of: Result, metric: str, **at: Any) -> float:
            return float(of.select(metric=metric, **at).mean().values)

        bare = result.controls[UNDEFENDED]
        yield (
            f"Undefended, {share(bare, 'right', input='attacked'):.0%} of {len(self.attack)} "
            f"answers are kept under attack, and {share(bare, 'target', input='attacked'):.0%} "
            "are the target."
        )
        for how in self.runs.how:
            for percent in self.runs.percents:
                at = {"defence": how, "percent": percent}
                kept, useful = (share(result, "right", input=x, **at) for x in INPUTS[::-1])
                drawn = share(result.controls[RANDOM], "right", input="attacked", **at)
                yield (
                    f"{how} of {percent:g} %: {kept:.0%} kept under attack ({drawn:.0%} with "
                    f"random neurons), {useful:.0%} on clean clips."
                )
        yield (
            f"All of {self.runs.stream} from the clean run: "
            f"{share(result.controls[STREAM], 'right'):.0%} kept."
        )
