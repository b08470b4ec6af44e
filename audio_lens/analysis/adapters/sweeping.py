"""Layer-restricted LoRA: which blocks, when they alone are trained, bring most of the answers?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from audio_lens.analysis.adapters.groups import (
    ALL,
    ALL_EQUAL,
    CONNECTOR,
    MODULES,
    NONE,
    RANDOM,
    Arm,
    Arms,
    checked_groups,
    linears_of,
)
from audio_lens.analysis.adapters.store import Runs, Trained
from audio_lens.analysis.adapters.telling import told
from audio_lens.analysis.adapters.training import (
    METRICS,
    Bench,
    Start,
    answers_of,
    check_counts,
    descend,
    examined,
    frozen,
    part_of,
)
from audio_lens.analysis.adapters.wearing import (
    check_connector,
    has_connector,
    held,
    own_connector,
    peft,
    put_on,
    take_off,
)
from audio_lens.arguments import listed, number, numbers, path_of
from audio_lens.digests import of_state
from audio_lens.errors import AudioLensError, InputError
from audio_lens.items import Items, found, method, statistics
from audio_lens.models import HookedAudioTransformer
from audio_lens.progress import track
from audio_lens.results import Result
from audio_lens.running import evaluating

NO_AUDIO, RETAINED = "no_audio", "retained"
HELD_FOR_TRAINING = "trained on"


class FrozenError(AudioLensError, RuntimeError):
    """Weights that should have stayed as they were and did not."""


@method("adapters.sweep", whole="adapters are trained on one part of all items")
def sweep(
    model: HookedAudioTransformer,
    items: Items,
    *,
    part: str | None = None,
    modules: Sequence[str] = MODULES,
    groups: Mapping[str, Sequence[int]] | None = None,
    arms: Sequence[str] | None = None,
    rank: int = 8,
    scale: float = 2.0,
    seeds: Sequence[int] = (0, 1, 2),
    steps: int = 60,
    rate: float = 2e-3,
    size: int = 16,
    split: str = "group",
    share: float = 0.5,
    retained: Items | None = None,
    controls: bool = True,
    to: str | Path | None = None,
    by: str | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """What adapters in some blocks alone learn: arms by seeds, tested on other groups of items.

    Every arm sees the same batches in the same order with the same rate, and adapters of the same
    maps. Groups of blocks, "random" (as many that are no neighbours, others for every seed) and
    "all_equal" (all blocks, the rank divided) train equally many parameters, which is checked;
    "all" has the full rank everywhere, "connector" trains the connector's own weights, "none"
    nothing. Afterwards the model is what it was, to the bit, which is checked too.

    Metrics: "right" (every token of the answer likeliest) and "log_prob" (nats, of the whole
    answer), teacher-forced. Control: "no_audio" is "all_equal" trained on the same questions and
    answers over silence: what is learned without hearing.

    Args:
        model: without a live adapter.
        items: with answers: single tokens, several, or classes.
        part: "encoder" or "decoder"; None takes the decoder, or else the encoder.
        modules: linear maps of a block, by the ends of their names.
        groups: blocks by name, equally many each; None takes `layer_groups`.
        arms: which; None takes all that the model has.
        rank: of the adapters.
        scale: of what they add (``alpha / r``), the same in every arm.
        seeds: of the adapters' start and the order of batches; three or more say how much of a
            difference is chance.
        steps: of training; Adam, whose rate falls to 0 (cosine).
        rate: of learning, at first: one for all arms.
        size: of the batches.
        split: a label; items that share a value, or a group, are trained on or tested, not both.
        share: of the items that are tested, about.
        retained: other items, of which the answers should not be lost; told as "retained".
        controls: whether "no_audio" runs.
        to: a folder: every arm and seed is written when it is done, with its adapter (`load`), and
            a later call goes on from there.
        by: a label whose values are drawn in place of items for intervals, such as "group".
        seed: of the split and of the intervals.
        progress: as in `patching.sweep`.

    Returns:
        metric by item that was tested by arm by seed; NaN where training diverged.

    Raises:
        ExtraError: no peft.
        InputError: arms, groups, blocks or modules that the model does not have, a rank that cannot
            be divided, a model that carries an adapter already or writes neither one stream of
            tokens nor classes; a folder of another sweep.
        ItemError: items without answers, that the model cannot give, or that cannot be split.
        FrozenError: a weight that changed and should not have.
    """
    peft()
    part = part_of(model, part)
    names = linears_of(model, part, modules)
    check_counts(rank=rank, steps=steps, size=size)
    for name, value in {"scale": scale, "rate": rate}.items():
        number(name, value, above=0)
    chosen = Arms(checked_groups(groups, len(names)), len(names), rank)
    asked, left_out = _arms(model, chosen, arms)
    drawn = numbers("seeds", seeds, least=0)
    if not drawn or len(set(drawn)) < len(drawn):
        raise InputError(f"seeds= names one or more, each once, got {drawn}")
    is_controlled = controls and rank * chosen.size >= len(names)
    if controls and not is_controlled:
        left_out[NO_AUDIO] = f"rank {rank} cannot be divided among {len(names)} blocks"
    train, test = items.split(split, share, seed)
    parts = {"train": train, "test": test, **({} if retained is None else {RETAINED: retained})}
    answers = {name: answers_of(model, one) for name, one in parts.items()}
    settings = {
        "weights": of_state(model),
        "items": [one.digest() for one in parts.values()],
        **{"part": part, "modules": list(modules), "rank": rank, "scale": scale, "steps": steps},
        **{"rate": rate, "size": size, "groups": {n: list(x) for n, x in chosen.groups.items()}},
    }
    runs = Runs.open(None if to is None else path_of("to", to), settings)
    widths = {
        name: sum(model.get_parameter(f"{name}.weight").shape)
        for own in names.values()
        for name in own
    }
    contest = _Contest(
        model, part, names, widths, chosen, parts, answers, runs, steps, rate, scale, size
    )
    contest.check_counts(asked, drawn)
    wanted = [*asked, *([NO_AUDIO] if is_controlled else [])]
    contest.run(wanted, drawn, progress)
    return _result(
        contest, asked, drawn, is_controlled, left_out, by=by, seed=seed, train=train, test=test
    )


def _arms(
    model: HookedAudioTransformer, arms: Arms, asked: Sequence[str] | None
) -> tuple[list[str], dict[str, str]]:
    """The arms to run, and those that the model does not have, with why."""
    if asked is not None:
        names = listed("arms", asked, str, "names")
        if not names or len(set(names)) < len(names):
            raise InputError(f"arms= names one or more, each once, got {names}")
        arms.check(names)
        if CONNECTOR in names:
            check_connector(model)
        return names, {}
    left_out = {}
    if not arms.has_random():
        left_out[RANDOM] = f"of {arms.n_layers} blocks no other {arms.size} can be drawn"
    if arms.rank * arms.size < arms.n_layers:
        left_out[ALL_EQUAL] = f"rank {arms.rank} cannot be divided among {arms.n_layers} blocks"
    if not has_connector(model):
        left_out[CONNECTOR] = "the model has none with weights"
    known = [*arms.groups, RANDOM, ALL_EQUAL, ALL, CONNECTOR, NONE]
    return [name for name in known if name not in left_out], left_out


@dataclass
class _Contest:
    """Where arms compete: one model, the same items, the same settings.

    Attributes:
        names: of the maps that adapters may sit on, by block.
        widths: what a map has of parameters for each rank.
    """

    model: HookedAudioTransformer
    part: str
    names: Mapping[int, Sequence[str]]
    widths: Mapping[str, int]
    arms: Arms
    items: Mapping[str, Items]
    answers: Mapping[str, Sequence[Sequence[int]]]
    runs: Runs
    steps: int
    rate: float
    scale: float
    size: int
    _prepared: dict[tuple[str, bool], list[Bench]] = field(default_factory=dict, repr=False)
    _ready: tuple[tuple[Start, bool], dict[str, list[Bench]]] | None = field(
        default=None, repr=False
    )

    def run(self, wanted: Sequence[str], seeds: Sequence[int], progress: bool | None) -> None:
        """Every arm with every seed that is not done yet."""
        left = [(arm, seed) for arm in wanted for seed in seeds if self.find(arm, seed) is None]
        before = of_state(self.model)
        with (
            evaluating(self.model),
            frozen(self.model),
            track("adapters", len(left), "runs", show=progress) as advance,
        ):
            for done, (arm, seed) in enumerate(left, 1):
                self._one(arm, seed)
                if of_state(self.model) != before:
                    raise FrozenError(f"the arm {arm!r} changed weights of the model itself")
                advance(1, done)

    def find(self, arm: str, seed: int) -> Trained | None:
        """A run that is done; "none" is the same with every seed."""
        return self.runs.find(NONE if arm == NONE else f"{arm}-{seed}")

    def _one(self, name: str, seed: int) -> None:
        arm = self.arms.of(ALL_EQUAL if name == NO_AUDIO else name, seed)
        benches = self._from(self._start(arm), silent=name == NO_AUDIO)
        with self._trainable(arm, seed) as trained:
            count = sum(one.numel() for one in trained)
            if arm.ranks and count != self.parameters(arm):
                raise AssertionError(f"{arm.name}: {count} parameters, not {self.parameters(arm)}")
            losses = (
                descend(self.model, benches["train"], trained, self.steps, self.rate, seed, False)
                if trained
                else []
            )
            is_sound = all(map(math.isfinite, losses))
            values = {
                which: self._examined(benches[which], which, is_sound)
                for which in self.items
                if which != "train"
            }
            weights, head = held(self.model) if arm.ranks else ({}, {})
            if arm.is_connector:
                weights = {
                    f"connector.{key}": one.detach().cpu().contiguous()
                    for key, one in self.model.get_submodule("connector").named_parameters()
                }
        run = Trained(values["test"], values.get(RETAINED), losses, count)
        self.runs.add(NONE if name == NONE else f"{name}-{seed}", run, weights, head)

    def _examined(
        self, benches: Sequence[Bench], which: str, is_sound: bool
    ) -> Float[Tensor, "n metrics"]:
        if is_sound:
            return examined(self.model, benches, len(self.items[which]))
        return torch.full((len(self.items[which]), len(METRICS)), torch.nan, dtype=torch.float64)

    def _start(self, arm: Arm) -> Start:
        if arm.is_connector:
            return Start(CONNECTOR)
        return Start(self.part, min(arm.ranks)) if arm.ranks else Start()

    def _from(self, start: Start, silent: bool) -> dict[str, list[Bench]]:
        """Batches of all items from a start on; those to learn from over silence, if asked."""
        if self._ready is None or self._ready[0] != (start, silent):
            self._ready = None  # one at a time in memory
            made = {
                which: [one.at(self.model, start) for one in self._whole(which, silent)]
                for which in self.items
            }
            self._ready = ((start, silent), made)
        return self._ready[1]

    def _whole(self, which: str, silent: bool) -> list[Bench]:
        """Batches of some items, prepared once."""
        key = (which, silent and which == "train")
        if key not in self._prepared:
            items = self.items[which]
            items = Items(map(statistics.no_audio, items)) if key[1] else items
            self._prepared[key] = Bench.each(self.model, items, self.answers[which], self.size)
        return self._prepared[key]

    @contextmanager
    def _trainable(self, arm: Arm, seed: int) -> Iterator[list[nn.Parameter]]:
        """Inside a ``with`` block the model carries what the arm trains."""
        with ExitStack() as stack:
            if arm.is_connector:
                yield stack.enter_context(own_connector(self.model))
                return
            if arm.is_idle:
                yield []
                return
            ranks = {name: r for layer, r in arm.ranks.items() for name in self.names[layer]}
            trained = put_on(self.model, ranks, self.scale, seed)
            stack.callback(take_off, self.model)
            yield trained

    def check_counts(self, names: Sequence[str], seeds: Sequence[int]) -> None:
        """Raise unless the arms that must train equally many parameters would.

        Raises:
            InputError: naming two of them.
        """
        counts = {
            name: self.parameters(self.arms.of(name, seed))
            for name in names
            for seed in seeds
            if name in (*self.arms.groups, RANDOM, ALL_EQUAL)
        }
        if len(set(counts.values())) > 1:
            raise InputError(
                "blocks are of unequal shapes, so that arms would train unequally many parameters "
                f"({', '.join(f'{name} {count}' for name, count in counts.items())}): name other "
                "modules or groups"
            )

    def parameters(self, arm: Arm) -> int:
        """How many parameters the adapters of an arm have."""
        maps = [(name, rank) for layer, rank in arm.ranks.items() for name in self.names[layer]]
        return sum(rank * self.widths[name] for name, rank in maps)


# -------------------------------------------------------------------------------- the result


def _result(
    contest: _Contest,
    arms: Sequence[str],
    seeds: Sequence[int],
    is_controlled: bool,
    left_out: Mapping[str, str],
    *,
    by: str | None,
    seed: int,
    train: Items,
    test: Items,
) -> Result:
    def runs_of(names: Sequence[str]) -> list[list[Trained]]:
        done = [[contest.find(name, one) for one in seeds] for name in names]
        return [[run for run in row if run is not None] for row in done]

    runs = runs_of(arms)
    axes = {"metric": list(METRICS), "arm": list(arms), "seed": list(seeds)}
    beside: dict[str, Result] = {}
    if is_controlled:
        (silent,) = runs_of([NO_AUDIO])
        values = torch.stack([run.values for run in silent], dim=-1)
        own = {"metric": list(METRICS), "seed": list(seeds)}
        beside[NO_AUDIO] = found(values, own, test, by=by, seed=seed)
    if RETAINED in contest.items:
        kept = _stacked([[run.retained for run in row] for row in runs])
        beside[RETAINED] = found(kept, axes, contest.items[RETAINED], by=by, seed=seed).mean()
    values = _stacked([[run.values for run in row] for row in runs])
    layers = {name: [*contest.arms.of(name, seeds[0]).ranks] for name in arms}
    return found(
        values,
        axes,
        test,
        by=by,
        seed=seed,
        controls=beside,
        dropped={HELD_FOR_TRAINING: len(train)},
        meta={
            **{"part": contest.part, "rank": str(contest.arms.rank), "steps": str(contest.steps)},
            **{"rate": str(contest.rate), "scale": str(contest.scale)},
            "parameters": ", ".join(
                f"{name} {row[0].n_trained}" for name, row in zip(arms, runs, strict=True)
            ),
        },
        report=told(dict(zip(arms, runs, strict=True)), layers, contest.arms.groups, left_out),
    )


def _stacked(rows: Sequence[Sequence[Tensor | None]]) -> Float[Tensor, "n metrics arms seeds"]:
    columns = [torch.stack([one for one in row if one is not None], dim=-1) for row in rows]
    return torch.stack(columns, dim=2)
