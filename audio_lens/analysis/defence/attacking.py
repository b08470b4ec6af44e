"""Projected gradient descent on the waveform, towards another answer of the items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens import metrics
from audio_lens.arguments import number, whole
from audio_lens.errors import InputError
from audio_lens.inputs import AudioInputs
from audio_lens.items import Batch, Item, ItemError, Items, Pairs, found
from audio_lens.items.item import listed
from audio_lens.items.pairs import CLEAN_WRONG, Dropped, answered
from audio_lens.metrics.reading import Reading
from audio_lens.models import HookedAudioTransformer
from audio_lens.progress import track
from audio_lens.results import Result
from audio_lens.running import evaluating

EPS, STEP, STEPS, MOMENTUM = 0.002, 3e-4, 25, 0.2
NOISE = "random_noise"
UNMOVED = "the target was given already, and no noise was needed"
Waves = list[Float[Tensor, " _"]]
BENIGN = (
    "Targets are other answers of the same items: this measures how little noise changes an "
    "answer, not whether a model can be made to say what it should not."
)


@dataclass(frozen=True)
class Attack:
    """Items and what noise makes of them.

    Attributes:
        pairs: the items, and the same with noise in their clips, at the model's rate.
        targets: which answer the noise was to bring, for every item.
        eps: how large a sample of the noise is at most.
        result: the cross-entropy of the targets by "step"; see `attack`.
    """

    pairs: Pairs[Items] = field(repr=False)
    targets: Sequence[str]
    eps: float | int
    result: Result = field(repr=False)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, rows: Sequence[int]) -> Attack:
        """Some of the items."""
        chosen = list(rows)
        result = self.result.select(stimulus=[self.pairs.clean[row].id for row in chosen])
        return replace(
            self,
            pairs=self.pairs[chosen],
            targets=[self.targets[row] for row in chosen],
            result=result,
        )


def attack(
    model: HookedAudioTransformer,
    items: Items,
    *,
    targets: Sequence[str] | None = None,
    eps: float | int = EPS,
    step: float | int = STEP,
    steps: int = STEPS,
    momentum: float | int = MOMENTUM,
    stop: float | int | None = None,
    by: str | None = None,
    size: int = 8,
    seed: int = 0,
    progress: bool | None = None,
) -> Attack:
    """Noise in the clips that makes a model give another answer, by gradients to the waveform.

    Each step moves every sample by ``step`` along the sign of the gradient (divided by its mean
    size, with momentum), and back into the ball of ``eps`` around the clip and into [-1, 1]. What
    lowers the cross-entropy of the target most is kept. It is that of the first token of the
    answer, where SPIRIT (2505.13541) generates. Items that are not answered rightly, or whose
    target is given already, are left out and counted.

    Args:
        model: a model that gradients to the sound reach (`Features.features`).
        items: with answers of one token (or class).
        targets: for every item, of the answers and options of the items: nothing else is taken.
            None takes ``against``, else another option or answer.
        eps: of samples within [-1, 1].
        step: by how much a sample moves at a time.
        steps: how many.
        momentum: how much of the former gradients is added.
        stop: clips whose cross-entropy is below that move no further (SPIRIT: 1); None never stops.
        by: a label whose values are drawn in place of items for intervals, such as "group".
        size: of the batches.
        seed: of targets, of the control and of intervals.
        progress: as in `patching.sweep`.

    Returns:
        The attack. Its ``result`` has the cross-entropy before each step and behind the last. The
        control "random_noise" has that of noise of ``eps`` in every sample with random signs.

    Raises:
        InputError: a model that no gradient reaches, targets that are no answers of these items,
            or numbers that make no sense.
        ItemError: items without answers, several clips in one, or of which none is left.
    """
    settings = _Settings(
        eps=number("eps", eps, above=0, most=1),
        step=number("step", step, above=0, most=1),
        steps=whole("steps", steps, least=1),
        momentum=number("momentum", momentum, least=0, most=1),
        stop=-np.inf if stop is None else number("stop", stop, least=0),
        seed=seed,
    )
    items.check_answers(model)
    wanted = targets_of(items, targets, seed)
    _check_targets(model, items, wanted)
    return _Running(model, items, wanted, settings, by, size, progress).attack()


def targets_of(items: Items, given: Sequence[str] | None, seed: int = 0) -> list[str]:
    """The answer that each item is to be moved to: one of these items' own, and not its own.

    Raises:
        InputError: answers that no item names, or as many as there are not.
        ItemError: items that all have one answer, and no other.
    """
    said = {x for item in items for x in (item.answer, item.against, *item.options) if x}
    if given is None:
        draw = np.random.default_rng(seed)
        return [_other(item, sorted(said), draw) for item in items]
    if isinstance(given, str) or len(given) != len(items):
        raise InputError(f"targets are one answer for each of {len(items)} items, got {given!r}")
    unknown = [one for one in given if one not in said]
    if unknown:
        raise InputError(
            f"the target {unknown[0]!r} is no answer or option of these items: attacks are "
            f"towards their own answers alone ({', '.join(sorted(said)[:8])})"
        )
    own = [item.name for item, one in zip(items, given, strict=True) if one == item.answer]
    if own:
        raise InputError(f"the target of {own[0]} is its own answer")
    return list(given)


def _other(item: Item, said: Sequence[str], draw: np.random.Generator) -> str:
    if item.against is not None:
        return item.against
    others = [one for one in item.options or said if one != item.answer]
    if not others:
        raise ItemError(f"{item.name}: no item names another answer than {item.answer!r}")
    return str(draw.choice(others))


def _check_targets(model: HookedAudioTransformer, items: Items, targets: Sequence[str]) -> None:
    """Raise where a target is not one token of its own."""
    wrong = []
    for item, target in zip(items, targets, strict=True):
        try:
            if model.to_single_token(target) == model.to_single_token(str(item.answer)):
                wrong.append(f"{item.name}: target {target!r} is the same token as its answer")
        except ValueError as error:
            wrong.append(f"{item.name}, target: {error}")
    if wrong:
        raise ItemError(listed(f"{len(wrong)} targets cannot be told from one token", wrong))


@dataclass(frozen=True)
class _Settings:
    eps: float | int
    step: float | int
    steps: int
    momentum: float | int
    stop: float | int
    seed: int


@dataclass
class _Running:
    """An attack on all items, batch by batch."""

    model: HookedAudioTransformer
    items: Items
    targets: list[str]
    settings: _Settings
    by: str | None
    size: int
    progress: bool | None

    def attack(self) -> Attack:
        count, n_steps = len(self.items), self.settings.steps
        ces = torch.full((count, n_steps + 1), torch.nan, dtype=torch.float64)
        noisy = torch.full((count,), torch.nan, dtype=torch.float64)
        heard: dict[int, np.ndarray] = {}
        why: dict[str, list[str]] = {CLEAN_WRONG: [], UNMOVED: []}
        with track("attack", count, "items", show=self.progress) as advance, evaluating(self.model):
            done = 0
            for batch in self.items.batches(self.model, self.size):
                rows, found_ = self._of_batch(batch, why)
                if rows:
                    ces[rows], noisy[rows] = found_.ces, found_.noisy
                    heard |= dict(zip(rows, found_.waves, strict=True))
                done += len(batch)
                advance(len(batch), done)
        rows = sorted(heard)
        if not rows:
            told = "; ".join(f"{len(names)}: {reason}" for reason, names in why.items() if names)
            raise ItemError(f"no item of {count} is left to attack ({told})")
        return self._told(rows, [heard[row] for row in rows], ces[rows], noisy[rows], why)

    def _of_batch(self, batch: Batch, why: dict[str, list[str]]) -> tuple[list[int], Any]:
        """The items of a batch that are attacked, and what became of them."""
        if sum(batch.inputs.clips_per_row) != len(batch):
            raise ItemError(f"{self.items[batch.rows[0]].name} has several clips: attack one")
        with torch.no_grad():
            right = answered(
                self.model, batch.inputs, [str(self.items[row].answer) for row in batch.rows]
            )
        kept = [place for place, is_right in enumerate(right) if is_right]
        names = [self.items[row].id for row in batch.rows]
        why[CLEAN_WRONG] += [name for name, ok in zip(names, right, strict=True) if not ok]
        if not kept:
            return [], None
        rows = [batch.rows[place] for place in kept]
        clips = _Clips.of(self.model, batch.inputs[kept], [self.targets[row] for row in rows])
        found_ = clips.moved(self.settings, rows)
        still = [(wave == own).all() for wave, own in zip(found_.waves, clips.own, strict=True)]
        why[UNMOVED] += [self.items[row].id for row, same in zip(rows, still, strict=True) if same]
        moved = [place for place, same in enumerate(still) if not same]
        return [rows[place] for place in moved], found_.only(moved)

    def _told(
        self,
        rows: list[int],
        waves: Sequence[np.ndarray],
        ces: Float[Tensor, "n steps"],
        noisy: Float[Tensor, " n"],
        why: Mapping[str, Sequence[str]],
    ) -> Attack:
        clean = self.items[rows]
        rate = self.model.cfg.sampling_rate
        attacked = Items(
            item.replaced(audio=wave, sampling_rate=rate, other_audio=None)
            for item, wave in zip(clean, waves, strict=True)
        )
        dropped = Dropped({reason: tuple(names) for reason, names in why.items() if names})
        pairs = Pairs(clean, attacked, dropped)
        axes = {"step": list(range(self.settings.steps + 1))}
        drawn: dict[str, Any] = {"by": self.by, "seed": self.settings.seed}
        result = found(
            ces,
            axes,
            clean,
            controls={NOISE: found(noisy, {}, clean, **drawn)},
            dropped=dropped.counts,
            meta={
                "title": "cross-entropy of the target under attack",
                "value": "cross-entropy",
                "eps": f"{self.settings.eps:g}",
            },
            report=[*_said(ces, noisy), BENIGN],
            **drawn,
        )
        return Attack(pairs, [self.targets[row] for row in rows], self.settings.eps, result)


def _said(ces: Float[Tensor, "n steps"], noisy: Float[Tensor, " n"]) -> list[str]:
    before, after = float(ces[:, 0].mean()), float(ces.min(1).values.mean())
    times = f" ({before / after:.3g} times less)" if after > 0 else ""
    return [
        f"Cross-entropy of the targets: {before:.3g}, under attack {after:.3g}{times}, under "
        f"random noise of the same size {float(noisy.mean()):.3g}."
    ]


# -------------------------------------------------------------------------------- one batch


@dataclass(frozen=True)
class _Moved:
    """Clips under attack: the best waveforms, and the cross-entropies on the way there."""

    waves: list[np.ndarray]
    ces: Float[Tensor, "b steps"]
    noisy: Float[Tensor, " b"]

    def only(self, places: Sequence[int]) -> _Moved:
        chosen = list(places)
        return _Moved([self.waves[i] for i in chosen], self.ces[chosen], self.noisy[chosen])


@dataclass(frozen=True)
class _Clips:
    """The clips of a batch, and what their targets cost.

    Attributes:
        own: the waveforms, as the model hears them.
        reading: from logits to the log-probability of each row's target.
    """

    model: HookedAudioTransformer
    inputs: AudioInputs
    own: list[np.ndarray]
    reading: Reading

    @staticmethod
    def of(model: HookedAudioTransformer, inputs: AudioInputs, targets: Sequence[str]) -> _Clips:
        reading = metrics.log_prob(list(targets)).bind(model, inputs)
        own = [np.asarray(wave, dtype=np.float32) for wave in inputs.need_audio]
        return _Clips(model, inputs, own, reading)

    def cost(self, waves: Waves) -> Float[Tensor, " b"]:
        """The cross-entropy of every target, with gradients to the waveforms."""
        return -self.reading(self.model(self.model.with_waveform(self.inputs, waves)))

    def moved(self, settings: _Settings, rows: Sequence[int]) -> _Moved:
        """The clips after all steps."""
        device = self.model.device
        own = [torch.from_numpy(wave).to(device) for wave in self.own]
        bounds = [
            ((wave - settings.eps).clamp(min=-1), (wave + settings.eps).clamp(max=1))
            for wave in own
        ]
        waves, speed = [wave.clone() for wave in own], [torch.zeros_like(wave) for wave in own]
        best, least, ces = waves, torch.full((len(own),), torch.inf).double(), []
        for _ in range(settings.steps):
            leaves = [wave.requires_grad_() for wave in waves]
            cost = self.cost(leaves)
            slopes = torch.autograd.grad(cost.sum(), leaves)
            ces.append(cost.detach().double().cpu())
            best, least = _better(best, least, waves, ces[-1])
            speed = [_scaled(g) + settings.momentum * v for g, v in zip(slopes, speed, strict=True)]
            waves = [
                _stepped(wave, v, bound, settings.step) if ce > settings.stop else wave.detach()
                for wave, v, bound, ce in zip(waves, speed, bounds, ces[-1].tolist(), strict=True)
            ]
        with torch.no_grad():
            ces.append(self.cost(waves).double().cpu())
            best, _ = _better(best, least, waves, ces[-1])
            noisy = self.cost(_noisy(own, bounds, settings, rows)).double().cpu()
        found_ = [wave.detach().cpu().numpy() for wave in best]
        return _Moved(found_, torch.stack(ces, dim=1), noisy)


def _scaled(gradient: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    return gradient / gradient.abs().mean().clamp(min=torch.finfo(gradient.dtype).tiny)


@torch.no_grad()
def _stepped(
    wave: Float[Tensor, " n"],
    along: Float[Tensor, " n"],
    bounds: tuple[Tensor, Tensor],
    step: float | int,
) -> Float[Tensor, " n"]:
    return (wave - step * along.sign()).maximum(bounds[0]).minimum(bounds[1])


def _better(
    best: Waves, least: Float[Tensor, " b"], waves: Waves, ces: Float[Tensor, " b"]
) -> tuple[Waves, Float[Tensor, " b"]]:
    """The waveforms that cost least so far."""
    is_less = (ces < least).tolist()
    chosen = [
        new.detach() if less else old for new, old, less in zip(waves, best, is_less, strict=True)
    ]
    return chosen, least.minimum(ces)


def _noisy(
    own: Waves, bounds: Sequence[tuple[Tensor, Tensor]], settings: _Settings, rows: Sequence[int]
) -> Waves:
    """Noise as large as may be in every sample, of signs drawn for each item by itself."""
    found_ = []
    for wave, (low, high), row in zip(own, bounds, rows, strict=True):
        signs = np.random.default_rng((settings.seed, row)).choice([-1.0, 1.0], len(wave))
        noise = torch.from_numpy(signs * settings.eps).to(wave)
        found_.append((wave + noise).maximum(low).minimum(high))
    return found_
